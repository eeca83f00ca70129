"""The machine and the code that figures were seen on, as results say it."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def described() -> str:
    """Such as "AMD EPYC (family 25, model 17), 2 cores, PyTorch 2.15.0, commit 0123abc"; with the GPU, where there is
    one, without a commit, where the code is not in its repository, and with "0123abc+", where it was changed since."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = said.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in said:  # names alone, such as those that virtual machines give, stand for several generations
        name += f" (family {said['cpu family']}, model {said.get('model')})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [name, f"{cores} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts.append(f"PyTorch {torch.__version__.partition('+')[0]}")
    commit = _git("rev-parse", "--short", "HEAD")
    if commit:
        parts.append(f"commit {commit}{'+' if _git('status', '--porcelain', '--', '*.py') else ''}")
    return ", ".join(parts)


def _git(*command: str) -> str:
    """What git says of this project's own repository; nothing where this is none, or where there is no git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
