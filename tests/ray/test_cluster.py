"""The service on Ray Serve, really: it grows, streams, cancels and refuses as one process does, and loses nothing.

The tests share one cluster and run in their order: the first sees it grow.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests.ray.conftest import Cluster, Load
from tests.service.conftest import Service, assert_problem

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # what Ray warns of is Ray's


class Held:
    """Engines with so many images each, until it is left."""

    def __init__(self, cluster: Cluster, *images: int) -> None:
        self._client = httpx.Client(base_url=cluster.url, timeout=120)
        asked = [self._client.build_request("POST", "/generate", json={**LONG, "n": n}, headers=SSE) for n in images]
        self._streams = [self._client.send(request, stream=True) for request in asked]

    def __enter__(self) -> set[int]:
        """The statuses."""
        return {stream.status_code for stream in self._streams}

    def __exit__(self, *exc: object) -> None:
        for stream in self._streams:
            stream.close()
        self._client.close()


SSE = {"accept": "text/event-stream"}
LONG = {"n": 32, "sampler": "ddpm", "steps": 1000}
BODY = {"seed": 5, "label": 3, "n": 4, "steps": 6}


@pytest.fixture
def alone(model_dir: Path) -> Iterator[Service]:
    """The same model in this process."""
    service = Service(Settings(model=str(model_dir), device="cpu"))
    service.start()
    yield service
    service.stop()


def test_it_grows_when_images_wait(cluster: Cluster) -> None:
    assert len(cluster.replicas()) == 1
    with Load(cluster.url, clients=12) as load:
        cluster.wait_for(2)
        grown = load.answered()
        cluster.wait_until(lambda: load.answered() > grown + 12)
    assert set(load.outcomes) == {"right"}


def test_any_replica_gives_the_bytes_of_one_process(cluster: Cluster, alone: Service) -> None:
    with Load(cluster.url) as load:
        cluster.wait_until(lambda: len(load.bytes) >= 30 and load.answered() >= 60)
    assert set(load.outcomes) == {"right"}
    assert min(cluster.counted("images_total", replica=r["name"]) for r in cluster.replicas()) > 0
    for response in (cluster.post("/generate", json=BODY), cluster.post("/generate", json={**BODY, "steps": 150})):
        steps = int(response.headers["x-steps"])
        assert response.content == alone.generate({**BODY, "steps": steps}).content
    health, ours = cluster.get("/health").json()["engine"], alone.request("GET", "/health").json()["engine"]
    assert (health["exact"], health["fingerprint"]) == (True, ours["fingerprint"])


def test_streams_have_every_step(cluster: Cluster) -> None:
    with httpx.stream(
        "POST", f"{cluster.url}/generate", json={**BODY, "previews": 3}, headers=SSE, timeout=60
    ) as response:
        lines = list(response.iter_lines())
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data")]
    assert events == ["progress"] * (len(events) - 1) + ["completed"]
    steps = [event["step"] for event in data[:-1]]
    assert steps == sorted(steps)
    assert steps[-1] == 6
    shown = [preview["index"] for event in data[:-1] for preview in event["previews"]]
    assert sorted(shown) == [0, 0, 1, 1, 2, 2, 3, 3]
    plain = cluster.post("/generate", json=BODY, headers={"accept": "application/json"}).json()
    assert data[-1]["images"] == plain["images"]


def test_a_client_that_leaves_frees_its_slots(cluster: Cluster) -> None:
    before = cluster.counted("requests_total", outcome="cancelled")

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
            asked = client.post("/generate", json=LONG, headers={"x-request-id": "leaves"})
            asking = asyncio.create_task(asked)
            while (await client.get("/requests/leaves")).json().get("step", 0) == 0:
                await asyncio.sleep(0.05)
            asking.cancel()

    asyncio.run(leave())
    with httpx.stream("POST", f"{cluster.url}/generate", json=LONG, headers=SSE, timeout=60) as response:
        next(response.iter_bytes())
    cluster.wait_until(lambda: cluster.counted("requests_total", outcome="cancelled") == before + 2)
    assert cluster.slots() == 0


def test_a_request_is_ended_by_its_id(cluster: Cluster) -> None:
    before = cluster.counted("requests_total", outcome="cancelled")
    accepted = cluster.post("/generate", json=LONG, headers={"prefer": "respond-async", "x-request-id": "long"})
    assert accepted.status_code == 202
    cluster.wait_until(lambda: cluster.get("/requests/long").json()["step"] > 0)
    assert_problem(cluster.post("/generate", json=BODY, headers={"x-request-id": "long"}), 409)
    assert httpx.delete(f"{cluster.url}/requests/long", timeout=60).status_code == 204
    assert cluster.get("/requests/long").json()["state"] == "cancelled"
    cluster.wait_until(lambda: cluster.counted("requests_total", outcome="cancelled") == before + 1)


def test_an_asynchronous_request_outlives_a_client_that_waited(cluster: Cluster) -> None:
    body = {**LONG, "n": 1, "steps": 400}
    headers = {"prefer": "respond-async, wait=50", "x-request-id": "left"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{cluster.url}/generate", json=body, headers=headers, timeout=httpx.Timeout(60, read=0.2))
    cluster.wait_until(lambda: cluster.get("/requests/left").status_code == 200)
    cluster.wait_until(lambda: cluster.get("/requests/left").json()["state"] not in ("queued", "running"))
    assert cluster.get("/requests/left").json()["state"] == "completed"


def test_a_result_is_kept(cluster: Cluster) -> None:
    headers = {"prefer": "respond-async, wait=60", "x-request-id": "kept"}
    assert cluster.post("/generate", json=BODY, headers=headers).content == cluster.post("/generate", json=BODY).content


@pytest.mark.parametrize("headers", [{}, SSE])
def test_refusals_are_statuses(cluster: Cluster, headers: dict[str, str]) -> None:
    too_soon = cluster.post("/generate", json={**LONG, "deadline_ms": 1}, headers=headers)
    assert "deadline_ms" in assert_problem(too_soon, 422)["detail"]
    impossible = cluster.post("/generate", json={**BODY, "steps": 1001}, headers=headers)
    assert_problem(impossible, 422)
    with Held(cluster, 64, 64) as statuses:
        full = cluster.post("/generate", json=BODY, headers=headers)
        assert_problem(full, 429)
        assert int(full.headers["retry-after"]) >= 1
    assert statuses == {200}
    cluster.wait_until(lambda: cluster.slots() == 0)


def test_small_requests_are_refused_too_when_all_is_full(cluster: Cluster) -> None:
    """None waits where nobody counts it: each is accepted or refused at once."""

    async def many() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=120, limits=limits) as client:
            ask = [client.build_request("POST", "/generate", json={**LONG, "n": 1}, headers=SSE) for _ in range(200)]
            answers = await asyncio.gather(*(client.send(request, stream=True) for request in ask))
            for answer in answers:
                await answer.aclose()
            return [answer.status_code for answer in answers]

    statuses = asyncio.run(many())
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 128
    cluster.wait_until(lambda: cluster.slots() == 0)


def test_a_full_replica_is_passed_over(cluster: Cluster) -> None:
    """By its images: one large request fills it, and is still the only one."""
    with Held(cluster, 64) as statuses:
        cluster.wait_until(lambda: cluster.slots() == 64)
        small = [cluster.post("/generate", json=BODY).status_code for _ in range(10)]
    assert set(small) == statuses == {200}


def test_a_replica_that_dies_costs_nobody_an_answer(cluster: Cluster) -> None:
    with Load(cluster.url) as load:
        cluster.wait_until(lambda: load.answered() > 20)
        name = cluster.replicas()[0]["name"]
        cluster.kill(name)
        cluster.wait_until(lambda: name not in [replica["name"] for replica in cluster.replicas()])
        cluster.wait_for(2)
        lost = load.answered()
        cluster.wait_until(lambda: load.answered() > lost + 20)
    assert set(load.outcomes) == {"right"}


def test_nor_does_a_stream_notice(cluster: Cluster) -> None:
    body = {"n": 2, "sampler": "ddpm", "steps": 400, "seed": 9}
    alone = cluster.post("/generate", json=body, headers={"accept": "application/json"}).json()
    with httpx.stream("POST", f"{cluster.url}/generate", json=body, headers=SSE, timeout=180) as response:
        lines = response.iter_lines()
        steps: list[int] = []
        for line in lines:
            if line.startswith("data"):
                event = json.loads(line.removeprefix("data: "))
                if "images" in event:
                    break
                steps.append(event["step"])
                if len(steps) == 3:
                    for replica in cluster.replicas():
                        cluster.kill(replica["name"])
    assert event["images"] == alone["images"]
    assert steps == sorted(steps), "it does not go back"
    cluster.wait_for(2)


def test_a_node_that_is_lost_costs_nobody_an_answer(cluster: Cluster) -> None:
    with Load(cluster.url) as load:
        cluster.wait_until(lambda: load.answered() > 20)
        cluster.lose_node()
        cluster.wait_for(1)
        lost = load.answered()
        cluster.wait_until(lambda: load.answered() > lost + 20)
        cluster.add_node()
        cluster.wait_for(2)
    assert set(load.outcomes) == {"right"}
