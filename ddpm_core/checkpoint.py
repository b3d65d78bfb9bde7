"""Model directories: the layout that diffusers' save_pretrained writes, and safe, atomic files.

    <model>/model_index.json  unet/config.json  unet/diffusion_pytorch_model.safetensors
            scheduler/scheduler_config.json

The old flat layout (config.json, *.safetensors and scheduler_config.json side by side) is read too (layout.py), and
what older revisions wrote (legacy.py). Nothing but these files is read, and none is run. Every config field is honoured
or refused by its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ddpm_core import layout, learned, legacy, samplers, weights
from ddpm_core.cuda_graph import CudaGraphNetwork
from ddpm_core.denoiser import Denoiser, Thresholding
from ddpm_core.graph import export_graph
from ddpm_core.network import GraphError, Network, OnnxNetwork, TorchNetwork
from ddpm_core.plans import SamplingPlan
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.unet import UNet, UNetConfig
from ddpm_core.weights import WEIGHTS_NAME as WEIGHTS_NAME

log = logging.getLogger(__name__)

CARD_NAME = "card.json"  # of a model directory: what was measured of its weights
GRAPH_NAME = "model.onnx"  # beside the weights: the network for ONNX Runtime


class CheckpointError(ValueError):
    """A model directory cannot be used; the message says which file, what is wrong and how to mend it."""


class WriteError(OSError):
    """A file cannot be written; what it held before is whole."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


@dataclasses.dataclass(frozen=True)
class Model:
    """What a model directory holds, ready to run: the network in evaluation mode, and its schedule."""

    name: str  # the directory's name, where it was given no other
    sha256: str  # of the weights file
    net: UNet
    scheduler: SchedulerConfig
    schedule: NoiseSchedule
    graph: Path | None = None  # where the network's graph lies, or would; None: the model is not on disk
    learned: Mapping[int, SamplingPlan] = dataclasses.field(default_factory=dict)  # fitted to it, by steps
    class_names: tuple[str, ...] = ()  # of its labels, where they are known (record.py)

    @property
    def config(self) -> UNetConfig:
        return self.net.config

    @property
    def distilled_steps(self) -> int | None:
        """The steps of ddim that its network is trained for, where it is trained for nothing else."""
        return self.scheduler.distilled_steps

    @property
    def num_classes(self) -> int:
        """Labels that a caller may ask for: 0 .. num_classes - 1; 0: it is unconditional."""
        return self.config.num_classes

    @property
    def null_label(self) -> int | None:
        """The label index that means "no label"; None where there is none."""
        return self.config.null_label

    @property
    def takes_labels(self) -> bool:
        """Whether its network is told a label in every call, if only the null label."""
        return self.config.num_class_embeds is not None

    @property
    def needs_label(self) -> bool:
        """Whether nothing can be drawn without a label: it takes labels and knows no "no label"."""
        return self.takes_labels and self.null_label is None

    def network(self, device: torch.device, *, export: bool = False) -> Network:
        """The raw network on a device: ONNX Runtime on a CPU where the graph beside the weights fits, else torch, whose
        calls are recorded on a GPU.

        Args:
            device: where; torch's network is moved there.
            export: make the graph, and keep it beside the weights, where there is none that fits.
        """
        if device.type == "cpu" and self.graph is not None:
            try:
                return self._from_graph(self.graph, export)
            except (GraphError, torch.onnx.OnnxExporterError) as error:
                log.warning("%s %s: torch runs the network, half as fast", self.graph, str(error).splitlines()[0])
        return CudaGraphNetwork(self.net, device) if device.type == "cuda" else TorchNetwork(self.net, device)

    def _from_graph(self, graph: Path, export: bool) -> OnnxNetwork:
        """Raises GraphError or OnnxExporterError where there is no graph that fits, and none can be made."""
        try:
            return OnnxNetwork(graph.read_bytes(), self.net, self.sha256)
        except OSError as error:
            lack = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        except GraphError as error:
            lack = str(error)
        if not export:
            raise GraphError(f"{lack}, and only a start of the service makes it")
        log.warning("%s %s: making it, which takes some seconds", graph, lack)
        content = export_graph(self.net, self.sha256)
        network = OnnxNetwork(content, self.net, self.sha256)
        try:
            write_atomically(graph, content)
        except OSError as error:
            log.warning("%s cannot be kept, every start makes it again: %s", graph, error.strerror)
        return network

    def denoiser(self, network: Network) -> Denoiser:
        """x_0_hat(x_t, t, label) from calls of `network`, as this model's configs have it."""
        s = self.scheduler
        clip: float | Thresholding | None = s.clip_sample_range if s.clip_sample else None
        if s.thresholding:
            clip = Thresholding(s.dynamic_thresholding_ratio, s.sample_max_value)
        return Denoiser(network, s.prediction_type, clip, self.null_label, self.needs_label)

    def plan(
        self, sampler: str, steps: int | None = None, *, eta: float = 0.0, start: int | None = None
    ) -> SamplingPlan:
        """A sampler's plan on this model's schedule, with the spacing and variance its config asks for."""
        s = self.scheduler
        return samplers.build(
            self.schedule, sampler, steps,
            eta=eta, start=start, variance=s.variance_type, spacing=s.timestep_spacing, offset=s.steps_offset,
            learned=self.learned, distilled_steps=self.distilled_steps,
        )  # fmt: skip


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary name, flushes to the disk, renames: path holds the old content or the new, never half.

    Raises:
        WriteError: it cannot; nothing temporary is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # until then a crash may take the new name back
        finally:
            os.close(folder)
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(path)) from error


def clear_temporaries(directory: Path) -> None:
    """Takes away what processes that were killed in write_atomically left there; nobody may be writing."""
    for path in directory.rglob(".*.[0-9]*.tmp"):
        path.unlink()


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def save_model(
    directory: Path, state_dict: Mapping[str, Tensor], config: UNetConfig, scheduler: SchedulerConfig
) -> str:
    """Writes a model directory that diffusers loads; its own pipelines pass no labels. Returns the weights' sha256."""
    tensors = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in state_dict.items()}
    content = save(tensors, metadata={"format": "pt"})
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    write_atomically(directory / "unet" / WEIGHTS_NAME, content)
    write_atomically(directory / "unet" / "config.json", to_json(config.to_dict()))
    write_atomically(directory / "scheduler" / "scheduler_config.json", to_json(scheduler.to_dict()))
    write_atomically(directory / "model_index.json", to_json(index))
    return hashlib.sha256(content).hexdigest()


def load_model(directory: Path, name: str | None = None) -> Model:
    """Reads a model directory, of any layout.

    Args:
        directory: where it lies.
        name: what the model is called; None: as its directory.

    Raises:
        CheckpointError: a file is missing, damaged, does not fit its config, or asks for what is not supported.
    """
    try:
        entries = {path.name for path in directory.iterdir()}
    except FileNotFoundError as error:
        message = f"no model directory at {directory}: train one with `python -m ddpm_core.train`"
        raise CheckpointError(message) from error
    except OSError as error:
        raise CheckpointError(f"{directory} is no model directory that can be read: {error.strerror}") from error
    if "model_index.json" in entries:
        check_components(directory / "model_index.json")
    unet_dir, scheduler_path = layout.unet_folder(directory), layout.scheduler_file(directory)
    config_path = unet_dir / "config.json"
    fields = read_json(config_path, f"is {directory} a directory that diffusers saved, or one above it?")
    try:
        config = UNetConfig.from_dict(legacy.unet_fields(fields))
        _ = config.image_shape
        net = UNet(config)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # torch raises the latter two for any size
        raise CheckpointError(f"{config_path}: {error}") from error
    fields = read_json(
        scheduler_path,
        "save the scheduler that the network was trained with, "
        f'`DDPMScheduler(...).save_pretrained("{directory / "scheduler"}")`',
    )
    try:
        scheduler = SchedulerConfig.from_dict(legacy.scheduler_fields(fields))
        schedule = scheduler.schedule()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{scheduler_path}: {error}") from error
    try:
        _check_fit(config, scheduler)
    except ValueError as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    try:
        weights_path = weights.find(unet_dir)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        content = weights_path.read_bytes()  # once: the sha256 is of what is loaded, whoever writes meanwhile
        weights.fill(net, content)
    except OSError as error:
        raise CheckpointError(f"{weights_path} cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{weights_path} is damaged or no safetensors file ({error}): restore it") from error
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{weights_path}: {error}") from error
    net.eval().requires_grad_(False)
    sha256 = hashlib.sha256(content).hexdigest()
    plans = _learned_plans(directory / learned.PLANS_NAME, sha256)
    return Model(name or directory.resolve().name, sha256, net, scheduler, schedule, unet_dir / GRAPH_NAME, plans)


def check_components(path: Path) -> None:
    """Raises CheckpointError where a model_index.json has a component that is not supported."""
    index = read_json(path)
    try:
        layout.check_components(index)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_fit(config: UNetConfig, scheduler: SchedulerConfig) -> None:
    """Raises ValueError where a network and a process do not go together."""
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"out_channels={config.out_channels} must be in_channels={config.in_channels}: a network that gives its "
            "own variance, or is given more than x_t, is not supported"
        )
    if config.time_embedding_type == "learned" and (config.num_train_timesteps or 0) < scheduler.num_train_timesteps:
        raise ValueError(
            f"num_train_timesteps={config.num_train_timesteps} of the learned time embedding must be at least the "
            f"scheduler's, {scheduler.num_train_timesteps}"
        )


def verify(directory: Path, model: Model, sha256: str | None = None) -> None:
    """Holds a model to what its weights are meant to be: to a pin, and to the card of its directory if there is one.

    load_model does not: weights just trained lie beside the card of the old ones until they are measured.

    Args:
        directory: where the model was loaded from.
        sha256: the pin, 12 digits or more from the start of the weights' sha256; None: there is none.

    Raises:
        CheckpointError: the weights are others, the pin is none, or card.json cannot be used.
    """
    if sha256 is not None:
        if not re.fullmatch("[0-9a-f]{12,64}", sha256):
            raise CheckpointError(f"the pin {sha256!r} must be the first 12 .. 64 digits of a sha256, in lower case")
        if not model.sha256.startswith(sha256):
            raise CheckpointError(
                f"the weights in {directory} have sha256 {model.sha256}, pinned is {sha256}: "
                "restore the weights that were pinned, or pin these if they are meant"
            )
    path = directory / CARD_NAME
    if not path.exists():
        return
    renew = f"measure them anew with `python -m ddpm_core.evaluate --model {directory} --card`, or delete {path}"
    try:
        measured = read_json(path)["model"]["sha256"]
    except (CheckpointError, KeyError, TypeError) as error:
        message = f"{path} does not say of which weights it is, in model.sha256 ({error}): {renew}"
        raise CheckpointError(message) from error
    if model.sha256 != measured:
        raise CheckpointError(
            f"the weights in {directory} have sha256 {model.sha256}, {CARD_NAME} was written for {measured}: they were "
            f"swapped, damaged or trained on. Restore the file, or {renew}"
        )


def _learned_plans(path: Path, sha256: str) -> dict[int, SamplingPlan]:
    """The learned plans beside the weights; none where they were fitted to others. Raises CheckpointError."""
    try:
        return learned.load(path, sha256)
    except learned.StalePlans as error:
        log.warning("%s %s: its plans are not offered; fit them anew with `python -m ddpm_core.fit_plans`", path, error)
        return {}
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error}; delete it, then fit it anew: `python -m ddpm_core.fit_plans`"
        ) from error


def read_json(path: Path, if_missing: str = "") -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where it is none, or is missing: then with what mends that."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        if if_missing and isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{path} is missing: {if_missing}") from error
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
