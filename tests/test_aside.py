"""What killed processes leave of the files that they were writing is removed when the next one starts; nothing else."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train.aside
from tests.test_launch import ROOT
from train.aside import remove_dead, written_aside
from train.data import read_pictures
from train.ldm import main
from train.sources import open_source

pytestmark = pytest.mark.usefixtures("in_process")
KILLED = """
import os, signal, sys
from contextlib import ExitStack
from pathlib import Path
from train.aside import written_aside

with ExitStack() as stack:
    for file in map(Path, sys.argv[1:]):
        file.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(written_aside(file)).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere, only a day tells")


def killed_while_writing(*files: Path) -> list[Path]:
    """What a real process left that was killed while it wrote these."""
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, files)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    left = [next(file.parent.glob(f"{file.name}.*.partial")) for file in files]
    assert all(file.read_text() == "half" for file in left)
    return left


def aged(file: Path, hours: float) -> Path:
    os.utime(file, (time.time() - 3600 * hours,) * 2)
    return file


@linux
def test_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    (mine,) = killed_while_writing(tmp_path / "000001.safetensors")
    with written_aside(tmp_path / "pixels.npy") as living:
        living.write_text("slow")
        aged(living, 30)
        _, host, process, rank, _ = living.name.rsplit(".npy", 1)[1].rsplit(".", 4)
        other = living.with_name(f"hashes.json.node7.cluster.{process}.{rank}.partial")
        before = living.with_name(f"hashes.json.{host[:-1]}.{process}.{rank}.partial")  # before the machine's last boot
        theirs = [tmp_path / name for name in ("film.mkv.partial", "a.json.partial", "hashes.json")]
        for file in (other, before, *theirs):
            file.write_text("x")
            aged(file, 30 if file in theirs else 23)
        remove_dead(tmp_path, tmp_path / "nothing")
        assert not mine.exists()
        assert {*tmp_path.iterdir()} == {living, other, before, *theirs}
        aged(other, 25)
        aged(before, 25)
        remove_dead(tmp_path)
        assert {*tmp_path.iterdir()} == {living, *theirs}
    assert (tmp_path / "pixels.npy").read_text() == "slow"


def test_where_machines_cannot_be_told_apart_only_a_day_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.aside, "_kernel", lambda: "")
    gone = tmp_path / f"0.png.{train.aside._host()}.{2**22 + 1}.0.partial"  # more than Linux counts to
    gone.write_text("half")
    remove_dead(tmp_path)
    assert gone.exists()
    aged(gone, 25)
    remove_dead(tmp_path)
    assert not gone.exists()


@linux
def test_every_start_removes_them(pixels: Any, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    left = killed_while_writing(
        cache / "sizes-1.json",
        cache / "latents-1" / "000000.safetensors",
        cache / "texts-1" / "000000.safetensors",
        cache / "pixels-1.npy",
        run / "samples" / "0000002.png",
        tmp_path / "other" / "pixels-1.npy",
    )
    main(replace(pixels, output=run, cache=cache))
    assert [file.exists() for file in left] == [False] * 5 + [True]
    read_pictures(open_source(pixels.data, 8), 8, tmp_path / "other", workers=0)  # as train/vae.py begins
    assert not left[-1].exists()
