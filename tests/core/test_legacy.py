"""What older revisions of diffusers wrote: mapped where its meaning is certain, else refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_core import legacy
from ddpm_core.checkpoint import WEIGHTS_NAME, CheckpointError, load_model, save_model
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.unet import UNet
from tests.core.theirs import CIFAR10_NARROW

OLD_FIELDS = {new: old for old, new in legacy.UNET_NAMES.items()}


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat directory in today's names that no test changes."""
    directory, flat = tmp_path_factory.mktemp("nested"), tmp_path_factory.mktemp("flat")
    torch.manual_seed(0)
    save_model(directory, UNet(CIFAR10_NARROW).state_dict(), CIFAR10_NARROW, SchedulerConfig())
    for path in [*(directory / "unet").iterdir(), *(directory / "scheduler").iterdir()]:
        shutil.copy(path, flat)
    return flat


@pytest.fixture
def old(today: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(today, tmp_path / "old"))


def rewrite(path: Path, change: Any) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def rename(path: Path, *names: tuple[str, str]) -> None:
    """The tensors of a file by other names: regular expressions, in this order."""
    tensors = load_file(path)
    for pattern, name in names:
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def same(found: UNet, wanted: UNet) -> bool:
    weights = wanted.state_dict()
    return all(torch.equal(tensor, weights[key]) for key, tensor in found.state_dict().items())


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    return str(caught.value)


OLD_ATTENTION = (
    (r"\.to_q\.", ".query."), (r"\.to_k\.", ".key."), (r"\.to_v\.", ".value."), (r"\.to_out\.0\.", ".proj_attn."),
)  # fmt: skip


def test_old_names_of_attention_load_as_diffusers_loads_them(today: Path, old: Path) -> None:
    rename(old / WEIGHTS_NAME, *OLD_ATTENTION)
    assert "mid_block.attentions.0.proj_attn.bias" in load_file(old / WEIGHTS_NAME)
    found, theirs = load_model(old).net, UNet2DModel.from_pretrained(old)
    assert same(found, load_model(today).net)
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in found.state_dict().items())


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("names", [OLD_ATTENTION, ()], ids=["old_names", "new_names"])
def test_projections_that_are_convolutions_of_one_pixel_load(
    today: Path, old: Path, names: tuple[tuple[str, str], ...], dims: int
) -> None:
    tensors = load_file(old / WEIGHTS_NAME)

    def as_convolution(key: str, tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape, *[1] * dims) if re.search(r"to_\w+(\.0)?\.weight", key) else tensor

    save_file({k: as_convolution(k, v) for k, v in tensors.items()}, old / WEIGHTS_NAME)
    rename(old / WEIGHTS_NAME, *names)
    assert same(load_model(old).net, load_model(today).net)


def test_a_convolution_of_more_pixels_is_no_projection(old: Path) -> None:
    tensors, key = load_file(old / WEIGHTS_NAME), "mid_block.attentions.0.to_q.weight"
    save_file({**tensors, key: tensors[key][:, :, None, None].expand(-1, -1, 3, 3).contiguous()}, old / WEIGHTS_NAME)
    assert f"'{key}' has shape (16, 16, 3, 3), the config asks for (16, 16)" in refusal(old)


def test_old_and_new_names_of_one_tensor_are_refused(old: Path) -> None:
    tensors = load_file(old / WEIGHTS_NAME)
    extra = tensors["mid_block.attentions.0.to_q.bias"].repeat(2)
    save_file({**tensors, "mid_block.attentions.0.query.bias": extra}, old / WEIGHTS_NAME)
    assert "'mid_block.attentions.0.query.bias' is there by two names" in refusal(old)


def as_of_july_2022(config: dict[str, Any]) -> dict[str, Any]:
    names = {"down_block_types", "up_block_types"}
    blocks = {k: [f"UNetRes{kind}" for kind in config[k]] if k in names else v for k, v in config.items()}
    then = {
        "center_input_sample", "downsample_padding", "dropout", "flip_sin_to_cos", "in_channels",
        "mid_block_scale_factor", "out_channels", "time_embedding_type",
    }  # fmt: skip
    fields = {OLD_FIELDS.get(k, k): v for k, v in blocks.items() if k in OLD_FIELDS or k in then}
    return {"_class_name": "UNetUnconditionalModel", "conv_resample": True, **fields}


def test_a_directory_of_july_2022_loads_as_todays(today: Path, old: Path) -> None:
    """The network was UNetUnconditionalModel then, with a tensor twice for every step down."""
    rewrite(old / "config.json", as_of_july_2022)
    tensors = load_file(old / WEIGHTS_NAME)
    twice = {k.replace(".conv.", ".op."): v.clone() for k, v in tensors.items() if ".downsamplers." in k}
    save_file({**tensors, **twice}, old / WEIGHTS_NAME)
    parts = (
        (r"^mid_block\.", "mid."),
        (r"^down_blocks\.", "downsample_blocks."),
        (r"^up_blocks\.", "upsample_blocks."),
    )
    rename(old / WEIGHTS_NAME, *parts, *OLD_ATTENTION)
    keys = load_file(old / WEIGHTS_NAME)
    assert {"mid.resnets.0.conv1.weight", "downsample_blocks.0.downsamplers.0.op.weight"} <= keys.keys()
    assert "block_channels" in (old / "config.json").read_text()
    found, wanted = load_model(old), load_model(today)
    assert found.config == wanted.config
    assert same(found.net, wanted.net)


def test_the_old_class_has_its_own_default() -> None:
    fields = legacy.unet_fields({"_class_name": "UNetUnconditionalModel"})
    assert fields["attention_head_dim"] == 32
    assert "attention_head_dim" not in legacy.unet_fields({"_class_name": "UNet2DModel"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_class_name": "UNetModel"}, "convert_ddpm_original_checkpoint_to_diffusers.py"),
        ({"ch_mult": [1, 2, 2, 2]}, "convert_ddpm_original_checkpoint_to_diffusers.py"),
        ({"resnet_eps": 1e-6}, "unknown field 'resnet_eps'"),  # beside norm_eps: which one is meant?
        ({"_class_name": "UNetUnconditionalModel", "conv_resample": False}, "conv_resample=False is not supported"),
        ({"num_res_blocks": 2, "resolution": 32}, "unknown field"),
    ],
)
def test_an_old_network_that_is_another_is_refused(old: Path, change: dict[str, Any], reason: str) -> None:
    rewrite(old / "config.json", lambda config: {**config, **change})
    message = refusal(old)
    assert message.startswith(f"{old / 'config.json'}: ")
    assert reason in message


def test_the_first_ddpm_scheduler_loads(old: Path) -> None:
    path = old / "scheduler_config.json"
    first = {
        "_class_name": "GaussianDDPMScheduler", "timesteps": 500, "beta_start": 0.0001, "beta_end": 0.02,
        "beta_schedule": "linear", "variance_type": "fixed_large", "clip_predicted_image": False,
        "tensor_format": "np", "timestep_values": None, "trained_betas": None,
    }  # fmt: skip
    rewrite(path, lambda config: first)
    wanted = SchedulerConfig(num_train_timesteps=500, variance_type="fixed_large", clip_sample=False)
    assert load_model(old).scheduler == wanted


@pytest.mark.parametrize(("predict_epsilon", "prediction"), [(True, "epsilon"), (False, "sample")])
def test_predict_epsilon_is_a_prediction_type(old: Path, predict_epsilon: bool, prediction: str) -> None:
    path = old / "scheduler_config.json"
    rewrite(path, lambda config: {k: v for k, v in config.items() if k != "prediction_type"})
    rewrite(path, lambda config: {**config, "predict_epsilon": predict_epsilon})
    assert load_model(old).scheduler.prediction_type == prediction
    rewrite(path, lambda config: {**config, "prediction_type": prediction})
    assert load_model(old).scheduler.prediction_type == prediction
    rewrite(path, lambda config: {**config, "prediction_type": "v_prediction"})
    assert f"predict_epsilon={predict_epsilon} and prediction_type='v_prediction' disagree" in refusal(old)


@pytest.mark.parametrize(
    ("field", "value"), [("timestep_values", [0, 10]), ("timesteps", 10), ("_class_name", "ScoreSdeVeScheduler")]
)
def test_an_old_scheduler_that_is_another_is_refused_by_name(old: Path, field: str, value: object) -> None:
    rewrite(old / "scheduler_config.json", lambda config: {**config, field: value})
    message = refusal(old)
    assert message.startswith(f"{old / 'scheduler_config.json'}: ")
    assert field in message
