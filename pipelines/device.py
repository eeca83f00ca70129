"""Which device to paint on, and how exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def best_device() -> str:
    """cuda where there is one, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, float32 is float32 on a GPU, too, and not TF32, whose ten bits PyTorch's convolutions take there."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name; ValueError when there is none, or none on this machine."""
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} can't be used here ({why}): expected cpu, cuda or mps") from None
    return chosen
