"""Which device to paint on."""

import torch


def best_device() -> str:
    """cuda where there is one, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name; ValueError when there is none, or none on this machine."""
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} can't be used here ({why}): expected cpu, cuda or mps") from None
    return chosen
