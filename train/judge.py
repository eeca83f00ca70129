"""Does it paint what was asked for? The verdict of a network that was trained apart, on clean pictures.

    accelerate launch train/recogniser.py --preset mnist --data mnist-train.parquet
    atelier evaluate runs/mnist --judge runs/mnist-recogniser

Or of a classifier of noisy pictures (train/classifier.py --preset clean), asked at its lowest noise level. How often it
is right about real pictures is said when it is trained: no share of right samples means more than that.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.classifier import NoisyClassifier
from pipelines.classifier import load_classifier
from pipelines.files import newest, read_json
from train.captions import Template
from train.data import generator, to_unit
from train.extractors import LEVEL, open_extractor, resized
from train.grid import grid
from train.launch import start
from train.pictograms import GROUNDS, STYLES, captions, things
from train.pictures import digest
from train.recogniser_model import Recogniser, RecogniserConfig, as_seen, load_recogniser
from train.results import counted, in_percent, write_result
from train.samples import NOTES, Painting, open_painter, paint_samples
from vae.autoencoder import Identity

SHOWN = 8  # samples of a class on the sheet


def open_judge(where: str | Path) -> Recogniser | NoisyClassifier:
    """The judge in a folder, or in a training run's newest checkpoint; ValueError where there is none."""
    folder = newest(Path(where).expanduser())
    if read_json(folder / "config.json").get("_class_name") == RecogniserConfig.class_name:
        return load_recogniser(folder)
    return load_classifier(folder)


def answers_of(judge: Recogniser | NoisyClassifier) -> dict[str, tuple[str, ...]]:
    """What it can tell: task -> answers."""
    return dict(judge.config.tasks) if isinstance(judge, Recogniser) else {"class": judge.config.labels}


@torch.no_grad()
def logits_of(judge: Recogniser | NoisyClassifier, images: list[Image.Image]) -> tuple[torch.Tensor, ...]:
    """What the judge makes of pictures, for each of its tasks: [N, answers]."""
    parts = resized([np.asarray(image) for image in images], judge.config.sample_size).split(100)
    if isinstance(judge, Recogniser):
        found = [judge(as_seen(judge.config, to_unit(part))) for part in parts]
        return tuple(torch.cat(of_task) for of_task in zip(*found, strict=True))
    clean = [Identity(judge.config.in_channels).encode(to_unit(part)).mean for part in parts]
    noises = (torch.randn(x0.shape, generator=generator(i)) for i, x0 in enumerate(clean))
    return (torch.cat([judge(x0 + LEVEL * noise, LEVEL) for x0, noise in zip(clean, noises, strict=True)]),)


def verdicts(judge: Recogniser | NoisyClassifier, images: list[Image.Image]) -> torch.Tensor:
    """The likeliest answer of each picture to the first task, its place in its answers: [N]."""
    return logits_of(judge, images)[0].argmax(1)


@torch.no_grad()
def right_by_caption(
    judge: Recogniser, features: torch.Tensor, said: Sequence[str], template: str = ""
) -> dict[str, float]:
    """Share of the pictures in which the judge sees what their captions say, by task.

    features: the judge's own of the pictures, [N, d]. template: made the captions of the classes, where they are not
    their names. Raises ValueError for captions that name none of its answers.
    """
    features = features.to(judge.linear_out.weight)
    shares = {}
    for (task, answers), logits in zip(judge.config.tasks, judge.answer(features), strict=True):
        named = [_named(caption)[task] if task in ("object", "style") else caption for caption in said]
        place = {name: i for i, answer in enumerate(answers) for name in (answer, *_made(answer, template))}
        if strange := set(named) - set(place):
            raise ValueError(
                f"the judge knows no {task} {min(strange)!r}: it knows {', '.join(answers[:5])} …; captions that a "
                "--template makes of classes need it here, too"
            )
        truth = torch.tensor([place[name] for name in named])
        shares[task] = float((logits.argmax(1).cpu() == truth).float().mean())
    return shares


def _made(answer: str, template: str) -> tuple[str, ...]:
    """What a template of one field makes of a class."""
    if not template or len(names := (made := Template(template)).names) != 1:
        return ()
    return made({names[0]: answer})


def _named(caption: str) -> dict[str, str]:
    known = drawn_captions()
    if caption not in known:
        raise ValueError(f"{caption!r} is no caption of pictograms, whose objects and styles this judge knows")
    return known[caption]


@cache
def drawn_captions() -> dict[str, dict[str, str]]:
    """What each caption of pictograms says: its object and its style."""
    every = ((o, s, g) for o in things() for s in STYLES for g in GROUNDS)
    return {said: {"object": o, "style": s} for o, s, g in every for said in captions(o, s, g)}


def _of(result: dict) -> dict:
    """What a result is of: results of the same are joined (`train.results`)."""
    return {key: result.get(key) for key in ("painted", "pictures", "judge")}


def evaluate_classes(
    model: str,
    judge: Path,
    out: Path,
    *,
    prompts: int = 100,
    painting: Painting | None = None,
    template: str = "",
    lora: Sequence[str] = (),
    lora_weight: Sequence[float] = (1.0,),
) -> dict:
    """Paints `prompts` pictures, as many of each of the judge's classes, and writes figures and a sheet; the pictures
    are kept in `out`/samples (`train.samples.paint_samples`).

    template: makes the prompts of the classes' names, as it made the captions in training. Of a model that is told
    nothing it says which classes came, evenly or not. Returns what evaluation.json says of these pictures.
    """
    classifier = open_judge(judge)
    known, channels = answers_of(classifier), classifier.config.in_channels
    if "class" not in known:
        raise ValueError(
            f"the judge {judge} tells {' and '.join(known)} apart, which is for models of pictograms: expected one of "
            "classes (train/recogniser.py --preset mnist or cifar10)"
        )
    names = known["class"]
    if channels not in (1, 3):
        raise ValueError(
            f"the judge {judge} looks at latents of {channels} channels: expected one of pixels "
            "(train/classifier.py --preset clean)"
        )
    if template and not _made(names[0], template):
        raise ValueError(f"--template {template!r}: expected one field, the class, such as 'a photo of a {{class}}'")
    said = [_made(name, template)[0] if template else name for name in names]
    each = prompts // len(names)
    if not each:
        raise ValueError(f"--prompts {prompts}: expected at least {len(names)}, one for each class of the judge")
    accelerator = start()
    pipe = open_painter(model, lora, lora_weight, accelerator.device)
    told = pipe.model.is_told
    asked = [prompt if told else "" for prompt in said for _ in range(each)]
    painted = paint_samples(pipe, asked, out / "samples", painting or Painting(), accelerator, reference=digest(*asked))
    images = [painted[i].image for i in range(len(painted))]
    found = verdicts(classifier, images)
    shown = [image for i in range(len(names)) for image in images[i * each : i * each + min(each, SHOWN)]]
    if accelerator.is_main_process:
        grid(shown, columns=2 * min(each, SHOWN)).save(out / "samples.png")
    notes = json.loads((out / "samples" / NOTES).read_text())
    result: dict = {"model": model, "pictures": len(images), "painted": notes}
    result["judge"] = open_extractor(str(judge)).described()
    if told:
        right = found == torch.arange(len(names)).repeat_interleave(each)
        by_class = right.view(len(names), each).float().mean(1)
        result |= counted(int(right.sum()), len(images))
        result["by_class"] = dict(zip(names, by_class.tolist(), strict=True))
        by = f"{judge} [{result['judge']['hash']}, pictures {result['judge']['resize']}]"
        accelerator.print(f"{in_percent(result)} of {len(images)} pictures are what was asked for, says {by}")
    else:
        shares = torch.bincount(found, minlength=len(names)) / len(images)
        result["share_of_class"] = dict(zip(names, shares.tolist(), strict=True))
        accelerator.print(", ".join(f"{name} {share:.1%}" for name, share in result["share_of_class"].items()))
    if accelerator.is_main_process:
        write_result(out / "evaluation.json", result, _of)
    accelerator.print(f"figures and sheet in {out}")
    return result
