"""LoRA files against diffusers and peft: the same picture, the same weights back, and nothing that fits nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines import TextToImagePipeline
from pipelines.adapters import NAME, layers_of, read_lora, save_lora
from pipelines.folder import load_model

PROMPT = "an oil painting of a fox"
UNET = "down_blocks.0.attentions.0"
PATHS = {  # every kind of layer: linear, 1×1 and 3×3 convolutions
    "unet": [
        f"{UNET}.transformer_blocks.0.attn1.to_q",
        f"{UNET}.transformer_blocks.0.attn2.to_k",
        f"{UNET}.transformer_blocks.0.attn2.to_out.0",
        f"{UNET}.transformer_blocks.0.ff.net.0.proj",
        f"{UNET}.proj_in",
        "up_blocks.1.resnets.0.conv1",
        "down_blocks.0.resnets.0.time_emb_proj",
    ],
    "text_encoder": [
        "encoder.layers.0.self_attn.q_proj",
        "encoder.layers.1.self_attn.out_proj",
        "encoder.layers.1.mlp.fc1",
    ],
}


@pytest.fixture
def pipe(model_folder: Path) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def theirs(model_folder: Path) -> StableDiffusionPipeline:
    pytest.importorskip("peft")
    pipe = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def factors(model: Any, rank: int = 2, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """part -> PATH.lora_A.weight and PATH.lora_B.weight, strong enough to be seen in a picture."""
    layers, made = layers_of(model), {}
    generator = torch.Generator().manual_seed(seed)
    for part, paths in PATHS.items():
        made[part] = {}
        for path in paths:
            weight: Any = layers[f"{part}.{path}"].weight
            ones = [1] * (weight.ndim - 2)
            spread = 0.6 / weight[0].numel() ** 0.5
            made[part][f"{path}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) * spread
            made[part][f"{path}.lora_B.weight"] = torch.randn(len(weight), rank, *ones, generator=generator)
    return made


def painted(pipe: Any, **options: Any) -> np.ndarray:
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": latents, "output_type": "np", **options}
    return pipe(PROMPT, **call).images


def own_weights(pipe: TextToImagePipeline) -> dict[str, Tensor]:
    return {name: layer.weight.clone() for name, layer in layers_of(pipe.model).items()}


def diffusers_file(folder: Path, made: dict, theirs: StableDiffusionPipeline) -> Path:
    text = {f"text_model.{key}": value for key, value in made["text_encoder"].items()}
    theirs.save_lora_weights(folder, made["unet"], text)
    return folder / NAME


def kohya_file(file: Path, made: dict, alpha: float) -> Path:
    """The names of kohya's scripts, each layer with its alpha."""
    tensors = {}
    for part, state in made.items():
        for key, value in state.items():
            path, _, factor = key.removesuffix(".weight").rpartition(".")
            name = f"lora_unet_{path}" if part == "unet" else f"lora_te_text_model_{path}"
            name = name.replace(".", "_")
            tensors[f"{name}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file


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


def test_the_oldest_names(tmp_path: Path, pipe: TextToImagePipeline) -> None:
    """As diffusers 0.14 to 0.20 wrote them, of attention only; and those of peft, and of one network alone."""
    made = factors(pipe.model)
    attention = {
        f"{part}.{key}": value for part, state in made.items() for key, value in state.items() if ".to_" in key
    } | {f"text_encoder.{key}": value for key, value in made["text_encoder"].items() if "_proj" in key}

    def renamed(*pairs: tuple[str, str]) -> dict[str, Tensor]:
        tensors = {}
        for key, value in attention.items():
            for old, new in pairs:
                key = key.replace(old, new)
            tensors[key] = value
        return tensors

    down, up = ("lora_A", "lora.down"), ("lora_B", "lora.up")
    old = [(f".to_{x}", f".processor.to_{x}") for x in "qkv"] + [("to_out.0", "processor.to_out")]
    old += [("self_attn.q_proj", "self_attn.to_q"), ("self_attn.out_proj", "self_attn.to_out")]
    old += [("text_encoder.", "text_encoder.text_model.")]
    layouts = {
        "peft": renamed(),
        "lora": renamed(down, up),
        "linear layer": renamed(
            ("_proj.lora_A", "_proj.lora_linear_layer.down"), ("_proj.lora_B", "_proj.lora_linear_layer.up")
        ),
        "processors": renamed(*old, (".lora_A", "_lora.down"), (".lora_B", "_lora.up")),
        "adapter's name": renamed(("lora_A", "lora_A.default"), ("lora_B", "lora_B.default")),
        "PeftModel": renamed(("unet.", "base_model.model."), ("text_encoder.", "base_model.model.text_model.")),
        "one network": renamed(("unet.", ""), ("text_encoder.", "text_model.")),
    }
    expected = {key.removesuffix(".lora_A.weight"): value for key, value in attention.items() if "lora_A" in key}
    for layout, tensors in layouts.items():
        assert len(tensors) == len(attention)
        save_file(tensors, tmp_path / "lora.safetensors")
        read = read_lora(tmp_path, pipe.model)  # the only such file in a folder
        assert read.keys() == expected.keys(), layout
        assert all(read[name].down.equal(expected[name]) and read[name].scale == 1 for name in read), layout


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


def good(pipe: TextToImagePipeline) -> dict[str, Tensor]:
    return {f"{part}.{key}": value for part, state in factors(pipe.model).items() for key, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.down_blocks.7.attn.to_q.lora_A.weight": (2, 8), "unet.down_blocks.7.attn.to_q.lora_B.weight": (8, 2)},
         r"1 of its 11 layers or keys fit nothing here, such as unet.down_blocks.7.attn.to_q; this model has \d+ lay"),
        ({"unet.conv_in.lora_A.weight": (2, 5, 3, 3), "unet.conv_in.lora_B.weight": (16, 2, 1, 1)},
         r"unet.conv_in \(\(16, 2, 1, 1\) times \(2, 5, 3, 3\) for a weight of \(16, 4, 3, 3\)\)"),
        ({"unet.conv_out.lora_A.weight": (2, 16, 3, 3)}, "unet.conv_out .one factor without the other"),
        ({"unet.conv_out.alpha": ()}, "unet.conv_out.alpha"),
        ({"unet.conv_out.weight": (4, 16, 3, 3)}, "unet.conv_out.weight"),
        ({"text_encoder_2.encoder.layers.0.mlp.fc1.lora_A.weight": (2, 32),
          "text_encoder_2.encoder.layers.0.mlp.fc1.lora_B.weight": (64, 2)}, "text_encoder_2.encoder"),
        ({"unet.conv_out.lora_magnitude_vector": (4,)}, "DoRA"),
        ({"lora_unet_conv_out.dora_scale": (4,)}, "DoRA"),
        ({"lora_unet_conv_out.hada_w1_a": (4, 2)}, "LoHa"),
        ({"lora_unet_conv_out.lokr_w1": (4, 2)}, "LoKr"),
        ({"lora_unet_conv_out.lora_mid.weight": (2, 2, 3, 3)}, "third factor"),
    ],
)  # fmt: skip
def test_what_fits_nothing_is_named_and_changes_nothing(
    tmp_path: Path, pipe: TextToImagePipeline, change: dict[str, tuple[int, ...]], message: str
) -> None:
    before = own_weights(pipe)
    save_file(good(pipe) | {key: torch.ones(shape) for key, shape in change.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        pipe.load_lora(tmp_path / "x.safetensors")
    assert pipe.loras == {}
    assert all(weight.equal(before[name]) for name, weight in own_weights(pipe).items())


def test_bad_files_and_names_say_what_to_do(
    tmp_path: Path, pipe: TextToImagePipeline, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, tmp_path / "a.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    (tmp_path / "empty").mkdir()
    save_file({"<cat>": torch.ones(1, 32)}, tmp_path / "embedding.safetensors")
    for where, message in {
        "a.pt": "pickled",
        "cut.safetensors": "broken",
        "empty": f"expected {NAME} or adapter_model.safetensors in it, or one .safetensors file; found nothing",
        "none.safetensors": "no such file or folder",
        "./no/such": "no such file or folder",
        "embedding.safetensors": "holds no LoRA: expected keys such as unet.….lora_A.weight, got <cat>",
        str(model_folder): "found atelier.json",
        str(model_folder / "unet"): "holds no LoRA",
    }.items():
        with pytest.raises(ValueError, match=message):
            pipe.load_lora(where)
    with pytest.raises(ValueError, match="no LoRA 'x' is loaded: none is"):
        pipe.set_lora("x", 1.0)
    file = save_lora(tmp_path / "good.safetensors", factors(pipe.model), {"unet": 2, "text_encoder": 2})
    with pytest.raises(ValueError, match="weight=nan"):
        pipe.load_lora(file, float("nan"))
    assert pipe.loras == {}
    for layers in ({}, {"vae": {}}, {"unet": {"conv_in.lora_A.weight": torch.ones(1, 4)}}):
        with pytest.raises(ValueError, match="a LoRA of"):
            save_lora(tmp_path / "bad.safetensors", layers, {"unet": 1})
    assert not (tmp_path / "bad.safetensors").exists()


def test_the_header_is_diffusers_own(tmp_path: Path, pipe: TextToImagePipeline) -> None:
    from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata

    file = save_lora(tmp_path, factors(pipe.model), {"unet": 2, "text_encoder": 3})
    notes = _load_sft_state_dict_metadata(file)
    assert (notes["unet.r"], notes["unet.lora_alpha"], notes["text_encoder.lora_alpha"]) == (2, 2, 3)
    assert notes["unet.target_modules"] == sorted(PATHS["unet"])
    assert json.dumps(notes)
    assert all(key.startswith(("unet.", "text_encoder.text_model.encoder.")) for key in load_file(file))
