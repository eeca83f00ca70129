"""What results say of the machine and the code that they are of."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from train import machine


def test_a_machine_is_described() -> None:
    said = machine.described()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert f", {cores} cores, " in said
    assert f"PyTorch {torch.__version__.partition('+')[0]}" in said


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_named_and_what_was_changed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "train" / "machine.py"
    code.parent.mkdir()
    code.write_text("")
    monkeypatch.setattr(machine, "__file__", str(code))
    assert "commit" not in machine.described()  # no repository

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert machine.described().endswith(f", commit {commit}")
    (tmp_path / "result.json").write_text("{}")  # no code
    assert machine.described().endswith(f", commit {commit}")
    code.write_text("changed = True")
    assert machine.described().endswith(f", commit {commit}+")
