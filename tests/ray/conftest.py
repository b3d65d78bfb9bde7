"""A real cluster of three nodes on this machine: a head that holds no engine, and two that hold one each."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent.parent
LONG_S = 180.0  # for what takes ten seconds on a quiet machine
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "DDPM_DEVICE": "cpu",
    "DDPM_QUEUE_SLOTS": "64",
    "DDPM_DRAIN_S": "20",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # a proxy starts slowly on busy cores
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
STORE = 100 * 2**20  # bytes of a node's object store: images are small


class Cluster:
    """The cluster, the service on it, and what may happen to both."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Nodes

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        self._nodes = Nodes(initialize_head=True, head_node_args=head)
        self.workers = [self._nodes.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port: int = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def deploy(self, **scale: Any) -> None:
        """The service, ready."""
        import ray
        from ray import serve

        from deploy.ray.service import Scale, build

        ray.init(address=self._nodes.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port})
        serve.run(build(Scale(**scale)), name="ddpm")
        self.wait_until(lambda: self.get("/readyz").status_code == 200)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=LONG_S, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=LONG_S, **options)

    def replicas(self) -> list[dict[str, Any]]:
        """What /health says of them."""
        found: list[dict[str, Any]] = self.get("/health").json()["replicas"]
        return found

    def slots(self) -> int:
        """Images in all engines, as they were two seconds ago at most."""
        return sum(replica["slots_running"] + replica["slots_waiting"] for replica in self.replicas())

    def counted(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, as it was two seconds ago at most."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == f"ddpm_{name}" and labels.items() <= sample.labels.items()
        )

    def wait_until(self, true: Callable[[], bool]) -> None:
        until = time.monotonic() + LONG_S
        while not true():
            assert time.monotonic() < until, "it did not come about"
            time.sleep(0.2)

    def wait_for(self, replicas: int) -> None:
        """Until so many are there."""
        self.wait_until(lambda: len(self.replicas()) == replicas)

    def kill(self, name: str) -> None:
        """SIGKILL of the process of a replica."""
        import ray

        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["name"].endswith(name):
                ray.kill(ray.get_actor(**actor))
                return
        raise LookupError(name)

    def lose_node(self) -> None:
        """One that holds an engine is gone at once, and its engine with it."""
        self._nodes.remove_node(self.workers.pop(0), allow_graceful=False)

    def add_node(self) -> None:
        self.workers.append(self._nodes.add_node(num_cpus=1, object_store_memory=STORE))

    def close(self) -> None:
        import ray
        from ray import serve

        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        self._nodes.shutdown()


@pytest.fixture(scope="session")
def cluster(model_dir: Path) -> Iterator[Cluster]:
    """Begins with one replica, may have two, and does not shrink."""
    pytest.importorskip("ray", reason="make test-ray installs it")
    environment = {**ENVIRONMENT, "DDPM_MODEL": str(model_dir)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    made = Cluster()
    try:
        made.deploy(min_replicas=1, max_replicas=2, waiting=0.5, upscale_delay_s=1, downscale_delay_s=3600)
        yield made
    finally:
        made.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Load:
    """Clients that ask again and again, in a thread of their own: what they got, and the bytes of each request."""

    def __init__(self, url: str, clients: int = 6) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.bytes: dict[tuple[int, int, str], str] = {}
        self._url, self._clients, self._over = url, clients, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def answered(self) -> int:
        return self.outcomes["right"]

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=LONG_S) as client:
            await asyncio.gather(*(self._ask(client, k) for k in range(self._clients)))

    async def _ask(self, client: httpx.AsyncClient, k: int) -> None:
        asked = 0
        while not self._over.is_set():
            asked += 1
            seed, n, sampler = (7 * asked + k) % 12, (1, 1, 4)[asked % 3], ("ddim", "ddpm", "dpmpp_2m")[asked // 3 % 3]
            body = {"seed": seed, "n": n, "sampler": sampler, "label": seed % 10, "steps": 25}
            try:
                response = await client.post("/generate", json=body, headers={"accept": "image/png"})
            except httpx.HTTPError as error:
                self.outcomes[type(error).__name__] += 1
                continue
            if response.status_code != 200:
                self.outcomes[f"{response.status_code}: {response.text[:200]}"] += 1
                continue
            digest = hashlib.sha256(response.content).hexdigest()
            same = self.bytes.setdefault((seed, n, sampler), digest) == digest
            self.outcomes["right" if same else "other bytes"] += 1
