"""What a training run carries from update to update, and how it gets it back: EMA, learning rate, checkpoints."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.files import checkpoints


class EMA:
    """Exponential moving average of a network's trainable weights, in float32 whatever the network's precision.

    The decay warms up as (1 + update) / (10 + update), so that the first updates do not linger.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.source = [p for p in network.parameters() if p.requires_grad]
        self.weights = [p.detach().float().clone() for p in self.source]

    @torch.no_grad()
    def step(self, update: int) -> None:
        decay = min(self.decay, (1 + update) / (10 + update))
        torch._foreach_lerp_(self.weights, [p.detach().float() for p in self.source], 1 - decay)

    @torch.no_grad()
    def distance(self) -> float:
        """|ema - weights| / |weights|: zero for ever means that the average is dead."""
        moved = sum(float((w - p.float()).square().sum()) for w, p in zip(self.weights, self.source, strict=True))
        return math.sqrt(moved / max(sum(float(p.float().square().sum()) for p in self.source), 1e-30))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self.weights, self.source, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def load(self, weights: list[Tensor]) -> None:
        """Takes the average up where it was left."""
        for mine, saved in zip(self.weights, weights, strict=True):
            mine.copy_(saved)


def learning_rate(update: int, *, peak: float, warmup: int, updates: int, schedule: str = "cosine") -> float:
    """The rate of optimizer update `update` (from 0): linear warm-up, then "constant" or a "cosine" to 0.

    A pure function of the update, so that a resumed run and one on more processes follow the same curve.
    """
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule == "constant":
        return peak
    done = min(1.0, (update - warmup) / max(1, updates - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def clamp_warmup(warmup: int, updates: int, say: Callable[[str], None]) -> int:
    """At most half of the updates, and what was done about a longer one is said."""
    if warmup <= updates // 2:
        return warmup
    say(f"--warmup {warmup} is more than half of {updates} updates: {updates // 2} are taken")
    return updates // 2


def save_checkpoint(
    output: Path, update: int, write: Callable[[Path], None], state: dict[str, Any], config: Any, *, keep: int = 2
) -> Path:
    """Writes output/checkpoint-UPDATE aside, syncs and renames it, so that a checkpoint is whole or not there.

    `write(folder)` saves the model folder; `state` (tensors, numbers, containers) goes to training/state.pt, which
    opens with `weights_only=True`. All but the newest `keep` checkpoints are deleted afterwards.
    """
    final = output / f"checkpoint-{update:07d}"
    partial = output / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "training").mkdir(parents=True)
    write(partial)
    torch.save({"update": update, **state}, partial / "training" / "state.pt")
    (partial / "training" / "config.json").write_text(json.dumps(asdict(config), indent=2, default=str) + "\n")
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return final


def resume(
    output: Path, config: Any, *, may_change: tuple[str, ...] = (), global_batch: int | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run and its state, or None when there is none.

    Raises ValueError when the run was started with other settings than `config`, but for the fields `may_change` and
    for `output`: a run may be moved. Raises it as well when the state names another "global_batch" than this one, the
    pictures in an update of all processes.
    """
    found = checkpoints(output)
    if not found:
        return None
    before = json.loads((found[-1] / "training" / "config.json").read_text())
    now = json.loads(json.dumps(asdict(config), default=str))
    changed = [k for k in now if k not in (*may_change, "output") and k in before and before[k] != now[k]]
    if changed:
        told = "; ".join(f"{k}: {before.get(k)!r} before, {now[k]!r} now" for k in changed)
        raise ValueError(
            f"{output} holds a run with other settings ({told}). Type the same command to go on with it, "
            "or choose another --output"
        )
    state = torch.load(found[-1] / "training" / "state.pt", weights_only=True, map_location="cpu")
    if global_batch and state.get("global_batch", global_batch) != global_batch:
        raise ValueError(
            f"{output} holds a run whose updates see {state['global_batch']} pictures (batch size × processes × "
            f"accumulated steps), now it would be {global_batch}: change them so that it stays, or choose another "
            "--output"
        )
    return found[-1], state
