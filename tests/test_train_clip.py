"""Training CLIP: what it draws, what it learns, and that what it saves is the same model in everybody's hands."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import train.clip
from conditioning.clip import ClipTextEncoder
from pipelines.files import checkpoints
from tests.test_drawn import needs_font
from train.clip import Config, draw_pairs, jittered, main, retrieval
from train.clip_model import export_text_tower, load_clip, tokenise
from train.data import Pictures, read_pictures, to_unit
from train.sources import open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sixteen shapes, each with its fullest caption, and no two captions alike."""
    folder = tmp_path_factory.mktemp("pictures")
    source, captions = open_source("shapes", 32), set()
    for i in range(len(source)):
        example = source[i]
        if example.captions[0] not in captions:
            captions.add(example.captions[0])
            example.image.save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(example.captions[0])
        if len(captions) == 16:
            break
    return folder


@pytest.fixture(scope="module")
def config(folder: Path, tmp_path_factory) -> Config:
    return Config(
        data=str(folder),
        output=tmp_path_factory.mktemp("run"),
        cache=tmp_path_factory.mktemp("cache"),
        size=32,
        vocabulary=560,
        context_length=24,
        embed_dim=16,
        text_width=32,
        text_layers=2,
        text_heads=2,
        vision_layers=(2,),
        vision_width=32,
        vision_head_width=16,
        jitter=0.0,
        updates=60,
        batch_size=16,
        learning_rate=4e-3,
        warmup=5,
        measure_every=10,
        checkpoint_every=100,
        workers=0,
    )


@pytest.fixture(scope="module")
def trained(config: Config) -> Path:
    """The output of one training, its losses beside it."""
    numbers: list[dict] = []
    patch = pytest.MonkeyPatch()
    patch.setattr("accelerate.Accelerator.log", lambda self, values, step: numbers.append(values))
    try:
        output = main(config)
    finally:
        patch.undo()
    (output / "numbers.json").write_text(json.dumps(numbers))
    return output


def test_training_learns_sixteen_shapes(trained: Path, config: Config) -> None:
    numbers = json.loads((trained / "numbers.json").read_text())
    assert numbers[-1]["loss"] < 0.3 * np.log(config.batch_size)
    assert numbers[-1]["loss"] < 0.5 * numbers[0]["loss"]
    judge = load_clip(trained / "clip")
    pictures = read_pictures(open_source(config.data, 32), 32, config.cache, workers=0, progress=False)
    pairs = [(i, captions[0]) for i, captions in enumerate(pictures.captions)]
    assert retrieval(judge, pictures, pairs) == numbers[-1]["retrieval"] >= 0.8


def test_saved_text_encoder_is_the_same_everywhere(trained: Path) -> None:
    """open_clip's hidden states, those of transformers and our own; to the same ids, padded with the end of text."""
    judge = load_clip(trained / "clip")
    captions = ["a red circle on a blue background", "", "Two SQUARES, one green!"]
    tokenizer = CLIPTokenizer.from_pretrained(trained / "tokenizer")
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.equal(tokenise(judge.tokenizer, captions, judge.length))
    model = judge.model
    with torch.no_grad():
        x = model.token_embedding(ids) + model.positional_embedding
        hidden = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        theirs = CLIPTextModel.from_pretrained(trained / "text_encoder")(ids)
    torch.testing.assert_close(theirs.last_hidden_state, hidden, atol=1e-5, rtol=1e-5)
    features = torch.nn.functional.normalize(theirs.pooler_output @ model.text_projection, dim=-1)
    torch.testing.assert_close(features, judge.encode_text(captions), atol=1e-5, rtol=1e-5)
    ours = ClipTextEncoder.from_folder(trained / "text_encoder", trained / "tokenizer")
    torch.testing.assert_close(ours(captions)["encoder_hidden_states"], hidden, atol=1e-5, rtol=1e-5)
    exported = export_text_tower(model, judge.tokenizer)
    model.transformer.resblocks[0].mlp.c_fc.weight.data.zero_()  # an export does not follow what it was made of
    torch.testing.assert_close(exported(captions)["encoder_hidden_states"], hidden, atol=1e-5, rtol=1e-5)


def test_open_clip_opens_what_is_saved(trained: Path) -> None:
    judge = load_clip(trained / "clip")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{trained / 'clip'}")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = to_unit(torch.from_numpy(pixels)[None])
    with torch.no_grad():
        expected = theirs.eval().encode_image(preprocess(Image.fromarray(pixels))[None], normalize=True)
    ours = judge.encode_image(images)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    larger = judge.encode_image(images.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert larger.shape == ours.shape
    torch.testing.assert_close(larger.norm(dim=1), torch.ones(1))


def test_a_killed_run_ends_with_the_same_bytes(config: Config, trained: Path, tmp_path: Path, monkeypatch) -> None:
    short = replace(config, updates=4, warmup=2, checkpoint_every=2, jitter=0.1)
    whole = main(replace(short, output=tmp_path / "whole"))

    class Killed(Exception):
        pass

    def rate(update: int, **kwargs) -> float:
        if update == 3:
            raise Killed
        return learning_rate(update, **kwargs)

    learning_rate = train.clip.learning_rate
    monkeypatch.setattr(train.clip, "learning_rate", rate)
    with pytest.raises(Killed):
        main(replace(short, output=tmp_path / "killed"))
    monkeypatch.undo()
    again = main(replace(short, output=tmp_path / "killed"))
    for file in ("clip/open_clip_model.safetensors", "text_encoder/model.safetensors", "tokenizer/vocab.json"):
        assert (whole / file).read_bytes() == (again / file).read_bytes()
    assert main(replace(short, output=tmp_path / "killed")) == again  # nothing is left to do
    with pytest.raises(ValueError, match="learning_rate"):
        main(replace(short, output=tmp_path / "killed", learning_rate=1.0))


def test_a_run_goes_on_with_the_same_pictures_alone(config: Config, folder: Path, tmp_path: Path) -> None:
    """Another vocabulary would be learnt from other captions, and every token would mean another word."""
    mine = shutil.copytree(folder, tmp_path / "pictures")
    short = replace(config, data=str(mine), output=tmp_path / "run", updates=1, checkpoint_every=1)
    main(short)
    next(mine.glob("*.txt")).write_text("a fox")
    with pytest.raises(ValueError, match="--data is not what this run was trained on"):
        main(replace(short, workers=0))


@needs_font
def test_a_set_of_which_nothing_is_held_out(config: Config, tmp_path: Path, capsys) -> None:
    short = replace(config, data="pictograms:fox,apple", batch_size=8, updates=1, measure_every=1)
    main(replace(short, output=tmp_path))
    assert "no picture is held out: retrieval is measured on training pictures" in capsys.readouterr().out


def test_batches_hold_no_false_negatives() -> None:
    captions: list[tuple[str, ...]]
    captions = [(f"a {c} {s} on grey", f"a {c} {s}") for c in ("red", "blue") for s in "abcdefgh" for _ in range(3)]
    pictures = Pictures(torch.zeros(len(captions), 1, 1, 3, dtype=torch.uint8), captions, [""] * len(captions))
    drawn = draw_pairs(pictures, 16, 0, 5)
    assert drawn == draw_pairs(pictures, 16, 0, 5) != draw_pairs(pictures, 16, 0, 6)
    for i, caption in drawn:
        assert caption in captions[i]
        assert sum(caption in captions[j] for j, _ in drawn) == 1
    assert {caption for _, caption in draw_pairs(pictures, 16, 1, fullest=True)} == {group[0] for group in captions}
    more = draw_pairs(pictures, 20, 0, 5)  # only sixteen differ: the others have to repeat
    assert more[:16] == drawn
    assert len({i for i, _ in more}) == 20


def test_jitter_moves_and_scales() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16)
    still = jittered(images, 0.0, torch.Generator())
    assert still is images
    same = jittered(images, 1e-9, torch.Generator())
    torch.testing.assert_close(same, images, atol=1e-5, rtol=1e-5)
    shares = [jittered(images[r::2], 0.1, torch.Generator().manual_seed(2), r, 2) for r in range(2)]
    whole = jittered(images, 0.1, torch.Generator().manual_seed(2))
    assert all(share.equal(whole[r::2]) for r, share in enumerate(shares))  # of two processes as of one
    ramp = torch.linspace(-1, 1, 65).expand(64, 3, 65, 65)  # a picture whose value is the place itself, from the left
    moved = jittered(ramp, 0.1, torch.Generator().manual_seed(1))
    shift, slope = moved[:, 0, 32, 32], moved[:, 0, 32, 48] - moved[:, 0, 32, 16]
    assert 0.1 < shift.abs().max() <= 0.2 * 65 / 64 + 1e-6  # a share of the side, which is 2 long
    assert 0.05 < (slope - 1).abs().max() <= 0.1 + 1e-5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("updates", 0),
        ("batch_size", 1),
        ("vocabulary", 400),
        ("vocabulary", 4001),
        ("context_length", 2),
        ("text_width", 33),
        ("vision_layers", (1, 2)),
        ("size", 36),
        ("clip", 0.0),
    ],
)
def test_bad_settings_are_refused(config: Config, field: str, value) -> None:
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')}( is|:? 0.0:)"):
        replace(config, **{field: value})


def test_fewer_pictures_than_a_batch_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 16 pictures, fewer than --batch-size 20: set it to 16 or less"):
        main(replace(config, output=tmp_path, batch_size=20))


def test_gradients_that_are_no_numbers_reach_no_checkpoint(config: Config, tmp_path: Path, monkeypatch) -> None:
    backward, steps = Accelerator.backward, []

    def poisoned(self, loss, **kwargs) -> None:
        backward(self, loss, **kwargs)
        steps.append(loss)
        if len(steps) == 3:
            self._models[-1].positional_embedding.grad.fill_(float("nan"))

    monkeypatch.setattr(Accelerator, "backward", poisoned)
    with pytest.raises(ValueError, match="gradient is nan at update 2"):
        main(replace(config, output=tmp_path, updates=4, checkpoint_every=1))
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000001", "checkpoint-0000002"]


def test_broken_folders_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CLIP here"):
        load_clip(tmp_path)
    config = json.loads((trained / "clip" / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 8
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").write_bytes((trained / "clip/open_clip_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not of one model"):
        load_clip(tmp_path)


def test_script_runs_from_anywhere(config: Config, tmp_path: Path) -> None:
    script = Path(train.clip.__file__)
    flags = "--updates 1 --batch-size 4 --text-layers 1 --text-width 16 --text-heads 2 --workers 0 --context-length 3"
    command = [sys.executable, str(script), "--data", config.data, "--size", "32", "--output", "out", *flags.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "16 captions are cut at 3 tokens" in run.stdout
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors").is_file()
