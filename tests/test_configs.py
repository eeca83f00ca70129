"""The launcher's configurations that are shipped: that it reads them and, where there is a GPU, that they work."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

import ldm.blocks
import ldm.transformer
import ldm.unet
from pipelines.files import checkpoints
from pipelines.folder import load_model

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "train" / "configs").glob("*.yaml"))


def test_there_are_some() -> None:
    assert [file.stem for file in CONFIGS] == ["deepspeed", "fsdp", "gpus"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_launcher_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    kinds = {"deepspeed": "DEEPSPEED", "fsdp": "FSDP", "gpus": "MULTI_GPU"}
    assert config.distributed_type == kinds[file.stem]
    assert config.mixed_precision == "bf16"
    if file.stem == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
        known = {**vars(ldm.blocks), **vars(ldm.transformer), **vars(ldm.unet)}
        assert "UNet" in wrapped  # samples are painted by calling it
        assert all(isinstance(known[name], type) for name in wrapped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_run_saves_and_goes_on(file: Path, picture_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    if file.stem == "deepspeed":
        pytest.importorskip("deepspeed")
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(file)]
    settings = [
        "--data",
        picture_folder,
        "--model",
        model_folder,
        "--output",
        "run",
        "--batch-size",
        "4",
        "--workers",
        "0",
    ]
    for updates in ("2", "3"):
        job = [*launch, "--num_processes", "1", ROOT / "train" / "ldm.py", *settings, "--updates", updates]
        result = subprocess.run([str(word) for word in job], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    state = torch.load(checkpoints(tmp_path / "run")[-1] / "training" / "state.pt", weights_only=True)
    assert state["update"] == 3
    assert all(weight.isfinite().all() for weight in state["weights"].values())
    load_model(tmp_path / "run")
