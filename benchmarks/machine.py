"""The machine that figures were seen on, as results say it."""

import os
import platform
from importlib.util import find_spec
from pathlib import Path

import torch


def needs(*packages: str) -> None:
    """ValueError for packages that a benchmark would miss hours later."""
    if missing := [name for name in packages if not find_spec(name)]:
        raise ValueError(f"this needs {' and '.join(missing)}: pip install -e '.[benchmarks]'")


def described() -> str:
    """Such as "AMD EPYC, 2 cores, PyTorch 2.15.0"; with the GPU, where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [names[0] if names else platform.processor() or platform.machine(), f"{cores} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"PyTorch {torch.__version__.partition('+')[0]}"])
