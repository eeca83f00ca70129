"""Textual inversion against diffusers: learned tokens from files, in prompts, in saved folders, and their errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from conditioning.labels import Labels
from pipelines import TextToImagePipeline
from pipelines.embeddings import NAME, save_embedding

PROMPT = "an oil painting of <cat> on a <hat>, <cat>"


@pytest.fixture
def theirs(model_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def painted(pipe: Any, prompt: str = PROMPT) -> np.ndarray:
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    return pipe(prompt, num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="np").images


def test_paints_what_diffusers_paints(
    tmp_path: Path, pipe: TextToImagePipeline, theirs: StableDiffusionPipeline
) -> None:
    plain = painted(pipe)
    cat = save_embedding(tmp_path / "cat.safetensors", "<cat>", vectors(1))
    hat = save_embedding(tmp_path / "hat", "<hat>", vectors(3, 1))
    assert hat == tmp_path / "hat" / NAME
    assert pipe.load_embedding(cat) == ("<cat>",)
    earlier = pipe(PROMPT, steps=1).images[0].settings
    assert pipe.load_embedding(tmp_path / "hat") == ("<hat>",)
    assert earlier["embeddings"] == ["<cat>"]  # still
    theirs.load_textual_inversion(cat)
    theirs.load_textual_inversion(tmp_path / "hat")
    ours = painted(pipe)
    np.testing.assert_allclose(ours, painted(theirs), atol=2e-3)
    assert np.abs(ours - plain).mean() > 0.005
    settings = pipe(PROMPT, steps=1).images[0].settings
    assert settings["embeddings"] == ["<cat>", "<hat>"]


@pytest.mark.parametrize("prompt", ["a Charturner fox", "CharTurner", "charturnered", "acharturner, charturner"])
def test_the_ids_are_transformers(
    tmp_path: Path, pipe: TextToImagePipeline, theirs: StableDiffusionPipeline, prompt: str
) -> None:
    """AUTOMATIC1111's format: the token is the file's name, and found in any case, inside of words as well."""
    file = tmp_path / "Charturner.safetensors"
    save_file({"emb_params": vectors(2)}, file)
    assert pipe.load_embedding(file) == ("Charturner",)
    theirs.load_textual_inversion(file, token="Charturner")
    tokenizer = pipe.model.conditioner.clip_tokenizer
    one, more = tokenizer.encode("charturner")
    wanted = theirs.tokenizer(prompt, add_special_tokens=False).input_ids
    assert one in wanted
    assert tokenizer.encode(prompt) == [i for w in wanted for i in ([one, more] if w == one else [w])]


def test_a_saved_pipeline_keeps_them(tmp_path: Path, pipe: TextToImagePipeline) -> None:
    pipe.load_embedding(save_embedding(tmp_path / "cat.safetensors", "<cat>", vectors(1)))
    pipe.load_embedding(save_embedding(tmp_path / "hat.safetensors", "<hat>", vectors(3, 1)))
    pipe.save_pretrained(tmp_path / "saved")
    again = TextToImagePipeline.from_pretrained(tmp_path / "saved", device="cpu")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    ours = painted(pipe)
    np.testing.assert_array_equal(painted(again), ours)
    np.testing.assert_allclose(painted(theirs), ours, atol=2e-3)

    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "saved" / "tokenizer")
    tower = CLIPTextModel.from_pretrained(tmp_path / "saved" / "text_encoder")
    assert len(tokenizer) == tower.config.vocab_size == len(again.model.conditioner.clip_tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<cat>", "<hat>", "<hat>_1", "<hat>_2"])
    table = tower.get_input_embeddings().weight
    assert table[ids].equal(torch.cat([vectors(1), vectors(3, 1)]))
    assert again.model.conditioner.clip_tokenizer.encode("<hat> <cat>") == [*ids[1:], ids[0]]
    with pytest.raises(ValueError, match="'<cat>' is known"):
        again.load_embedding(tmp_path / "cat.safetensors")


def test_half_precision_and_another_name(tmp_path: Path, model_folder: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu", dtype=torch.bfloat16)
    before = pipe.model.conditioner.tower.embeddings["token_embedding"].weight.clone()
    file = save_embedding(tmp_path / "cat.safetensors", "<cat>", vectors(1)[0][None].half())
    assert pipe.load_embedding(file, "zorg") == ("zorg",)
    table: Any = pipe.model.conditioner.tower.embeddings["token_embedding"].weight
    assert table.dtype == torch.bfloat16
    assert not table.requires_grad
    assert table[:-1].equal(before)
    assert table[-1].equal(vectors(1)[0].half().bfloat16())
    assert len(pipe.model.conditioner.clip_tokenizer.encode("zorg")) == 1
    assert np.isfinite(painted(pipe, "zorg")).all()


def test_the_file_is_diffusers_own(tmp_path: Path) -> None:
    saved = load_file(save_embedding(tmp_path, "<cat>", vectors(2)))
    assert list(saved) == ["<cat>"]
    assert saved["<cat>"].equal(vectors(2))
    with pytest.raises(ValueError, match=r"got \[32\], expected \[n, D\]"):
        save_embedding(tmp_path, "<cat>", vectors(1)[0])


@pytest.mark.parametrize(
    ("held", "token", "message"),
    [
        ({}, None, "holds no learned embedding: .* got nothing"),
        ({"<cat>": torch.ones(1, 16)}, None, "of another text encoder: .* <cat> of 16 numbers, this model's 32"),
        ({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 64)}, None, "clip_g of 64"),
        ({"<cat>": torch.ones(1, 2, 32)}, None, r"got <cat> \[1, 2, 32\]"),
        ({"<cat>": torch.ones(1, 32, dtype=torch.int64)}, None, "holds no learned embedding"),
        ({"<a>": torch.ones(1, 32), "<b>": torch.ones(1, 32)}, "<c>", "can't all be called '<c>'"),
        ({"<a>": torch.ones(1, 32), "a": torch.ones(1, 32)}, None, "'a' is known"),
        ({"<|endoftext|>": torch.ones(1, 32)}, None, "is known to this tokenizer; give another name"),
        ({"<known>": torch.ones(1, 32)}, None, "'<known>' is known"),
        ({"x": torch.ones(1, 32)}, "<two>", "'<two>' is known"),
        ({"x": torch.ones(1, 32)}, "<KNOWN>", "'<known>' is known"),  # prompts are read in lower case
        ({"x": torch.ones(1, 32)}, "Ń", "'Ń' is known"),  # a byte's symbol, in capitals
        ({"x": torch.ones(1, 32)}, "<known>_1", "further vector of '<known>'"),
        ({"<a>": torch.ones(2, 32), "<a>_2": torch.ones(1, 32)}, None, "further vector of '<a>'"),
        ({"<a>_1": torch.ones(1, 32), "<a>": torch.ones(1, 32)}, None, "further vector of '<a>'"),
        ({"x": torch.ones(1, 32)}, " ", "it is empty"),
    ],
)
def test_what_can_not_be_learned_is_said_and_changes_nothing(
    tmp_path: Path, pipe: TextToImagePipeline, held: dict[str, torch.Tensor], token: str | None, message: str
) -> None:
    pipe.load_embedding(save_embedding(tmp_path, "<known>", vectors(1)))
    pipe.load_embedding(save_embedding(tmp_path, "<two>", vectors(2)))
    tokenizer, tower = pipe.model.conditioner.clip_tokenizer, pipe.model.conditioner.tower
    size = len(tokenizer)
    save_file(held, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        pipe.load_embedding(tmp_path / "x.safetensors", token)
    assert len(tokenizer) == tower.config.vocab_size == size


def test_pickled_files_and_other_models_are_refused(tmp_path: Path, pipe: TextToImagePipeline) -> None:
    torch.save({"<cat>": torch.ones(1, 32)}, tmp_path / "learned_embeds.bin")
    for where, message in ((tmp_path / "learned_embeds.bin", "pickled"), (tmp_path, f"expected {NAME} in it")):
        with pytest.raises(ValueError, match=message):
            pipe.load_embedding(where)
    pipe.model.conditioner = Labels(("cat", "dog"))
    with pytest.raises(ValueError, match="belong to a CLIP text encoder; this model has Labels"):
        pipe.load_embedding(tmp_path)
