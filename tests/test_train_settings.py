"""What a run is told: flags, presets, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import train.ldm
import train.objective
import train.watch
from pipelines.files import checkpoints
from pipelines.folder import load_model
from tests.training import COLOURS, UNET
from train.build import fitted, new_unet
from train.config import parse
from train.ldm import main
from train.presets import PRESETS, check_model_settings, preset_for, presets_for
from train.settings import SMALL, Config, settled
from train.sources import first_captions, open_source

pytestmark = pytest.mark.usefixtures("in_process")

UNIFORM = {"noise": "uniform", "noise_mean": None, "noise_std": None}


def test_settings_that_are_left_open() -> None:
    assert (settled(Config(), "bf16").noise_mean, settled(Config(), "bf16").mixed_precision) == (0.4, "bf16")
    assert settled(Config(noise_mean=1.0), "no").noise_std == 1.4
    for noise in ("uniform", "logit_normal"):
        assert settled(Config(noise=noise), "no").noise_mean is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"updates": 0}, "--updates is 0: expected at least 1"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"accumulate": 0}, "--accumulate is 0"),
        ({"checkpoint_every": 0}, "--checkpoint-every is 0"),
        ({"size": -8}, "--size is -8"),
        ({"size": 0}, "--size is 0"),
        ({"caption_dropout": 1.0}, "--caption-dropout is 1.0: expected a share"),
        ({"lora_rank": 4}, "--lora-rank adds to a model that can paint already: name it by --model"),
        ({"lora_alpha": 0}, "--lora-alpha is 0"),
        ({"model": "x", "token": "<a>", "lora_rank": 4}, "--token learns a word and nothing else"),
        ({"model": "x", "token": "<a>", "train": ("text_encoder",)}, "leave out --lora-rank and --train"),
        ({"model": "x", "inpainting": True, "lora_rank": 4}, "--inpainting teaches the whole U-Net"),
        ({"model": "x", "prior": ("a dog",), "streaming": True}, "--prior wants pictures with captions of their own"),
        ({"model": "x", "prior": ("a dog", " ")}, "expected captions of what shall stay as it is"),
        ({"model": "x", "prior": ("a dog", "a cat"), "prior_pictures": 1}, "one at least of each of 2 captions"),
        ({"prior_pictures": 0}, "--prior-pictures is 0"),
        ({"model": "x", "lora_targets": ("to_q",)}, "--lora-targets belongs to --lora-rank, which is not given"),
        ({"model": "x", "token_vectors": 2}, "--token-vectors belongs to --token, "),
        ({"min_snr_floor": 1.0}, "belong to --weight min_snr, not plain"),
        ({"train": ()}, "expected unet, text_encoder or both"),
        ({"learned_variance": True, "huber": 0.1}, "a loss of its own: leave out --huber"),
        ({"clip": 0.0}, "--clip 0.0"),
        ({"ema_decay": 1.5}, "--ema-decay 1.5"),
        ({"huber": -1.0}, "--huber is -1.0: expected at least 0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": "nowhere"}, "--data 'nowhere' does not exist"),
        ({"model": "nowhere/at/all", "unet": SMALL, "vae": "bundled", "text_encoder": "bundled"}, "not a model folder"),
        ({"model": "MODEL", "zero_snr": True}, "its own --unet, --vae, --text-encoder, --zero-snr: train a new one"),
        ({"noise": "uniform", "noise_mean": 0.0}, "--noise uniform has no mean and no deviation"),
        ({"vae": "nowhere"}, "nowhere.*missing"),
        ({"text_encoder": "nowhere"}, "nowhere is not a model folder"),
        ({"size": 18, "vae": "MODEL"}, "--size 18: expected a multiple of 4"),
        ({"prediction": "velocity"}, "expected scaled_linear"),
        ({"prediction": "epsilon", "zero_snr": True}, "pure noise"),
        ({"path": "flow"}, "v-prediction needs"),
        ({"path": "flow", "prediction": "velocity", "zero_snr": True}, "zero.snr"),
        ({"noise": "log_normal", "noise_std": 0.0}, "std"),
        ({"zero_snr": True}, "log_normal noise all but never shows the pure noise"),
        ({"path": "cosine"}, "log_normal noise all but never shows .*take --noise uniform"),
        ({**UNIFORM, "weight": "min_snr", "zero_snr": True}, "min_snr gives pure noise no weight"),
        ({**UNIFORM, "weight": "soft_min_snr", "zero_snr": True}, "soft_min_snr gives pure noise no weight"),
    ],
)
def test_runs_that_make_no_sense_are_refused(
    pixels: Config, model_folder: Path, tmp_path: Path, settings: dict, words: str
) -> None:
    settings = {k: str(model_folder) if v == "MODEL" else v for k, v in settings.items()}
    with pytest.raises(ValueError, match=words):
        main(replace(pixels, output=tmp_path / "run", **settings))
    assert not checkpoints(tmp_path / "run")


def test_flags_replace_what_the_preset_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(text: str) -> Config:
        monkeypatch.setattr(sys, "argv", ["ldm.py", *text.split()])
        return parse(Config, PRESETS, default="shapes")

    assert command("") == PRESETS["shapes"]
    assert command("--preset bundled") == command("--preset=bundled") == PRESETS["bundled"]
    changed = command("--preset bundled --updates 3 --unet.block-out-channels 16 32 64 --size 64 --prompts red blue")
    unet = replace(PRESETS["bundled"].unet, block_out_channels=(16, 32, 64))
    assert changed == replace(PRESETS["bundled"], updates=3, unet=unet, size=64, prompts=("red", "blue"))
    with pytest.raises(ValueError, match=r"--preset 'big': expected one of shapes, new, fine-tune, bundled"):
        command("--preset big")
    with pytest.raises(SystemExit) as stopped:
        command("--update 3 --optimiser lion")
    assert stopped.value.code not in (0, None)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("", "shapes"),
        ("--updates 3", "shapes"),
        ("--data my_pictures", "new"),
        ("--data=my_pictures", "new"),
        ("--data my_pictures --model bundled", "fine-tune"),
        ("--model=bundled", "fine-tune"),
    ],
)
def test_what_a_run_starts_from(arguments: str, name: str) -> None:
    assert preset_for(arguments.split()) == name
    check_model_settings(PRESETS[name])


@pytest.mark.parametrize("flag", ["--prediction=v", "--vae bundled", "--unet.layers-per-block 1"])
def test_what_a_model_brings_itself_is_refused_even_at_its_default(flag: str) -> None:
    config = replace(PRESETS["fine-tune"], model="bundled")
    check_model_settings(config, ["--model", "bundled"])
    with pytest.raises(ValueError, match=f"--model bundled brings its own {flag[:5]}"):
        check_model_settings(config, ["--model", "bundled", *flag.split()])


def test_guidance_interval_and_min_snr_reach_the_model(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict = {}
    weight = train.objective.training_weight
    monkeypatch.setattr(train.objective, "training_weight", lambda *a, **kw: given.update(kw) or weight(*a, **kw))
    config = replace(pixels, weight="min_snr", min_snr_gamma=4.0, min_snr_floor=0.1, guidance_interval=(0.3, 2.0))
    run = main(replace(config, output=tmp_path, zero_snr=True, **UNIFORM))
    assert load_model(run).defaults.guidance_interval == (0.3, 2.0)
    assert given == {"gamma": 4.0, "floor": 0.1}


@pytest.mark.parametrize("conditioning", ["text", "labels", "none"])
def test_a_new_unet_puts_out_zero(conditioning: str) -> None:
    config = fitted(UNET, 4, 8, 3 if conditioning == "labels" else None, 32 if conditioning == "text" else None)
    unet = new_unet(config)
    context = {"encoder_hidden_states": torch.randn(2, 5, 32)} if conditioning == "text" else {}
    context |= {"class_labels": torch.tensor([0, 2])} if conditioning == "labels" else {}
    x = torch.randn(2, 4, 8, 8)
    assert unet(x, 10.0, **context).abs().max() == 0
    for block in unet.mid_block.resnets:
        h = torch.randn(2, 32, 4, 4)
        assert block(h, torch.randn(2, 64)).equal(h)
    for attention in unet.mid_block.attentions:
        assert attention(h, unet._context(context.get("encoder_hidden_states"), None, h.dtype)).equal(h)
    loss = (unet(x, 10.0, **context) - 1).square().mean()
    loss.backward()
    assert unet.conv_out.weight.grad.abs().max() > 0  # zeros, but not dead


def test_the_labels_of_joined_sets_are_those_of_each(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "shapes" / "one.png")
    (tmp_path / "shapes" / "one.txt").write_text("a dot")
    (tmp_path / "shapes" / "two.png").write_bytes(b"broken")  # is not decoded for its caption
    (tmp_path / "shapes" / "two.txt").write_text("a line")
    joined = first_captions(open_source(f"{pictures}+{tmp_path / 'shapes'}", 8))
    assert joined == {f"a {colour} square" for colour in COLOURS} | {"a dot", "a line"}


def test_another_kind_of_noise_brings_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not those of a preset that has another kind, which nobody gave."""
    mean, std = PRESETS["new"].noise_mean, PRESETS["new"].noise_std
    for words, numbers in {
        "": (mean, std),
        "--noise log_normal": (mean, std),
        "--noise-std 2": (mean, 2.0),
        "--noise uniform": (None, None),
        "--noise=logit_normal --noise-std 2": (None, 2.0),
    }.items():
        arguments = ["ldm.py", "--data", "x", *words.split()]
        monkeypatch.setattr(sys, "argv", arguments)
        config = parse(Config, presets_for(arguments), default=preset_for(arguments))
        assert (config.noise_mean, config.noise_std) == numbers


def test_what_a_flag_takes_again_adds_to_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--prior", "a dog", "--model", "x", "--prior=a cat", "--updates", "7", "--lora-targets", "to_q", "to_k"]
    monkeypatch.setattr(sys, "argv", ["ldm.py", *words, "--updates", "9", "--lora-rank", "4", "--lora_targets", "to_v"])
    config = parse(Config, PRESETS, default="fine-tune")
    assert config.prior == ("a dog", "a cat")
    assert config.lora_targets == ("to_q", "to_k", "to_v")
    assert config.updates == 9  # of what takes one value the last counts, as everywhere
