"""Who may import whom, read from the source: direct imports only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p.relative_to(ROOT) for package in ("ddpm_core", "app") for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def test_the_check_sees_imports() -> None:
    assert "torch" in imports(Path("ddpm_core/unet.py"))
    assert "ddpm_core.checkpoint.load_model" in imports(Path("app/engine/runner.py"))


WITHOUT_HTTP = ("answers", "capabilities", "drawing", "forward", "images", "noising")  # the command line has them too
FORBIDDEN = [
    ("ddpm_core/", {"app", "deploy", "ray", "fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn"}),
    ("ddpm_core/unet.py", {"ddpm_core"}),
    ("app/", {"deploy", "ray"}),
    ("app/engine/", {"fastapi", "starlette", "app.routes", "app.schemas", "app.http"}),
    ("app/routes/", {"torch"}),
    ("app/schemas.py", {"torch"}),
    *((f"app/{name}.py", {"fastapi", "starlette", "app.http", "app.routes"}) for name in WITHOUT_HTTP),
    ("app/cli/", {"fastapi", "starlette", "app.http", "app.routes"}),
    ("app/engine/scheduler.py", {"torch", "threading", "time", "asyncio"}),
]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_import_rules(path: Path) -> None:
    found = imports(path)
    for prefix, forbidden in FORBIDDEN:
        if str(path).startswith(prefix):
            bad = {name for name in found for f in forbidden if name == f or name.startswith(f + ".")}
            assert not bad, f"{path} must not import {sorted(bad)}"
    if path != Path("app/__main__.py"):
        assert not {n for n in found if n.startswith("app.main")}, f"{path} must not import main"


def test_only_network_imports_onnxruntime_and_only_data_torchvision() -> None:
    for path in SOURCES:
        top = {name.partition(".")[0] for name in imports(path)}
        assert "onnxruntime" not in top or path == Path("ddpm_core/network.py")
        assert "torchvision" not in top or path == Path("ddpm_core/data.py")
