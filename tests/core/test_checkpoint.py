"""Model directories: both layouts, refusals that name the file and the field, files that are never half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_core import checkpoint, sampling
from ddpm_core.checkpoint import WEIGHTS_NAME, CheckpointError, load_model, write_atomically
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("AttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=8,
    attention_head_dim=None,
    num_class_embeds=4,
)
SCHEDULER = SchedulerConfig(
    num_train_timesteps=100,
    beta_schedule="squaredcos_cap_v2",
    variance_type="fixed_large",
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    clip_sample_range=0.9,
)
UNET_JSON, SCHEDULER_JSON = Path("unet/config.json"), Path("scheduler/scheduler_config.json")
WEIGHTS = Path("unet") / WEIGHTS_NAME


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that no test changes."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    checkpoint.save_model(directory, UNet(CONFIG).state_dict(), CONFIG, SCHEDULER)
    return directory


@pytest.fixture
def model_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def flatten(model_dir: Path) -> Path:
    """The same model in the old layout, all files side by side."""
    flat = model_dir.with_name("flat")
    flat.mkdir()
    for path in (UNET_JSON, SCHEDULER_JSON, WEIGHTS, Path("model_index.json")):
        shutil.copy(model_dir / path, flat)
    return flat


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(model_dir: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(model_dir)
    return str(caught.value)


# What loads


def test_a_saved_model_loads_as_it_was_saved(saved: Path) -> None:
    model = load_model(saved)
    assert model.name == "model"
    assert (model.config, model.scheduler) == (CONFIG, SCHEDULER)
    assert model.schedule.num_train_steps == 100
    assert model.null_label == 3
    assert model.sha256 == checkpoint.sha256_of(saved / WEIGHTS)
    weights = load_file(saved / WEIGHTS)
    assert all(torch.equal(v, weights[k]) for k, v in model.net.state_dict().items())
    assert not model.net.training
    assert not any(p.requires_grad for p in model.net.parameters())


def test_save_model_returns_the_sha256_of_its_weights_and_stores_float32(tmp_path: Path) -> None:
    weights = UNet(CONFIG).double().state_dict()
    sha256 = checkpoint.save_model(tmp_path, weights, CONFIG, SCHEDULER)
    assert sha256 == checkpoint.sha256_of(tmp_path / WEIGHTS)
    assert {v.dtype for v in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


def test_the_flat_layout_loads_to_the_same_model(model_dir: Path) -> None:
    nested, flat = load_model(model_dir), load_model(flatten(model_dir))
    assert flat.name == "flat"
    assert (flat.config, flat.scheduler, flat.sha256) == (nested.config, nested.scheduler, nested.sha256)
    assert all(torch.equal(v, flat.net.state_dict()[k]) for k, v in nested.net.state_dict().items())


def test_a_models_plan_and_denoiser_follow_its_config(saved: Path) -> None:
    model = load_model(saved)
    plan = model.plan("ddpm", 10)
    assert plan.timesteps.tolist() == [*range(99, 0, -10)]  # trailing
    assert float(plan.d[0] ** 2) == pytest.approx(1 - plan.alpha_bars[0] / plan.alpha_bars[1])  # fixed_large
    denoiser = model.denoiser(model.network(torch.device("cpu")))
    assert (denoiser.prediction, denoiser.clip, denoiser.null_label) == ("v_prediction", 0.9, 3)


def test_clip_sample_false_clips_nothing(model_dir: Path) -> None:
    edit(model_dir / SCHEDULER_JSON, clip_sample=False)
    assert load_model(model_dir).denoiser(lambda x_t, t, label: x_t).clip is None


def test_notes_and_fields_without_effect_are_accepted(model_dir: Path) -> None:
    edit(model_dir / UNET_JSON, _diffusers_version="0.1", _name_or_path="x")
    edit(model_dir / SCHEDULER_JSON, _diffusers_version="0.1", thresholding=False, dynamic_thresholding_ratio=0.9)
    assert load_model(model_dir).scheduler == SCHEDULER


def test_trained_betas_are_the_schedule(model_dir: Path) -> None:
    edit(model_dir / SCHEDULER_JSON, trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)
    assert load_model(model_dir).schedule.betas.tolist() == [0.1, 0.2, 0.3]


def test_a_schedule_that_ends_without_signal_is_refused_for_epsilon_alone(model_dir: Path) -> None:
    """alpha_bar_T = 0: v and x_0 predictions give x_0 there, eps does not."""
    edit(model_dir / SCHEDULER_JSON, trained_betas=[*[0.01] * 99, 1.0])
    model = load_model(model_dir)
    images = sampling.generate(model, torch.device("cpu"), [0], [0], sampler="fast")
    assert images.shape == (1, 1, 8, 8)
    edit(model_dir / SCHEDULER_JSON, prediction_type="epsilon")
    assert "trained_betas ends in 1" in refusal(model_dir)


# Refusals: the message names the file and what is wrong in it


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder_hid_dim", 32),
        ("time_embedding_type", "fourier"),
        ("class_embed_type", "timestep"),
        ("mid_block_type", "UNetMidBlock3D"),
        ("down_block_types", ["SkipDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"]),
        ("act_fn", "gelu"),
        ("downsample_type", "resnet"),
        ("upsample_type", "resnet"),
        ("downsample_padding", 2),
        ("resnet_time_scale_shift", "scale_shift"),
        ("norm_num_groups", 3),
        ("attention_head_dim", 5),
        ("attn_norm_num_groups", 3),
        ("sample_size", None),
        ("sample_size", "8"),
        ("sample_size", -8),
        ("in_channels", 0),
        ("layers_per_block", 1.5),
        ("norm_num_groups", None),
        ("norm_num_groups", 0),
        ("block_out_channels", []),
        ("num_class_embeds", True),
        ("dropout", 1.5),
        ("mid_block_scale_factor", 0),
        ("norm_eps", "x"),
        ("freq_shift", 4),
        ("flip_sin_to_cos", "yes"),
        ("add_attention", None),
        ("center_input_sample", 2),
    ],
)
def test_a_unet_field_that_is_not_honoured_is_refused_by_name(model_dir: Path, field: str, value: object) -> None:
    edit(model_dir / UNET_JSON, **{field: value})
    message = refusal(model_dir)
    assert message.startswith(str(model_dir / UNET_JSON))
    assert field in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_karras_sigmas", True),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("set_alpha_to_one", False),
        ("variance_type", "learned_range"),
        ("variance_type", "fixed_small_log"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "karras"),
        ("beta_schedule", "sigmoid"),
        ("trained_betas", [*[0.01] * 99, 2.0]),
        ("trained_betas", [0.1, 0.2]),
        ("_class_name", "IPNDMScheduler"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 99.5),
        ("beta_end", 1.5),
        ("clip_sample", "no"),
        ("clip_sample_range", -1),
        ("clip_sample_range", "big"),
        ("steps_offset", -5),
        ("steps_offset", "1"),
    ],
)
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_scheduler_field_that_is_not_honoured_is_refused_by_name(
    model_dir: Path, field: str, value: object, flat: bool
) -> None:
    if flat:
        model_dir = flatten(model_dir)
    path = model_dir / (SCHEDULER_JSON.name if flat else SCHEDULER_JSON)
    edit(path, **{field: value})
    message = refusal(model_dir)
    assert message.startswith(str(path))
    assert field.removeprefix("trained_") in message


def test_an_image_size_that_the_levels_cannot_halve_is_refused(model_dir: Path) -> None:
    edit(
        model_dir / UNET_JSON,
        sample_size=7,
        block_out_channels=[8, 8],
        down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
    )
    assert "sample_size=7 must be a multiple of 2" in refusal(model_dir)


@pytest.mark.parametrize("path", [UNET_JSON, SCHEDULER_JSON, WEIGHTS])
def test_a_missing_file_is_named(model_dir: Path, path: Path) -> None:
    (model_dir / path).unlink()
    assert str(model_dir / path) in refusal(model_dir)


def test_a_missing_directory_says_how_to_make_one(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in message
    assert "ddpm_core.train" in message


def test_pickled_weights_are_never_read(model_dir: Path) -> None:
    """A .bin beside the config does not stand in for the safetensors file."""
    torch.save(UNet(CONFIG).state_dict(), model_dir / "unet" / "diffusion_pytorch_model.bin")
    (model_dir / WEIGHTS).unlink()
    assert "safetensors" in refusal(model_dir)


@pytest.mark.parametrize("path", [UNET_JSON, SCHEDULER_JSON])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "not JSON"), (b"", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[1, 2]", "not list"), (b"7", "not int")],
)
def test_a_config_that_is_no_json_object_is_named(model_dir: Path, path: Path, content: bytes, reason: str) -> None:
    (model_dir / path).write_bytes(content)
    message = refusal(model_dir)
    assert str(model_dir / path) in message
    assert reason in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:7],
        lambda b: b[:100],
        lambda b: b[:-4],
        lambda b: b"\xff" * 8 + b[8:],
        lambda b: b * 2,
    ],
    ids=["empty", "cut_in_length", "cut_in_header", "cut_in_data", "absurd_header", "twice"],
)
def test_a_damaged_weights_file_is_named(model_dir: Path, damage: Callable[[bytes], bytes]) -> None:
    path = model_dir / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(model_dir).startswith(str(path))


def test_a_tensor_of_the_wrong_shape_a_missing_and_an_extra_one_are_named(model_dir: Path) -> None:
    path = model_dir / WEIGHTS
    weights = load_file(path)

    save_file({**weights, "conv_in.bias": torch.zeros(9)}, path)
    message = refusal(model_dir)
    assert message.startswith(str(path))
    assert "'conv_in.bias' has shape (9,), the config asks for (8,)" in message

    save_file({k: v for k, v in weights.items() if k != "conv_out.weight"}, path)
    assert "'conv_out.weight' is missing" in refusal(model_dir)

    save_file({**weights, "conv_extra.weight": torch.zeros(1)}, path)
    assert "'conv_extra.weight' is not part of this config" in refusal(model_dir)


# Files


def test_write_atomically_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, fails: str
) -> None:
    path = tmp_path / "file"
    if existing:
        path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail) if fails == "fsync" else monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if existing else [])


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync comes before the rename: a crash in between cannot leave an empty file under the real name."""
    seen: list[tuple[int, bool]] = []

    def watch(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_size, (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", watch)
    write_atomically(tmp_path / "file", b"12345")
    assert seen == [(5, False)]


def test_numbers_that_json_does_not_know_are_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.to_json({"loss": float("nan")})
