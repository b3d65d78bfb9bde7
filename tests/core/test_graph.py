"""The graph's own forms of the network's parts are the network, for every kind of part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddpm_core.graph import export_graph
from ddpm_core.network import OnnxNetwork, TorchNetwork
from ddpm_core.unet import UNet, UNetConfig
from tests.core.theirs import CIFAR10_NARROW


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_head_dim": 4, "num_class_embeds": 4},
        {"attention_head_dim": 3},
        {"attention_head_dim": None, "downsample_padding": 0, "center_input_sample": True, "freq_shift": 1},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2, "mid_block_scale_factor": 2.0},
        {"add_attention": False, "norm_eps": 1e-6},
        {
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "act_fn": "gelu",
            "time_embedding_type": "learned",
            "num_train_timesteps": 1000,
        },
    ],
)
def test_a_graph_computes_what_its_network_does(fields: dict[str, Any]) -> None:
    config = UNetConfig(
        sample_size=(8, 12), block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **fields,
    )  # fmt: skip
    assert_its_graph_is(config)


def test_the_graph_of_the_network_of_cifar10_is_the_network() -> None:
    """In colour, narrow."""
    assert_its_graph_is(CIFAR10_NARROW)


def assert_its_graph_is(config: UNetConfig) -> None:
    torch.manual_seed(0)
    net = UNet(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    graph = OnnxNetwork(export_graph(net, "abc"), net, "abc")
    labels = torch.arange(5) % 4 if config.num_class_embeds else None
    inputs = torch.randn(5, *config.image_shape), torch.rand(5) * 999, labels
    torch.testing.assert_close(graph(*inputs), TorchNetwork(net, torch.device("cpu"))(*inputs), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())  # it was copied
