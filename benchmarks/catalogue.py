"""A finite set of requests that asks for everything that the service offers, and for what it refuses."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from benchmarks import wire

PNG, JSON, ZIP, EVENTS, NPZ = (
    "image/png", "application/json", "application/zip", "text/event-stream", "application/x-npz"
)  # fmt: skip
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "ipndm", "unipc", "learned", "fast", "balanced")
CHOOSE_STEPS = SAMPLERS[:6]
SIZES = ((28, 28), (100, 80), (640, 480), (1200, 900))  # of uploads


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One of them."""

    what: str
    method: str
    target: str
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    draws: bool = False  # it takes slots of the engine
    may_be_refused: bool = False  # for want of room, with 429
    shared: bool = False  # the same in flight is one computation
    changes: bool = False  # its content is another at another time

    def data(self, request_id: str) -> bytes:
        """What is sent."""
        return wire.request(self.method, self.target, {**self.headers, "X-Request-Id": request_id}, self.body)


def catalogue(model: str, count: int, seed: int) -> list[Request]:
    """`count` requests that are served and forty others, for a model by its name; the same ones for the same seed."""
    rng = random.Random(seed)
    block: list[Callable[[random.Random], Request]] = [
        *[_generate] * 10, *[_denoise] * 4, *[_noise] * 4, *[lambda rng: _image(rng, model)] * 3, _large
    ]  # fmt: skip
    return [make(rng) for make in itertools.islice(itertools.cycle(block), count)] + _refused() + _looks()


def _fields(rng: random.Random) -> dict[str, Any]:
    """What /generate and /denoise share."""
    n = rng.choice((1, 1, 1, 1, 1, 2, 3, 4, 9))
    fields: dict[str, Any] = {"n": n, "sampler": rng.choice(SAMPLERS), "seed": rng.randrange(2**53 - n)}
    if fields["sampler"] in CHOOSE_STEPS:
        fields["steps"] = rng.choice((1, 2, 4, 6, 10))
    if fields["sampler"] == "ddim" and rng.random() < 0.7:
        fields["eta"] = rng.choice((0.5, 1.0))
    if rng.random() < 0.8:
        fields["label"] = rng.randrange(10)
        if n > 1 and rng.random() < 0.5:
            fields["label"] = [fields["label"], *(rng.choice((None, rng.randrange(10))) for _ in range(n - 1))]
        if rng.random() < 0.4:
            fields["guidance_scale"] = rng.choice((0.0, 1.5, 4.0))
    if rng.random() < 0.5:
        fields["scale"] = rng.choice((2, 3, 8))
    return fields


def _drawn_as(rng: random.Random, fields: dict[str, Any]) -> dict[str, str]:
    """An Accept, and what of the fields goes with it."""
    accept = rng.choice((PNG, JSON, ZIP, EVENTS))
    if accept == EVENTS:
        fields["previews"] = rng.choice((1, 1, 2))
    elif rng.random() < 0.1:
        fields["response_format"] = "b64_json"
    return {"Accept": accept}


def _generate(rng: random.Random) -> Request:
    fields = _fields(rng)
    headers = {"Content-Type": JSON, **_drawn_as(rng, fields)}
    if fields["n"] == 1 and rng.random() < 0.1:
        fields["deadline_ms"] = 2000
    return Request(
        f"generate {fields}", "POST", "/generate", headers, json.dumps(fields).encode(), draws=True, may_be_refused=True
    )


def _large(rng: random.Random) -> Request:
    """As many images as one request may ask for."""
    fields = {"n": 64, "sampler": "fast", "label": [k % 10 for k in range(64)], "seed": rng.randrange(2**40)}
    headers = {"Content-Type": JSON, "Accept": rng.choice((PNG, JSON, ZIP))}
    return Request(
        f"generate {fields}", "POST", "/generate", headers, json.dumps(fields).encode(), draws=True, may_be_refused=True
    )


def picture(rng: random.Random, size: tuple[int, int]) -> bytes:
    """Noise that is not as large as its pixels, as photographs are not."""
    mode, kind = rng.choice(("L", "RGB")), rng.choice(("PNG", "JPEG", "WEBP", "BMP"))
    small = Image.frombytes(mode, (8, 8), rng.randbytes(64 * len(mode)))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def blank(side: int) -> bytes:
    """A file that is small however many pixels it has."""
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def form(fields: Mapping[str, object], image: bytes | None) -> tuple[dict[str, str], bytes]:
    """Headers and body of an upload."""
    line = '--part\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    parts = [line.format(name, "").encode() + f"{value}\r\n".encode() for name, value in fields.items()]
    if image is not None:
        parts.append(line.format("image", '; filename="x"').encode() + image + b"\r\n")
    return {"Content-Type": "multipart/form-data; boundary=part"}, b"".join([*parts, b"--part--\r\n"])


def _denoise(rng: random.Random) -> Request:
    fields = {**_fields(rng), "t": rng.randrange(100, 1000)}
    if fields["sampler"] == "learned":
        fields["sampler"] = "balanced"
    accept = _drawn_as(rng, fields)
    if isinstance(label := fields.get("label"), list):
        fields["label"] = ",".join("null" if one is None else str(one) for one in label)
    size = rng.choice(SIZES[:3])
    headers, body = form(fields, picture(rng, size))
    return Request(
        f"denoise {size} {fields}", "POST", "/denoise", headers | accept, body, draws=True, may_be_refused=True
    )


def _noise(rng: random.Random) -> Request:
    fit = rng.choice(("none", "model"))
    size = rng.choice(SIZES)
    several = fit == "model" or size in SIZES[:2]
    t = ",".join(str(rng.randrange(1000)) for _ in range(rng.choice((1, 3, 8)) if several else 1))
    fields = {"t": t, "fit": fit, "seed": rng.randrange(2**53)}
    headers, body = form(fields, picture(rng, size))
    accept = {"Accept": rng.choice((PNG, NPZ, JSON))}
    return Request(f"noise {size} {fields}", "POST", "/noise", headers | accept, body, may_be_refused=True)


def _image(rng: random.Random, model: str) -> Request:
    label, sampler, steps = rng.choice((*range(10), "none")), rng.choice(CHOOSE_STEPS), rng.choice((2, 5, 8))
    query = rng.choice(("", "?scale=4", *(() if label == "none" else ("?guidance_scale=2.5&scale=2",))))
    target = f"/images/{model}/{sampler}-{steps}/{label}/{rng.randrange(2**53)}.png{query}"
    return Request(f"GET {target}", "GET", target, draws=True, may_be_refused=True, shared=True)


def _refused() -> list[Request]:
    """What is refused whoever asks, each in its way."""
    bodies: list[object] = [
        {"n": 0}, {"n": 65}, {"steps": 0}, {"label": 10}, {"label": [1, 2]}, {"guidance_scale": 3}, {"scale": 17},
        {"sampler": "unipc", "eta": 0.5}, {"seed": -1}, {"colour": "red"}, {"previews": 1}, [],
    ]  # fmt: skip
    as_json = {"Content-Type": JSON}
    contents = [*(json.dumps(body).encode() for body in bodies), b"{", b"\xff"]
    found = [Request(f"refused {body!r}", "POST", "/generate", as_json, body) for body in contents]
    image = picture(random.Random(0), SIZES[0])
    for path, fields, file in (
        ("/noise", {"t": 1000}, image), ("/noise", {"t": "x"}, image), ("/noise", {}, image),
        ("/noise", {"t": 1}, None), ("/noise", {"t": 1}, b"no image"), ("/noise", {"t": 1}, image[:100]),
        ("/denoise", {"t": 1000}, image), ("/denoise", {"t": 5, "sampler": "learned"}, image),
    ):  # fmt: skip
        headers, body = form(fields, file)
        found.append(Request(f"refused {path} {fields}", "POST", path, headers, body, may_be_refused=True))
    headers, too_large = form({"t": 1}, b"x" * 10 * 2**20)
    return [
        *found,
        Request("refused 406", "POST", "/generate", {**as_json, "Accept": "text/html"}),
        Request("refused 413", "POST", "/generate", as_json, b" " * (16 * 2**10 + 1)),
        Request("refused 413 /noise", "POST", "/noise", headers, too_large),
        Request("refused 415", "POST", "/generate", {"Content-Type": "text/plain"}, b"seven"),
        Request("refused 415 /denoise", "POST", "/denoise", as_json, b"{}"),
        Request("refused 405", "GET", "/generate"),
        Request("refused 404", "GET", "/nothing"),
        Request("refused 404 of a model", "GET", "/images/nobody/ddim-5/7/1.png"),
        Request("refused 404 of a request", "DELETE", "/requests/nobody"),
        Request("refused 422 of an image", "GET", "/images/nobody/ddim-5/7/1.png?colour=red"),
    ]


def _looks() -> list[Request]:
    """What those ask for who watch."""
    return [
        *(Request(path, "GET", path) for path in ("/livez", "/readyz", "/v2/health/live", "/openapi.json", "/docs")),
        *(Request(path, "GET", path, changes=True) for path in ("/health", "/metrics")),
    ]
