"""Files that were made to harm: each is drawn or refused with a reason, soon, and the service lives on."""

from __future__ import annotations

import functools
import io
import random
import struct
import time
import zipfile
import zlib
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from app import images
from tests.service.conftest import Service, assert_problem, encode

MIB = 2**20
QUICK_S = 5.0  # of this process's processors, whatever others do on the machine; the harm would be minutes
NOISY = Image.effect_noise((40, 30), 50)
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@functools.cache
def noisy(kind: str) -> bytes:
    return encode(NOISY.convert("RGB"), kind)


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, data: bytes | None = None, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of any header; `data` is what its IDAT unpacks to."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    rows = (b"\0" + b"\x80" * width) * height if data is None else data
    body = header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def exif(content: bytes) -> bytes:
    """A JPEG whose EXIF is this."""
    jpeg = noisy("JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 8) + b"Exif\0\0" + content + jpeg[2:]


def looping_exif() -> bytes:
    """Its directory of tags is followed by itself, and its thumbnail and GPS directories too."""
    entry = struct.pack("<HHII", 0x8825, 4, 1, 8) + struct.pack("<HHII", 0x8769, 4, 1, 8)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + entry + struct.pack("<I", 8)


def ask(service: Service, path: str, content: bytes, name: str = "upload") -> httpx.Response:
    data = {"t": "5"} | ({"steps": "1"} if path == "/denoise" else {})
    return service.request("POST", path, files={"image": (name, content)}, data=data)


def check(service: Service, content: bytes, name: str = "upload") -> list[int]:
    """/noise and /denoise answer soon, with a picture or a problem of the field `image`."""
    statuses = []
    for path in ("/noise", "/denoise"):
        start = time.process_time()
        response = ask(service, path, content, name)
        assert time.process_time() - start < QUICK_S
        if response.status_code == 200:
            Image.open(io.BytesIO(response.content)).load()
        else:
            assert_problem(response, 422, "image")
        statuses.append(response.status_code)
    return statuses


REFUSED: dict[str, Callable[[], bytes]] = {
    "0 bytes": lambda: b"",
    "one byte": lambda: b"\x89",
    "only a magic": lambda: b"\x89PNG\r\n\x1a\n",
    "wrong magic": lambda: b"GIF89a" + noisy("PNG")[6:],
    "a zip": lambda: zip_of(b"x"),
    "a script": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pdf": lambda: encode(NOISY, "PDF"),
    "tiff": lambda: encode(NOISY, "TIFF"),
    "icon": lambda: encode(NOISY, "ICO"),
    "jpeg 2000": lambda: encode(NOISY, "JPEG2000"),
    "zero width": lambda: png(0, 10),
    "zero height": lambda: png(10, 0),
    "depth 3": lambda: png(10, 10, depth=3),
    "100 megapixels, a header alone (png)": lambda: png(10_000, 10_000, data=b""),
    "2 gigapixels, a header alone (png)": lambda: png(2**31 - 1, 1, data=b""),
    "100 megapixels, a header alone (gif)": lambda: b"GIF89a" + struct.pack("<HH", 10_000, 10_000) + noisy("GIF")[10:],
    "100 megapixels, a header alone (bmp)": lambda: bmp(10_000, 10_000),
    "4 gigapixels, a header alone (bmp)": lambda: bmp(65_535, 65_535),
    "negative width (bmp)": lambda: bmp(-10, 10),
    "100 megapixels, a header alone (jpeg)": lambda: jpeg_header(10_000, 10_000),
    "4 gigapixels, a header alone (jpeg)": lambda: jpeg_header(65_535, 65_535),
    "250 megapixels, a header alone (webp)": lambda: webp_header(16_383, 16_383),
    "20 megapixels in 20 kB": lambda: png(5000, 4000),
    "a hundred scans too many": lambda: scans(200),
    "a hundred scans too many, as MPO": lambda: mpo(scans(200)),
    "text of 200 MB, compressed": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 200_000_000, 1))),
    "profile of 200 MB, compressed": lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 200_000_000))),
}


def zip_of(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", content)
    return buffer.getvalue()


def bmp(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def jpeg_header(width: int, height: int) -> bytes:
    content = bytearray(noisy("JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def webp_header(width: int, height: int) -> bytes:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + size + noisy("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def scans(more: int) -> bytes:
    """A progressive JPEG that says its last scan again and again: each is a pass over all its pixels."""
    content = encode(Image.new("L", (4000, 4000), 99), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * more + content[-2:]


def mpo(jpeg: bytes) -> bytes:
    """The same with the segment of several pictures in one, which makes Pillow call it another format."""
    two = encode(NOISY, "MPO", save_all=True, append_images=[NOISY])
    at = two.index(b"\xff\xe2")
    segment = two[at : at + 2 + struct.unpack(">H", two[at + 2 : at + 4])[0]]
    return jpeg[:2] + segment + jpeg[2:]


@pytest.mark.parametrize("name", REFUSED)
def test_what_harms_or_is_no_image_is_refused(service: Service, name: str) -> None:
    content = REFUSED[name]()
    assert check(service, content) == [422, 422]
    if "pixels" in name:  # by its header, before anything is decoded
        with pytest.raises(images.TooManyPixels):
            images.Upload(content, 16_000_000)


READ: dict[str, Callable[[], bytes]] = {
    "1 x 1": lambda: png(1, 1),
    "1 x 65,500": lambda: png(1, 65_500),
    "65,500 x 1": lambda: png(65_500, 1),
    "16 megapixels in 20 kB": lambda: png(4000, 4000),
    "more data than pixels: 1 GB behind 64": lambda: png(8, 8, data=b"\0" * 1_000_000_000),
    "16 bit": lambda: encode(Image.fromarray(np.full((9, 9), 40_000, np.uint16))),
    "16 bit colour": lambda: png(4, 4, data=(b"\0" + b"\x12\x34" * 12) * 4, depth=16, colour=2),
    "CMYK": lambda: encode(NOISY.convert("CMYK"), "JPEG"),
    "palette": lambda: encode(NOISY.convert("P")),
    "palette without a palette": lambda: png(10, 10, colour=3),
    "transparent palette": lambda: encode(NOISY.convert("P"), transparency=b"\0\x80"),
    "alpha": lambda: encode(NOISY.convert("RGBA")),
    "animated gif": lambda: encode(NOISY, "GIF", save_all=True, append_images=[NOISY.rotate(90)] * 50),
    "animated webp": lambda: encode(
        NOISY.convert("RGB"), "WEBP", save_all=True, append_images=[NOISY.convert("RGB")] * 50
    ),
    "animated png": lambda: encode(NOISY, "PNG", save_all=True, append_images=[NOISY.rotate(90)] * 50),
    "a picture and a zip in one": lambda: noisy("PNG") + zip_of(b"evil"),
    "a picture and a script in one": lambda: noisy("GIF").replace(b";", b";", 1) + b"/*<script>alert(1)</script>*/",
    "a million empty chunks": lambda: png(8, 8, chunk(b"abCd", b"") * 800_000),
    "half a million texts": lambda: png(8, 8, chunk(b"tEXt", b"a\0b") * 600_000),
    "three million empty comments (gif)": lambda: noisy("GIF")[:781] + b"\x21\xfe\0" * 3_000_000 + noisy("GIF")[781:],
    "two million empty segments (jpeg)": lambda: noisy("JPEG")[:2] + b"\xff\xe5\0\x02" * 2_000_000 + noisy("JPEG")[2:],
    "EXIF that points at itself": lambda: exif(looping_exif()),
    "EXIF of noise": lambda: exif(random.Random(0).randbytes(60_000)),
    "EXIF of the largest size, 150 times": lambda: (exif(b"II*\0" + b"\0" * 65_000)[:-99] * 150)[: 9 * MIB] + exif(b""),
    "orientation 9": lambda: exif(b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 9) + b"\0\0\0\0"),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_strange_but_an_image_is_read_or_refused_soon(service: Service, name: str) -> None:
    statuses = check(service, READ[name]())
    assert statuses[0] == statuses[1]
    if not name.startswith(("EXIF", "three million", "orientation")):  # of damaged metadata it may be either
        assert statuses == [200, 200]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_whatever_it_is(service: Service, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    response = ask(service, "/noise", encode(NOISY, "JPEG", exif=tags))
    size = Image.open(io.BytesIO(response.content)).size
    assert size == ((40, 30) if orientation < 5 else (30, 40))


@pytest.mark.parametrize(
    "name", ["digit.exe", "../../etc/passwd", "a" * 1000, "con", "x.png\0.sh", "\u202egnp.exe", ""]
)
def test_the_name_of_a_file_means_nothing(service: Service, name: str) -> None:
    for kind in KINDS:
        response = ask(service, "/noise", noisy(kind), name or "x")
        assert response.status_code == 200
        assert "etc" not in response.text


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_anywhere_it_is_refused_or_read(service: Service, kind: str) -> None:
    content = noisy(kind)
    whole = len(content)
    cuts = {*range(0, min(64, whole)), *range(64, whole, max(1, whole // 60)), *range(whole - 16, whole)}
    statuses = [ask(service, "/noise", content[:cut]).status_code for cut in sorted(cuts)]
    assert set(statuses) <= {200, 422}
    assert statuses[0] == 422
    assert statuses.count(422) > len(statuses) / 2


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(
    kind=st.sampled_from(KINDS),
    spoiled=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6),
    early=st.booleans(),
)
def test_spoiled_anywhere_it_is_refused_or_read(
    service: Service, kind: str, spoiled: list[tuple[float, bytes]], early: bool
) -> None:
    content = bytearray(noisy(kind))
    for share, value in spoiled:
        at = int(share * (min(100, len(content)) if early else len(content)))
        content[at : at + len(value)] = value
    response = ask(service, "/noise", bytes(content))
    assert response.status_code == 200 or assert_problem(response, 422, "image")


def test_only_what_is_on_the_list_is_ever_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has fifty formats, of which some start other programs: none of them may even look at a file."""
    tried: list[str] = []
    for name in list(Image.OPEN):
        if name not in KINDS:
            monkeypatch.setitem(Image.OPEN, name, (lambda *a, n=name: tried.append(n), None))
    for content in (b"%!PS-Adobe", b"II*\0", b"\0\0\x01\0", b"%PDF", b"SIMPLE  =                    T"):
        with pytest.raises(images.BadImage):
            images.Upload(content * 100, 10**6)
    assert tried == []
