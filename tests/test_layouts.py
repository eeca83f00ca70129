"""Networks with a layout of their own compute what they always did: files of weights that people have stay good.

The numbers were written down when the networks were; that they are right is shown elsewhere, by what is learnt.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from conditioning.semantic import SemanticConfig, SemanticEncoder
from ldm.classifier import NoisyClassifier, NoisyClassifierConfig
from ldm.mlp import MLP
from ldm.pixel_unet import PixelUNet, PixelUNetConfig
from train.recogniser_model import Recogniser, RecogniserConfig


def waves(shape: torch.Size, step: float) -> Tensor:
    """Numbers between -1 and 1 that no library's random numbers change."""
    return torch.sin(torch.arange(shape.numel(), dtype=torch.float64).square() * step).float().view(shape)


def filled(network: nn.Module) -> nn.Module:
    """With weights from a formula, of about the size that new ones have, and no zeros."""
    with torch.no_grad():
        for i, (name, weight) in enumerate([*network.named_parameters(), *network.named_buffers()]):
            if weight.is_floating_point():
                size = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3
                middle = weight.ndim == 1 and name.endswith(("weight", "var"))  # of a norm: about 1
                weight.copy_(middle + size * waves(weight.shape, 1.3 + 0.37 * i))
    return network.eval()


def pixel_unet(norm: str) -> Tensor:
    widths, one = (4, 8), (1, 1)
    config = PixelUNetConfig(
        block_out_channels=widths,
        layers_per_block=one,
        attention_heads=(0, 2),
        norm=norm,
        norm_num_groups=2,
        num_class_embeds=3,
    )
    x = waves(torch.Size((2, 3, 6, 4)), 0.7)
    return filled(PixelUNet(config))(x, torch.tensor([-0.3, 0.8]), torch.tensor([2, 0]))


def mlp() -> Tensor:
    network = filled(MLP(2, width=8, depth=2, num_class_embeds=3))
    return network(waves(torch.Size((2, 2)), 0.7), torch.tensor([-0.3, 0.8]), torch.tensor([2, 0]))


def classifier() -> Tensor:
    config = NoisyClassifierConfig(labels=("a", "b", "c"), block_out_channels=(4, 8), norm_num_groups=2)
    return filled(NoisyClassifier(config))(waves(torch.Size((2, 1, 6, 4)), 0.7), torch.tensor([0.2, 7.0]))


def semantic() -> Tensor:
    config = SemanticConfig(code_dim=3, block_out_channels=(4, 8), norm_num_groups=2, fields=2)
    return filled(SemanticEncoder(config)).encode(waves(torch.Size((2, 3, 8, 6)), 0.7))  # type: ignore[operator]


def recogniser() -> Tensor:
    config = RecogniserConfig(tasks=(("class", ("a", "b", "c")),), sample_size=8, widths=(4, 8))
    return filled(Recogniser(config))(30 * waves(torch.Size((2, 3, 8, 8)), 0.7))[0]


NETWORKS: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    "pixel unet": (partial(pixel_unet, "batch"), [-0.15454, -0.17625, 0.05903, 0.08031, -0.18402, 0.15613]),
    "pixel unet, groups": (partial(pixel_unet, "group"), [-0.30346, -0.14371, 0.02203, -0.07041, 0.00166, 0.24383]),
    "mlp": (mlp, [0.04924, -0.15042, 0.34587, -0.01044]),
    "noisy classifier": (classifier, [-0.13771, 0.47912, 0.03617, -0.02628, 0.32396, -0.21641]),
    "semantic encoder": (semantic, [-0.01898, -0.26471, -0.16264, 0.37297, -0.12305, 0.18560]),
    "recogniser": (recogniser, [-0.02013, 0.01771, -0.01939, -0.01701, 0.00553, -0.01733]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_it_did(name: str) -> None:
    compute, wanted = NETWORKS[name]
    with torch.no_grad():
        found = compute().flatten()[:6]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-3, atol=2e-5)
