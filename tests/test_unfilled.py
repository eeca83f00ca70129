import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from conditioning.unfilled import unfilled

ROOT = Path(__file__).resolve().parents[1]
BUILDING = """
import sys
from conditioning.clip import ClipText, ClipTextConfig
from conditioning.unfilled import unfilled
from ldm.pixel_unet import PixelUNet, PixelUNetConfig
from ldm.unet import UNet, UNetConfig
from vae.autoencoder import Autoencoder, AutoencoderConfig

with unfilled():
    networks = [
        ClipText(ClipTextConfig()),
        PixelUNet(PixelUNetConfig(num_class_embeds=11)),
        UNet(UNetConfig(num_class_embeds=11)),
        Autoencoder(AutoencoderConfig()),
    ]
for network in networks:
    assert all(weight.is_meta for weight in network.state_dict().values()), type(network)
print("sympy" in sys.modules, "torch._dynamo" in sys.modules)
"""


def test_networks_are_built_without_the_compiler() -> None:
    result = subprocess.run([sys.executable, "-c", BUILDING], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "False False\n"), result.stderr


def test_first_weights_are_drawn_as_ever_outside() -> None:
    with unfilled():
        inside = nn.Embedding(50, 40)
    outside = nn.Embedding(50, 40)
    assert [inside.weight.is_meta, outside.weight.is_meta] == [True, False]
    assert abs(outside.weight.std().item() - 1) < 0.1


def test_other_functions_go_through() -> None:
    numbers = torch.arange(3.0)
    with unfilled():
        doubled, shape = numbers * 2, torch.zeros(2, 3).shape
    assert (doubled.tolist(), shape) == ([0, 2, 4], (2, 3))
