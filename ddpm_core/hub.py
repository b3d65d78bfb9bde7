"""Models by what a person calls them: a directory, or `owner/name` or `owner/name@revision` of the Hugging Face hub.

What is fetched are configs and safetensors weights, never pickles or code. It lies in the hub's own cache, so the next
start needs no network.
"""

from __future__ import annotations

import re
from pathlib import Path

from ddpm_core import learned, record
from ddpm_core.checkpoint import CARD_NAME, CheckpointError, check_components

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/(?P<name>[A-Za-z0-9][\w.-]*))(@(?P<revision>[\w./-]+))?", re.ASCII)
CONFIGS = [  # of a repository
    "model_index.json", "config.json", "scheduler_config.json", CARD_NAME, learned.PLANS_NAME, record.RECORD_NAME,
    "unet/*.json", "scheduler/*.json", "noise_scheduler/*.json", "diffusion_pytorch_model*.json",
]  # fmt: skip
WEIGHTS = ["diffusion_pytorch_model*.safetensors", "unet/diffusion_pytorch_model*.safetensors"]
DEEPER = ["*/*/*"]  # where a training keeps its checkpoints; a pattern's * matches slashes too


def name_of(reference: str) -> str:
    """What a model is called: the last part of its directory's path, or of its id on the hub without the revision."""
    match = None if Path(reference).is_dir() else _ID.fullmatch(reference)
    return match["name"] if match else Path(reference).resolve().name


def locate(reference: str) -> Path:
    """The directory of a model: an existing one is itself, owner/name[@revision] is fetched, with a progress bar.

    Raises:
        CheckpointError: it is neither, the hub does not give it, or it has a component that is not supported.
    """
    if Path(reference).is_dir():
        return Path(reference)
    match = _ID.fullmatch(reference)
    if match is None:
        raise CheckpointError(
            f"no model directory at {reference}, and it is no owner/name[@revision] of the hub either: train a model "
            "with `python -m ddpm_core.train`, or name another"
        )
    configs = _fetch(reference, match["repo"], match["revision"], CONFIGS)
    if (index := configs / "model_index.json").is_file():
        check_components(index)  # before gigabytes come that would be refused
    return _fetch(reference, match["repo"], configs.name, [*CONFIGS, *WEIGHTS])  # of the same commit


def _fetch(reference: str, repo: str, revision: str | None, files: list[str]) -> Path:
    """Where files of a repository lie in the cache. Raises CheckpointError."""
    nowhere = f"no model directory at {reference}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{nowhere}, and to fetch it from the hub the package huggingface-hub is needed: install this project's "
            "extra `hub`, or give a directory"
        ) from error
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=DEEPER))
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{nowhere}, and the hub has no model {repo} for you: check the name, or log in with `hf auth login` if "
            "it is private or gated"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{nowhere}: {repo} on the hub has no revision {revision!r}: check its name") from error
    except Exception as error:  # its errors have no common base, nor have those of the HTTP client under it
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(
            f"{nowhere}, and {reference} cannot be fetched from the hub ({reason.rstrip('.')}): check the network, or "
            "download it elsewhere and give its directory"
        ) from error
