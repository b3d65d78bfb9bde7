"""A short soak (benchmarks/soak.py) of the tiny model; and what it rests on can fail."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.catalogue import Request, blank, catalogue
from benchmarks.crowd import Crowd, Reference, essence
from benchmarks.soak import complaints, soak
from benchmarks.wire import Pool, Reply

SECONDS = 10.0


def test_under_a_mixed_load_every_byte_is_right_and_nothing_is_lost_or_kept(model_dir: Path) -> None:
    figures = soak(model_dir, catalogue(model_dir.name, 22, seed=1), SECONDS)
    assert figures["broken"] == [], figures
    assert figures["counts"]["right"] > 100
    for what in ("refused", "ended", "left while sending", "left while waiting", "left while reading"):
        assert figures["counts"][what] > 0, what


def png(picture: bytes, created: int) -> tuple[str, bytes]:
    return "image/png", picture


def as_json(picture: bytes, created: int) -> tuple[str, bytes]:
    images = [{"b64_json": base64.b64encode(picture).decode(), "seed": 1, "label": None}]
    return "application/json", json.dumps({"created": created, "images": images}, separators=(",", ":")).encode()


def stream(preview: bytes, picture: bytes, created: int) -> tuple[str, bytes]:
    previews = [{"index": 0, "b64_json": base64.b64encode(preview).decode()}]
    eta_s = created / 1e12  # differs from run to run, as `created` does
    progress = json.dumps({"step": 1, "steps": 2, "queue_position": 0, "eta_s": eta_s, "previews": previews})
    completed = as_json(picture, created)[1].decode()
    return "text/event-stream", f"event: progress\ndata: {progress}\n\nevent: completed\ndata: {completed}\n\n".encode()


FORMS = {
    "png": png,
    "json": as_json,
    "preview": lambda picture, created: stream(picture, blank(8), created),
    "completed": lambda picture, created: stream(blank(8), picture, created),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_flipped_bit_is_a_wrong_answer_and_another_time_is_not(
    form: Callable[[bytes, int], tuple[str, bytes]],
) -> None:
    def reply(picture: bytes, created: int) -> Reply:
        media_type, body = form(picture, created)
        return Reply(200, {"content-type": media_type, "x-request-id": "me"}, body)

    picture = blank(28)
    request = Request("a digit", "POST", "/generate")
    crowd = Crowd(Pool(""), {request: Reference(essence(reply(picture, 1)), 0.0)})
    crowd.judge(request, "me", reply(picture, 2))
    assert crowd.wrong == []
    for place in range(len(picture)):
        flipped = bytearray(picture)
        flipped[place] ^= 1
        crowd.judge(request, "me", reply(bytes(flipped), 2))
    assert len(crowd.wrong) == len(picture)
    crowd.judge(request, "another", reply(picture, 1))
    assert len(crowd.wrong) == len(picture) + 1


def test_errors_in_a_log_are_found() -> None:
    fine = '{"level": "INFO", "message": "all is well"}'
    bad = ['{"level": "ERROR", "message": "x"}', '{"level": "INFO", "exc_info": "Traceback (most recent"}', "Aborted"]
    assert complaints("\n".join([fine, *bad, fine])) == bad
