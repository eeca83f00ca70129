"""LoRA files: the names of every kind, what is written, and what fits nothing or is broken."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipelines.loras
from pipelines import TextToImagePipeline
from pipelines.adapters import NAME, Factors, layers_of, read_lora, save_lora
from tests.lora import PATHS, factors, own_weights


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


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ("not json", "in its header is not JSON"),
        ("[]", "should be a JSON object"),
        ('{"unet.lora_alpha": "x"}', "holds a value that makes no sense"),
        ('{"painting": 3}', "what its header says of painting is 3"),
        ('{"painting": {"steps": "many"}}', "steps is 'many', expected a whole number, at least 1"),
        ('{"painting": {"sampler": "nope"}}', "sampler is 'nope', expected one of"),
        ('{"painting": {"guidance_interval": 5}}', "guidance_interval is 5, expected two noise levels, or null"),
        ('{"painting": {"scheduler": [1]}}', "expected names and values"),
        ('{"painting": {"scheduler": {"timestep_spacing": 3}}}', "spacing"),
        ('{"painting": {"scheduler": {"prediction_type": "sample"}}}', "its scheduler is of prediction sample"),
        ('{"unet.lora_alpha": NaN}', "is nan, expected a number"),
        ('{"unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 1}}', "holds a value that makes no sense"),
    ],
)
def test_a_broken_header_changes_nothing(tmp_path: Path, pipe: TextToImagePipeline, notes: str, message: str) -> None:
    before, defaults = own_weights(pipe), pipe.model.defaults
    file = tmp_path / "x.safetensors"
    save_file(good(pipe), file, metadata={"lora_adapter_metadata": notes})
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        pipe.load_lora(file)
    assert (pipe.loras, pipe.model.defaults) == ({}, defaults)
    assert all(weight.equal(before[name]) for name, weight in own_weights(pipe).items())


def test_a_merge_that_fails_half_way_leaves_what_was_there(
    tmp_path: Path, pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        save_lora(tmp_path / f"{i}.safetensors", factors(pipe.model, seed=i), {"unet": 2, "text_encoder": 2})
        for i in range(2)
    )
    pipe.load_lora(first)
    before = own_weights(pipe)
    read = pipelines.loras.read_lora

    def too_large(where: Path, model: Any) -> dict[str, Factors]:
        found = read(where, model)
        name = [layer for layer in layers_of(model) if layer in found][-1]
        return found | {name: found[name]._replace(up=torch.ones(1, 2))}

    monkeypatch.setattr(pipelines.loras, "read_lora", too_large)
    with pytest.raises(RuntimeError):  # in the last of the layers
        pipe.load_lora(second)
    assert pipe.loras == {str(first): 1.0}
    assert all(weight.equal(before[name]) for name, weight in own_weights(pipe).items())


def test_two_pipelines_of_one_model_share_its_loras(tmp_path: Path, pipe: TextToImagePipeline) -> None:
    before, other = own_weights(pipe), TextToImagePipeline(pipe.model)
    one, two = (
        save_lora(tmp_path / f"{i}.safetensors", factors(pipe.model, seed=i), {"unet": 2, "text_encoder": 2})
        for i in range(2)
    )
    pipe.load_lora(one)
    other.load_lora(two)
    assert pipe.loras == other.loras == {str(one): 1.0, str(two): 1.0}
    pipe.unload_loras()
    assert other.loras == {}
    assert TextToImagePipeline(replace(pipe.model)).loras == {}
    assert all(weight.equal(before[name]) for name, weight in own_weights(other).items())


def test_unloading_takes_back_what_the_lora_said_and_nothing_else(tmp_path: Path, pipe: TextToImagePipeline) -> None:
    said = {"steps": 4, "sampler": "euler", "scheduler": {"timestep_spacing": "linspace"}}
    file = save_lora(tmp_path, factors(pipe.model), {"unet": 2, "text_encoder": 2}, said)
    defaults, scheduler = pipe.model.defaults, dict(pipe.model.scheduler)
    pipe.load_lora(file)
    assert (pipe.model.defaults.steps, pipe.model.defaults.sampler) == (4, "euler")
    assert pipe.model.scheduler["timestep_spacing"] == "linspace"
    pipe.model.defaults = replace(pipe.model.defaults, steps=7, guidance_scale=3.0)  # the caller's own wishes
    pipe.load_lora(save_lora(tmp_path / "other.safetensors", factors(pipe.model), {"unet": 2, "text_encoder": 2}))
    assert (pipe.model.defaults.steps, pipe.model.defaults.sampler) == (7, "euler")
    pipe.set_lora(file, 0.0)
    assert pipe.model.defaults == replace(defaults, steps=7, guidance_scale=3.0)
    pipe.unload_loras()
    assert pipe.model.defaults == replace(defaults, steps=7, guidance_scale=3.0)
    assert list(pipe.model.scheduler.items()) == list(scheduler.items())


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
    for alpha, lowest in ((torch.ones(2), "one element"), (torch.tensor(2.0), "")):
        tensors = {"lora_unet_conv_in.alpha": alpha, "lora_unet_conv_in.lora_up.weight": torch.ones(3)}
        save_file(tensors | {"lora_unet_conv_in.lora_down.weight": torch.tensor(1.0)}, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=f"{tmp_path / 'odd.safetensors'}.*{lowest}"):
            pipe.load_lora(tmp_path / "odd.safetensors")
    for weight in (float("nan"), "0.5"):
        with pytest.raises(ValueError, match=f"weight={weight!r}: expected a number, 1 as it was trained"):
            pipe.load_lora(file, weight)  # type: ignore[arg-type]
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
