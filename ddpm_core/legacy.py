"""Configs and weights as other revisions of diffusers wrote them, under the names that today's has for them.

Where a name's meaning is certain it is mapped: diffusers renamed its U-Net in July 2022 (commit 9c3820d05a, and
scripts/change_naming_configs_and_checkpoints.py), its attention in February 2023, and schedulers along the way. What
changes nothing in the network or the process is left out; every other field is left to be honoured or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ddpm_core.scheduler_config import DISTILLED
from ddpm_core.unet import NO_LABEL

UNET, BEFORE = "UNet2DModel", "UNetUnconditionalModel"  # today's class and that of July 2022
UNET_NAMES = {  # of the fields of BEFORE
    "image_size": "sample_size",
    "num_res_blocks": "layers_per_block",
    "block_channels": "block_out_channels",
    "down_blocks": "down_block_types",
    "up_blocks": "up_block_types",
    "downscale_freq_shift": "freq_shift",
    "resnet_num_groups": "norm_num_groups",
    "resnet_act_fn": "act_fn",
    "resnet_eps": "norm_eps",
    "num_head_channels": "attention_head_dim",
}
WITHOUT_EFFECT_ON_UNETS = {  # what diffusers' EMAModel.save_pretrained leaves in a config: how the average was made
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
SCHEDULER_NAMES = {"timesteps": "num_train_timesteps", "clip_predicted_image": "clip_sample"}
WITHOUT_EFFECT_ON_SCHEDULERS = {
    "tensor_format",  # numpy or torch, in 2022
    # Fields of the other schedulers, which from_config takes along and DDPMScheduler and DDIMScheduler do not read:
    "algorithm_type", "disable_corrector", "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type",
    "lambda_min_clipped", "lower_order_final", "predict_x0", "rho", "shift_terminal", "sigma_data", "sigma_max",
    "sigma_min", "sigma_schedule", "skip_prk_steps", "solver_order", "solver_p", "solver_type", "time_shift_type",
    "timestep_type", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas",
    "use_karras_sigmas", "use_lu_lambdas",
}  # fmt: skip
WEIGHT_NAMES = (  # in this order
    (r"^mid\.", "mid_block."),
    (r"^downsample_blocks\.", "down_blocks."),
    (r"^upsample_blocks\.", "up_blocks."),
    (r"(\battentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\battentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\battentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\battentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)


def unet_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's config.json in today's names.

    Raises:
        ValueError: it is of another network, or a field has the name of our marker.
    """
    _refuse_bare(NO_LABEL, config)
    name = config.get("_class_name", UNET)
    if name == "UNetModel" or "ch_mult" in config:
        raise ValueError(
            f"_class_name={name!r} with fields like ch_mult is the network of diffusers 0.0, whose weights are laid "
            "out in another way: convert it with its scripts/convert_ddpm_original_checkpoint_to_diffusers.py"
        )
    if name not in (UNET, BEFORE):
        raise ValueError(f"_class_name={name!r} is not supported; supported: {UNET}")
    fields = _renamed(config, UNET_NAMES)
    if name == BEFORE:
        fields.setdefault("attention_head_dim", 32)  # its own default
        if not fields.pop("conv_resample", True):
            raise ValueError("conv_resample=False is not supported; supported: True")
    for key in ("down_block_types", "up_block_types"):
        if isinstance(fields.get(key), list):
            fields[key] = [str(kind).removeprefix("UNetRes") for kind in fields[key]]
    return {k: v for k, v in fields.items() if k not in WITHOUT_EFFECT_ON_UNETS}


def scheduler_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json in today's names.

    Raises:
        ValueError: two names of one field disagree, timesteps are fixed by the config, or a field has the name of our
            marker.
    """
    _refuse_bare(DISTILLED, config)
    fields = _renamed(config, SCHEDULER_NAMES)
    if fields.get("_class_name") == "GaussianDDPMScheduler":
        fields["_class_name"] = "DDPMScheduler"
    if fields.pop("timestep_values", None) is not None:
        raise ValueError("timestep_values is not supported; supported: null")
    if (predict_epsilon := fields.pop("predict_epsilon", None)) is not None:
        wanted = "epsilon" if predict_epsilon else "sample"
        if fields.setdefault("prediction_type", wanted) != wanted:
            raise ValueError(
                f"predict_epsilon={predict_epsilon!r} and prediction_type={fields['prediction_type']!r} disagree: "
                "delete the one that is wrong"
            )
    return {k: v for k, v in fields.items() if k not in WITHOUT_EFFECT_ON_SCHEDULERS}


def _refuse_bare(marker: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError where a model's config has our marker without its underscore, as run.json alone has it."""
    if (name := marker.removeprefix("_")) in config:
        raise ValueError(f"unknown field {name!r}: delete it, or call it {marker!r} if this project's marker is meant")


def _renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """With today's names; where a config has both the old one stays, to be refused."""
    return {names[k] if k in names and names[k] not in config else k: v for k, v in config.items()}


def weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under today's keys; projections of attention, once 1x1 convolutions, as linear layers.

    Raises:
        ValueError: a tensor is there by its old name and by its new one.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if re.search(r"samplers\.0\.op\.", key):  # the same tensor as conv, saved twice
            continue
        name = key
        for old, new in WEIGHT_NAMES:
            name = re.sub(old, new, name)
        if name != key and name in tensors:
            raise ValueError(f"tensor {key!r} is there by two names, {name!r} too: delete the one that is wrong")
        if re.search(r"\battentions\.\d+\.to_", name) and tensor.ndim > 2 and set(tensor.shape[2:]) == {1}:
            tensor = tensor.flatten(1)
        found[name] = tensor
    return found
