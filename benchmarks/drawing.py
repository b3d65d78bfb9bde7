"""Those that benchmarks/sampling.py compares: each draws n images by DDIM and returns one PNG of them."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import numpy as np
import torch
from diffusers import DDPMPipeline
from diffusers.utils import logging
from numpy.typing import NDArray

from app import images
from benchmarks.contenders.chain import Chain
from benchmarks.machine import MODEL, ROOT, version
from benchmarks.network import gflop
from benchmarks.turns import Side, seconds_of
from ddpm_core import data, sampling
from ddpm_core.checkpoint import load_model

STEPS, SEED = 20, 1
CPU = torch.device("cpu")
THREADS = torch.get_num_threads()
FORMATS = {"": torch.contiguous_format, "channels_last": torch.channels_last}

Draw = Callable[[int], bytes]
"""So many images as one PNG."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who draws, and how torch is set up for it."""

    library: str
    memory_format: str
    draw: Draw
    torch_threads: int = THREADS
    same_images: bool = True

    @property
    def name(self) -> str:
        return f"{self.library} {self.memory_format}".strip()

    def side(self, n: int) -> Side:
        def before() -> None:
            torch.set_num_threads(self.torch_threads)
            self.draw(1)

        return Side(functools.partial(self.draw, n), before)


def labels(n: int) -> list[int]:
    return [i % 10 for i in range(n)]


def sheet(pixels: NDArray[np.uint8]) -> bytes:
    """(B, C, H, W) as the service lays several images out."""
    return images.encode_png(images.grid(list(pixels), columns=math.ceil(math.sqrt(len(pixels)))), {})


def service(http: httpx.Client, **fields: Any) -> bytes:
    return http.post("/generate", json=fields, headers={"Accept": "image/png"}).raise_for_status().content


def contenders(http: httpx.Client, batches: Iterable[int]) -> tuple[list[Contender], list[dict[str, Any]]]:
    """All that are installed, and what their networks cost."""

    def over_http(n: int) -> bytes:
        return service(http, n=n, label=labels(n), sampler="ddim", steps=STEPS, seed=SEED)

    model = load_model(ROOT / MODEL)
    denoiser, plan = model.denoiser(model.network(CPU)), model.plan("ddim", STEPS)
    like = torch.empty(0, *model.config.image_shape)

    def in_process(n: int) -> bytes:
        seeds = range(SEED, SEED + n)
        x_T = sampling.draw_noise(seeds, 0, like)
        *_, last = sampling.sample(denoiser, plan, x_T, seeds, labels=torch.tensor(labels(n)))
        return sheet(data.to_uint8(last.x).numpy())

    found = [Contender("ours, HTTP", "", over_http), Contender("ours, in process", "", in_process, torch_threads=1)]
    given = {n: sampling.draw_noise(range(SEED, SEED + n), 0, like) for n in {1, *batches}}
    for name, memory_format in FORMATS.items():
        chain = Chain(memory_format)

        def diffusers(n: int, chain: Chain = chain) -> bytes:
            return sheet(chain.denoise(given[n], labels(n), STEPS)[:, None])

        found.append(Contender("diffusers", name, diffusers))
    x_t, t = torch.randn(1, *model.config.image_shape), torch.tensor([500])
    networks = [_network("ours and diffusers'", model.net, lambda: model.net(x_t, t.float(), torch.tensor([0])))]

    if version("denoising-diffusion-pytorch"):
        from benchmarks.contenders.lucidrains import Lucidrains

        for name, memory_format in FORMATS.items():
            theirs = Lucidrains(model.config.image_shape[-1], STEPS, memory_format)

            def lucidrains(n: int, theirs: Lucidrains = theirs) -> bytes:
                return sheet(theirs.draw(n)[:, None])

            found.append(Contender("lucidrains", name, lucidrains, same_images=False))
        networks.append(_network("lucidrains'", theirs.unet, lambda: theirs.unet(x_t, t)))
    return found, networks


@torch.no_grad()
def _network(name: str, net: torch.nn.Module, call: Callable[[], object]) -> dict[str, Any]:
    parameters = sum(p.numel() for p in net.parameters())
    return {"network": name, "parameters": parameters, "gflop_per_call": round(gflop(call), 4)}


def pipeline_s(memory_format: str, steps: int) -> float:
    """Seconds of diffusers' own pipeline for one image, the way to a PNG included."""
    logging.disable_progress_bar()
    pipeline = DDPMPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=FORMATS[memory_format])
    no_label = torch.tensor([pipeline.unet.config.num_class_embeds - 1])
    pipeline.unet.forward = functools.partial(pipeline.unet.forward, class_labels=no_label)  # it passes no labels

    def draw() -> None:
        pipeline(batch_size=1, num_inference_steps=steps).images[0].save(io.BytesIO(), "PNG")

    torch.set_num_threads(THREADS)
    return seconds_of(draw)
