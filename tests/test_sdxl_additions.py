"""What is added to a Stable Diffusion XL: LoRA files and learned words, against diffusers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from pipelines import TextToImagePipeline
from pipelines.adapters import NAME, layers_of, read_lora, save_lora
from pipelines.embeddings import save_embedding
from tests.lora import factors, kohya_file, own_weights
from tests.sdxl import PROMPT, assert_same, opened, painted, told

LEVEL = "down_blocks.1.attentions.0"
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"]
PATHS = {
    "unet": [
        f"{LEVEL}.transformer_blocks.1.attn1.to_q",
        f"{LEVEL}.transformer_blocks.0.attn2.to_out.0",
        f"{LEVEL}.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_k",
    ],
    "text_encoder": TEXT,
    "text_encoder_2": [*TEXT, "text_projection"],
}
# Layers whose names in the original code are other ones; the last five only in files that kohya's scripts write for
# convolutions and beyond.
ORIGINAL = {
    "input_blocks_4_1_transformer_blocks_1_attn1_to_q": f"{LEVEL}.transformer_blocks.1.attn1.to_q",
    "input_blocks_5_1_proj_out": "down_blocks.1.attentions.1.proj_out",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": PATHS["unet"][3],
    "output_blocks_2_1_transformer_blocks_0_attn2_to_k": PATHS["unet"][4],
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_4_0_emb_layers_1": "up_blocks.1.resnets.1.time_emb_proj",
    "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}


@pytest.fixture
def ours(xl_folder: Path) -> TextToImagePipeline:
    return opened(xl_folder)


@pytest.fixture
def theirs(xl_folder: Path) -> StableDiffusionXLPipeline:
    pytest.importorskip("peft")
    pipe = StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_diffusers(folder: Path, made: dict, theirs: StableDiffusionXLPipeline) -> Path:
    def full(part: str) -> dict:
        return {k if k.startswith("text_proj") else f"text_model.{k}": v for k, v in made[part].items()}

    theirs.save_lora_weights(folder, made["unet"], full("text_encoder"), full("text_encoder_2"))
    return folder / NAME


def as_trained(folder: Path, made: dict, theirs: StableDiffusionXLPipeline) -> Path:
    return save_lora(folder, made, dict.fromkeys(made, 2))


def as_kohya(folder: Path, made: dict, theirs: StableDiffusionXLPipeline) -> Path:
    return kohya_file(folder / "kohya.safetensors", made, 1.0)


@pytest.mark.parametrize("written", [as_diffusers, as_trained, as_kohya])
def test_loras_paint_what_they_paint_in_diffusers(
    tmp_path: Path, ours: TextToImagePipeline, theirs: StableDiffusionXLPipeline, written: Callable
) -> None:
    before, plain = own_weights(ours), painted(ours)
    made = factors(ours.model, paths=PATHS)
    file = written(tmp_path, made, theirs)
    read = read_lora(file, ours.model)
    assert set(read) == {f"{part}.{path}" for part, paths in PATHS.items() for path in paths}
    scale = 0.5 if written is as_kohya else 1.0  # alpha / rank
    # Of kohya's names diffusers loses those of the text encoders' attention, with transformers 5.
    known = as_diffusers(tmp_path / "known", made, theirs) if written is as_kohya else file
    theirs.load_lora_weights(known, adapter_name="one")
    theirs.set_adapters("one", 0.7 * scale)
    ours.load_lora(file, 0.7)
    changed = painted(ours)
    assert_same(changed, painted(theirs))
    assert np.abs(changed - plain).mean() > 0.01
    ours.unload_loras()
    assert all(weight.equal(before[name]) for name, weight in own_weights(ours).items())


def test_both_text_encoders_are_changed_each_by_its_own(
    tmp_path: Path, ours: TextToImagePipeline, theirs: StableDiffusionXLPipeline
) -> None:
    plain = painted(ours)
    for part in ("text_encoder", "text_encoder_2"):
        file = save_lora(tmp_path / part, factors(ours.model, paths={part: PATHS[part]}), {part: 2})
        assert set(read_lora(file, ours.model)) == {f"{part}.{path}" for path in PATHS[part]}
        ours.load_lora(file)
        assert np.abs(painted(ours) - plain).mean() > 1e-3
        ours.unload_loras()


def test_names_of_the_original_code(
    tmp_path: Path, ours: TextToImagePipeline, theirs: StableDiffusionXLPipeline
) -> None:
    """As kohya's scripts name SDXL's layers: counted through all levels, beside those of the text encoders."""
    made = factors(ours.model, paths={"unet": list(ORIGINAL.values()), "text_encoder_2": PATHS["text_encoder_2"][1:]})
    tensors = load_file(kohya_file(tmp_path / "diffusers.safetensors", made, 1.0))
    for theirs_name, name in ORIGINAL.items():
        for end in ("lora_down.weight", "lora_up.weight", "alpha"):
            old = f"lora_unet_{name.replace('.', '_')}.{end}"
            tensors[f"lora_unet_{theirs_name}.{end}"] = tensors.pop(old)
    save_file(tensors, tmp_path / "original.safetensors")
    read = read_lora(tmp_path / "original.safetensors", ours.model)
    wanted = read_lora(tmp_path / "diffusers.safetensors", ours.model)
    assert read.keys() == wanted.keys()
    assert all(read[name].down.equal(wanted[name].down) for name in wanted)
    theirs.load_lora_weights(tmp_path / "original.safetensors")
    ours.load_lora(tmp_path / "original.safetensors", 1.0)
    assert_same(painted(ours), painted(theirs))


def test_a_lora_of_another_kind_of_model_is_refused(tmp_path: Path, ours: TextToImagePipeline) -> None:
    save_file(
        {"lora_unet_input_blocks_9_1_proj_in.lora_down.weight": torch.ones(2, 32),
         "lora_unet_input_blocks_9_1_proj_in.lora_up.weight": torch.ones(32, 2)},
        tmp_path / "x.safetensors",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="1 of its 1 layers or keys fit nothing here, such as lora_unet_input_blocks_9"
    ):
        ours.load_lora(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="a LoRA of 'text_encoder_3'"):
        save_lora(tmp_path, {"text_encoder_3": {}}, {})
    assert any(name.startswith("text_encoder_2.text_projection") for name in layers_of(ours.model))


def vectors(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 24, generator=generator), torch.randn(count, 32, generator=generator)


@pytest.mark.parametrize("count", [1, 3])
def test_learned_words_of_both_text_encoders(
    tmp_path: Path, ours: TextToImagePipeline, theirs: StableDiffusionXLPipeline, count: int
) -> None:
    prompt, first, second = "an oil painting of a <cat>!", *vectors(count)
    plain = painted(ours, prompt)
    save_file({"clip_l": first, "clip_g": second}, tmp_path / "<cat>.safetensors")
    assert ours.load_embedding(tmp_path / "<cat>.safetensors") == ("<cat>",)
    towers = ((theirs.text_encoder, theirs.tokenizer, first), (theirs.text_encoder_2, theirs.tokenizer_2, second))
    for tower, tokenizer, learned in towers:
        theirs.load_textual_inversion(learned, token="<cat>", text_encoder=tower, tokenizer=tokenizer)
    got = painted(ours, prompt)
    assert_same(got, painted(theirs, prompt))
    assert np.abs(got - plain).mean() > 1e-3
    assert ours(PROMPT, steps=1).images[0].settings["embeddings"] == ["<cat>"]
    ours.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(painted(opened(tmp_path / "saved"), prompt), got)
    reopened: Any = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", add_watermarker=False)
    assert_same(got, painted(reopened, prompt))


def test_the_summary_is_still_that_of_the_end_of_the_text(ours: TextToImagePipeline) -> None:
    """SDXL's configs call the end of text 2, "the highest id", which learned words would be."""
    pair = told(ours)
    config = pair.second.tower.config
    object.__setattr__(config, "eos_token_id", 2)
    before = pair.encode(["a fox"])[1]
    pair.add_tokens({"<cat>": vectors(1)})
    torch.testing.assert_close(pair.encode(["a fox"])[1], before)
    _, of_cat = pair.encode(["a <cat> fox"])
    ids = pair.second.ids(["a <cat> fox"])[:, 0]
    end = ids[0].tolist().index(pair.second.clip_tokenizer.suffix[0])
    last = pair.second.tower.states(ids)[-1]
    wanted = pair.second.tower.text_projection(pair.second.tower.final_layer_norm(last)[:, end])
    torch.testing.assert_close(of_cat, wanted)


def test_a_word_is_written_for_both_with_its_name(tmp_path: Path, ours: TextToImagePipeline) -> None:
    file = save_embedding(tmp_path, "<cat>", vectors(2))
    assert load_file(file).keys() == {"clip_l", "clip_g"}
    assert ours.load_embedding(tmp_path) == ("<cat>",)
    with pytest.raises(ValueError, match="'<cat>' is known"):
        ours.load_embedding(tmp_path)
    assert ours.load_embedding(tmp_path, "<dog>") == ("<dog>",)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            {"<cat>": (1, 24)},
            r"not for two text encoders: expected clip_l \[n, 24\] and clip_g \[n, 32\], got <cat> of 24",
        ),
        ({"clip_l": (1, 24)}, "not for two text encoders"),
        ({"clip_l": (1, 24), "clip_g": (1, 24)}, "its vectors are clip_g of 24 numbers, this model's 24 and 32"),
        ({}, r"holds no learned embedding: expected clip_l \[n, 24\] and clip_g \[n, 32\], got nothing"),
    ],
)
def test_what_is_for_another_text_encoder(
    tmp_path: Path, ours: TextToImagePipeline, held: dict[str, tuple[int, int]], message: str
) -> None:
    size = len(told(ours).first.clip_tokenizer)
    save_file({key: torch.ones(shape) for key, shape in held.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        ours.load_embedding(tmp_path / "x.safetensors")
    assert len(told(ours).first.clip_tokenizer) == len(told(ours).second.clip_tokenizer) == size
