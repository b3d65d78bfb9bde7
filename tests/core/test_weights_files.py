"""Which file of a directory holds the weights: what can be read is, and what cannot says how to mend it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from ddpm_core.checkpoint import WEIGHTS_NAME, CheckpointError, load_model
from tests.core.theirs import theirs_of
from tests.networks import EIGHT

FP16 = "diffusion_pytorch_model.fp16.safetensors"


def saved(directory: Path, **how: object) -> UNet2DModel:
    """A flat directory of diffusers, and the network in it."""
    net = theirs_of(EIGHT).float()
    net.save_pretrained(directory, **how)
    DDPMScheduler().save_pretrained(directory)
    return net


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert message.startswith(f"{directory / WEIGHTS_NAME} is missing")
    assert "\n" not in message
    return message


def run_advice(message: str) -> None:
    """What the message says in backquotes."""
    (advice,) = re.findall("`(.*)`", message)
    eval(advice, {"UNet2DModel": UNet2DModel})


def assert_loads(directory: Path, theirs: UNet2DModel) -> None:
    weights = load_model(directory).net.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({}, "diffusion_pytorch_model.bin"),
        ({"variant": "fp16"}, "diffusion_pytorch_model.fp16.bin"),
        ({"max_shard_size": "10KB"}, "diffusion_pytorch_model-00001-of-"),
        ({"max_shard_size": "10KB", "variant": "non_ema"}, "diffusion_pytorch_model.non_ema-00001-of-"),
    ],
)
def test_a_pickle_alone_is_refused_and_the_advice_mends_it(tmp_path: Path, how: dict[str, str], name: str) -> None:
    theirs = saved(tmp_path, safe_serialization=False, **how)
    message = refusal(tmp_path)
    assert f"never pickled ones like {name}" in message
    assert "If you trust that file" in message
    run_advice(message)
    assert_loads(tmp_path, theirs)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_are_refused_and_the_advice_mends_it(tmp_path: Path, variant: str | None) -> None:
    theirs = saved(tmp_path, max_shard_size="10KB", variant=variant)
    assert len(list(tmp_path.glob("diffusion_pytorch_model*-of-*.safetensors"))) > 1
    message = refusal(tmp_path)
    assert "several files" in message
    run_advice(message)
    assert_loads(tmp_path, theirs)


def test_the_only_variant_is_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = theirs_of(EIGHT).half()
    theirs.save_pretrained(tmp_path, variant="fp16")
    DDPMScheduler().save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        assert_loads(tmp_path, theirs.float())
    assert f"{tmp_path / FP16} is read" in caplog.text
    assert {p.dtype for p in load_model(tmp_path).net.parameters()} == {torch.float32}


def test_a_variant_does_not_stand_in_for_the_weights_themselves(tmp_path: Path) -> None:
    theirs = saved(tmp_path)
    (tmp_path / FP16).write_bytes(b"not looked at")
    assert_loads(tmp_path, theirs)


def test_one_of_several_variants_must_be_chosen(tmp_path: Path) -> None:
    theirs = saved(tmp_path)
    (tmp_path / WEIGHTS_NAME).rename(tmp_path / FP16)
    (tmp_path / "diffusion_pytorch_model.ema.safetensors").write_bytes(b"")
    message = refusal(tmp_path)
    assert f"there are diffusion_pytorch_model.ema.safetensors, {FP16}: rename" in message
    (tmp_path / FP16).rename(tmp_path / WEIGHTS_NAME)
    assert_loads(tmp_path, theirs)


def test_no_weights_at_all_say_what_is_read(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / "optimizer.bin").touch()  # of a training, not of the network
    assert "only safetensors weights are read, never pickled ones (.bin)" in refusal(tmp_path)


def test_weights_that_are_no_float_type_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    save_file({**tensors, "conv_in.bias": torch.zeros(8, dtype=torch.int8)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"'conv_in.bias' is of torch.int8: weights must be of a float type"):
        load_model(tmp_path)
