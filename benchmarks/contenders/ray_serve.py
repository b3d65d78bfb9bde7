"""The service on a Ray cluster of this one machine: REPLICAS engines of one CPU each behind one ingress."""

from __future__ import annotations

import os
import signal

import ray
from ray import serve

from app.settings import Settings
from deploy.ray.service import Scale, build

os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if __name__ == "__main__":
    replicas, settings = int(os.environ["REPLICAS"]), Settings()
    ray.init(num_cpus=replicas, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
    serve.run(build(Scale(min_replicas=replicas, max_replicas=replicas)), name="ddpm")
    signal.pause()
