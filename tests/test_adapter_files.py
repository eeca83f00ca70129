"""LoRA files: the names of every kind, what is written, and what fits nothing or is broken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines import TextToImagePipeline
from pipelines.adapters import NAME, read_lora, save_lora
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
