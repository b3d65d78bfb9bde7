"""Models by their id on the hub: from a small hub on this machine, from the cache that it leaves, from neither."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from ddpm_core import hub
from ddpm_core.checkpoint import CheckpointError, load_model, save_model
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.unet import UNet
from tests.networks import EIGHT

REPO, SHA = "somebody/small-model", "0123456789abcdef0123456789abcdef01234567"
WANTED = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
OTHERS = [
    "modeling_ddpm.py", "unet/diffusion_pytorch_model.bin", "flax_model.msgpack", "vae/config.json", "results.json",
    "model.safetensors", "checkpoint-500/unet/config.json", f"checkpoint-500/{WEIGHTS}", "unet/old/config.json",
]  # fmt: skip
LATENT = "89abcdef0123456789abcdef0123456789abcdef"  # a commit whose network draws latents
LOCATE = """
import json, sys
from ddpm_core import hub
found = {}
for reference in sys.argv[1:]:
    try:
        found[reference] = str(hub.locate(reference))
    except hub.CheckpointError as error:
        found[reference] = f"refused: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository: a model of ours, and what must stay there."""
    directory = tmp_path_factory.mktemp("repo")
    save_model(directory, UNet(EIGHT).state_dict(), EIGHT, SchedulerConfig())
    return {name: (directory / name).read_bytes() for name in [*WANTED, WEIGHTS]} | dict.fromkeys(OTHERS, b"x")


class Hub(BaseHTTPRequestHandler):
    """What of the hub's API a download asks for: a revision's commit, its files, and each of them."""

    files: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[str]]

    def answer(self, status: int, content: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        revision = path.rpartition("/")[2]
        listed = [
            {"type": "file", "path": k, "rfilename": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
            for k, v in self.files.items()
        ]
        if path.startswith(f"/api/models/{REPO}/tree/"):
            self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        elif path in (
            f"/api/models/{REPO}",
            *(f"/api/models/{REPO}/revision/{r}" for r in ("main", "v1", SHA, "latent", LATENT)),
        ):
            sha = LATENT if revision in ("latent", LATENT) else SHA
            facts = {"id": REPO, "sha": sha, "siblings": listed, "private": False, "tags": [], "downloads": 0}
            self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        elif path.startswith(f"/{REPO}/resolve/") and (name := path.split("/", 5)[5]) in self.files:
            commit = path.split("/")[4]
            self.asked.append(f"{commit}/{name}")
            latent = commit == LATENT and name == "model_index.json"
            content = b'{"vqvae": ["diffusers", "VQModel"]}' if latent else self.files[name]
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)
        else:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served(files: dict[str, bytes]) -> Iterator[str]:
    """The address of such a hub."""
    Hub.files, Hub.asked = files, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def locate(references: list[str], home: Path, **environment: str) -> tuple[dict[str, str], str]:
    """What hub.locate says of each, in a process of its own, and its stderr."""
    own = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    process = subprocess.run(
        [sys.executable, "-c", LOCATE, *references], capture_output=True, text=True, timeout=120, check=True,
        env={**own, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment},
    )  # fmt: skip
    found: dict[str, str] = json.loads(process.stdout)
    return found, process.stderr


@pytest.fixture(scope="module")
def fetched(served: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], str]:
    """The cache after some were asked for, what was said of them, and the progress bar."""
    home = tmp_path_factory.mktemp("home")
    references = [REPO, f"{REPO}@v1", f"{REPO}@{SHA}", f"{REPO}@v2", "somebody/unknown", f"{REPO}@latent"]
    return home, *locate(references, home, HF_ENDPOINT=served)


def test_a_model_of_the_hub_is_fetched_and_loads(fetched: tuple[Path, dict[str, str], str]) -> None:
    """By all names of one revision to one directory; called as it is there, not as the cache calls it."""
    home, found, stderr = fetched
    directory = Path(found[REPO])
    assert found[f"{REPO}@v1"] == found[f"{REPO}@{SHA}"] == found[REPO]
    assert directory.is_relative_to(home)
    assert directory.name == SHA
    assert load_model(directory, hub.name_of(REPO)).name == "small-model"
    assert "Fetching 4 files" in stderr


def test_nothing_but_what_is_read_is_fetched(fetched: tuple[Path, dict[str, str], str]) -> None:
    _, found, _ = fetched
    directory = Path(found[REPO])
    there = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    assert there == sorted([*WANTED, WEIGHTS])
    assert {name for name in Hub.asked if name.startswith(SHA)} == {f"{SHA}/{name}" for name in [*WANTED, WEIGHTS]}


def test_a_component_that_is_not_supported_is_refused_before_weights_are_fetched(
    fetched: tuple[Path, dict[str, str], str],
) -> None:
    _, found, _ = fetched
    assert "model_index.json: component 'vqvae' is not supported" in found[f"{REPO}@latent"]
    assert {name for name in Hub.asked if name.startswith(LATENT)} == {f"{LATENT}/{name}" for name in WANTED}


def test_what_the_hub_has_not_is_refused_in_one_line(fetched: tuple[Path, dict[str, str], str]) -> None:
    _, found, _ = fetched
    unknown, revision = found["somebody/unknown"], found[f"{REPO}@v2"]
    assert "the hub has no model somebody/unknown for you: check the name, or log in" in unknown
    assert f"{REPO} on the hub has no revision 'v2'" in revision
    for message in (unknown, revision):
        assert message.startswith("refused: no model directory at somebody/")
        assert "\n" not in message


def test_without_a_network_the_cache_serves(
    fetched: tuple[Path, dict[str, str], str], files: dict[str, bytes], tmp_path: Path
) -> None:
    """One that was fetched, one whose cache is laid out by hand as the hub's library documents it, and neither."""
    home, found, _ = fetched
    repo = home / "hub" / "models--somebody--by-hand"
    for name in [*WANTED, WEIGHTS]:
        blob = repo / "blobs" / hashlib.sha1(files[name]).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(files[name])
        link = repo / "snapshots" / SHA / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    again, _ = locate([REPO, "somebody/by-hand", "somebody/else"], home, HF_HUB_OFFLINE="1")
    assert again[REPO] == found[REPO]
    assert again["somebody/by-hand"] == str(repo / "snapshots" / SHA)
    assert load_model(repo / "snapshots" / SHA).null_label == 10
    assert again["somebody/else"].startswith(
        "refused: no model directory at somebody/else, and somebody/else cannot be"
    )
    assert again["somebody/else"].endswith("check the network, or download it elsewhere and give its directory")


def test_a_directory_is_itself_whatever_the_hub_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebody" / "small-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.locate(REPO) == Path(REPO)
    assert hub.locate(str(tmp_path)) == tmp_path
    assert (hub.name_of("."), hub.name_of(REPO)) == (tmp_path.name, "small-model")


@pytest.mark.parametrize("reference", ["nowhere", "/no/where", "./no", "a/b/c", "owner/name@", "../no/where", "o w/n"])
def test_what_is_neither_a_directory_nor_an_id_is_refused(reference: str) -> None:
    with pytest.raises(CheckpointError, match=r"no model directory at .* no owner/name"):
        hub.locate(reference)


@pytest.mark.parametrize(
    ("reference", "name"), [("google/ddpm-cifar10-32", "ddpm-cifar10-32"), ("a/b.c@refs/pr/1", "b.c"), ("/x/y", "y")]
)
def test_a_model_is_called_as_its_last_part(reference: str, name: str) -> None:
    assert hub.name_of(reference) == name


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        CheckpointError, match="the package huggingface-hub is needed: install this project's extra `hub`"
    ):
        hub.locate("somebody/else")
