"""The network call: ONNX Runtime and torch give the same numbers, and a graph that is not the network is not used."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_core import checkpoint
from ddpm_core.checkpoint import GRAPH_NAME, Model, load_model, save_model
from ddpm_core.graph import export_graph, facts
from ddpm_core.network import GraphError, OnnxNetwork, Padded, TorchNetwork, flops
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.unet import UNet, UNetConfig

CPU = torch.device("cpu")
SMALL = UNetConfig(
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), layers_per_block=1,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, mid_block_type=None,
)  # fmt: skip


def small_net(seed: int) -> UNet:
    torch.manual_seed(seed)
    net = UNet(SMALL)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("heads", [None, 4, 3])
@pytest.mark.parametrize("attention", ["", "Attn"])
def test_operations_are_counted_as_torch_does(heads: int | None, attention: str) -> None:
    config = UNetConfig(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        attention_head_dim=heads, down_block_types=(f"{attention}DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", f"{attention}UpBlock2D"), norm_num_groups=4, num_class_embeds=5,
    )  # fmt: skip
    net = UNet(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 8, 8), torch.tensor([5]), torch.tensor([3]))
    assert flops(net) == counter.get_total_flops()
    assert not any(module._forward_hooks for module in net.modules())


@pytest.fixture(scope="module")
def graph() -> bytes:
    """Of small_net(0), an unconditional network of colour images."""
    return export_graph(small_net(0), "abc")


@pytest.fixture
def saved(tmp_path: Path) -> Model:
    """small_net(0) on disk, without a graph."""
    save_model(tmp_path / "small", small_net(0).state_dict(), SMALL, SchedulerConfig())
    return load_model(tmp_path / "small")


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, 8, 8, generator=generator), torch.rand(rows, generator=generator) * 999


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64])
def test_an_unconditional_graph_is_the_network_at_any_batch_size(graph: bytes, rows: int) -> None:
    net = small_net(0)
    ours, torchs = (
        network(*inputs(rows), None) for network in (OnnxNetwork(graph, net, "abc"), TorchNetwork(net, CPU))
    )
    assert ours.shape == torchs.shape
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


def test_a_conditional_graph_is_the_network_and_denoiser_uses_it(model_dir: Path) -> None:
    model = load_model(model_dir)
    network = model.network(CPU)
    assert isinstance(network, OnnxNetwork)
    x, t, label = torch.randn(5, 1, 28, 28), torch.tensor([0.0, 10.5, 300.0, 999.0, 1.0]), torch.arange(5) * 2
    torch.testing.assert_close(network(x, t, label), TorchNetwork(model.net, CPU)(x, t, label), rtol=1e-4, atol=1e-4)
    assert isinstance(model.denoiser(model.network(CPU)).network, OnnxNetwork)


def test_timesteps_of_a_plan_are_float64_and_mean_the_same(model_dir: Path) -> None:
    network = load_model(model_dir).network(CPU)
    x, label = torch.randn(1, 1, 28, 28), torch.tensor([3])
    one, other = (network(x, torch.tensor([500], dtype=dtype), label) for dtype in (torch.float64, torch.int64))
    assert torch.equal(one, other)


def test_without_a_graph_torch_runs_and_the_log_says_so(saved: Model, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(saved.network(CPU), TorchNetwork)
    assert "model.onnx is not there" in caplog.text


def test_a_graph_is_made_once_and_kept(saved: Model, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(saved.network(CPU, export=True), OnnxNetwork)
    assert "making it" in caplog.text
    caplog.clear()
    assert isinstance(saved.network(CPU, export=True), OnnxNetwork)
    assert isinstance(saved.network(CPU), OnnxNetwork)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_graph_of_other_weights_is_made_anew(
    saved: Model, graph: bytes, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    assert saved.graph is not None
    saved.graph.write_bytes(graph)
    assert isinstance(saved.network(CPU), TorchNetwork)
    assert "was made of other weights" in caplog.text
    assert isinstance(saved.network(CPU, export=True), OnnxNetwork)
    assert saved.graph.read_bytes() != graph


@pytest.mark.parametrize(("field", "value"), [("norm_eps", 1e-6), ("sample_size", 16)])
def test_a_graph_by_another_config_is_made_anew(
    saved: Model, graph: bytes, caplog: pytest.LogCaptureFixture, field: str, value: float
) -> None:  # fmt: skip
    """Whether its numbers are too close to tell, or its shapes are others."""
    assert saved.graph is not None
    saved.graph.write_bytes(restamped(graph, saved.net, saved.sha256))
    assert isinstance(saved.network(CPU), OnnxNetwork)
    path = saved.graph.with_name("config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    changed = load_model(path.parent.parent)
    assert isinstance(changed.network(CPU), TorchNetwork)
    assert "was made by another config.json" in caplog.text
    assert isinstance(changed.network(CPU, export=True), OnnxNetwork)


def test_a_graph_that_cannot_be_run_is_refused(graph: bytes) -> None:
    larger = UNet(dataclasses.replace(SMALL, sample_size=16))
    with pytest.raises(GraphError, match=r"^cannot be run: .*$"):
        OnnxNetwork(restamped(graph, larger, "abc"), larger, "abc")


@pytest.mark.parametrize(
    ("net", "sha256", "cut", "reason"),
    [
        (0, "abd", None, "other weights"),
        (1, "abc", None, "differs"),
        (0, "abc", 100, "damaged"),
        (0, "abc", 0, "damaged"),
    ],
)
def test_a_graph_that_is_not_the_network_is_refused(
    graph: bytes, net: int, sha256: str, cut: int | None, reason: str
) -> None:
    with pytest.raises(GraphError, match=reason):
        OnnxNetwork(graph[:cut], small_net(net), sha256)


def test_a_graph_of_another_form_is_refused(graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_core.graph.FORM", "other")
    with pytest.raises(GraphError, match="another version"):
        OnnxNetwork(graph, small_net(0), "abc")


def test_where_it_cannot_be_kept_it_is_used_all_the_same(
    saved: Model, graph: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(path: Path, content: bytes) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint, "write_atomically", read_only)
    monkeypatch.setattr(checkpoint, "export_graph", lambda net, sha256: restamped(graph, net, sha256))
    network = saved.network(CPU, export=True)
    assert isinstance(network, OnnxNetwork)
    assert "cannot be kept" in caplog.text
    assert saved.graph is not None
    assert not saved.graph.exists()


def restamped(graph: bytes, net: UNet, sha256: str) -> bytes:
    """The same graph, as if made of this network from a file of these weights."""
    import onnx

    model = onnx.load_from_string(graph)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts(net, sha256))
    return bytes(model.SerializeToString())


def test_where_it_cannot_be_made_torch_runs(
    saved: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(net: UNet, sha256: str) -> bytes:
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(checkpoint, "export_graph", fail)
    assert isinstance(saved.network(CPU, export=True), TorchNetwork)
    assert "no such operator" in caplog.text


def test_another_device_than_the_cpu_is_torchs(model_dir: Path) -> None:
    assert isinstance(load_model(model_dir).network(torch.device("meta")), TorchNetwork)


def test_the_graph_lies_beside_the_weights(model_dir: Path) -> None:
    assert (model_dir / "unet" / GRAPH_NAME).is_file()


@pytest.mark.parametrize("multiple", [1, 4, 7])
def test_padding_changes_sizes_and_nothing_else(multiple: int) -> None:
    sizes = []

    def network(x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        assert len(x_t) == len(t) == (len(x_t) if label is None else len(label))
        sizes.append(len(x_t))
        return x_t * 2

    for labelled in (True, False):
        for rows in range(1, 9):
            x, t = inputs(rows)
            out = Padded(network, multiple)(x, t, torch.arange(rows) if labelled else None)
            assert torch.equal(out, x * 2)
    assert all(size % multiple == 0 for size in sizes)


def test_nothing_is_reported_to_anybody(model_dir: Path, tmp_path: Path) -> None:
    """ONNX Runtime keeps an id of the machine and what it will send in the user's home, unless it is told not to."""
    run = (
        "import sys, torch; from pathlib import Path; from ddpm_core.checkpoint import load_model;"
        "load_model(Path(sys.argv[1])).network(torch.device('cpu'))"
    )
    env = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", run, str(model_dir)], env=env, check=True, timeout=120)
    assert list(tmp_path.rglob("*")) == []
