"""Whatever is wrong is one line on stderr and exit code 2."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.conftest import KEY, everywhere
from tests.service.process import Server, until


@everywhere
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "11"], "label: 11 is not a label of tiny; allowed: 0 .. 9, or null"),
        (["generate", "--guidance-scale", "3"], "guidance_scale: needs a label"),
        (["generate", "--sampler", "euler"], "sampler: Input should be 'ddpm', 'ddim'"),
        (["generate", "--seed", "-1"], "seed: "),
        (["generate", "--scale", "17"], "scale: "),
        (["generate", "--frames", "12", "-o", "x.npz"], "frames: 12 must be 2 .. 11"),
        (["denoise", "text", "--t", "5"], "image: not an image of a supported format (PNG, "),
        (["denoise", "cut.png", "--t", "5"], "image: the image is damaged or truncated"),
        (["denoise", "picture.png", "--t", "1000"], "t: 1000 must be 0 .. 999"),
        (["denoise", "picture.png", "--t", "5", "--steps", "7"], "steps: 7 must be 1 .. 6"),
        (["noise", "text", "--t", "5"], "image: not an image"),
        (["noise", "picture.png", "--t", "5,1000"], "t: 1000 must be 0 .. 999"),
        (["noise", "picture.png", "--t", "5,"], "t: must be one timestep or several, comma-separated"),
    ],
)
def test_a_field_or_image_that_cannot_be_used(
    ddpm: Any, place: list[str], picture: bytes, words: list[str], says: str
) -> None:
    Path("text").write_text("this is no image")
    Path("picture.png").write_bytes(picture)
    Path("cut.png").write_bytes(picture[:-900])
    assert says in ddpm(*words, *place).problem
    assert not list(Path().glob("out.png"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "--model", "nowhere"], "no model directory at nowhere"),
        (["noise", "text", "--t", "5", "--model", "nowhere"], "no model directory at nowhere"),
        (["info", "nowhere"], "no model directory at nowhere"),
        (["generate", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["denoise", "gone.png", "--t", "5"], "gone.png cannot be read: No such file"),
        (["generate", "-o", "x.jpg"], "-o x.jpg must end in .png, .zip, .json without --frames, or in /"),
        (["generate", "-o", "x.webp"], "without --frames"),
        (["generate", "--frames", "3", "-o", "x.zip"], "must end in .png, .apng, .webp, .npz with --frames"),
        (["generate", "--frames", "3", "-o", "x/"], "is a folder: name one file"),
        (["noise", "text", "--t", "5", "-o", "."], "is a folder: name one file"),
        (["generate", "-o", "gone/x.png"], "there is no folder gone"),
        (["generate", "-o", "text/"], "text is a file, and a folder is asked for"),
        (
            ["generate", "--seed", "1", "--steps", "1", "-o", "/proc/x.png"],
            "it can be had again by seed 1, model tiny",
        ),
        (["generate", "-o", ""], "-o has no name"),
        (["generate", "--url", f"http://{'x' * 70}.org"], "cannot be reached: "),
        (["generate", "seven"], "'seven' is no label"),
        (["generate", "-n", "0"], "argument -n: 0 must be 1 .. 100,000"),
        (["generate", "--stepz", "3"], "unrecognized arguments: --stepz"),
        (["denoise", "text"], "--t"),
        (["generate", "--api-key", "x"], "name that with --url"),
        (["generate", "--device", "cpu", "--url", "http://127.0.0.1:9"], "leave it out with --url"),
        (["info", "x", "--url", "http://127.0.0.1:9"], "leave one of them out"),
        (["generat"], "there is no command generat: did you mean generate?"),
        (["xyz"], "there is no command xyz: ddpm --help lists them"),
        (["--seed"], "--seed"),
    ],
)
def test_a_command_line_that_cannot_be_carried_out(ddpm: Any, words: list[str], says: str) -> None:
    Path("text").write_text("no image")
    assert says in ddpm(*words).problem


def test_a_setting_that_cannot_be_used_is_named(ddpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_BATCH_ROWS", "none")
    assert "DDPM_BATCH_ROWS: Input should be a valid integer" in ddpm("generate").problem


def test_other_weights_than_the_settings_pin_are_refused(ddpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_MODEL_SHA256", "0" * 12)
    assert "pinned is 000000000000" in ddpm("generate").problem


# Services


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:y", "http://[", "http://x:0", "http://x/ä"]
)
def test_what_is_no_url(ddpm: Any, url: str) -> None:
    assert "must be like http://127.0.0.1:8000" in ddpm("generate", "--url", url).problem


def test_no_service_at_all(ddpm: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for words in (["generate"], ["info"]):
        assert "cannot be reached: Connection refused" in ddpm(*words, "--url", f"http://127.0.0.1:{port}").problem


class Stranger(http.server.BaseHTTPRequestHandler):
    """Another server: it greets everybody, in JSON where it is asked for."""

    def _greet(self) -> None:
        kind, content = ("application/json", b"[1]") if "/health" in self.path else ("text/html", b"<h1>hello</h1>")
        status = 502 if self.path.startswith("/broken") else 200
        if self.path.startswith("/rude"):
            return
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _greet

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{other.server_address[1]}"
        other.shutdown()


@pytest.mark.parametrize(
    ("words", "path", "says"),
    [
        (["generate"], "", "answered with text/html, as no service of this project does"),
        (["info"], "", "does not describe itself as a service of this project does"),
        (["generate"], "/broken", "/broken answered 502 Bad Gateway"),
        (["generate"], "/rude", "broke the connection off"),
    ],
)
def test_a_server_of_another_kind(ddpm: Any, stranger: str, words: list[str], path: str, says: str) -> None:
    assert says in ddpm(*words, "--url", stranger + path).problem


def test_a_key_is_needed_and_the_environment_can_have_it(
    ddpm: Any, served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", "--seed", "1", "--url", served.url]
    for more in ([], ["--api-key", "another-key-of-nobody"]):
        assert "--api-key" in ddpm(*words, *more).problem
    monkeypatch.setenv("DDPM_API_KEY", KEY)
    assert ddpm(*words).code == 0
    monkeypatch.setenv("DDPM_API_KEY", "schlüssel")
    assert "visible ASCII" in ddpm(*words).problem


def test_what_a_service_refuses(ddpm: Any, at: list[str]) -> None:
    assert "n: 65 is over the limit of 64 images" in ddpm("generate", "-n", "65", *at).problem
    assert "model other is not served here; served: tiny@" in ddpm("generate", "--model", "other", *at).problem


def test_a_full_queue_says_when_to_come_back(ddpm: Any, served: Server, at: list[str]) -> None:
    body = b'{"n": 64, "sampler": "reference"}'
    head = f"POST /generate HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json"
    with served.send(head, body):
        until(lambda: served.metric("slots_running") > 0, "it does not begin")
        assert "; come back in " in ddpm("generate", "-n", "64", *at).problem
    served.wait_until_idle()


def test_the_service_is_no_worse_for_it(served: Server) -> None:
    assert httpx.get(f"{served.url}/readyz").status_code == 200
