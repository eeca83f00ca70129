"""A run that is killed at any moment, or told to end, goes on to the same bytes; and what stops one cleanly."""

import dataclasses
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines.files import checkpoints
from tests.killing import run_killed
from tests.training import UNET
from train.settings import Config

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def settings(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """More pictures than a shard of the cache holds; steps that are accumulated; epochs that end within an update."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(530):
        Image.new("RGB", (16, 16), (i % 256, i // 3 % 256, 7 * i % 256)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"number {i}")
    config = Config(
        data=str(folder),
        vae=str(model_folder),
        text_encoder=str(model_folder),
        unet=UNET,
        size=16,
        updates=24,
        batch_size=16,
        accumulate=2,
        warmup=4,
        caption_dropout=0.3,
        checkpoint_every=5,
        prompts=("number 3",),
        steps=2,
        workers=0,
    )
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {
        "unet": dataclasses.asdict(UNET)
    }


def state(run: Path) -> dict:
    return torch.load(checkpoints(run)[-1] / "training" / "state.pt", weights_only=True)


def same(one: Path, other: Path) -> None:
    a, b = state(one), state(other)
    assert a["update"] == b["update"] == 24
    assert (checkpoints(one)[-1] / WEIGHTS).read_bytes() == (checkpoints(other)[-1] / WEIGHTS).read_bytes()
    assert all(weight.equal(b["weights"][name]) for name, weight in a["weights"].items())
    for mine, theirs in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(mine[name].equal(theirs[name]) for name in mine)
    assert (one / "samples/0000024.png").read_bytes() == (other / "samples/0000024.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_ends_with_the_same_bytes(settings: dict, tmp_path: Path, processes: int) -> None:
    """In a step, in a checkpoint, while latents are cached, while samples are painted: wherever it happens to be."""
    size = settings["batch_size"] // processes
    job = settings | {"batch_size": size}
    whole = run_killed(job | {"output": tmp_path / "whole", "cache": tmp_path / "one"}, processes=processes)
    assert whole["codes"] == [[0] * processes]
    job |= {"output": tmp_path / "killed", "cache": tmp_path / "two", "seconds": whole["seconds"][0]}
    killed = run_killed(job, processes=processes, kills=4)
    assert killed["codes"][-1] == [0] * processes
    same(tmp_path / "whole", tmp_path / "killed")
    left = {f.name for f in (tmp_path / "killed").iterdir()}
    assert not {name for name in left if name.startswith(".")}  # neither half a checkpoint nor a rehearsal

    # Told to end, it saves and ends, with the code of the signal; in all processes after the same update.
    job = {k: v for k, v in job.items() if k != "seconds"} | {"output": tmp_path / "told", "cache": tmp_path / "one"}
    names = ("SIGTERM", "SIGINT", "SIGUSR1")[: 3 // processes]
    told = run_killed(job, processes=processes, signals=names)
    assert told["codes"][:-1] == [[128 + getattr(signal, name)] * processes for name in names]
    # What docs/training.md's script for SLURM looks for, to know whether to queue a job again.
    ends = re.findall(r"(?m)^done|told to end", told["printed"])
    assert ends == [*["told to end"] * len(names), "done"]
    same(tmp_path / "whole", tmp_path / "told")


@pytest.mark.slow
def test_what_dropout_leaves_out_is_the_same_again(settings: dict, tmp_path: Path) -> None:
    drops = settings | {"unet": settings["unet"] | {"dropout": 0.5}, "cache": tmp_path / "cache"}
    run_killed(drops | {"output": tmp_path / "whole"})
    run_killed(settings | {"cache": tmp_path / "cache", "output": tmp_path / "without"})
    dropped, kept = (state(tmp_path / run)["weights"] for run in ("whole", "without"))
    assert any(not weight.equal(kept[name]) for name, weight in dropped.items())
    told = run_killed(drops | {"output": tmp_path / "told"}, signals=("SIGTERM",))
    assert told["codes"][0] == [128 + signal.SIGTERM]
    same(tmp_path / "whole", tmp_path / "told")


@pytest.mark.slow
def test_accumulated_steps_of_two_processes_are_one_batch(settings: dict, tmp_path: Path) -> None:
    short = settings | {"updates": 3, "optimizer": "adamw", "clip": 1e9, "cache": tmp_path / "cache"}
    run_killed(short | {"output": tmp_path / "one", "batch_size": 16, "accumulate": 1})
    run_killed(short | {"output": tmp_path / "two", "batch_size": 4, "accumulate": 2}, processes=2)
    run_killed(short | {"output": tmp_path / "other", "batch_size": 16, "accumulate": 1, "seed": 1})

    def moments(run: str) -> torch.Tensor:
        """The mean gradient of the updates, in essence."""
        return torch.cat([s["exp_avg"].flatten() for s in state(tmp_path / run)["optimizer"]["state"].values()])

    one, two, other = map(moments, ("one", "two", "other"))
    torch.testing.assert_close(two, one, atol=1e-4 * float(one.abs().max()), rtol=1e-3)
    assert (other - one).abs().max() > 0.05 * one.abs().max()
