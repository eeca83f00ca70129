"""FSDP and DeepSpeed: a run on two processors that each hold half of everything is the run of one."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train.launch
from pipelines.files import checkpoints
from pipelines.folder import load_model
from tests.killing import run_killed
from tests.training import UNET, paint, state
from train.build import optimizer_for
from train.settings import Config
from train.trained import refuse_shards
from train.zero import settle


def small(pictures: Path, model_folder: Path, folder: Path) -> dict[str, Any]:
    """Settings of a run of six updates of eight pictures."""
    config = Config(
        data=str(pictures),
        vae="none",
        text_encoder=str(model_folder),
        unet=UNET,
        size=8,
        updates=6,
        batch_size=8,
        warmup=1,
        optimizer="adamw",
        learning_rate=1e-3,
        checkpoint_every=3,
        prompts=("a red square",),
        steps=2,
        workers=0,
        clip=0.5,
    )
    job = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return job | {"unet": dataclasses.asdict(UNET), "cache": folder / "cache"}


def alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Weights and moments of two runs that differ by rounding."""
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=2e-4, rtol=1e-3)
    for mine, theirs in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        assert float(mine["step"]) == float(theirs["step"])
        torch.testing.assert_close(theirs["exp_avg"], mine["exp_avg"], atol=1e-4, rtol=1e-2)


@pytest.mark.slow
def test_a_sharded_run_saves_paints_and_goes_on_as_a_whole_one(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    job = small(pictures, model_folder, tmp_path)
    run_killed(job | {"output": tmp_path / "one"})
    halves = job | {"batch_size": 4, "sharded": True}
    run_killed(halves | {"output": tmp_path / "two"}, processes=2)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    alike(one, two)
    shown = [
        load_file(checkpoints(tmp_path / run)[-1] / "unet/diffusion_pytorch_model.safetensors")
        for run in ("one", "two")
    ]
    for name, weight in shown[0].items():
        torch.testing.assert_close(shown[1][name], weight, atol=2e-4, rtol=1e-3)
    sheets = [np.asarray(Image.open(tmp_path / run / "samples" / "0000006.png"), np.float32) for run in ("one", "two")]
    assert np.abs(sheets[0] - sheets[1]).mean() < 1
    assert np.abs(paint(tmp_path / "one") - paint(tmp_path / "two")).mean() < 1

    # Killed, it ends with the same bytes; and what two have saved, one goes on with, and the other way round.
    run_killed(halves | {"output": tmp_path / "killed", "updates": 6}, processes=2, signals=("SIGTERM",))
    again = state(tmp_path / "killed")
    assert all(weight.equal(again["weights"][name]) for name, weight in two["weights"].items())
    run_killed(job | {"output": tmp_path / "two", "updates": 7})
    run_killed(halves | {"output": tmp_path / "one", "updates": 7}, processes=2)
    alike(state(tmp_path / "one"), state(tmp_path / "two"))


@pytest.mark.parametrize("asked", [{"lora_rank": 4}, {"token": "<x>"}, {"train": ("text_encoder",)}])
def test_fsdp_refuses_what_it_can_not_shard(asked: dict[str, Any], model_folder: Path) -> None:
    model = load_model(model_folder)
    refuse_shards(model, Config())
    with pytest.raises(ValueError, match="adapters, words, text encoders"):
        refuse_shards(model, Config(model=str(model_folder), **asked))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
def test_shards_want_adamw(kind: str, optimizer: Any) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    with pytest.raises(ValueError, match=f"--optimizer {optimizer} .*{kind} shards them: take adamw"):
        optimizer_for(torch.nn.Linear(2, 2), Config(optimizer=optimizer), accelerator)


def test_other_scripts_refuse_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.launch, "sharding", lambda accelerator: "FSDP")
    with pytest.raises(ValueError, match=r"^FSDP is for train/ldm\.py: .*gpus\.yaml"):
        train.launch.start(None)


def settled(zero: dict[str, Any], precision: str = "no") -> dict[str, Any]:
    """DeepSpeed's config, once the loop has said what it has to."""
    config = {"zero_optimization": zero, "bf16": {"enabled": True}}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    settle(cast(Any, SimpleNamespace(state=state, mixed_precision=precision)))
    return config


@pytest.mark.parametrize(
    ("zero", "precision", "said"),
    [
        ({"stage": 3}, "no", "stage 3 is not supported: .*fsdp.yaml"),
        ({"stage": 2}, "fp16", "fp16 is not supported with DeepSpeed: take bf16"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "no", "offloading is not supported"),
        ({"stage": 1, "offload_optimizer": {"device": "nvme"}}, "no", "offloading is not supported"),
    ],
)
def test_what_deepspeed_is_not_for(zero: dict[str, Any], precision: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settled(zero, precision)


def test_deepspeed_keeps_weights_in_float32() -> None:
    settled({"stage": 2, "offload_optimizer": {"device": "none"}})
    config = settled({"stage": 2}, "bf16")
    assert not config["bf16"]["enabled"]
    assert config["torch_autocast"]["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_shares_out_what_adamw_keeps(stage: int, pictures: Path, model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    job = small(pictures, model_folder, tmp_path) | {"accumulate": 2}
    run_killed(job | {"output": tmp_path / "one", "batch_size": 4})
    halves = job | {"batch_size": 2, "zero": stage}
    run_killed(halves | {"output": tmp_path / "two"}, processes=2)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    alike(one, two)
    assert np.abs(paint(tmp_path / "one") - paint(tmp_path / "two")).mean() < 1

    run_killed(halves | {"output": tmp_path / "killed"}, processes=2, signals=("SIGTERM",))
    again = state(tmp_path / "killed")
    assert all(weight.equal(again["weights"][name]) for name, weight in two["weights"].items())
    run_killed(job | {"output": tmp_path / "two", "batch_size": 4, "updates": 7})
    run_killed(halves | {"output": tmp_path / "one", "updates": 7}, processes=2)
    alike(state(tmp_path / "one"), state(tmp_path / "two"))
