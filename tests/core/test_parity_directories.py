"""Directories that diffusers saved: whole chains of its networks in float64, and where we mean to differ."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from ddpm_core import checkpoint, legacy
from ddpm_core.checkpoint import Model, load_model
from ddpm_core.network import TorchNetwork
from ddpm_core.sampling import sample
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.unet import UNet, UNetConfig
from tests.core import theirs as oracle
from tests.core.theirs import CIFAR10_NARROW, inputs_of, largest_difference, start, their_ddim, their_ddpm, theirs_of
from tests.networks import DIGITS

CPU = torch.device("cpu")
TINY = UNetConfig(
    sample_size=8,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("DownBlock2D",),
    up_block_types=("AttnUpBlock2D",),
    norm_num_groups=4,
    attention_head_dim=4,
)
LABELLED = dataclasses.replace(DIGITS, no_label=False)  # all that diffusers knows of labels


@pytest.fixture(autouse=True, scope="module")
def float64_schedulers() -> Iterator[None]:
    with oracle.float64_schedulers():
        yield


def loud(config: UNetConfig) -> UNet2DModel:
    """Their network with outputs as large as eps: a chain of smaller ones would end in its clipping."""
    net = theirs_of(config).float()
    with torch.no_grad():
        net.conv_out.weight *= 15
    return net


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """google/ddpm-cifar10-32, narrow and with random weights, its files as they lie on the hub: flat, of July 2022."""
    directory = tmp_path_factory.mktemp("hub") / "ddpm-cifar10-32"
    loud(CIFAR10_NARROW).save_pretrained(directory)
    absent = {
        "add_attention", "attn_norm_num_groups", "class_embed_type", "downsample_type", "dropout", "mid_block_type",
        "num_class_embeds", "num_train_timesteps", "resnet_time_scale_shift", "time_embedding_dim", "upsample_type",
    }  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in absent}))
    scheduler = {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
        "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
        "variance_type": "fixed_large",
    }  # fmt: skip
    (directory / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (directory / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "UNet2DModel"]}))
    (directory / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    (directory / "modeling_ddpm.py").write_text("raise SystemExit('never run')\n")
    return directory


def network_of(directory: Path, subfolder: str | None = None) -> Any:
    """Their network in a directory as a function."""
    net = UNet2DModel.from_pretrained(directory, subfolder=subfolder).double().eval()

    @torch.inference_mode()
    def call(x: Tensor, t: int) -> Tensor:
        out: Tensor = net(x, t).sample
        return out

    return call


def our_states(model: Model, sampler: str, steps: int | None, seeds: list[int], eta: float = 0.0) -> list[Tensor]:
    denoiser = model.denoiser(TorchNetwork(model.net.double(), CPU))
    x = start(model.config.image_shape, seeds)
    return [s.x for s in sample(denoiser, model.plan(sampler, steps, eta=eta), x, seeds)]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Every state of the chain; and the images are not only their clipping."""
    assert largest_difference(ours, theirs) <= 1e-9
    assert float((ours[-1].abs() < 0.99).double().mean()) > 0.1


# Whole chains of real networks


def test_a_thousand_steps_of_ddpm_are_theirs(tmp_path: Path) -> None:
    scheduler = DDPMScheduler(variance_type="fixed_large")
    DDPMPipeline(loud(TINY), scheduler).save_pretrained(tmp_path)
    x = start(TINY_SHAPE, [5])
    theirs = their_ddpm(DDPMScheduler.from_pretrained(tmp_path / "scheduler"), network_of(tmp_path, "unet"), x, [5])
    ours = our_states(load_model(tmp_path), "ddpm", None, [5])
    assert len(ours) == 1000
    assert_close(ours, theirs)


TINY_SHAPE = TINY.image_shape


@pytest.mark.parametrize("steps", [20, 50])
def test_strided_ddpm_of_cifar10_is_theirs(cifar10: Path, steps: int) -> None:
    scheduler = DDPMScheduler.from_pretrained(cifar10)
    scheduler.set_timesteps(steps)
    theirs = their_ddpm(scheduler, network_of(cifar10), start(CIFAR10_NARROW.image_shape, [5, 6]), [5, 6])
    model = load_model(cifar10)
    assert (model.name, model.scheduler.variance_type) == ("ddpm-cifar10-32", "fixed_large")
    assert_close(our_states(model, "ddpm", steps, [5, 6]), theirs)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_fifty_steps_of_ddim_of_cifar10_are_theirs(cifar10: Path, eta: float) -> None:
    scheduler = DDIMScheduler.from_pretrained(cifar10)
    scheduler.set_timesteps(50)
    x = start(CIFAR10_NARROW.image_shape, [5, 6])
    theirs = their_ddim(scheduler, network_of(cifar10), x, eta, [5, 6])
    assert_close(our_states(load_model(cifar10), "ddim", 50, [5, 6], eta), theirs)


def toy(x_t: Tensor, t: Tensor | int, label: Tensor | None = None) -> Tensor:
    """A network that says enough for x_0_hat to leave -1 .. 1 by far."""
    phase = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1, 1) / 200
    return 1.3 * torch.tanh(0.8 * x_t + 0.3 * x_t.flip(-1)) * torch.cos(phase) + 0.2 * torch.sin(3 * phase)


def read(scheduler: Any, directory: Path) -> Model:
    """A model in memory with the scheduler that diffusers saved."""
    scheduler.save_pretrained(directory)
    fields = checkpoint.read_json(directory / "scheduler_config.json")
    config = SchedulerConfig.from_dict(legacy.scheduler_fields(fields))
    return Model("toy", "-", UNet(TINY), config, config.schedule())


def toy_states(model: Model, sampler: str, steps: int, eta: float = 0.0) -> list[Tensor]:
    plan = model.plan(sampler, steps, eta=eta)
    return [s.x for s in sample(model.denoiser(toy), plan, start(TINY_SHAPE), oracle.SEEDS)]


THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.7}
FIELDS: dict[str, dict[str, Any]] = {
    "thresholding": THRESHOLDING,
    "thresholding_to_one": {"thresholding": True},
    "zero_snr_v": {
        "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing",
    },
    "zero_snr_sample": {
        "rescale_betas_zero_snr": True, "prediction_type": "sample", "timestep_spacing": "trailing",
        "beta_schedule": "scaled_linear", **THRESHOLDING,
    },
    "offset_and_wider_clipping": {"steps_offset": 1, "clip_sample_range": 1.3},
    "another_length": {"num_train_timesteps": 300, "beta_end": 0.05},
}  # fmt: skip


@pytest.mark.parametrize("fields", [*FIELDS.values(), {"variance_type": "fixed_small_log"}], ids=[*FIELDS, "small_log"])
def test_ddpm_configs_that_they_save_run_as_theirs(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = read(DDPMScheduler(**fields), tmp_path)
    scheduler = DDPMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(25)
    assert largest_difference(toy_states(model, "ddpm", 25), their_ddpm(scheduler, toy, start(TINY_SHAPE))) <= 1e-9


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_ddim_configs_that_they_save_run_as_theirs(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = read(DDIMScheduler(**fields), tmp_path)
    scheduler = DDIMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(25)
    theirs = their_ddim(scheduler, toy, start(TINY_SHAPE), 0.5)
    assert largest_difference(toy_states(model, "ddim", 25, 0.5), theirs) <= 1e-9


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_fields_that_a_config_leaves_out_are_as_their_class_has_them(kind: Any) -> None:
    config = SchedulerConfig.from_dict({"_class_name": kind.__name__})
    defaults = kind().config
    ours = {f.name for f in dataclasses.fields(SchedulerConfig)} - {"distilled_steps"}
    assert ours - {"variance_type"} == set(kind._get_init_keys(kind)) - {"self", "set_alpha_to_one", "variance_type"}
    assert {k: getattr(config, k) for k in ours} == {k: defaults.get(k, "fixed_small") for k in ours}


OF_BOTH = ("variance_type", "set_alpha_to_one")  # of one of the two, with a test of its own


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_what_other_schedulers_leave_in_a_config_changes_nothing(tmp_path: Path, kind: Any) -> None:
    """from_config takes along what it does not know, here of every class that they call compatible."""
    for number, other in enumerate(kind._get_compatibles()):
        if other is kind or "dummy" in other.__module__:
            continue
        fields = inspect.signature(other.__init__).parameters.values()
        remnants = {f.name: "theirs" for f in fields if f.name not in (*kind._get_init_keys(kind), *OF_BOTH)}
        assert read(kind.from_config(remnants), tmp_path / str(number)).scheduler == SchedulerConfig()
        saved = checkpoint.read_json(tmp_path / str(number) / "scheduler_config.json")
        assert remnants.items() <= saved.items()


# Networks


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CIFAR10_NARROW, sample_size=16),
        dataclasses.replace(TINY, sample_size=(8, 12)),
        LABELLED,
    ],
    ids=["colour", "not_square", "class_conditional"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@torch.no_grad()
def test_a_pipeline_that_they_saved_loads_here(tmp_path: Path, config: UNetConfig, dtype: torch.dtype) -> None:
    """Of weights in half precision too: they become float32, to the bit."""
    DDPMPipeline(theirs_of(config).to(dtype), DDPMScheduler()).save_pretrained(tmp_path / "named")
    theirs = UNet2DModel.from_pretrained(tmp_path / "named" / "unet").double().eval()
    model = load_model(tmp_path / "named")
    assert {p.dtype for p in model.net.parameters()} == {torch.float32}
    x, t, label = inputs_of(config)
    difference = model.net.double()(x, t, label) - theirs(x, t, class_labels=label).sample
    assert float(difference.abs().max()) <= 1e-9
    assert (model.name, model.config) == ("named", config)
    assert load_model(tmp_path / "named", "other").name == "other"


def test_their_classes_are_all_real_ones_and_ours_end_in_no_label(tmp_path: Path) -> None:
    """Only our marker says otherwise, and it outlives a loading and saving by diffusers."""
    DDPMPipeline(theirs_of(LABELLED).float(), DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    theirs = load_model(tmp_path / "theirs")
    assert (theirs.num_classes, theirs.null_label, theirs.takes_labels, theirs.needs_label) == (11, None, True, True)
    checkpoint.save_model(tmp_path / "ours", UNet(DIGITS).state_dict(), DIGITS, SchedulerConfig())
    DDPMPipeline.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    for name in ("ours", "again"):
        ours = load_model(tmp_path / name)
        assert (ours.num_classes, ours.null_label, ours.takes_labels, ours.needs_label) == (10, 10, True, False)
    unconditional = Model("", "", UNet(TINY), SchedulerConfig(), SchedulerConfig().schedule())
    assert (unconditional.num_classes, unconditional.null_label) == (0, None)
    assert (unconditional.takes_labels, unconditional.needs_label) == (False, False)


def test_diffusers_says_nothing_of_our_marker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save_model(tmp_path, UNet(DIGITS).state_dict(), DIGITS, SchedulerConfig())

    def told() -> list[str]:
        return [message for record in caplog.records if "no_label" in (message := record.getMessage())]

    diffusers.utils.logging.enable_propagation()
    try:
        UNet2DModel.from_pretrained(tmp_path / "unet")
        assert not told()
        config = json.loads((tmp_path / "unet" / "config.json").read_text())
        (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "no_label": True}))
        UNet2DModel.from_pretrained(tmp_path / "unet")
        assert told()  # of other names it would
    finally:
        diffusers.utils.logging.disable_propagation()


# Where diffusers errs we do not follow


def test_the_logarithm_of_the_large_variance_is_theirs_as_nan_and_ours_as_meant(tmp_path: Path) -> None:
    """They take the root of the logarithm itself."""
    model, scheduler = read(DDPMScheduler(variance_type="fixed_large_log"), tmp_path), None
    scheduler = DDPMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(25)
    assert their_ddpm(scheduler, toy, start(TINY_SHAPE))[0].isnan().any()
    meant = read(DDPMScheduler(variance_type="fixed_large"), tmp_path)
    assert largest_difference(toy_states(model, "ddpm", 25), toy_states(meant, "ddpm", 25)) == 0


@pytest.mark.parametrize(("fields", "last"), [({"timestep_spacing": "trailing"}, 99), ({"steps_offset": 1}, 1)])
def test_the_final_image_of_a_chain_that_ends_above_0_is_noisy_there_and_clean_here(
    tmp_path: Path, fields: dict[str, Any], last: int
) -> None:
    """They add noise where t > 0, whatever comes next; up to the last step the chains are one."""
    scheduler = DDPMScheduler(variance_type="fixed_large", **fields)
    model = read(scheduler, tmp_path)
    scheduler.set_timesteps(10)
    theirs, ours = their_ddpm(scheduler, toy, start(TINY_SHAPE)), toy_states(model, "ddpm", 10)
    assert largest_difference(ours[:-1], theirs[:-1]) <= 1e-9
    assert scheduler.timesteps[-1] == last
    noise_std = float((1 - scheduler.alphas_cumprod[last]).sqrt())
    assert float((theirs[-1] - ours[-1]).std()) == pytest.approx(noise_std, rel=0.1)
    assert float(ours[-1].abs().max()) <= 1


def test_ddim_keeps_eps_of_before_the_clipping_there_and_not_here(tmp_path: Path) -> None:
    """Unless they are told to re-derive it, as in the chains above; without clipping it is one."""
    for clip_sample in (True, False):
        model = read(DDIMScheduler(clip_sample=clip_sample), tmp_path)
        scheduler = DDIMScheduler.from_pretrained(tmp_path)
        scheduler.set_timesteps(20)
        theirs, ours = their_ddim(scheduler, toy, start(TINY_SHAPE), rederive=False), toy_states(model, "ddim", 20)
        scale = max(1.0, *(float(x.abs().max()) for x in theirs))
        assert (largest_difference(ours, theirs) > 0.1) == clip_sample
        assert clip_sample or largest_difference(ours, theirs) <= 1e-9 * scale


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_goes_to_its_next_timestep_here_and_beside_it_there(tmp_path: Path, spacing: str) -> None:
    """Where T // steps is not the distance of its timesteps, their step ends at another noise level than the next
    begins at: a network that knows x_0 makes every state sqrt(abar) x_0 + sqrt(1 - abar) eps of one eps."""
    x_0 = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)
    scheduler = DDIMScheduler(timestep_spacing=spacing, prediction_type="sample")
    model = read(scheduler, tmp_path)
    scheduler.set_timesteps(30)
    x_T = start(TINY_SHAPE, [1])
    theirs = their_ddim(scheduler, lambda x, t: x_0, x_T, seeds=[1])
    plan = model.plan("ddim", 30)
    ours = [s.x for s in sample(model.denoiser(lambda x, t, label: x_0), plan, x_T, [1])]
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    abar = torch.from_numpy(plan.alpha_bars.copy())
    eps = (x_T - abar[0].sqrt() * x_0) / (1 - abar[0]).sqrt()
    meant = [a.sqrt() * x_0 + (1 - a).sqrt() * eps for a in abar[1:]]
    assert largest_difference(ours[:-1], meant) <= 1e-9
    assert largest_difference(theirs[:-1], meant) > 1e-3


def test_a_chain_ends_at_the_clean_image_whatever_a_ddpm_config_holds_for_ddim(tmp_path: Path) -> None:
    """set_alpha_to_one=False, taken along from another scheduler, makes their DDIM stop one noising step before."""
    DDPMScheduler.from_config({"_class_name": "DDPMScheduler", "set_alpha_to_one": False}).save_pretrained(tmp_path)
    model = read(DDPMScheduler.from_pretrained(tmp_path), tmp_path)
    assert checkpoint.read_json(tmp_path / "scheduler_config.json")["set_alpha_to_one"] is False
    scheduler = DDIMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(20)
    theirs, ours = their_ddim(scheduler, toy, start(TINY_SHAPE)), toy_states(model, "ddim", 20)
    assert largest_difference(ours[:-1], theirs[:-1]) <= 1e-9
    assert largest_difference([theirs[-1]], [theirs[-2]]) <= 1e-9  # their last call changes nothing
    assert largest_difference([ours[-1]], [theirs[-1]]) > 1e-3


def test_their_own_pipelines_load_what_we_wrote_of_colours(tmp_path: Path, cifar10: Path) -> None:
    """And, with clipping alone, draw it: one step of their whole DDIM pipeline is finite."""
    model = load_model(cifar10)
    checkpoint.save_model(tmp_path / "ours", model.net.state_dict(), model.config, model.scheduler)
    again = load_model(tmp_path / "ours")
    assert (again.config, again.scheduler) == (model.config, model.scheduler)
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "ours")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)


def test_nothing_but_configs_and_safetensors_is_read(cifar10: Path, tmp_path: Path) -> None:
    """The rest of what lies in the repository may as well not be there."""
    names = ("config.json", "scheduler_config.json", checkpoint.WEIGHTS_NAME)
    for name in names:
        shutil.copy(cifar10 / name, tmp_path)
    alone, whole = load_model(tmp_path), load_model(cifar10)
    assert (alone.sha256, alone.config, alone.scheduler) == (whole.sha256, whole.config, whole.scheduler)
