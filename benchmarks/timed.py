"""Trainings against the clock: their rate, what their updates take, and several at once, each on a core of its own."""

import ctypes
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

SAID_EVERY = 60.0  # seconds between two lines on what runs


class Enough(Exception):
    """The calibration has lasted long enough."""


class Clock:
    """Seconds that the updates of train/ldm.py take, without what it does beside them."""

    def __init__(self, before: float = 0.0, limit: float = math.inf, saved: Callable[[int], None] | None = None):
        """before: seconds of a run that goes on. limit: seconds after which `Enough` is raised. saved: called before
        the checkpoint of an update is written."""
        self.before, self.limit, self.saved = before, limit, saved
        self.began, self.beside = math.nan, 0.0
        self.seconds = before  # when the last update was done
        self.starts: list[float] = []  # of each update
        self.gflop = 0.0  # of an update on this process: its matrix products and convolutions, the optimizer's too

    def now(self) -> float:
        return self.before + time.perf_counter() - self.began - self.beside

    @contextmanager
    def watching(self) -> Iterator[None]:
        from torch.utils.flop_counter import FlopCounterMode

        import train.ldm as script

        rate, save, paused = script.learning_rate, script.save_checkpoint, script.Meter.paused
        counter, counting = FlopCounterMode(display=False), ExitStack()

        def beginning(update: int, **options: Any) -> float:
            if math.isnan(self.began):
                self.began = time.perf_counter()
                counting.enter_context(counter)
            self.starts.append(self.now())
            if self.now() - self.before > self.limit and len(self.starts) > 2:
                raise Enough
            return rate(update, **options)

        @contextmanager
        def outside(meter: Any) -> Iterator[None]:
            counting.close()
            self.gflop, self.seconds = counter.get_total_flops() / 1e9, self.now()
            with paused(meter):
                yield
            self.beside += self.now() - self.seconds

        def saving(output: Path, update: int, *arguments: Any, **options: Any) -> Path:
            if self.saved and not output.name.startswith("."):  # which is the rehearsal's
                self.saved(update)
            return save(output, update, *arguments, **options)

        hooks = patch.multiple(script, learning_rate=beginning, save_checkpoint=saving)
        with counting, hooks, patch.object(script.Meter, "paused", outside):
            yield


def calibrate(config: Any, seconds: float) -> float:
    """Pictures a second that train/ldm.py trains on with these settings, over the later half of its updates."""
    import train.ldm

    clock = Clock(limit=seconds)
    try:
        with clock.watching():
            train.ldm.main(replace(config, updates=10**6, checkpoint_every=10**6, steps=1))
    except Enough:
        pass
    later = clock.starts[(len(clock.starts) - 1) // 2 :]
    return config.batch_size * config.accumulate * (len(later) - 1) / (later[-1] - later[0])


def learn(config: Any, file: Path) -> dict[str, Any]:
    """Trains to the end, going on where it was; seconds of training by checkpoint, and the GFLOP of an update, as in
    `file`: {"seconds": {"100": 12.5}, "gflop": 150.0}."""
    import train.ldm
    from pipelines.files import checkpoints
    from train.aside import written_aside

    found = json.loads(file.read_text()) if file.is_file() else {"seconds": {}, "gflop": 0.0}
    there = [int(folder.name.partition("-")[2]) for folder in checkpoints(config.output)]
    if config.updates in there:
        return found

    def saved(update: int) -> None:
        found["seconds"][str(update)], found["gflop"] = clock.seconds, clock.gflop
        with written_aside(file) as partial:
            partial.write_text(json.dumps(found) + "\n")

    clock = Clock(found["seconds"][str(there[-1])] if there else 0.0, saved=saved)
    with clock.watching():
        train.ldm.main(config)
    return found


def places() -> list[int | None]:
    """The cores that this process may use; one place, pinned nowhere, on a GPU or where cores can't be chosen."""
    import torch

    if torch.cuda.is_available() or not hasattr(os, "sched_getaffinity"):
        return [None]
    return sorted(os.sched_getaffinity(0))


def together(jobs: dict[str, tuple], places: Sequence[int | None], logs: Path) -> dict[str, Any]:
    """What functions return, {name: (function, *arguments)}: each in a process of its own at one of the places, as many
    at once as there are. What they print is in `logs`; each minute its last line is said.

    Raises ValueError where one fails; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting, free, done = list(jobs), list(places), {}
    running: dict[str, tuple] = {}
    logs.mkdir(parents=True, exist_ok=True)
    said = time.monotonic()
    try:
        while waiting or running:
            while waiting and free:
                name, place = waiting.pop(0), free.pop(0)
                receiving, sending = context.Pipe(duplex=False)
                log = logs / f"{name.replace(' ', '-')}.log"
                arguments = (jobs[name][0], jobs[name][1:], place, log, sending)
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                sending.close()
                running[name] = (process, receiving, place, log)
            ready = wait([one[1] for one in running.values()], timeout=SAID_EVERY)
            for name in [name for name, one in running.items() if one[1] in ready]:
                process, receiving, place, log = running[name]
                try:
                    done[name], error = receiving.recv()
                except EOFError:
                    error = f"ended without a result: {_last_line(log)}"
                if error:
                    raise ValueError(f"{name}: {error} (see {log})")
                process.join()
                free.append(place)
                del running[name]
            if time.monotonic() > said + SAID_EVERY:
                said = time.monotonic()
                for name, one in running.items():
                    print(f"{name}: {_last_line(one[3])}", file=sys.stderr)
    finally:
        for process, *_ in running.values():
            process.terminate()
            process.join()
    return {name: done[name] for name in jobs}


def _work(function: Callable[..., Any], arguments: tuple, core: int | None, log: Path, answer: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: nothing is left behind by a benchmark that ends
    if core is not None:
        os.sched_setaffinity(0, {core})
        os.environ["OMP_NUM_THREADS"] = "1"  # whatever the shell says
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        answer.send((function(*arguments), ""))
    except ValueError as error:
        answer.send((None, str(error)))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "begins")
