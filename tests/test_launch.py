"""The scripts as people start them: by the launcher, from any folder, in one process or two."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file

import train.vae
from ldm.pixel_unet import PixelUNet, PixelUNetConfig
from pipelines import TextToImagePipeline
from pipelines.files import checkpoints
from train.launch import errors_said, memory_format, start
from train.ldm import main
from train.presets import PRESETS

pytestmark = pytest.mark.usefixtures("in_process")

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = Path(sys.executable).with_name("accelerate")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """As in a fresh terminal on a machine without a GPU: there, the launcher sets OMP_NUM_THREADS to 1."""
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and not k.startswith("ACCELERATE_")}
    env = {**inherited, "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def flags(pictures: Path, model: Path, output: Path) -> list[str]:
    """Two updates of a tiny model."""
    places = {"data": pictures, "model": model, "output": output, "cache": output / "cache"}
    numbers = "--updates 2 --batch-size 2 --warmup 1 --clip 1e9 --learning-rate 1e-3 --workers 0 --seed 3"
    return [*(word for name, place in places.items() for word in (f"--{name}", str(place))), *numbers.split()]


def test_the_launcher_trains_from_the_projects_folder(picture_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    result = run(ACCELERATE, "launch", "train/ldm.py", *flags(picture_folder, model_folder, tmp_path / "run"), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert f"1 process(es) on cpu, {CORES} thread(s) each" in result.stdout
    assert "8 pictures, captions: metadata.jsonl" in result.stdout
    assert (tmp_path / "run" / "samples" / "0000002.png").is_file()
    image = TextToImagePipeline.from_pretrained(tmp_path / "run", device="cpu")("a red square", steps=2).images[0]
    assert image.size == (16, 16)


def test_fewer_processes_than_asked_for_are_refused() -> None:
    # From a folder below: that this sentence is reached means that the project's packages were found.
    result = run(ACCELERATE, "launch", "--cpu", "--num_processes", "2", "../train/ldm.py", cwd=ROOT / "tests")
    assert result.returncode != 0
    assert "error: the launcher was asked for several processes and started one." in result.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 train/ldm.py" in result.stderr
    assert 'ldm.py", line' not in result.stderr  # a sentence, no traceback of ours


def test_a_tracker_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ValueError, match="--tracker wandb is not installed: pip install wandb"):
        start(log_with="wandb", project_dir=tmp_path)


def test_what_the_launcher_and_the_environment_say_is_taken() -> None:
    start = "from train.launch import start; start()"
    if sys.platform == "linux":
        start += "; import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n))"  # PR_GET_PDEATHSIG
        start += "; print(f'ended by signal {n.value}')"
    for precision, wished, threads in (("bf16", "3", 3), ("no", "1", CORES)):
        environment = {"ACCELERATE_MIXED_PRECISION": precision, "OMP_NUM_THREADS": wished, "ACCELERATE_USE_CPU": "true"}
        result = run(sys.executable, "-c", start, cwd=ROOT, **environment)
        assert f"on cpu, {threads} thread(s) each, mixed precision: {precision}" in result.stdout, result.stderr
        if sys.platform == "linux":
            assert "ended by signal 15" in result.stdout  # when the launcher ends, which hands no signal on


@pytest.mark.parametrize(
    ("device", "precision", "norm", "layout"),
    [
        ("cpu", "bf16", "group", torch.contiguous_format),
        ("cpu", "bf16", "batch", torch.channels_last),
        ("cpu", "no", "group", torch.channels_last),
        ("cuda", "bf16", "group", torch.channels_last),
    ],
)
def test_pictures_are_laid_out_as_their_norms_are_fast(
    device: str, precision: str, norm: str, layout: torch.memory_format
) -> None:
    where = SimpleNamespace(device=torch.device(device), mixed_precision=precision, distributed_type=DistributedType.NO)
    assert memory_format(where, PixelUNet(PixelUNetConfig(norm=norm))) is layout  # type: ignore[arg-type]


@pytest.mark.slow
def test_strangers_are_refused(tmp_path: Path) -> None:
    port = ("--main_process_port", str(free_port()))
    result = run(ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", *port, "train/ldm.py", cwd=ROOT)
    assert result.returncode != 0
    assert "error: the launcher started 2 processes, but they do not know each other" in result.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 train/ldm.py" in result.stderr


@pytest.mark.slow
def test_two_processes_train_the_model_that_one_trains(
    picture_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    """By the command that works, from a folder that has nothing to do with the project."""
    arguments = flags(picture_folder, model_folder, Path("two"))
    launch = (ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", free_port())
    result = run(*map(str, launch), ROOT / "train" / "ldm.py", *arguments, cwd=tmp_path, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert f"2 process(es) on cpu, {max(1, CORES // 2)} thread(s) each" in result.stdout
    assert result.stdout.count("8 pictures to train on") == 1
    config = replace(
        PRESETS["fine-tune"],
        data=str(picture_folder),
        model=str(model_folder),
        output=tmp_path / "one",
        cache=tmp_path / "cache",
        updates=2,
        batch_size=4,
        warmup=1,
        clip=1e9,
        learning_rate=1e-3,
        workers=0,
        seed=3,
    )
    main(config)
    main(replace(config, output=tmp_path / "other", seed=4))
    two, one, other = (
        torch.load(checkpoints(tmp_path / name)[-1] / "training" / "state.pt", weights_only=True)
        for name in ("two", "one", "other")
    )

    def moments(state: dict) -> torch.Tensor:
        """The mean gradient of both updates, in essence."""
        return torch.cat([s["exp_avg"].flatten() for s in state["optimizer"]["state"].values()])

    scale = float(moments(one).abs().max())
    torch.testing.assert_close(moments(two), moments(one), atol=1e-4 * scale, rtol=1e-3)
    assert (moments(other) - moments(one)).abs().max() > 0.05 * scale  # the same batches, not just any
    start = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    moved = sum(float((one["weights"][f"unet.{name}"] - weight).abs().sum()) for name, weight in start.items())
    apart = sum(float((one["weights"][name] - weight).abs().sum()) for name, weight in two["weights"].items())
    # Where a gradient is nothing but rounding, AdamW makes steps of it all the same.
    assert apart < 0.02 * moved


def test_the_autoencoders_script_finds_the_package_that_ldm_py_hides(tmp_path: Path) -> None:
    result = run(sys.executable, ROOT / "train" / "vae.py", "--preset", "nothing", cwd=tmp_path)
    assert result.returncode == 1
    wanted = ", ".join(train.vae.PRESETS)
    assert result.stderr.strip().splitlines()[-1] == f"error: --preset 'nothing': expected one of {wanted}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("--size is 0"), "error: --size is 0"),
        (torch.OutOfMemoryError("no room"), "error: no room\nTake a smaller --batch-size with --accumulate, --mixed"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(error: Exception, said: str) -> None:
    with pytest.raises(SystemExit) as ended, errors_said(" with --accumulate"):
        raise error
    assert str(ended.value).startswith(said)
    with pytest.raises(AssertionError), errors_said():  # a bug is one
        raise AssertionError
