"""The numbers of a run that a person needs: what its log says, and what share of the machine it uses."""

import itertools
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conditioning.context import Context
from pipelines.folder import Model
from train.launch import precision

EDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the noise levels whose losses are told apart
SPIKE = 4.0  # times the median of the last losses
KEPT = 100  # losses of which that is taken


class Meter:
    """Sums between two lines of the log, and the losses that jump."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.flops = self.peak = 0.0  # of one picture's training; what one device can do in a second
        self.sums = torch.zeros(2, len(EDGES) + 1, device=accelerator.device)  # of losses, and how many these were
        self.edges = torch.tensor(EDGES, device=accelerator.device)
        self.last: deque[float] = deque(maxlen=KEPT)
        self.spikes = 0
        self.began, self.update = time.perf_counter(), 0

    def measure(self, model: Model, shape: Sequence[int], context: Context, update: int) -> None:
        """Begins at an update: what a picture costs, and what the device can do.

        shape: of its latents, (C, h, w). context: of one picture.
        """
        training = model.unet.training
        device = self.accelerator.device
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(self.accelerator), torch.float32)
        x = torch.zeros(1, model.unet.config.in_channels, *shape[1:], device=device)
        model.unet.eval()  # one picture has no statistics for a batch norm
        self.flops = training_flops(model.unet, x, torch.zeros(1, device=device), **context)
        model.unet.train(training)
        self.peak = matrix_rate(device, dtype)
        self.sums.zero_()
        self.began, self.update = time.perf_counter(), update

    def add(self, sigma: Tensor, loss: Tensor) -> None:
        """The losses of pictures at these noise levels, [B] each."""
        place = torch.bucketize(sigma.to(self.edges), self.edges)
        self.sums.index_add_(1, place, torch.stack([loss.detach().float(), torch.ones(len(loss), device=loss.device)]))

    def is_spike(self, loss: float) -> bool:
        """Whether an update's loss is over 4 times the median of the last hundred; counts it."""
        jumped = len(self.last) >= KEPT // 2 and loss > SPIKE * statistics.median(self.last)
        self.spikes += jumped
        self.last.append(loss)
        return jumped

    def read(self, update: int, global_batch: int) -> dict[str, float]:
        """The numbers since the last reading."""
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        rate = (update - self.update) * global_batch / (time.perf_counter() - self.began)
        numbers = {"pictures_per_second": rate, "spikes": float(self.spikes), "memory_gb": memory(self.sums.device)}
        if self.peak:
            numbers["share_of_peak"] = rate * self.flops / self.peak / self.accelerator.num_processes
        between = [f"{low}-{high}" for low, high in itertools.pairwise(EDGES)]
        names = [f"below {EDGES[0]}", *between, f"above {EDGES[-1]}"]
        numbers |= {f"loss/sigma {name}": s / n for name, s, n in zip(names, *sums, strict=True) if n}
        self.sums.zero_()
        self.began, self.update = time.perf_counter(), update
        return numbers

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no time passes: for what is no training."""
        before = time.perf_counter()
        yield
        self.began += time.perf_counter() - before

    def state(self) -> dict[str, Any]:
        return {"last": list(self.last), "spikes": self.spikes}

    def load(self, state: dict[str, Any]) -> None:
        self.last = deque(state["last"], maxlen=KEPT)
        self.spikes = state["spikes"]


def memory(device: torch.device) -> float:
    """The most that was taken so far, in GB: of the GPU's memory, or of this process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@torch.no_grad()
def training_flops(network: nn.Module, *inputs: Any, **context: Any) -> float:
    """Operations that a picture costs in training, 2 to a multiplication and addition: three times its forward run, as
    is usual (Chowdhery et al. 2022, appendix B); what gradient checkpointing repeats is not counted."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs, **context)
    return 3.0 * counter.get_total_flops() / len(inputs[0])


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product here and now: the best of five."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)  # of ones a GPU makes faster work than of numbers
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
