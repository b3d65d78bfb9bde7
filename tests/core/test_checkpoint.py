"""Model directories: both layouts, refusals that name the file and the field, files that are never half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from ddpm_core import checkpoint, sampling, weights
from ddpm_core.checkpoint import WEIGHTS_NAME, CheckpointError, WriteError, load_model, verify, write_atomically
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
    no_label=True,
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
    tensors = load_file(saved / WEIGHTS)
    assert all(torch.equal(v, tensors[k]) for k, v in model.net.state_dict().items())
    assert not model.net.training
    assert not any(p.requires_grad for p in model.net.parameters())


def test_save_model_returns_the_sha256_of_its_weights_and_stores_float32(tmp_path: Path) -> None:
    state_dict = UNet(CONFIG).double().state_dict()
    sha256 = checkpoint.save_model(tmp_path, state_dict, CONFIG, SCHEDULER)
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
    edit(model_dir / UNET_JSON, _diffusers_version="0.1", _name_or_path="x", decay=0.9999, use_ema_warmup=True)
    edit(model_dir / SCHEDULER_JSON, _diffusers_version="0.1", tensor_format="pt", use_karras_sigmas=True)
    model = load_model(model_dir)
    assert (model.config, model.scheduler) == (CONFIG, SCHEDULER)


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
        ("class_embed_type", "identity"),
        ("_class_name", "UNet2DConditionModel"),
        ("time_embedding_type", "learned"),  # of how many timesteps is not said
        ("out_channels", 2),
        ("mid_block_type", "UNetMidBlock3D"),
        ("down_block_types", ["SkipDownBlock2D"]),
        ("down_block_types", ["KDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"]),
        ("act_fn", "tanh"),
        ("downsample_type", "fir"),
        ("upsample_type", "fir"),
        ("downsample_padding", 2),
        ("resnet_time_scale_shift", "spatial"),
        ("norm_num_groups", 3),
        ("attention_head_dim", 9),
        ("attn_norm_num_groups", 3),
        ("sample_size", None),
        ("sample_size", "8"),
        ("sample_size", -8),
        ("in_channels", 0),
        ("layers_per_block", 1.5),
        ("norm_num_groups", None),
        ("norm_num_groups", 0),
        ("block_out_channels", []),
        ("block_out_channels", 8),
        ("down_block_types", None),
        ("up_block_types", "UpBlock2D"),
        ("sample_size", [8]),
        ("sample_size", [3, 8, 8]),
        ("in_channels", [1]),
        ("layers_per_block", [1, 1]),
        ("attention_head_dim", [8, 8]),
        ("num_train_timesteps", [100]),
        ("no_label", True),  # ours is _no_label
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
        ("use_karas_sigmas", True),
        ("thresholding", "yes"),
        ("dynamic_thresholding_ratio", 1.1),
        ("sample_max_value", 0.5),
        ("rescale_betas_zero_snr", 1),
        ("variance_type", "learned"),
        ("variance_type", "learned_range"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "karras"),
        ("beta_schedule", "exp"),
        ("trained_betas", [*[0.01] * 99, 2.0]),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", 0.1),
        ("distilled_steps", 2),  # ours is _distilled_steps
        ("trained_betas", ["0.1"] * 100),
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


def test_an_offset_that_leaves_no_room_is_refused(model_dir: Path) -> None:
    """Of 100 timesteps three leading ones begin at 66."""
    edit(model_dir / SCHEDULER_JSON, timestep_spacing="leading", steps_offset=33)
    assert load_model(model_dir).plan("ddim", 3).timesteps[0] == 99
    edit(model_dir / SCHEDULER_JSON, steps_offset=34)
    assert "steps_offset=34 is too large" in refusal(model_dir)


def test_a_marker_of_no_label_without_classes_is_refused(model_dir: Path) -> None:
    for embedded in (None, 1):
        edit(model_dir / UNET_JSON, num_class_embeds=embedded)
        assert '_no_label=true needs num_class_embeds, of one class or more and "no label"' in refusal(model_dir)


def test_a_ddim_chain_that_stops_before_the_clean_image_is_refused(model_dir: Path) -> None:
    """A DDPMScheduler does not read the field: there it is a remnant of another scheduler."""
    edit(model_dir / SCHEDULER_JSON, set_alpha_to_one=False)
    assert load_model(model_dir).scheduler == SCHEDULER
    edit(model_dir / SCHEDULER_JSON, _class_name="DDIMScheduler")
    message = refusal(model_dir)
    assert message.startswith(f"{model_dir / SCHEDULER_JSON}: set_alpha_to_one=False is not supported")
    assert "Set it to true" in message


def test_a_schedule_that_is_to_end_without_signal_is_refused_for_epsilon(model_dir: Path) -> None:
    edit(model_dir / SCHEDULER_JSON, rescale_betas_zero_snr=True)
    assert load_model(model_dir).schedule.alphas_cumprod[-1] == 0
    edit(model_dir / SCHEDULER_JSON, prediction_type="epsilon")
    assert "rescale_betas_zero_snr=True is supported for prediction_type sample and v_prediction" in refusal(model_dir)


def test_a_learned_time_embedding_of_too_few_timesteps_is_refused(model_dir: Path) -> None:
    edit(model_dir / UNET_JSON, time_embedding_type="learned", num_train_timesteps=99)
    assert "num_train_timesteps=99 of the learned time embedding must be at least the scheduler's, 100" in refusal(
        model_dir
    )


def test_a_pipeline_with_a_part_between_network_and_images_is_refused(model_dir: Path) -> None:
    """Its network draws latents; as images they would be noise."""
    index = model_dir / "model_index.json"
    edit(index, vqvae=["diffusers", "VQModel"])
    assert refusal(model_dir).startswith(f"{index}: component 'vqvae' is not supported")
    edit(index, vqvae=[None, None], noise_scheduler=["diffusers", "DDPMScheduler"])  # by its name of June 2022
    assert load_model(model_dir).config == CONFIG
    edit(index, requires_safety_checker=False, guidance=1.5, _class_name=["pipeline", "Mine"])  # no components
    assert load_model(model_dir).config == CONFIG


def test_an_image_size_that_the_levels_cannot_halve_is_refused(model_dir: Path) -> None:
    edit(
        model_dir / UNET_JSON,
        sample_size=7,
        block_out_channels=[8, 8],
        down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
    )
    assert "sample_size=7 must be a multiple of 2" in refusal(model_dir)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("folder", ["scheduler", "noise_scheduler", ""])
def test_the_scheduler_is_found_where_it_lies(model_dir: Path, flat: bool, folder: str) -> None:
    """Beside a U-Net of either layout, which diffusers saves alone too."""
    if flat:
        model_dir = flatten(model_dir)
    scheduler = model_dir / (SCHEDULER_JSON.name if flat else SCHEDULER_JSON)
    (model_dir / folder).mkdir(exist_ok=True)
    scheduler.rename(model_dir / folder / SCHEDULER_JSON.name)
    assert load_model(model_dir).scheduler == SCHEDULER


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_network_alone_says_how_to_give_it_its_scheduler(model_dir: Path, flat: bool) -> None:
    if flat:
        model_dir = flatten(model_dir)
    (model_dir / (SCHEDULER_JSON.name if flat else SCHEDULER_JSON)).unlink()
    message = refusal(model_dir)
    assert message.startswith(f"{model_dir / SCHEDULER_JSON} is missing: save the scheduler that the network was")
    (advice,) = re.findall("`(.*)`", message)
    eval(advice.replace("...", "clip_sample_range=0.7"), {"DDPMScheduler": DDPMScheduler})
    assert load_model(model_dir).scheduler.clip_sample_range == 0.7


def test_the_directory_above_a_model_is_asked_about(model_dir: Path) -> None:
    above = model_dir.parent
    assert refusal(above) == (
        f"{above / 'config.json'} is missing: is {above} a directory that diffusers saved, or one above it?"
    )


@pytest.mark.parametrize("path", [UNET_JSON, SCHEDULER_JSON, WEIGHTS])
def test_a_missing_file_is_named(model_dir: Path, path: Path) -> None:
    (model_dir / path).unlink()
    assert str(model_dir / path) in refusal(model_dir)


def test_a_missing_directory_says_how_to_make_one(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in message
    assert "ddpm_core.train" in message


def test_a_file_is_no_model_directory(model_dir: Path) -> None:
    message = refusal(model_dir / WEIGHTS)
    assert message == f"{model_dir / WEIGHTS} is no model directory that can be read: Not a directory"


def test_weights_that_the_disk_does_not_give_are_named(model_dir: Path) -> None:
    path = model_dir / WEIGHTS
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a regular file of which no byte can be read: EIO
    assert refusal(model_dir) == f"{path} cannot be read: Input/output error"


@pytest.mark.parametrize(
    ("closed", "reason"),
    [
        (WEIGHTS, f"{Path('model') / WEIGHTS} cannot be read"),
        (UNET_JSON, f"{Path('model') / UNET_JSON} cannot be read"),
        (Path("unet"), f"{Path('model') / UNET_JSON} cannot be read"),
        (Path(), "model is no model directory that can be read"),
    ],
)
def test_what_may_not_be_read_is_named(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: Path, reason: str
) -> None:
    """By anyone but root, who may read everything: root becomes nobody, who sees what lies here by relative paths."""
    user = os.geteuid()
    tmp_path.chmod(0o755)
    mode = (model_dir / closed).stat().st_mode
    (model_dir / closed).chmod(0)
    monkeypatch.chdir(tmp_path)
    os.seteuid(user or 65534)
    try:
        message = refusal(Path("model"))
    finally:
        os.seteuid(user)
        (model_dir / closed).chmod(mode)
    assert message == f"{reason}: Permission denied"


def test_pickled_weights_are_never_read(model_dir: Path) -> None:
    """A .bin beside the config does not stand in for the safetensors file."""
    torch.save(UNet(CONFIG).state_dict(), model_dir / "unet" / "diffusion_pytorch_model.bin")
    (model_dir / WEIGHTS).unlink()
    assert "safetensors" in refusal(model_dir)


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_pickle_by_the_name_of_weights_is_not_run(model_dir: Path, form: str) -> None:
    path, witness = model_dir / WEIGHTS, model_dir / "witness"

    class Mine:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(witness),)

    if form == "torch":
        torch.save({"conv_in.bias": Mine()}, path)
    else:
        path.write_bytes(pickle.dumps(Mine()))
    message = refusal(model_dir)
    assert message.startswith(f"{path} is damaged or no safetensors file (")
    assert message.endswith("restore it")
    assert not witness.exists()


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
        lambda b: (2**62).to_bytes(8, "little") + b[8:],
        lambda b: len(b).to_bytes(8, "little") + b[8:],
        lambda b: b * 2,
    ],
    ids=[
        "empty",
        "cut_in_length",
        "cut_in_header",
        "cut_in_data",
        "absurd_header",
        "huge_header",
        "long_header",
        "twice",
    ],
)
def test_a_damaged_weights_file_is_named(model_dir: Path, damage: Callable[[bytes], bytes]) -> None:
    path = model_dir / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(model_dir)
    assert message.startswith(f"{path} is damaged or no safetensors file (")
    assert "\n" not in message


def test_weights_that_are_cut_short_anywhere_are_refused(model_dir: Path) -> None:
    path = model_dir / WEIGHTS
    good = path.read_bytes()
    for length in random.Random(0).sample(range(len(good)), 30):
        path.write_bytes(good[:length])
        assert refusal(model_dir).startswith(f"{path} is damaged or no safetensors file (")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_the_tensor(model_dir: Path, value: float) -> None:
    path = model_dir / WEIGHTS
    tensors = load_file(path)
    tensors["mid_block.resnets.0.conv1.weight"][3, 2, 1, 0] = value
    save_file(tensors, path)
    message = refusal(model_dir)
    assert message.startswith(str(path))
    assert "'mid_block.resnets.0.conv1.weight' holds numbers that are not finite" in message


def test_weights_that_float32_cannot_hold_are_refused(model_dir: Path) -> None:
    """Finite in the file, infinite once they are loaded."""
    tensors = load_file(model_dir / WEIGHTS)
    save_file({**tensors, "conv_in.bias": torch.full((8,), 1e300, dtype=torch.float64)}, model_dir / WEIGHTS)
    assert "'conv_in.bias' holds numbers that are not finite" in refusal(model_dir)


def test_a_tensor_of_the_wrong_shape_a_missing_and_an_extra_one_are_named(model_dir: Path) -> None:
    path = model_dir / WEIGHTS
    tensors = load_file(path)

    save_file({**tensors, "conv_in.bias": torch.zeros(9)}, path)
    message = refusal(model_dir)
    assert message.startswith(str(path))
    assert "'conv_in.bias' has shape (9,), the config asks for (8,)" in message

    save_file({k: v for k, v in tensors.items() if k != "conv_out.weight"}, path)
    assert "'conv_out.weight' is missing" in refusal(model_dir)

    save_file({**tensors, "conv_extra.weight": torch.zeros(1)}, path)
    assert "'conv_extra.weight' is not part of this config" in refusal(model_dir)


# Whether the weights are those that are meant


def swap(model_dir: Path) -> None:
    """Another network's weights, of the same shapes."""
    torch.manual_seed(1)
    checkpoint.save_model(model_dir, UNet(CONFIG).state_dict(), CONFIG, SCHEDULER)


def write_card(model_dir: Path) -> str:
    """The card of the weights that are there; returns their sha256."""
    sha256 = load_model(model_dir).sha256
    (model_dir / "card.json").write_text(json.dumps({"model": {"sha256": sha256}}))
    return sha256


def doubt(model_dir: Path, sha256: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify(model_dir, load_model(model_dir), sha256)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_are_their_card_s_and_the_pin_s_are_good(model_dir: Path) -> None:
    model = load_model(model_dir)
    verify(model_dir, model)
    for digits in (12, 13, 64):
        verify(model_dir, model, model.sha256[:digits])
    write_card(model_dir)
    verify(model_dir, model)
    verify(model_dir, model, model.sha256)


def test_swapped_weights_are_told_by_card_and_pin(model_dir: Path) -> None:
    before = write_card(model_dir)
    swap(model_dir)
    after = load_model(model_dir).sha256  # the card does not keep them from being loaded: they may be measured next
    message = doubt(model_dir)
    assert f"weights in {model_dir} have sha256 {after}, card.json was written for {before}" in message
    assert f"`python -m ddpm_core.evaluate --model {model_dir} --card`" in message
    assert f"delete {model_dir / 'card.json'}" in message
    (model_dir / "card.json").unlink()
    verify(model_dir, load_model(model_dir))
    message = doubt(model_dir, before[:12])
    assert f"weights in {model_dir} have sha256 {after}, pinned is {before[:12]}: restore" in message


@pytest.mark.parametrize("by", ["card", "pin"])
def test_a_bit_that_flips_anywhere_in_the_weights_is_told(model_dir: Path, by: str) -> None:
    """Refused when they are loaded, where it makes a number infinite or spoils the header, else by card or pin."""
    path, pin = model_dir / WEIGHTS, write_card(model_dir)
    if by == "pin":
        (model_dir / "card.json").unlink()
    good = path.read_bytes()
    rng = random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    places = [0, header - 1, header, len(good) - 1, *(rng.randrange(len(good)) for _ in range(40))]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=str(model_dir)):
            verify(model_dir, load_model(model_dir), pin[:12] if by == "pin" else None)
    path.write_bytes(good)
    verify(model_dir, load_model(model_dir), pin)


@pytest.mark.parametrize("pin", ["", "a" * 11, "a" * 65, "A" * 12, "g" * 12, " " + "a" * 12, "a" * 12 + "\n"])
def test_what_is_no_pin_is_refused(model_dir: Path, pin: str) -> None:
    assert "must be the first 12 .. 64 digits of a sha256" in doubt(model_dir, pin)


def test_a_pin_is_the_start_of_the_digest_and_no_other_part(model_dir: Path) -> None:
    assert "pinned is" in doubt(model_dir, load_model(model_dir).sha256[1:])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"{}", b'{"model": {}}', b'{"model": "x"}', b'{"model": []}']
)
def test_a_card_that_names_no_weights_is_named(model_dir: Path, content: bytes) -> None:
    (model_dir / "card.json").write_bytes(content)
    message = doubt(model_dir)
    assert message.startswith(f"{model_dir / 'card.json'} does not say of which weights it is")
    assert "--card" in message


def test_the_sha256_is_of_the_weights_that_were_loaded(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes the file between two looks at it: there is one."""
    first, check = load_model(model_dir), weights.check_shapes

    def swapped_meanwhile(*args: Any) -> None:
        check(*args)
        swap(model_dir)

    monkeypatch.setattr(weights, "check_shapes", swapped_meanwhile)
    model = load_model(model_dir)
    assert model.sha256 == first.sha256
    assert torch.equal(model.net.state_dict()["conv_in.weight"], first.net.state_dict()["conv_in.weight"])
    assert load_model(model_dir).sha256 != first.sha256


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
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail) if fails == "fsync" else monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(WriteError) as caught:
        write_atomically(path, b"new")
    assert str(caught.value) == f"{path} cannot be written: No space left on device"
    assert caught.value.errno == errno.ENOSPC
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if existing else [])


def test_a_folder_that_cannot_be_made_is_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(WriteError, match=rf"{tmp_path / 'a' / 'b' / 'file'} cannot be written: Not a directory"):
        write_atomically(tmp_path / "a" / "b" / "file", b"")


def test_content_then_name_then_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the whole file before the rename: a crash cannot leave half of it under the real name; fsync of the
    folder after it: a crash cannot take the new name back."""
    path, seen = tmp_path / "file", list[tuple[str, object]]()
    path.write_bytes(b"old")
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        at = os.fstat(descriptor)
        seen.append(("fsync", "folder" if at.st_ino == tmp_path.stat().st_ino else at.st_size))

    def watched_replace(temporary: Path, target: Path) -> Path:
        seen.append(("replace", target.read_bytes()))
        return replace(temporary, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_atomically(path, b"12345")
    assert seen == [("fsync", 5), ("replace", b"old"), ("fsync", "folder")]
    assert path.read_bytes() == b"12345"


def test_temporaries_of_the_killed_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    left = [tmp_path / ".state.safetensors.4711.tmp", tmp_path / "model" / "unet" / ".config.json.1.tmp"]
    kept = [tmp_path / "state.safetensors", tmp_path / ".hidden", tmp_path / "model" / "a.1.tmp", tmp_path / ".my.tmp"]
    for path in (*left, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    checkpoint.clear_temporaries(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
    checkpoint.clear_temporaries(tmp_path / "nowhere")


def test_numbers_that_json_does_not_know_are_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.to_json({"loss": float("nan")})
