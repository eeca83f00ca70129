"""The updates of a training, one after the other, with a bar; told to end, it saves first.

A loss or gradient that is no number ends it, too, before it spoils the weights.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from train.launch import Interruption


class Progress:
    """The loop of a training script:

    progress = Progress(accelerator, update, updates, checkpoint_every)
    for update in progress:  # how many are done
        ...                  # one more
        if progress.advance():
            ...              # a checkpoint of progress.done updates is due: all processes are told the same
    progress.end()           # which leaves the program if it was told to end (SIGTERM, Ctrl-C, SIGUSR1)
    """

    def __init__(self, accelerator: Accelerator, done: int, updates: int, every: int):
        """done: updates that were made before; every: updates between checkpoints, the last one always has one."""
        self.accelerator, self.done, self.updates, self.every = accelerator, done, updates, every
        self.first, self.began = done, time.perf_counter()
        self.interruption, self.told = Interruption(), False
        self.bar = tqdm(total=updates, initial=done, unit="update", disable=not accelerator.is_main_process)

    def __iter__(self) -> Iterator[int]:
        with self.interruption:
            while self.done < self.updates and not self.told:
                yield self.done
        self.bar.close()

    def advance(self) -> bool:
        """An update is done; whether to save."""
        self.done += 1
        self.bar.update()
        self.told = self.interruption.asked(self.accelerator)
        return self.told or self.done % self.every == 0 or self.done == self.updates

    def rate(self, global_batch: int) -> float:
        """Pictures a second since the loop began; global_batch: of an update, over all processes."""
        return (self.done - self.first) * global_batch / (time.perf_counter() - self.began)

    def end(self) -> None:
        """Leaves the program if it was told to end before it was through, with the exit status of the signal; what
        comes after the last update is left to the next time."""
        if self.told and self.done < self.updates:
            self.accelerator.wait_for_everyone()  # a launcher ends all as soon as one has ended
            self.accelerator.end_training()
            self.accelerator.print(f"told to end: update {self.done} is saved, and the same command goes on with it")
            sys.exit(self.interruption.exit_code())


def follow_gradient(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    weights: Iterable[Tensor],
    update: int,
    output: Path,
    *,
    clip: float = math.inf,
    about: Callable[[], object] | None = None,
) -> Tensor:
    """One step of an optimizer along the gradient of a loss, cut to the norm `clip`; returns the norm it had.

    Raises ValueError, before the step, as `refuse_not_finite` for loss and norm. Under fp16 a gradient may well be
    infinite: its scaler leaves such a step out.
    """
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(weights, clip)
    numbers = {"loss": loss} if accelerator.scaler else {"loss": loss, "gradient": norm}
    values = torch.stack([number.detach().float() for number in numbers.values()]).tolist()  # a device is waited for
    for what, value in zip(numbers, values, strict=True):
        refuse_not_finite(what, value, update, output, about)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def refuse_not_finite(
    what: str, value: float, update: int, output: Path, about: Callable[[], object] | None = None
) -> None:
    """ValueError for a number that would spoil the weights; `about` tells of it what there is to tell."""
    if not math.isfinite(value):
        raise ValueError(
            f"the {what} is {value} at update {update}{f' ({about()})' if about else ''}: the checkpoints in "
            f"{output} are untouched. Go on from the last one with --mixed-precision no, or begin anew with a lower "
            "--learning-rate and another --output"
        )
