"""What one client, or many, may take: bytes, pixels, places, seconds, connections. And it all comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from app import images
from tests.service.conftest import Service, assert_problem, encode, encode_grey, pixels
from tests.service.process import Server, server, until

FORM = "POST /noise HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=a"
PART = b'--a\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
DRAW = "POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nAccept: "


def taken(service: Service) -> list[int]:
    uploads = service.app.state.uploads
    return [uploads.bytes.taken, uploads.slots.taken, uploads.pixels.taken]


# ---- uploads


@pytest.fixture
def slow_decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While this is cleared no image is decoded."""
    gate, decode = threading.Event(), images.Upload.decode

    def held(self: images.Upload, fit: tuple[int, int, int] | None) -> images.Pixels:
        gate.wait(60)
        return decode(self, fit)

    monkeypatch.setattr(images.Upload, "decode", held)
    yield gate
    gate.set()


def test_no_key_takes_all_of_the_uploads(make_service: Callable[..., Service], slow_decoding: threading.Event) -> None:
    service = make_service(api_keys="alice-0123456789,bob-0123456789abc", upload_slots=4)
    slow_decoding.clear()

    async def ask(key: str) -> int:
        files = {"image": ("x", encode_grey())}
        return (
            await service.client.post("/noise", files=files, data={"t": "3"}, headers={"x-api-key": key})
        ).status_code

    async def crowd() -> list[int]:
        first = [asyncio.ensure_future(ask("alice-0123456789")) for _ in range(2)]
        while service.app.state.uploads.slots.taken < 2:
            await asyncio.sleep(0.01)
        refused = await ask("alice-0123456789")
        other = asyncio.ensure_future(ask("bob-0123456789abc"))
        while service.app.state.uploads.slots.taken < 3:
            await asyncio.sleep(0.01)
        slow_decoding.set()
        return [refused, await other, *(await asyncio.gather(*first))]

    assert service.run(crowd()) == [429, 200, 200, 200]
    assert taken(service) == [0, 0, 0]


@pytest.mark.parametrize(
    ("bounds", "what", "fit"),
    [
        ({"upload_slots": 2}, "places for images", 2),
        ({"upload_pixels": 4_200, "max_image_pixels": 4_200}, "pixels", 1),
        ({"upload_bytes": 3_000, "max_body_bytes": 2_000}, "bytes of forms", 2),
    ],
)
@pytest.mark.parametrize("path", ["/noise", "/denoise"])
def test_more_uploads_at_once_than_fit_get_429(
    make_service: Callable[..., Service],
    slow_decoding: threading.Event,
    bounds: dict[str, int],
    what: str,
    fit: int,
    path: str,
) -> None:
    """/generate and the engine do not notice, and what was taken comes back."""
    service = make_service(**bounds)
    content = encode(Image.effect_noise((31, 31), 60)) if "bytes" in what else encode(Image.new("L", (64, 64)))
    slow_decoding.clear()

    async def ask() -> int:
        response = await service.client.post(path, files={"image": ("x", content)}, data={"t": "3"})
        if response.status_code == 429:
            assert what in assert_problem(response, 429)["detail"]
            assert response.headers["retry-after"] == "1"
        return response.status_code

    async def crowd() -> list[int]:
        first = [asyncio.ensure_future(ask()) for _ in range(fit)]
        while taken(service)[1] < fit or ("pixels" in what and not taken(service)[2]):
            await asyncio.sleep(0.01)
        refused = await asyncio.wait_for(ask(), 30)
        drawn = (await service.client.post("/generate", json={"steps": 1})).status_code
        slow_decoding.set()
        return [refused, drawn, *(await asyncio.gather(*first))]

    assert service.run(crowd()) == [429, 200, *[200] * fit]
    assert taken(service) == [0, 0, 0]
    registry = service.engine.metrics.registry
    assert registry.get_sample_value("ddpm_refused_total", {"reason": "uploads_full"}) == 1


def test_an_upload_whose_client_left_waits_for_no_thread(
    make_service: Callable[..., Service], slow_decoding: threading.Event
) -> None:
    """Those that wait are dropped at once; one that is being worked on holds its share until it ends."""
    service = make_service()
    uploads = service.app.state.uploads
    slow_decoding.clear()

    async def crowd() -> None:
        async def leave(content: bytes) -> None:
            body = service.client.build_request("POST", "/noise", files={"image": ("x", content)}, data={"t": "3"})
            messages = [{"type": "http.request", "body": await body.aread(), "more_body": False}]
            headers = [(name.lower(), value) for name, value in body.headers.raw]
            scope = {
                "type": "http", "method": "POST", "path": "/noise", "raw_path": b"/noise", "query_string": b"",
                "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("y", 1),
            }  # fmt: skip

            async def receive() -> dict[str, object]:
                if messages:
                    return messages.pop()
                await leaving.wait()
                return {"type": "http.disconnect"}

            async def send(message: dict[str, object]) -> None:
                pass

            await service.app(scope, receive, send)

        leaving = asyncio.Event()
        tasks = [asyncio.create_task(leave(encode_grey())) for _ in range(12)]
        while uploads.slots.taken < 12:
            await asyncio.sleep(0.01)
        leaving.set()
        threads = uploads.threads._max_workers
        while sum(task.done() for task in tasks) < 12 - threads:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert uploads.slots.taken == threads
        assert uploads.pixels.taken == 64 * threads
        slow_decoding.set()
        await asyncio.gather(*tasks)

    service.run(crowd())
    assert taken(service) == [0, 0, 0]


def test_whatever_becomes_of_an_upload_its_share_comes_back(service: Service) -> None:
    before = taken(service)
    for content, fields in (
        (encode_grey(), {"t": 1}), (encode_grey(), {"t": 10**6}), (b"no image", {"t": 1}), (b"", {}),
        (encode(Image.new("L", (5000, 4000))), {"t": 1}), (b"x" * 11 * 2**20, {"t": 1}), (encode_grey()[:50], {"t": 1}),
    ):  # fmt: skip
        service.noise(content, **fields)
        service.noise(content, {"accept": "nothing/here"}, **fields)
        assert taken(service) == before == [0, 0, 0]


def test_a_long_answer_holds_its_share_until_it_is_read(make_service: Callable[..., Service]) -> None:
    """In pieces, so that a server can wait for its client between them; put together they are the whole."""
    service = make_service()
    sizes: list[int] = []
    shares: list[list[int]] = []
    content = encode(Image.effect_noise((1200, 1000), 60))
    body = service.client.build_request("POST", "/noise", files={"image": ("x", content)}, data={"t": "9", "seed": "1"})
    scope = {
        "type": "http", "method": "POST", "path": "/noise", "raw_path": b"/noise", "query_string": b"", "headers": [
            (name.lower(), value) for name, value in body.headers.raw
        ], "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("y", 1), "state": {},
    }  # fmt: skip
    sent: list[bytes] = []

    async def run() -> None:
        messages = [{"type": "http.request", "body": await body.aread(), "more_body": False}]

        async def receive() -> dict[str, object]:
            return messages.pop() if messages else await asyncio.sleep(60, {"type": "http.disconnect"})

        async def send(message: dict[str, object]) -> None:
            if message["type"] == "http.response.body":
                sent.append(message["body"])  # type: ignore[arg-type]
                shares.append(taken(service))

        await service.app(scope, receive, send)

    service.run(run())
    sizes = [len(piece) for piece in sent]
    assert len(sizes) > 3
    assert max(sizes) <= 2**18
    assert all(share[2] == 1_200_000 for share in shares)
    assert taken(service) == [0, 0, 0]
    assert pixels(b"".join(sent)).shape == (1000, 1200)
    assert b"".join(sent) == service.noise(content, t=9, seed=1).content


def test_pictures_of_an_answer_are_bounded_together(make_service: Callable[..., Service]) -> None:
    service = make_service(max_image_pixels=28 * 28 * 4 * 9)
    assert service.generate({"n": 9, "scale": 2, "steps": 1}).status_code == 200
    assert_problem(service.generate({"n": 10, "scale": 2, "steps": 1}), 422, "scale")


# ---- the queue


def test_the_queue_is_bounded_in_seconds_too(make_service: Callable[..., Service], hold: threading.Event) -> None:
    """What would wait longer is refused; what goes before the long one, being smaller, waits for nothing."""
    service = make_service(queue_s=0.5)
    engine = service.engine
    hold.clear()

    async def ask() -> tuple[int, int, int]:
        long = asyncio.ensure_future(service.client.post("/generate", json={"n": 64, "steps": 1000, "sampler": "ddpm"}))
        while engine.scheduler.slots < 64:
            await asyncio.sleep(0.01)
        small = asyncio.ensure_future(service.client.post("/generate", json={"steps": 1}))
        while engine.scheduler.slots < 65:
            await asyncio.sleep(0.01)
        refused = await service.client.post("/generate", json={"n": 64, "steps": 1000, "sampler": "ddpm"})
        assert "s for its first step, 0.5 s are allowed" in assert_problem(refused, 429)["detail"]
        retry = int(refused.headers["retry-after"])
        long.cancel()
        engine.cancel(next(iter(engine._jobs)).removeprefix("/"))
        hold.set()
        after = await small
        with contextlib.suppress(asyncio.CancelledError):
            await long
        return refused.status_code, retry, after.status_code

    refused, retry, after = service.run(ask())
    assert (refused, after) == (429, 200)
    expected = engine.step_time.finish_s(64_000, 0, 64, engine.rows_limit)
    assert retry == pytest.approx(expected, rel=0.5)
    assert engine.metrics.registry.get_sample_value("ddpm_refused_total", {"reason": "queue_long"}) == 1


# ---- connections, against the real process


@pytest.fixture(scope="module")
def tight(model_dir: Path) -> Iterator[Server]:
    with server(model=model_dir, max_connections=8, request_s=1, stall_s=1, max_header_bytes=2048, max_images=64) as it:
        yield it


def closed_after(connection: socket.socket) -> float:
    """Seconds until the server closes it; what it says is read."""
    start = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    return time.monotonic() - start


def answer(connection: socket.socket, *, sent_on: bool = False) -> tuple[int, dict[str, object]]:
    """Status and problem of a connection that is closed after them; by a reset, maybe, if the client still sent."""
    content = b""
    with contextlib.suppress(*((ConnectionResetError,) if sent_on else ())):
        while piece := connection.recv(65536):
            content += piece
    head, _, body = content.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert f"content-length: {len(body)}".encode() in head.lower()
    return int(head.split()[1]), json.loads(body)


def test_a_silent_connection_is_closed(tight: Server) -> None:
    with tight.connect() as connection:
        assert 0.5 < closed_after(connection) < 10


def test_a_head_that_trickles_in_is_closed(tight: Server) -> None:
    """Each byte is progress, and none of them helps."""
    with tight.connect() as connection:
        start = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for byte in b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 200:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
        assert 0.5 < time.monotonic() - start < 10


def test_a_body_that_trickles_in_gets_408(tight: Server) -> None:
    with tight.send(FORM, PART, length=10_000) as connection:
        connection.settimeout(0.1)
        start = time.monotonic()
        while time.monotonic() - start < 10:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(b"x")
            try:
                if connection.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                continue
        connection.settimeout(10)
        status, problem = answer(connection, sent_on=True)
        assert status == 408
        assert "within 1 seconds" in str(problem["detail"])
        assert 0.5 < time.monotonic() - start < 9


@pytest.mark.parametrize("what", ["an event stream", "a picture"])
def test_a_client_that_reads_nothing_is_taken_to_have_left(tight: Server, what: str) -> None:
    """Its slots are free, its connection is closed; others are served meanwhile."""
    if what == "a picture":
        noise = encode(Image.effect_noise((2200, 2000), 60), "JPEG", quality=5)
        body = PART + noise + b'\r\n--a\r\nContent-Disposition: form-data; name="t"\r\n\r\n999\r\n--a--\r\n'
        head = FORM + "\r\nAccept: application/x-npz"  # 35 MB: more than the kernel's buffers hold
    else:
        body = b'{"n": 64, "steps": 1000, "sampler": "ddpm", "previews": 1, "scale": 8}'
        head = DRAW + "text/event-stream"
    ended, files = tight.metric("requests_total"), tight.open_files()
    with tight.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(f"{head}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(1, socket.MSG_PEEK)  # it came
        if what == "an event stream":
            until(lambda: tight.metric("requests_total") == ended + 1, "it was never ended")
        until(lambda: tight.open_files() <= files, "its connection is still open")
        tight.wait_until_idle()


def test_a_slow_reader_gets_all_of_its_answer(tight: Server) -> None:
    """Slow is not gone: it takes far longer than the bound, a little at a time."""
    content = encode(Image.effect_noise((1500, 1500), 60), "JPEG", quality=5)
    body = PART + content + b'\r\n--a\r\nContent-Disposition: form-data; name="t"\r\n\r\n999\r\n--a--\r\n'
    connection = tight.connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    connection.sendall(f"{FORM}\r\nConnection: close\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    received, start = b"", time.monotonic()
    while piece := connection.recv(40_000):
        received += piece
        time.sleep(0.05)
    connection.close()
    assert time.monotonic() - start > 2
    head, _, png = received.partition(b"\r\n\r\n")
    assert b"200 OK" in head
    assert pixels(png).shape == (1500, 1500)


def test_too_large_a_head_gets_431_and_no_http_400(tight: Server) -> None:
    whole = tight.get("/health", headers={"x-long": "x" * 5000})
    assert_problem(whole, 431)
    with tight.connect() as connection:  # one that never ends
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 5000)
        status, problem = answer(connection)
        assert (status, problem["type"]) == (431, whole.json()["type"])
    with tight.connect() as connection:
        connection.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
        status, problem = answer(connection)
        assert (status, problem["type"]) == (400, "urn:ddpm:problem:bad-request")


def test_a_body_that_breaks_its_own_form_ends_its_request(tight: Server) -> None:
    """What is no HTTP any more after its head was accepted: no answer twice, nothing left running, no error logged."""
    head = DRAW + "image/png\r\nTransfer-Encoding: chunked\r\nHost: x\r\n\r\n"
    for rest in (b"zz\r\n", b"5\r\nhello world\r\n"):
        with tight.connect() as connection:
            connection.sendall(head.encode() + rest)
            assert answer(connection)[0] == 400
    body = b'{"n": 8, "steps": 1000, "sampler": "ddpm"}'
    with tight.send(DRAW + "image/png", body) as connection:
        until(lambda: tight.metric("slots_running") > 0, "it never ran")
        connection.sendall(b"\0\0 no second request\r\n\r\n")
    tight.wait_until_idle()
    assert "Traceback" not in tight.logged()


def test_what_is_no_http_after_a_head_request_has_no_body(tight: Server) -> None:
    with tight.connect() as connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        closed_after(connection)
    assert tight.get("/livez").status_code == 200
    assert "Traceback" not in tight.logged()


def test_a_client_that_has_sent_more_and_leaves_is_seen_to_leave(tight: Server) -> None:
    """The first byte of a next request must not hide the end of the connection."""
    with tight.send(DRAW + "image/png", b'{"n": 64, "steps": 1000, "sampler": "ddpm"}') as connection:
        until(lambda: tight.metric("slots_running") > 0, "it never ran")
        connection.sendall(b"\r\nGET /")
        time.sleep(0.1)
    tight.wait_until_idle(10)


def test_connections_that_end_badly_do_not_spoil_the_end(model_dir: Path) -> None:
    """Many that were answered 400 and read nothing are being closed when SIGTERM comes."""
    with server(model=model_dir, exact=False, drain_s=2) as it, contextlib.ExitStack() as opened:
        connections = [opened.enter_context(it.connect()) for _ in range(20)]
        for i, connection in enumerate(connections):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(OSError):  # it may have been closed already
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * (20 + 6 * i) + b"no http\r\n\r\n")
        time.sleep(0.5)
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(30) == 0
        assert "LocalProtocolError" not in it.logged()


def test_connections_over_the_limit_get_503_and_probes_their_answer(tight: Server) -> None:
    """And when some have gone, there is room again."""
    held = [tight.send(DRAW + "image/png", b'{"n": 8, "steps": 1000, "sampler": "ddpm"}') for _ in range(8)]
    time.sleep(0.3)
    refused = tight.post("/generate", json={"steps": 1})
    assert_problem(refused, 503)
    assert refused.headers["retry-after"] == "1"
    assert tight.get("/livez").status_code == 200
    assert tight.get("/readyz").status_code == 200
    for connection in held:
        connection.close()
    tight.wait_until_idle()
    assert tight.post("/generate", json={"steps": 1}).status_code == 200
    assert tight.metric('refused_total{reason="connections"}') >= 1


def test_nothing_grows_with_clients_that_came_and_went(model_dir: Path) -> None:
    """Files, threads and memory after many clients of every kind, compared with after some."""

    def state(it: Server) -> tuple[int, int, int]:
        status = Path(f"/proc/{it.process.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        return it.open_files(), int(fields["Threads"]), int(fields["VmRSS"].split()[0])

    def come_and_go(it: Server, times: int) -> None:
        for i in range(times):
            with it.send(DRAW + "text/event-stream", b'{"n": 4, "steps": 100, "sampler": "ddpm"}'):
                pass
            with it.send(FORM, PART + b"x" * 50_000, length=90_000):
                pass
            with it.connect():
                pass
            it.post("/generate", json={"steps": 1, "seed": i}, headers={"x-request-id": f"id-{i}"})
            it.get(f"/images/tiny/ddim-2/{i % 10}/{i}.png")
            it.post("/noise", files={"image": ("x", encode_grey())}, data={"t": "5"})
        it.wait_until_idle()
        time.sleep(0.5)

    with server(model=model_dir) as it:
        come_and_go(it, 50)
        files, threads, memory_kib = state(it)
        come_and_go(it, 100)
        after = state(it)
        assert after[0] <= files + 2
        assert after[1] <= threads + 2
        assert after[2] < memory_kib * 1.05


# ---- a file system that cannot be written to


def test_uploads_need_no_disk(model_dir: Path) -> None:
    """The process may not write a byte to any file, its log among them: what a read-only root means, and more."""
    picture = encode(Image.effect_noise((3000, 2900), 60))
    assert len(picture) > 8 * 2**20
    with server(model=model_dir) as it, ThreadPoolExecutor(2) as pool:
        resource.prlimit(it.process.pid, resource.RLIMIT_FSIZE, (0, 0))
        both = [
            pool.submit(it.post, path, files={"image": ("x", picture)}, data={"t": "5"})
            for path in ("/noise", "/denoise")
        ]
        assert [answer.result().status_code for answer in both] == [200, 200]
