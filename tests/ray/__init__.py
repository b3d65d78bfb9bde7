"""Imports Ray where it is installed: what it warns of is its own, and warnings are errors here."""

import contextlib
import warnings

with contextlib.suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
