"""POST /noise: the closed form, and every kind of image that people send."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_core.checkpoint import load_model
from tests.service.conftest import Service, assert_problem, encode, pixels

GREY = encode(Image.new("L", (64, 64), 200))


@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_mean_and_variance_are_the_closed_form(service: Service, model_dir: Path, t: int) -> None:
    """Over 160,000 pixels of a grey x_0, x_t has mean sqrt(abar) x_0 and variance 1 - abar, to 5 standard errors."""
    abar = load_model(model_dir).schedule.alphas_cumprod[t]
    n = 400
    response = service.noise(encode(Image.new("L", (n, n), 200)), {"accept": "application/x-npz"}, t=t, seed=3)
    with np.load(io.BytesIO(response.content)) as arrays:
        x_t, eps = arrays["x_t"], arrays["eps"]
    x_0 = 200 / 127.5 - 1
    variance = 1 - abar
    assert abs(x_t.mean() - np.sqrt(abar) * x_0) < 5 * np.sqrt(variance) / n
    assert abs(x_t.var() / variance - 1) < 5 * np.sqrt(2) / n
    assert np.allclose(x_t[0], np.sqrt(abar) * x_0 + np.sqrt(variance) * eps, atol=1e-6)
    assert float(response.headers["x-alpha-bar"]) == pytest.approx(abar, abs=1e-15)


def test_several_t_make_a_strip_of_one_noise(service: Service) -> None:
    response = service.noise(GREY, t="0,500,999", seed=1)
    assert pixels(response.content).shape == (64, 3 * 64 + 4)
    assert len(response.headers["x-alpha-bar"].split(", ")) == 3
    answer = service.noise(GREY, {"accept": "application/json"}, t="0,500,999", seed=1).json()
    assert [image["t"] for image in answer["images"]] == [0, 500, 999]
    for image in answer["images"]:
        assert image["snr"] == pytest.approx(image["alpha_bar"] / (1 - image["alpha_bar"]))
    alone = service.noise(GREY, t=500, seed=1)
    assert np.array_equal(pixels(base64.b64decode(answer["images"][1]["b64_json"])), pixels(alone.content))


def test_the_same_seed_gives_the_same_bytes(service: Service) -> None:
    first = service.noise(GREY, t=300)
    again = service.noise(GREY, t=300, seed=first.headers["x-seed"])
    assert again.content == first.content


def test_fit_model_makes_it_the_models_shape(service: Service) -> None:
    image = encode(Image.new("RGB", (50, 80), (255, 0, 0)))
    assert pixels(service.noise(image, t=0, fit="model").content).shape == (28, 28)
    assert pixels(service.noise(image, t=0).content).shape == (80, 50, 3)


ORANGE = (250, 120, 10)


def _pictures() -> dict[str, tuple[bytes, object]]:
    """Files of a 9 x 7 orange picture with one blue corner, at the top left, and what they must become."""
    colour = Image.new("RGB", (9, 7), ORANGE)
    colour.paste((0, 0, 255), (0, 0, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees, clockwise
    clear = colour.copy()
    clear.putalpha(0)
    black = Image.new("RGB", (9, 7))
    grey, palette = colour.convert("L"), colour.convert("P", palette=Image.Palette.ADAPTIVE)
    sharp: dict[str, object] = {"quality": 100, "subsampling": 0}
    return {
        "png": (encode(colour), colour),
        "jpeg": (encode(colour, "JPEG", **sharp), colour),
        "webp": (encode(colour, "WEBP", lossless=True), colour),
        "gif": (encode(colour, "GIF"), colour),
        "bmp": (encode(colour, "BMP"), colour),
        "cmyk": (encode(colour.convert("CMYK"), "JPEG", **sharp), colour),
        "palette": (encode(palette), colour),
        "palette with transparency": (encode(palette, transparency=0), colour),
        "alpha": (encode(clear), colour),
        "grey with alpha": (encode(colour.convert("LA")), grey),
        "one bit": (encode(grey.point(lambda v: 255 * (v > 99)).convert("1")), grey.point(lambda v: 255 * (v > 99))),
        "16 bit": (encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)), grey),
        "rotated": (encode(colour, "JPEG", exif=exif, **sharp), colour.rotate(-90, expand=True)),
        "animated": (encode(colour, "GIF", save_all=True, append_images=[black]), colour),
        "1x1": (encode(Image.new("L", (1, 1), 77)), Image.new("L", (1, 1), 77)),
    }


@pytest.mark.parametrize("name", _pictures())
def test_every_usual_kind_of_image_is_read(service: Service, name: str) -> None:
    """At t = 0 hardly any noise is left: the pixels are those of the picture."""
    content, expected = _pictures()[name]
    response = service.noise(content, t=0, seed=0)
    assert response.status_code == 200, response.text
    found, wanted = pixels(response.content).astype(float), np.asarray(expected, float)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 32  # four deviations of the noise, and what JPEG loses
    assert np.abs(found - wanted).mean() < 8


def _bomb() -> bytes:
    """A PNG whose header promises 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


BAD = {
    "empty": b"",
    "text": b"this is no image",
    "truncated": encode(Image.effect_noise((64, 64), 50))[:-900],
    "bomb": _bomb(),
    "over the limit": encode(Image.new("L", (5000, 4000))),
    "tiff": encode(Image.new("L", (8, 8)), "TIFF"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_usable_image_is_422(service: Service, name: str) -> None:
    problem = assert_problem(service.noise(BAD[name], t=0), 422, "image")
    assert ("pixels" in problem["detail"]) == (name in ("bomb", "over the limit"))  # refused for its size, undecoded


def test_several_t_share_the_limit_of_pixels_unless_the_image_is_made_small(service: Service) -> None:
    photo = encode(Image.new("L", (2000, 2000)))
    problem = assert_problem(service.noise(photo, t="1,2,3,4,5"), 422, "image")
    assert "fewer than 5 t" in problem["detail"]
    assert service.noise(photo, t="1,2,3,4,5", fit="model").status_code == 200
    for other in (service.noise(b"no image", t="1,2,3,4,5"), service.noise(BAD["over the limit"], t=1)):
        assert "fewer" not in assert_problem(other, 422, "image")["detail"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "t"),
        ({"t": 1000}, "t"),
        ({"t": -1}, "t"),
        ({"t": "abc"}, "t"),
        ({"t": "1,,2"}, "t"),
        ({"t": "nan"}, "t"),
        ({"t": ",".join(["1"] * 33)}, "t"),
        ({"t": 1, "seed": -1}, "seed"),
        ({"t": 1, "seed": 2**53}, "seed"),
        ({"t": 1, "fit": "crop"}, "fit"),
        ({"t": 1, "steps": 3}, "steps"),
    ],
)
def test_a_bad_field_is_422_and_named(service: Service, fields: dict[str, object], field: str) -> None:
    assert_problem(service.noise(GREY, **fields), 422, field)


def test_a_body_that_is_no_form_is_415(service: Service) -> None:
    assert_problem(service.request("POST", "/noise", json={"t": 1}), 415)
    assert_problem(service.request("POST", "/noise"), 415)


@pytest.mark.parametrize(
    "more", ["", "; boundary=abc", "; boundary=abc; charset=undefined", "; boundary=a; charset=no"]
)
def test_a_form_that_cannot_be_read_is_422(service: Service, more: str) -> None:
    headers = {"content-type": f"multipart/form-data{more}"}
    content = b'--abc\r\nContent-Disposition: form-data; name="t"\r\n\r\n1'
    assert_problem(service.request("POST", "/noise", content=content, headers=headers), 422)


def test_a_missing_or_doubled_image_is_422(service: Service) -> None:
    assert_problem(service.request("POST", "/noise", files={"picture": GREY}, data={"t": "1"}), 422, "image")
    twice = [("image", ("a", GREY)), ("image", ("b", GREY))]
    assert_problem(service.request("POST", "/noise", files=twice, data={"t": "1"}), 422, "image")


def test_a_large_upload_is_413(service: Service) -> None:
    assert_problem(service.noise(b"\0" * (11 * 2**20), t=0), 413)


def test_another_accept_is_406(service: Service) -> None:
    assert_problem(service.noise(GREY, {"accept": "text/html"}, t=0), 406)
