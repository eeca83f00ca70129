"""LoRA files against diffusers and peft: the same picture, the same weights back, and nothing that fits nothing."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from pipelines import TextToImagePipeline
from pipelines.adapters import NAME, layers_of, read_lora, save_lora
from pipelines.folder import load_model
from tests.lora import PATHS, factors, kohya_file, own_weights

PROMPT = "an oil painting of a fox"


@pytest.fixture
def theirs(model_folder: Path) -> StableDiffusionPipeline:
    pytest.importorskip("peft")
    pipe = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painted(pipe: Any, **options: Any) -> np.ndarray:
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": latents, "output_type": "np", **options}
    return pipe(PROMPT, **call).images


def diffusers_file(folder: Path, made: dict, theirs: StableDiffusionPipeline) -> Path:
    text = {f"text_model.{key}": value for key, value in made["text_encoder"].items()}
    theirs.save_lora_weights(folder, made["unet"], text)
    return folder / NAME


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
def test_paints_what_diffusers_paints(
    tmp_path: Path, pipe: TextToImagePipeline, theirs: StableDiffusionPipeline, weight: float
) -> None:
    plain = painted(pipe)
    file = diffusers_file(tmp_path, factors(pipe.model), theirs)
    theirs.load_lora_weights(file, adapter_name="one")
    theirs.set_adapters("one", weight)
    pipe.load_lora(file, weight)
    ours = painted(pipe)
    np.testing.assert_allclose(ours, painted(theirs), atol=2e-3)
    assert (np.abs(ours - plain).mean() > 0.01) == (weight != 0)


def test_two_at_once_reweighted_and_unloaded_to_the_bit(
    tmp_path: Path, pipe: TextToImagePipeline, theirs: StableDiffusionPipeline
) -> None:
    before, plain = own_weights(pipe), painted(pipe)
    for i, name in enumerate(("one", "two")):
        file = diffusers_file(tmp_path / name, factors(pipe.model, rank=2 + i, seed=i), theirs)
        theirs.load_lora_weights(file, adapter_name=name)
        pipe.load_lora(tmp_path / name)  # a folder
    theirs.set_adapters(["one", "two"], [0.7, -0.4])
    pipe.set_lora(tmp_path / "one", 0.7)
    pipe.load_lora(tmp_path / "two", -0.4)  # once more: it is the same one
    assert pipe.loras == {str(tmp_path / "one"): 0.7, str(tmp_path / "two"): -0.4}
    np.testing.assert_allclose(painted(pipe), painted(theirs), atol=2e-3)
    settings = pipe(PROMPT, steps=1).images[0].settings
    assert settings["loras"] == pipe.loras
    pipe.unload_loras()
    assert pipe.loras == {}
    assert all(weight.equal(before[name]) for name, weight in own_weights(pipe).items())
    assert (painted(pipe) == plain).all()


@pytest.mark.parametrize("alpha", [1.0, 2.0, 4.0])
def test_kohyas_names_and_alphas(
    tmp_path: Path, pipe: TextToImagePipeline, theirs: StableDiffusionPipeline, alpha: float
) -> None:
    made = factors(pipe.model)
    file = kohya_file(tmp_path / "kohya.safetensors", made, alpha)
    read = read_lora(file, pipe.model)
    assert set(read) == {f"{part}.{path}" for part, paths in PATHS.items() for path in paths}
    assert {one.scale for one in read.values()} == {alpha / 2}
    theirs.load_lora_weights(file)
    pipe.load_lora(file)
    np.testing.assert_allclose(painted(pipe), painted(theirs), atol=2e-3)


@pytest.mark.parametrize("stabilised", [False, True])
def test_what_peft_writes(tmp_path: Path, pipe: TextToImagePipeline, stabilised: bool) -> None:
    """A PeftModel's own folder, with alpha, patterns and rank in the file beside."""
    peft = pytest.importorskip("peft")
    base = load_model(pipe.source).unet
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "conv1"],
        init_lora_weights=False,
        rank_pattern={"conv1": 2},
        alpha_pattern={"up_blocks.1.*to_q": 3},
        use_rslora=stabilised,
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path)
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "alone")
    with pytest.raises(ValueError, match=r"adapter_config\.json, which peft writes beside it, is missing"):
        pipe.load_lora(tmp_path / "alone")  # at the strength of 1 that it does not have
    pipe.load_lora(tmp_path)
    merged = wrapped.merge_and_unload()
    changed = 0
    own = load_model(pipe.source).unet
    for (name, ours), theirs, before in zip(
        pipe.model.unet.named_parameters(), merged.parameters(), own.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)
        changed += not ours.equal(before)
    assert changed > 5


def test_what_training_writes_opens_in_diffusers_with_its_alpha(
    tmp_path: Path, pipe: TextToImagePipeline, theirs: StableDiffusionPipeline
) -> None:
    peft = pytest.importorskip("peft")
    trained = load_model(pipe.source)
    torch.manual_seed(0)
    config = {"init_lora_weights": False, "rank_pattern": {}}
    unet = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v", "conv1", "proj_in"], **config)
    text = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "fc2"], **config)
    peft.inject_adapter_in_model(unet, trained.unet)
    peft.inject_adapter_in_model(text, trained.conditioner.tower)
    states = {
        "unet": peft.get_peft_model_state_dict(trained.unet),
        "text_encoder": peft.get_peft_model_state_dict(trained.conditioner.tower),
    }
    file = save_lora(tmp_path / "run" / "checkpoint-7", states, {"unet": 2, "text_encoder": 5})
    assert file.name == NAME
    pipe.load_lora(tmp_path / "run")  # a training run: its newest checkpoint
    theirs.load_lora_weights(file.parent)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    ours = painted(pipe)
    np.testing.assert_allclose(ours, painted(theirs), atol=2e-3)
    np.testing.assert_allclose(ours, painted(TextToImagePipeline(trained), latents=latents), atol=2e-3)
    pipe.unload_loras()
    assert np.abs(painted(pipe) - ours).mean() > 0.005


def test_layers_of_several_ranks(tmp_path: Path, pipe: TextToImagePipeline, theirs: StableDiffusionPipeline) -> None:
    made = factors(pipe.model)
    other = factors(pipe.model, rank=3)
    made["unet"] |= {key: value for key, value in other["unet"].items() if "to_q" in key or "conv1" in key}
    save_lora(tmp_path, made, {"unet": 1.5, "text_encoder": 1})
    read = read_lora(tmp_path, pipe.model)
    assert {name: f.scale for name, f in read.items() if len(f.down) == 3}.popitem()[1] == 0.5
    theirs.load_lora_weights(tmp_path)
    pipe.load_lora(tmp_path)
    np.testing.assert_allclose(painted(pipe), painted(theirs), atol=2e-3)


def test_bfloat16_rounds_once_and_comes_back(tmp_path: Path, model_folder: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu", dtype=torch.bfloat16)
    exact = load_model(model_folder)
    before = own_weights(pipe)
    file = save_lora(tmp_path, factors(exact), {"unet": 2, "text_encoder": 2})
    pipe.load_lora(file, 0.5)
    for name, (down, up, scale) in read_lora(file, exact).items():
        delta = 0.5 * scale * (up.flatten(1) @ down.flatten(1)).view_as(before[name])
        wanted = (before[name].float() + delta).bfloat16()
        torch.testing.assert_close(layers_of(pipe.model)[name].weight, wanted, atol=0, rtol=0.01)
    assert np.isfinite(painted(pipe)).all()
    pipe.unload_loras()
    assert all(weight.equal(before[name]) for name, weight in own_weights(pipe).items())


def test_a_merged_pipeline_can_be_saved(tmp_path: Path, pipe: TextToImagePipeline) -> None:
    file = save_lora(tmp_path / "lora.safetensors", factors(pipe.model), {"unet": 2, "text_encoder": 2})
    pipe.load_lora(file)
    pipe.save_pretrained(tmp_path / "merged")
    again = TextToImagePipeline.from_pretrained(tmp_path / "merged", device="cpu")
    np.testing.assert_array_equal(painted(pipe), painted(again))
