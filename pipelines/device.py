"""Which device to paint on, how exactly, and how many pictures at once."""

from collections.abc import Callable, Iterator
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
    cudnn: Any = torch.backends.cudnn
    switches = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    # Not `allow_tf32`, PyTorch's older name of them: it can't be read where a caller has used this one.
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name; ValueError when there is none, or none on this machine."""
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} can't be used here ({why}): expected cpu, cuda or mps") from None
    return chosen


def data_type(name: torch.dtype | str | None) -> torch.dtype | None:
    """PyTorch's data type of this name; ValueError where there is none that weights can have."""
    if name is None:
        return None
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype={name!r}: expected float32, bfloat16 or float16")
    return found


def as_many_as_fit(count: int, most: int, paint: Callable[[int, int], Any]) -> Iterator[Any]:
    """`count` pictures of paint(first, pictures), at most so many at a time, fewer once a GPU has too little memory.

    A picture is the same in any batch. Raises ValueError where there is no memory for one."""
    first = 0
    while first < count:
        pictures = min(most, count - first)
        try:
            painted = paint(first, pictures)
        except torch.OutOfMemoryError as error:
            if pictures == 1:
                raise ValueError(
                    f"the memory of this device is too small for one picture ({str(error).splitlines()[0]}): ask for a "
                    "smaller width and height, or the data type bfloat16"
                ) from None
            most = pictures // 2
            continue
        yield from painted
        first += pictures
