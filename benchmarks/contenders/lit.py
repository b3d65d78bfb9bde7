"""LitServe with dynamic batching around the same diffusers loop: requests that came together are drawn together.

A batch is closed when it starts, and only requests of equal step count can share a loop; both are what its batching
gives a diffusion model. Its other settings are its defaults.
"""

import os

import litserve
import numpy as np
from fastapi import Response
from numpy.typing import NDArray

from benchmarks.contenders.chain import Chain, DrawRequest, png

Images = NDArray[np.uint8]


class Digits(litserve.LitAPI):
    """setup, predict and encode_response run in LitServe's worker process, which reads their annotations as types."""

    def setup(self, device: str) -> None:
        self.chain = Chain()

    def decode_request(self, request: DrawRequest) -> DrawRequest:
        return request

    def batch(self, inputs: list[DrawRequest]) -> list[DrawRequest]:
        return inputs

    def predict(self, requests: list[DrawRequest]) -> list[Images]:
        drawn: dict[int, Images] = {}
        for steps in {request.steps for request in requests}:
            same = [k for k, request in enumerate(requests) if request.steps == steps]
            seeds = [requests[k].seed + i for k in same for i in range(requests[k].n)]
            labels = [requests[k].label for k in same for _ in range(requests[k].n)]
            ends = np.cumsum([requests[k].n for k in same])[:-1]
            drawn |= dict(zip(same, np.split(self.chain.draw(seeds, labels, steps), ends), strict=True))
        return [drawn[k] for k in range(len(requests))]

    def unbatch(self, output: list[Images]) -> list[Images]:
        return output

    def encode_response(self, output: Images) -> Response:
        return Response(png(output), media_type="image/png")


if __name__ == "__main__":  # it starts processes that import this module again
    server = litserve.LitServer(Digits(max_batch_size=8, batch_timeout=0.005, api_path="/generate"), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(os.environ["DDPM_PORT"]), generate_client_file=False)
