"""What a training run carries from update to update, and how it gets it back: weights, optimizer, EMA, learning rate.

Weights may be sharded over processes (FSDP, a `DTensor` each). Averages are then of this process's shards; the state
of a checkpoint holds whole tensors, so that any number of processes may go on with it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from train.zero import Zero


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
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name, other in self.others.items():
            other.load(state[name])


def load_optimizer(optimizer: torch.optim.Optimizer | Zero, saved: dict[str, Any]) -> None:
    """Takes the state of an optimizer up, whatever its weights are sharded over, and however they are laid out, now."""
    if isinstance(optimizer, Zero):
        optimizer.load_state_dict(saved)
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    optimizer.state.clear()  # a device may not have room for two
    kept = {
        i: {
            name: sharded_like(value, weights[i]) if _is_like(value, weights[i]) else value
            for name, value in of_weight.items()
        }
        for i, of_weight in saved["state"].items()
    }
    optimizer.load_state_dict({"state": kept, "param_groups": saved["param_groups"]})


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
