"""The weights of a model directory: which file holds them, and its tensors in a network. Nothing is ever unpickled."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from ddpm_core import legacy
from ddpm_core.unet import UNet

log = logging.getLogger(__name__)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_VARIANT = re.compile(r"\.index\.(.+)\.json|diffusion_pytorch_model\.(.+?)(?:-\d+-of-\d+)?\.bin")  # in a file's name


def find(folder: Path) -> Path:
    """The weights file in a folder; a variant (fp16, ...) where there is one and no other.

    Raises:
        ValueError: there is none that can be read; the message says which files there are, and what to do.
    """
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return path
    if indices := sorted(folder.glob(f"{WEIGHTS_NAME}.index*.json"), key=lambda index: len(index.name)):
        raise ValueError(
            f"{path} is missing: the weights are in several files. Write one with diffusers: "
            f"`{_conversion(indices[0])}`"
        )
    variants = sorted(folder.glob(WEIGHTS_NAME.replace(".", ".*.", 1)))
    if len(variants) == 1:
        log.info("%s is read: there is no %s", variants[0], WEIGHTS_NAME)
        return variants[0]
    if variants:
        names = ", ".join(variant.name for variant in variants)
        raise ValueError(f"{path} is missing, and there are {names}: rename the one that is meant to it")
    if pickled := sorted(folder.glob("diffusion_pytorch_model*.bin")):
        raise ValueError(
            f"{path} is missing: only safetensors weights are read, never pickled ones like {pickled[0].name}, which "
            f"may run code. If you trust that file, convert it with diffusers: `{_conversion(pickled[0])}`"
        )
    raise ValueError(
        f"{path} is missing: only safetensors weights are read, never pickled ones (.bin), which diffusers' "
        "from_pretrained and save_pretrained convert"
    )


def _conversion(file: Path) -> str:
    """What writes one safetensors file of the weights that this file is of, in diffusers; by its name."""
    found = _VARIANT.search(file.name)
    arguments = [f'"{file.parent}"']
    if found:
        arguments.append(f'variant="{found[1] or found[2]}"')
    if file.suffix == ".bin":
        arguments.append("use_safetensors=False")
    return (
        f'UNet2DModel.from_pretrained({", ".join(arguments)}).save_pretrained("{file.parent}", max_shard_size="100GB")'
    )


def fill(net: UNet, content: bytes) -> None:
    """Gives a network the weights of a safetensors file, of any float type and in any revision's names.

    Raises:
        SafetensorError: the content is no such file, or damaged.
        ValueError: a tensor is missing, superfluous, of another shape or type, or not finite.
    """
    tensors = legacy.weights(load(content))
    check_shapes(tensors, net)
    net.load_state_dict(tensors)
    for key, tensor in net.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {key!r} holds numbers that are not finite: restore the file or train anew")


def check_shapes(tensors: Mapping[str, Tensor], net: UNet) -> None:
    """Raises ValueError where tensors are not those of a network."""
    wanted = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    for key in wanted.keys() ^ tensors.keys():
        raise ValueError(f"tensor {key!r} is {'missing' if key in wanted else 'not part of this config'}")
    for key, shape in wanted.items():
        if (found := tuple(tensors[key].shape)) != shape:
            raise ValueError(f"tensor {key!r} has shape {found}, the config asks for {shape}")
        if not tensors[key].is_floating_point():
            raise ValueError(f"tensor {key!r} is of {tensors[key].dtype}: weights must be of a float type")
