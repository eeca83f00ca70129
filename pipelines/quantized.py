"""Weights in 8 bits: half the size of float16, for storing alone; they are read as floating-point numbers.

A matrix or kernel is int8 with one scale for each row, the row's largest magnitude over 127, so that a weight is off by
at most half a scale: 0.8% (root mean square) of a row of normal numbers. Vectors (biases, norms) are few: float16.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = "int8_scale"  # NAME.int8_scale, float32 [rows], beside NAME, int8 [rows, …]
LEVELS = 127


def quantize(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored of a network's state: about a byte for each weight.

    Raises ValueError for weights that are not finite, which have no scale.
    """
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not weight.is_floating_point():
            stored[name] = weight
            continue
        half = weight.to(torch.float16) if weight.ndim < 2 else weight
        if not half.isfinite().all():
            raise ValueError(
                f"{name} holds numbers that are not finite, or too large for float16: it can't be stored so"
            )
        if weight.ndim < 2:
            stored[name] = half
            continue
        rows = weight.float().flatten(1)
        scale = rows.abs().amax(1) / LEVELS
        steps = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        stored[name] = steps.round().clamp(-LEVELS, LEVELS).to(torch.int8).view_as(weight).contiguous()
        stored[f"{name}.{SCALE}"] = scale
    return stored


def dequantize(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights again, float32 where they were int8; weights that were never quantized stay as they are."""
    weights = {name: tensor for name, tensor in stored.items() if not name.endswith(f".{SCALE}")}
    for name, tensor in stored.items():
        if name.endswith(f".{SCALE}"):
            name = name.removesuffix(f".{SCALE}")
            steps = weights[name]
            weights[name] = steps.float() * tensor.float().view(-1, *[1] * (steps.ndim - 1))
    return weights
