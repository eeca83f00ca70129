"""Checkpoints of a training run: written so that one is whole or not there, and taken up by the same command."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipelines.files import checkpoints
from train.state import load_optimizer

# Settings with which every run may go on otherwise: of the machine, and what a loss that was no number asks for.
ANY_RUN_MAY_CHANGE = ("output", "workers", "cache", "font", "checkpoint_every", "mixed_precision")
REPLACED = ".replaced"  # ends the name of a checkpoint while another takes its place


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
    if final.exists():  # a moment without: it may be large, and slow to delete
        _renamed(final, REPLACED)
    partial.rename(final)
    _sync(output)
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(_renamed(old, ".old.partial"), ignore_errors=True)  # what others hold open the next save removes
    for left in output.glob(f".checkpoint-*{REPLACED}"):
        shutil.rmtree(left, ignore_errors=True)
    return final


def _renamed(checkpoint: Path, ending: str) -> Path:
    """A checkpoint under a name that is none's any more, in case that the run is killed while it is deleted."""
    gone = checkpoint.with_name(f".{checkpoint.name}{ending}")
    shutil.rmtree(gone, ignore_errors=True)
    return checkpoint.rename(gone)


def _restore(output: Path) -> None:
    """Puts back a checkpoint that another was to take the place of when the run was killed."""
    for left in output.glob(f".checkpoint-*{REPLACED}"):
        whole = left.with_name(left.name[1 : -len(REPLACED)])
        if not whole.exists():
            with contextlib.suppress(OSError):  # another process has put it back
                left.rename(whole)


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
    _restore(output)
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


def refuse_other_data(state: Mapping[str, Any], contents: str) -> None:
    """ValueError where a run was of other pictures than those of this fingerprint: it would go on in another order,
    with other ones held out."""
    if state.get("data", contents) != contents:  # checkpoints had none at first
        raise ValueError(
            "--data is not what this run was trained on: pictures or captions were added, removed or changed. Put "
            "back what was there, and type the same command again; or begin a new run with another --output"
        )


def common_state(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, global_batch: int, contents: str
) -> dict[str, Any]:
    """What `take_up` reads of a checkpoint's state: optimizer, fp16's loss scale, and of what data the run is.

    contents: the fingerprint of the pictures.
    """
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    return {
        "optimizer": optimizer.state_dict(),
        "scaler": scaler,
        "global_batch": global_batch,
        "data": contents,
    }


def take_up(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    contents: str,
    found: tuple[Path, Mapping[str, Any]] | None,
) -> int:
    """The updates of which a checkpoint is, whose optimizer and loss scale are taken up; 0 where `resume` found none.

    Raises ValueError as `refuse_other_data`.
    """
    if not found:
        return 0
    folder, state = found
    refuse_other_data(state, contents)
    load_optimizer(optimizer, state["optimizer"])
    if accelerator.scaler and state.get("scaler"):  # a run in another precision has none
        accelerator.scaler.load_state_dict(state["scaler"])
    accelerator.print(f"going on from {folder}")
    return state["update"]
