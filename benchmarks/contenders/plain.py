"""FastAPI around a diffusers loop as most people write it: a sync endpoint, one lock, one request at a time.

The endpoint runs on the threads of a pool, each of which brings a pool of torch's, so two clients together get fewer
answers than one alone (`plain_one_client_rps` of serving.py). That is part of this way to serve.
"""

from __future__ import annotations

import os
import threading

import uvicorn
from fastapi import FastAPI, Response

from benchmarks.contenders.chain import Chain, DrawRequest, png

app = FastAPI()
chain = Chain()
lock = threading.Lock()  # the scheduler has state, and two loops at once would only share the cores


@app.post("/generate")
def generate(request: DrawRequest) -> Response:
    with lock:
        images = chain.draw(range(request.seed, request.seed + request.n), [request.label] * request.n, request.steps)
    return Response(png(images), media_type="image/png")


@app.get("/health")
def health() -> str:
    return "ok"


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["DDPM_PORT"]))
