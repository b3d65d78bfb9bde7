"""The same bytes as the service's, in every form, here and by --url."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.conftest import everywhere

PNG, ZIP, JSON, NPZ = "image/png", "application/zip", "application/json", "application/x-npz"

DRAWN = {
    "an image": (["3", "--seed", "5", "--scale", "2"], "out.png", {"label": 3, "seed": 5, "scale": 2}, PNG),
    "a grid": (
        ["1", "null", "-n", "2", "--seed", "7", "--sampler", "ddim", "--steps", "4", "--eta", "0.5"], "grid.PNG",
        {"n": 4, "label": [1, 1, None, None], "seed": 7, "sampler": "ddim", "steps": 4, "eta": 0.5}, PNG,
    ),
    "a ZIP": (
        ["3", "-n", "3", "--seed", "2", "--guidance-scale", "2"], "three.zip",
        {"n": 3, "label": 3, "seed": 2, "guidance_scale": 2}, ZIP,
    ),
    "an animation": (["-n", "2", "--seed", "5", "--frames", "3"], "chain.apng", {"n": 2, "seed": 5, "frames": 3}, PNG),
    "the same by another name": (["--seed", "5", "--frames", "3"], "chain.png", {"seed": 5, "frames": 3}, PNG),
    "a WebP": (["--seed", "5", "--frames", "3"], "chain.webp", {"seed": 5, "frames": 3}, "image/webp"),
    "numbers": (["4", "--seed", "5", "--frames", "3"], "chain.npz", {"label": 4, "seed": 5, "frames": 3}, NPZ),
}  # fmt: skip


@everywhere
@pytest.mark.parametrize("name", DRAWN)
def test_generate_gives_the_service_s_bytes(
    ddpm: Any, direct: Callable[..., bytes], place: list[str], name: str
) -> None:
    words, out, body, accept = DRAWN[name]
    ran = ddpm("generate", *words, "-o", out, *place)
    assert ran.code == 0, ran.err
    assert Path(out).read_bytes() == direct("/generate", body, accept)
    sampler, steps = ("ddim", 4) if "sampler" in body else ("dpmpp_2m", 10)
    assert re.fullmatch(
        rf"{out}: seed {body['seed']}, model tiny@[0-9a-f]{{12}}, sampler {sampler}, steps {steps}\n", ran.err
    )
    assert not ran.out
    if out == "out.png":  # the default
        assert ddpm("generate", "3", "--seed", "6", *place).err.startswith("out.png (replaced): seed 6")
        assert Path(out).read_bytes() == direct("/generate", {"label": 3, "seed": 6}, accept)


@everywhere
def test_json_but_for_its_time(ddpm: Any, direct: Callable[..., bytes], place: list[str]) -> None:
    assert ddpm("generate", "4", "-n", "2", "--seed", "9", "-o", "two.json", *place).code == 0
    asked = direct("/generate", {"n": 2, "label": 4, "seed": 9}, JSON)
    found, wanted = (json.loads(content) for content in (Path("two.json").read_bytes(), asked))
    assert {**found, "created": 0} == {**wanted, "created": 0}


@everywhere
def test_a_folder_holds_what_the_zip_does(ddpm: Any, direct: Callable[..., bytes], place: list[str]) -> None:
    assert "2 in new/digits/" in ddpm("generate", "-n", "2", "--seed", "3", "-o", "new/digits/", *place).err
    Path("wanted.zip").write_bytes(direct("/generate", {"n": 2, "seed": 3}, ZIP))
    with zipfile.ZipFile("wanted.zip") as archive:
        wanted = {name: archive.read(name) for name in archive.namelist()}
    assert {path.name: path.read_bytes() for path in Path("new/digits").iterdir()} == wanted
    assert len(wanted) == 2


@everywhere
@pytest.mark.parametrize(
    ("words", "body", "out", "accept"),
    [
        (
            ["4", "null", "--t", "600", "--steps", "5", "--seed", "3"],
            {"label": "4,null", "n": 2, "t": 600, "steps": 5, "seed": 3}, "two.png", PNG,
        ),
        (["--t", "99", "--frames", "2", "--seed", "3"], {"t": 99, "frames": 2, "seed": 3}, "chain.npz", NPZ),
    ],
)  # fmt: skip
def test_denoise_gives_the_service_s_bytes(
    ddpm: Any, direct: Callable[..., bytes], place: list[str], picture: bytes, words: list[str], body: dict[str, Any],
    out: str, accept: str,
) -> None:  # fmt: skip
    Path("picture").write_bytes(picture)
    ran = ddpm("denoise", "picture", *words, "-o", out, *place)
    assert ran.code == 0, ran.err
    assert Path(out).read_bytes() == direct("/denoise", body, accept, picture)


@everywhere
@pytest.mark.parametrize(
    ("words", "body", "out", "accept"),
    [
        (["--t", "0,250,999", "--seed", "1"], {"t": "0,250,999", "seed": 1}, "strip.png", PNG),
        (["--t", "7", "--seed", "1", "--fit", "model"], {"t": 7, "seed": 1, "fit": "model"}, "x_t.npz", NPZ),
        (["--t", "7, 8", "--seed", "2"], {"t": "7, 8", "seed": 2}, "two.json", JSON),
    ],
)
def test_noise_gives_the_service_s_bytes(
    ddpm: Any, direct: Callable[..., bytes], place: list[str], picture: bytes, words: list[str], body: dict[str, Any],
    out: str, accept: str,
) -> None:  # fmt: skip
    Path("picture").write_bytes(picture)
    ran = ddpm("noise", "picture", *words, "-o", out, *place)
    assert re.fullmatch(rf"{out}: seed {body['seed']}, model tiny@\w{{12}}, alpha_bar 0\.\d+.*\n", ran.err)
    found, wanted = Path(out).read_bytes(), direct("/noise", body, accept, picture)
    if accept == JSON:
        found, wanted = (re.sub(rb'"created":\d+', b"", content) for content in (found, wanted))
    assert found == wanted


@everywhere
def test_the_seed_that_is_told_gives_the_image_again(ddpm: Any, place: list[str]) -> None:
    seed = re.search(r"seed (\d+)", ddpm("generate", "2", "-o", "first.png", *place).err)
    assert seed
    assert ddpm("generate", "2", "-o", "again.png", "--seed", seed[1], "-q", *place).err == ""
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()


def test_the_limits_of_a_service_bind_nobody_here(ddpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_MAX_IMAGES", "4")
    monkeypatch.setenv("DDPM_QUEUE_SLOTS", "4")
    monkeypatch.setenv("DDPM_MAX_IMAGE_PIXELS", "4000")
    monkeypatch.setenv("DDPM_FRAME_BYTES", "1024")
    ran = ddpm("generate", "-n", "70", "--sampler", "ddim", "--steps", "1", "--frames", "2", "-o", "many.png")
    assert ran.code == 0, ran.err
    with Image.open("many.png") as grid:
        assert grid.size == (9 * 30 - 2, 8 * 30 - 2)
