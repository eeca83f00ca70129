"""How every training script starts: as many processes as asked for, all the cores, or a sentence on what is wrong."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from train import zero

MixedPrecision = Literal["no", "bf16", "fp16"]

TWO_CPU_PROCESSES = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 train/ldm.py"


def start(
    mixed_precision: MixedPrecision | None = None,
    log_with: str | None = None,
    project_dir: str | Path | None = None,
    *,
    accumulate: int = 1,
    shards: bool = False,
) -> Accelerator:
    """An `Accelerator` whose processes are those that the launcher was asked for, each with its share of the cores.

    mixed_precision: None takes what the launcher was told, and "no" without one. accumulate: steps of an update.
    shards: whether the script can train with FSDP or DeepSpeed. OMP_NUM_THREADS above 1 is kept.

    Raises ValueError when the launcher asks for these and it can't, when fewer processes run than were asked for
    (`accelerate launch --cpu --num_processes 2` starts one), or when several were started that do not know each other
    (`--multi_gpu` on a machine without a GPU).
    """
    environment = os.environ
    if "MASTER_ADDR" in environment and "ACCELERATE_MIXED_PRECISION" in environment and "WORLD_SIZE" not in environment:
        raise ValueError(
            "the launcher was asked for several processes and started one. For several processes on the CPU, type: "
            + TWO_CPU_PROCESSES
        )
    _end_with_the_launcher()
    accelerator = Accelerator(
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENT),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else gradients are there twice
        ],
        mixed_precision=mixed_precision,
        log_with=log_with,
        project_config=ProjectConfiguration(project_dir=str(project_dir)) if project_dir else None,
        step_scheduler_with_optimizer=False,
    )
    if log_with and log_with != "all" and not accelerator.log_with:  # of which accelerate would say nothing
        raise ValueError(f"--tracker {log_with} is not installed: pip install {log_with}, or take another")
    accelerator.gradient_accumulation_steps = accumulate  # whatever the launcher's configuration says
    if (kind := sharding(accelerator)) and not shards:
        raise ValueError(f"{kind} is for train/ldm.py: this script takes --config_file train/configs/gpus.yaml")
    if kind == "FSDP":
        # Without it accelerate would have even noise levels rounded to bfloat16; autocast rounds where it may be.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if kind == "DEEPSPEED":
        zero.settle(accelerator)
    asked = int(environment.get("WORLD_SIZE", 1))
    if asked != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {asked} processes, but they do not know each other: each believes to be one of "
            f"{accelerator.num_processes}. Without a GPU, type: {TWO_CPU_PROCESSES}"
        )
    local = int(environment.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wished = environment.get("OMP_NUM_THREADS", "")
    # accelerate itself exports OMP_NUM_THREADS=1, and one core would do all the work: more is a person's own wish.
    torch.set_num_threads(int(wished) if wished.isdecimal() and int(wished) > 1 else max(1, cores // local))
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, {torch.get_num_threads()} thread(s) "
        f"each, mixed precision: {precision(accelerator)}"
    )
    return accelerator


PATIENT = timedelta(hours=3)  # that processes wait for one that paints, or encodes what others have encoded already
PATIENCE = 5.0  # seconds after a signal in which another one is taken for the same


class Interruption:
    """SIGTERM, Ctrl-C, or SIGUSR1 (what a scheduler sends before it takes the machine away): asked for between two
    updates, so that the run can save and end. One that comes later ends it at once; at first a launcher hands on
    what the terminal has sent to all of its processes already.

    with Interruption() as interruption: … if interruption.asked(accelerator): …
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number, self.when = 0, 0.0

    def __enter__(self) -> Self:
        self.before: dict[int, Any] = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() > self.when + PATIENCE:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.when = number, time.monotonic()

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any of the processes was told to end; the same answer in all of them."""
        if accelerator.num_processes > 1:
            number = torch.tensor(self.number, device=accelerator.device)
            self.number = max(self.number, int(accelerator.gather(number[None]).max()))
        return self.number != 0

    def exit_code(self) -> int:
        """As a shell has it for a program that a signal ended."""
        return 128 + self.number


@contextlib.contextmanager
def errors_said(savings: str = "") -> Iterator[None]:
    """Ends the program with a sentence for what its user can mend: a ValueError, or a GPU that is full.

    savings: what a script has against that beside smaller batches and sizes.
    """
    try:
        yield
    except ValueError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {error}\nTake a smaller --batch-size{savings}, --mixed-precision bf16, or a smaller --size")


def _end_with_the_launcher() -> None:
    """`accelerate launch` of one process hands no signal on: when it is told to end, so is this process (Linux)."""
    environment = os.environ
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in environment and "WORLD_SIZE" not in environment:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def sharding(accelerator: Accelerator) -> str:
    """ "FSDP" or "DEEPSPEED" where the launcher was told to shard the weights, else ""."""
    kind = str(accelerator.distributed_type.value)
    return kind if kind in ("FSDP", "DEEPSPEED") else ""


def precision(accelerator: Accelerator) -> str:
    """In which the networks are autocast: "no", "bf16" or "fp16"; trained weights are float32 in any case."""
    return zero.precision(accelerator) if sharding(accelerator) == "DEEPSPEED" else str(accelerator.mixed_precision)


def prepare(
    accelerator: Accelerator, learner: nn.Module, optimizer: torch.optim.Optimizer, *, batch_size: int, clip: float
) -> tuple[Any, Any]:
    """`Accelerator.prepare`: (the module to train by, its optimizer).

    batch_size: of a process and a step; clip: largest norm of the gradient: DeepSpeed has to know them beforehand.
    """
    if sharding(accelerator) == "DEEPSPEED":
        return zero.prepare(accelerator, learner, optimizer, batch_size=batch_size, clip=clip)
    if sharding(accelerator) == "FSDP":  # which wants all that its configuration names to be there
        plugin, there = accelerator.state.fsdp_plugin, {type(module).__name__ for module in learner.modules()}
        named = plugin.transformer_cls_names_to_wrap or ()
        plugin.transformer_cls_names_to_wrap = [name for name in named if name in there]
    return accelerator.prepare(learner, optimizer)


def memory_format(accelerator: Accelerator, network: nn.Module) -> torch.memory_format:
    """The layout of pictures in which a network's convolutions and their neighbours are fastest.

    `channels_last`, but for bfloat16 on a CPU, where PyTorch's group norm is slow on it: one thread trains 53 crops a
    second instead of 39 (autoencoder of 3.4 M parameters); without group norms (`ldm.pixel_unet`, 5.0 M) 7.3 pictures
    a second instead of 3.0. Only contiguous weights can be shared out.
    """
    if sharding(accelerator):
        return torch.contiguous_format
    slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    normed = any(isinstance(module, nn.GroupNorm) for module in network.modules())
    return torch.contiguous_format if slow and normed else torch.channels_last


def matrix_type(accelerator: Accelerator) -> torch.dtype:
    """In which Muon orthogonalizes: bfloat16, which is enough for it, where the device multiplies that natively."""
    if accelerator.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = accelerator.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native or accelerator.mixed_precision == "bf16" else torch.float32
