"""What a training run carries from update to update, and how it gets it back: EMA, learning rate, checkpoints.

Weights may be sharded over processes (FSDP, a `DTensor` each). Averages are then of this process's shards; a checkpoint
holds whole tensors, so that any number of processes may go on with it.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipelines.files import checkpoints
from train.zero import Zero

# Settings with which every run may go on otherwise: of the machine, and what a loss that was no number asks for.
ANY_RUN_MAY_CHANGE = ("output", "workers", "cache", "font", "checkpoint_every", "mixed_precision")


def whole(value: Any, *, keep: bool = True) -> Any:
    """A copy of a state in the computer's own memory, in which sharded tensors are whole; a collective call:
    every process has to make it.

    keep: False puts None in the place of tensors, for a process that is only asked for its shards.
    """
    if isinstance(value, dict):
        return {key: whole(part, keep=keep) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [whole(part, keep=keep) for part in value]
    if isinstance(value, Tensor):
        value = value.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        return value.to("cpu", copy=True) if keep else None
    return value


def sharded_like(value: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor on the device of a weight, sharded and laid out in memory as that is.

    The layout counts: fused AdamW goes through weights and moments as they lie in memory.
    """
    if isinstance(weight, DTensor):
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return torch.empty_like(weight, dtype=value.dtype).copy_(value)


class Resumable(Protocol):
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


@dataclass
class Carried:
    """What goes from one update to the next, but for the average, which a checkpoint's model folder has."""

    weights: Mapping[str, Tensor]  # that learn, and statistics
    optimizer: torch.optim.Optimizer | Zero
    scaler: Any  # of fp16, or None
    others: dict[str, Resumable]

    def state(self, *, keep: bool = True) -> dict[str, Any]:
        """Copies, in which sharded tensors are whole; a collective call: every process has to make it, also those that
        keep nothing."""
        zero = self.optimizer if isinstance(self.optimizer, Zero) else None
        optimizer = zero.state_dict(keep=keep) if zero else self.optimizer.state_dict()
        weights = whole(dict(self.weights), keep=keep)
        state: dict[str, Any] = {"weights": weights, "optimizer": whole(optimizer, keep=keep)}
        state["scaler"] = self.scaler.state_dict() if self.scaler else None
        return state | {name: other.state() for name, other in self.others.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Takes a state up, whatever the weights are sharded over now."""
        for name, weight in self.weights.items():
            weight.copy_(sharded_like(state["weights"][name], weight))
        self._load_optimizer(state["optimizer"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name, other in self.others.items():
            other.load(state[name])

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        if isinstance(self.optimizer, Zero):
            self.optimizer.load_state_dict(saved)
            return
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.optimizer.state.clear()  # a device may not have room for two
        kept = {
            i: {
                name: sharded_like(value, weights[i]) if _is_like(value, weights[i]) else value
                for name, value in of_weight.items()
            }
            for i, of_weight in saved["state"].items()
        }
        self.optimizer.load_state_dict({"state": kept, "param_groups": saved["param_groups"]})


def _is_like(value: Any, weight: Tensor) -> bool:
    """Whether a part of an optimizer's state is laid out as its weight is; others are counts, or quantised blocks."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == weight.shape


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


class EMA:
    """Exponential moving average of a network's trainable weights, in float32 whatever the network's precision.

    The decay warms up as (1 + update) / (10 + update), so that the first updates do not linger.
    """

    def __init__(self, network: nn.Module | Iterable[Tensor], decay: float):
        weights = network.parameters() if isinstance(network, nn.Module) else network
        self.decay = decay
        self.parameters = [p for p in weights if p.requires_grad]
        self.weights = [p.float().clone() for p in self.source]

    @property
    def source(self) -> list[Tensor]:
        """The weights now: an optimizer may have put others in the place of those of before."""
        return [_local(p.detach()) for p in self.parameters]

    @torch.no_grad()
    def step(self, update: int) -> None:
        decay = min(self.decay, (1 + update) / (10 + update))
        torch._foreach_lerp_(self.weights, [p.float() for p in self.source], 1 - decay)

    @torch.no_grad()
    def distance(self) -> float:
        """|ema - weights| / |weights|: zero for ever means that the average is dead."""
        pairs = list(zip(self.weights, self.source, strict=True))
        moved = torch.stack([(average - weight.float()).square().sum() for average, weight in pairs]).sum()
        length = torch.stack([weight.float().square().sum() for _, weight in pairs]).sum()
        return math.sqrt(float(moved) / max(float(length), 1e-30))

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
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def load(self, weights: list[Tensor]) -> None:
        """Takes the average up where it was left."""
        for mine, saved in zip(self.weights, weights, strict=True):
            mine.copy_(saved)


def scaler_state(accelerator: Accelerator) -> dict[str, Any] | None:
    """Of fp16's loss scale; None where there is none."""
    return accelerator.scaler.state_dict() if accelerator.scaler else None


def load_scaler(accelerator: Accelerator, state: Mapping[str, Any]) -> None:
    """Takes the loss scale up that a checkpoint's state has as "scaler"; a run in another precision has none."""
    if accelerator.scaler and state.get("scaler"):
        accelerator.scaler.load_state_dict(state["scaler"])


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

    Raises ValueError when the disk is full; what was there before is there still.
    """
    final = output / f"checkpoint-{update:07d}"
    partial = output / f".{final.name}.partial"
    for left in output.glob(".checkpoint-*.partial"):  # of a run that was killed here
        shutil.rmtree(left, ignore_errors=True)
    try:
        (partial / "training").mkdir(parents=True)
        write(partial)
        torch.save({"update": update, **state}, partial / "training" / "state.pt")
        (partial / "training" / "config.json").write_text(json.dumps(asdict(config), indent=2, default=str) + "\n")
        for file in partial.rglob("*"):
            _sync(file)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not _is_full(error):
            raise
        kept = checkpoints(output.parent if output.name.startswith(".") else output)  # of a rehearsal: the run's
        raise ValueError(
            f"the disk of {output} is full: the checkpoint of update {update} is not written, "
            + (f"{kept[-1].name} is whole. " if kept else "and there is none before it. ")
            + "Make room and type the same command again"
        ) from error
    before = _taken_away(final) if final.exists() else None  # a moment without: it may be large, and slow to delete
    partial.rename(final)
    _sync(output)
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(_taken_away(old), ignore_errors=True)  # what others hold open the next save removes
    if before:
        shutil.rmtree(before, ignore_errors=True)
    return final


def _taken_away(checkpoint: Path) -> Path:
    """Under a name that is no checkpoint's any more, in case that the run is killed while it is deleted."""
    gone = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    return gone


def _sync(path: Path) -> None:
    """To the disk itself: a file's contents, or the names in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _is_full(error: BaseException) -> bool:
    """Whether writing failed for want of room; safetensors and torch.save have only words for it."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = str(error)
    return full or "No space left" in said or "os error 28" in said or "PytorchStreamWriter failed" in said


def resume(
    output: Path, config: Any, *, may_change: tuple[str, ...] = (), global_batch: int | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run and its state, or None when there is none.

    Raises ValueError when the run was started with other settings than `config`, but for the fields `may_change` and
    ANY_RUN_MAY_CHANGE. Raises it as well when the state names another "global_batch" than this one, the pictures in an
    update of all processes.
    """
    found = checkpoints(output)
    if not found:
        return None
    before = json.loads((found[-1] / "training" / "config.json").read_text())
    now = json.loads(json.dumps(asdict(config), default=str))
    for name in before.keys() & now.keys():  # what is several words now was one in runs of an earlier version
        if isinstance(before[name], str) and isinstance(now[name], list):
            before[name] = [before[name]] if before[name] else []
    changed = [k for k in now if k not in (*may_change, *ANY_RUN_MAY_CHANGE) and k in before and before[k] != now[k]]
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
