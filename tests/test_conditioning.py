"""Conditioning against its oracles: transformers, diffusers and open_clip on the same weights and the same texts."""

import json
import subprocess
import sys
import warnings
from typing import Any

import open_clip
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from conditioning import Unconditional
from conditioning.clip import ClipText, ClipTextConfig, ClipTextEncoder
from conditioning.labels import Labels
from conditioning.open_clip import OpenClipEncoder, OpenClipLayer
from conditioning.tokenizer import ClipTokenizer

CAPTIONS = ["an oil painting of a fox on a blue background", "a watercolour of the boat", "a cat, a dog and 3 mice"]
TEXTS = [
    *CAPTIONS,
    "",
    "  white \n\t space　wide ",
    "Don't SHOUT, it's 42 o'clock!!! they'll we've",
    "Été naïve Ångström 日本語 🦊 ﬁ ① 'S",
    "a <|endoftext|> inside, <|STARTOFTEXT|> too",
]
LENGTH = 12


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer.train(CAPTIONS * 3, 600, length=LENGTH)


def tower(size: int, **changes) -> CLIPTextModel:
    """A transformers tower whose every parameter is random, the gains and biases too."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        **changes,
    )
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def oracle(tokenizer: ClipTokenizer) -> CLIPTextModel:
    return tower(len(tokenizer))


@pytest.fixture(scope="module")
def encoder(oracle: CLIPTextModel, tokenizer: ClipTokenizer) -> ClipTextEncoder:
    said = oracle.config.to_diff_dict() | {"_attn_implementation_autoset": True}  # as transformers 4.46 to 4.50 wrote
    config = ClipTextConfig.from_dict(said)
    return ClipTextEncoder(ClipText.from_weights(config, oracle.state_dict()).eval().requires_grad_(False), tokenizer)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("legacy_end", [False, True])
def test_tower_equals_transformers(hidden_act: str, legacy_end: bool) -> None:
    theirs = tower(50, hidden_act=hidden_act)
    if legacy_end:
        theirs.config.eos_token_id = theirs.eos_token_id = 2
    ours = ClipText.from_weights(ClipTextConfig.from_dict(theirs.config.to_diff_dict()), theirs.state_dict())
    ids = torch.randint(3, 48, (4, LENGTH))
    ids[torch.arange(4), torch.tensor([2, 5, 9, 11])] = 49
    ids[:, 1] = 2
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        torch.testing.assert_close(ours(ids), expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.pool(ours(ids), ids), expected.pooler_output, atol=1e-5, rtol=1e-5)
        for skip in range(4):
            skipped = theirs.final_layer_norm(expected.hidden_states[-(skip + 1)])
            torch.testing.assert_close(ours(ids, skip), skipped, atol=1e-5, rtol=1e-5)


def test_gradients_equal_transformers(oracle: CLIPTextModel) -> None:
    ours = ClipText.from_weights(ClipTextConfig.from_dict(oracle.config.to_diff_dict()), oracle.state_dict())
    ids = torch.randint(0, 50, (2, LENGTH))
    weight = torch.randn(2, LENGTH, 32)
    ours.load_state_dict({k: v.clone() for k, v in oracle.state_dict().items()}, assign=True)
    (ours(ids) * weight).sum().backward()
    parameters = dict(oracle.named_parameters())
    gradients = torch.autograd.grad((oracle(ids).last_hidden_state * weight).sum(), list(parameters.values()))
    for (name, expected), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, atol=1e-3, rtol=1e-4, msg=name)
        assert expected.shape == gradient.shape


def test_weights_are_loaded_strictly(oracle: CLIPTextModel) -> None:
    config = ClipTextConfig.from_dict(oracle.config.to_diff_dict())
    prefixed = {f"text_model.{k}": v for k, v in oracle.state_dict().items()}
    ClipText.from_weights(config, prefixed | {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]})
    with pytest.raises(ValueError, match="text_projection"):
        ClipText.from_weights(config, prefixed | {"text_projection.weight": torch.zeros(32, 32)})
    del prefixed["text_model.encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc1\.bias"):
        ClipText.from_weights(config, prefixed)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "relu"}, {"model_type": "t5"}, {"attention_dropout": 0.1}, {"use_attention_mask": True}]
)
def test_config_refuses_by_name(changes: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        ClipTextConfig.from_dict(ClipTextConfig().to_dict() | changes)


def same_ids(folder, texts: list[str] = TEXTS) -> ClipTokenizer:
    theirs, ours = CLIPTokenizer.from_pretrained(folder), ClipTokenizer.from_folder(folder)
    for text in texts:
        assert [*ours.prefix, *ours.encode(text), *ours.suffix] == theirs(text).input_ids, text
    assert ours.pad == theirs.pad_token_id
    assert ours.length == theirs.model_max_length
    assert len(ours) == len(theirs)
    return ours


def test_tokenizer_equals_transformers(tokenizer: ClipTokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    assert same_ids(tmp_path).encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])
    (tmp_path / "tokenizer.json").unlink()  # as Stable Diffusion folders are
    assert same_ids(tmp_path).decode(tokenizer.encode(CAPTIONS[2])) == "a cat , a dog and 3 mice"
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<cat-toy>"])
    theirs.save_pretrained(tmp_path / "added")
    assert len(same_ids(tmp_path / "added", [*TEXTS, "a <cat-toy> on grass"]).encode("<cat-toy>")) == 1


def test_tokenizer_of_older_folders(tokenizer: ClipTokenizer, tmp_path) -> None:
    """Stable Diffusion 2: the pad token of special_tokens_map.json differs from tokenizer_config.json's and wins."""
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    config = {"pad_token": "<|endoftext|>", "model_max_length": 77, "do_lower_case": True}
    start = {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": start, "eos_token": "<|endoftext|>", "pad_token": "!", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<toy>": len(tokenizer)}))
    ours = same_ids(tmp_path, [*TEXTS, "hello! a <toy> !"])
    assert ours.pad == ours.vocabulary["!"] != ours.suffix[0]


def test_vocabulary_is_clips(tokenizer: ClipTokenizer) -> None:
    """256 byte symbols, the same at the end of a word, the merges, start and end; and no text is unknown."""
    by_id = [token for token, _ in sorted(tokenizer.vocabulary.items(), key=lambda item: item[1])]
    theirs = open_clip.tokenizer.SimpleTokenizer()
    assert by_id[:512] == [theirs.decoder[i] for i in range(512)]
    assert by_id[512:-2] == ["".join(merge) for merge in tokenizer.merges]
    assert by_id[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert len(by_id) == len(set(by_id)) <= 600
    assert tokenizer.suffix[0] not in tokenizer.encode("Ω 東京 🦊 \x00 ~")
    assert tokenizer.merges == ClipTokenizer.train(CAPTIONS * 3, 600).merges
    with pytest.raises(ValueError, match="514"):
        ClipTokenizer.train(CAPTIONS, 300)


def test_saved_folders_open_in_diffusers(encoder: ClipTextEncoder, tmp_path) -> None:
    """16-bit weights must not open as 16-bit, and diffusers' encode_prompt must say the same of every clip_skip."""
    from diffusers import StableDiffusionPipeline

    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer", dtype=torch.float16)
    text_encoder = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    assert text_encoder.dtype == torch.float32
    text_encoder.__dict__["text_model"] = text_encoder  # where diffusers looks for the norm; transformers 5 dropped it
    parts = {"text_encoder": text_encoder, "tokenizer": CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")}
    none = {"vae": None, "unet": None, "scheduler": None, "safety_checker": None, "feature_extractor": None}
    pipe: Any = StableDiffusionPipeline(requires_safety_checker=False, **parts, **none)
    ours = ClipTextEncoder.from_folder(tmp_path / "text_encoder", tmp_path / "tokenizer")
    fitting = ["a fox on a blue boat", ""]
    for skip in (None, 1, 2):
        expected, _ = pipe.encode_prompt(fitting, torch.device("cpu"), 1, False, clip_skip=skip)
        ours.clip_skip = skip or 0
        torch.testing.assert_close(ours(fitting)["encoder_hidden_states"], expected, atol=1e-5, rtol=1e-5)
    ours.clip_skip = 4
    with pytest.raises(ValueError, match="clip_skip"):
        ours(fitting)
    half = ClipTextEncoder.from_folder(tmp_path / "text_encoder", tmp_path / "tokenizer", dtype=torch.bfloat16)
    assert half(fitting)["encoder_hidden_states"].dtype == torch.bfloat16


def test_long_prompts_in_chunks(encoder: ClipTextEncoder, oracle: CLIPTextModel) -> None:
    caption = " and ".join(CAPTIONS)
    content, room = encoder.tokenizer.encode(caption), LENGTH - 2
    assert len(content) > 2 * room
    end = encoder.tokenizer.suffix[0]
    parts = []
    for start in range(0, len(content), room):
        ids = [*encoder.tokenizer.prefix, *content[start : start + room], end]
        with torch.no_grad():
            parts.append(oracle(torch.tensor([ids + [end] * (LENGTH - len(ids))])).last_hidden_state)
    context = encoder(["", caption])
    hidden = context["encoder_hidden_states"]
    assert hidden.shape == (2, len(parts) * LENGTH, 32)
    torch.testing.assert_close(hidden[1:], torch.cat(parts, dim=1), atol=1e-5, rtol=1e-5)
    empty = encoder([""])["encoder_hidden_states"]
    torch.testing.assert_close(hidden[:1], empty.repeat(1, len(parts), 1), atol=1e-5, rtol=1e-5)
    assert encoder.chunks(["", caption]) == len(parts)
    assert encoder([""], chunks=5)["encoder_hidden_states"].shape == (1, 5 * LENGTH, 32)
    with pytest.raises(ValueError, match="needs"):
        encoder([caption], chunks=1)


def test_long_prompts_are_cut_aloud(encoder: ClipTextEncoder) -> None:
    cutting = ClipTextEncoder(encoder.tower, encoder.clip_tokenizer, long_prompts="cut")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = cutting(["a fox", ""])
        assert encoder(["a fox", ""]).keys() == short.keys()
    with pytest.warns(UserWarning, match="cut from the prompt: 'dog and 3 mice'"):
        hidden = cutting([", ".join(CAPTIONS[1:])])["encoder_hidden_states"]
    assert hidden.shape == (1, LENGTH, 32)
    torch.testing.assert_close(hidden, encoder([", ".join(CAPTIONS[1:])])["encoder_hidden_states"][:, :LENGTH])


def test_broken_folders_and_captions(encoder: ClipTextEncoder, tmp_path) -> None:
    for captions in ([], "a fox", [None], ["a", 3], 7):
        with pytest.raises(ValueError, match="caption"):
            encoder(captions)
    with pytest.raises(ValueError, match="long_prompts"):
        ClipTextEncoder(encoder.tower, encoder.clip_tokenizer, long_prompts="shorten")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="missing"):
        ClipTextEncoder.from_folder(tmp_path / "nothing", tmp_path / "tokenizer")
    encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="broken"):
        ClipTextEncoder.from_folder(tmp_path / "text_encoder", tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="no tokenizer"):
        ClipTokenizer.from_folder(tmp_path / "nothing")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        ClipTokenizer.from_folder(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="same model"):
        ClipTextEncoder(ClipText(ClipTextConfig(vocab_size=100, hidden_size=8)), encoder.clip_tokenizer)


def small_open_clip(vocabulary: int) -> tuple[open_clip.CLIP, dict]:
    torch.manual_seed(1)
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": LENGTH, "vocab_size": vocabulary, "width": 16, "heads": 2, "layers": 3},
    }
    return open_clip.CLIP(**config).eval(), config


def test_open_clip_equals_transformers(tmp_path) -> None:
    """The penultimate layer of an open_clip tower is clip_skip 1 of the same tower in transformers' layout."""
    from safetensors.torch import save_file

    from train.clip_model import export_text_tower

    model, config = small_open_clip(49408)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    words = ClipTokenizer.train(CAPTIONS, 514)
    export_text_tower(model, words).save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    theirs = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    captions = ["a fox on a blue boat", ""]
    with torch.no_grad():
        expected = theirs(open_clip.tokenize(captions, LENGTH), output_hidden_states=True)
        penultimate = theirs.final_layer_norm(expected.hidden_states[-2])
    layers: dict[OpenClipLayer, torch.Tensor] = {"last": expected.last_hidden_state, "penultimate": penultimate}
    for layer, hidden in layers.items():
        ours = OpenClipEncoder.from_name(tmp_path, layer=layer)
        torch.testing.assert_close(ours(captions)["encoder_hidden_states"], hidden, atol=1e-5, rtol=1e-5)
    assert ours([" and ".join(CAPTIONS)])["encoder_hidden_states"].shape[1] > LENGTH


def test_open_clip_with_a_transformers_tokenizer(tokenizer: ClipTokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=LENGTH)
    model, _ = small_open_clip(len(tokenizer))
    ours = OpenClipEncoder(model, theirs)
    ids = theirs([*CAPTIONS[:1], "fox", ""])
    with torch.no_grad():
        expected = model.forward_intermediates(text=ids, text_indices=1, normalize_intermediates=True)
        hidden = ours(["fox", ""])["encoder_hidden_states"]
    torch.testing.assert_close(hidden, expected["text_intermediates"][0][1:], atol=1e-5, rtol=1e-5)


def test_open_clip_errors(tmp_path) -> None:
    model, _ = small_open_clip(49408)
    words = open_clip.get_tokenizer("ViT-B-32")
    with pytest.raises(ValueError, match="pretrained"):
        OpenClipEncoder.from_name("ViT-B-32")
    with pytest.raises(ValueError, match="cannot open no-such-model"):
        OpenClipEncoder.from_name("no-such-model", "laion")
    with pytest.raises(ValueError, match="cannot open"):
        OpenClipEncoder.from_name(tmp_path)
    with pytest.raises(ValueError, match="layer"):
        OpenClipEncoder(model, words, layer="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not implemented"):
        OpenClipEncoder(torch.nn.Linear(1, 1), words)


def test_labels() -> None:
    labels = Labels(["fox", "cat", "boat"])
    assert labels(["cat", 2, "", "fox"])["class_labels"].tolist() == [1, 2, 3, 0]
    assert labels.num_embeddings == 4
    for wrong, message in ((["boats"], "boat"), ([3], "0 to 2"), ([-1], "0 to 2"), ([True], "expected str or int")):
        with pytest.raises(ValueError, match=message):
            labels(wrong)
    with pytest.raises(ValueError, match="differ"):
        Labels(["fox", "fox"])
    assert Unconditional()(["whatever", ""]) == {}


def test_painting_needs_no_heavy_library() -> None:
    code = """import sys, conditioning.clip, conditioning.labels, conditioning.open_clip
print(sorted({"transformers", "diffusers", "open_clip", "torchvision"} & set(sys.modules)))"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
