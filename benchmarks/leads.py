"""What might make the bundled model better, one change at a time, the same short training each:

    python benchmarks/leads.py --vae bundled --clip bundled --judge runs/pictograms-recogniser

A U-Net of half the bundled one's size, between its autoencoder and text encoder, sees as many pictograms every time,
with one thing changed: a setting, or the latents (`--vaes runs/other-vae …`). Its objects, some forty, are those that
have a pair of object and style among the held-out ones that `atelier evaluate` leaves alone: what is chosen here can be
measured there. It is trained for minutes, where the bundled one had hours: what wins late is not seen. Of each lead:
what the judge finds right (objects, styles) in samples of pairs trained on and held out, and how sure it is of that
(mean log-probability, which says more than a share); the Fréchet distance of all these to fresh drawings in the judge's
features, the validation error by noise level, what the autoencoder loses, and the training's time beside the base's.

NAME@SEED is a lead with another seed, "base@1" and so on the base: differences that are not larger than theirs say
nothing (another seed holds out other pictures, too, and leads in other latents have validation errors of another kind).
What the project has no flag for is in twists.py. What is finished is kept in --work, and --out grows lead by lead; one
that fails is left out, and said in the end. The base keeps earlier checkpoints, for benchmarks/guides.py --weaker.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

import train.ldm
from benchmarks.files import RESULTS, results_before, write_aside
from benchmarks.packages import needs
from benchmarks.twists import aligned, as_it_is, immiscible, power_ema, replaced
from pipelines import TextToImagePipeline
from pipelines.files import newest
from pipelines.find import find_model
from train.evaluate import draw_rows, drawn_afresh, judged, open_pictogram_judge, reconstruction_psnr
from train.extractors import open_extractor
from train.judge import logits_of
from train.launch import errors_said
from train.machine import described
from train.metrics import Moments, frechet_distance
from train.pictograms import Row, captions, chosen, objects_of
from train.pictures import digest
from train.presets import PRESETS, THREE_LEVELS
from train.recogniser_model import Recogniser
from train.samples import NOISES
from train.settings import Config
from train.sources import open_source

CLIP = ("text_encoder", "clip")
PAINTED = 1  # seed of the pairs and noises; those of `atelier evaluate` are 0
EVERYWHERE = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
UNET = replace(THREE_LEVELS, block_out_channels=(48, 96, 160), norm_num_groups=8)


@dataclass(frozen=True)
class Options:
    vae: str
    clip: str  # a run of train/clip.py
    judge: Path  # a run of train/recogniser.py --preset pictograms
    leads: tuple[str, ...] = ()  # by default all
    vaes: tuple[str, ...] = ()  # more autoencoders, each of which is a lead, too
    every: int = 1  # of the objects with a pair to choose by, one in so many
    updates: int = 520
    batch: int = 64
    prompts: int = 360  # of pairs that were trained on, and as many held out
    size: int | None = None  # of the pictures; by default the autoencoder's
    out: Path = RESULTS / "leads.json"
    work: Path = Path("runs/leads")
    cache: Path = Path("cache")
    workers: int = 1


@dataclass(frozen=True)
class Lead:
    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    twist: Callable[[str], Any] = as_it_is


RECIPE = PRESETS["bundled"]
LEADS = {
    "base": Lead(
        "the bundled preset: Muon 3e-3, v, log-normal noise about 0.7 ± 1.5, soft min-SNR, no attention at 16×16"
    ),
    "muon-5e-3": Lead("Muon at 5e-3", {"learning_rate": 5e-3}),
    "adamw": Lead("AdamW at 1e-3", {"optimizer": "adamw", "learning_rate": 1e-3}),
    "adamw-2e-3": Lead("AdamW at 2e-3", {"optimizer": "adamw", "learning_rate": 2e-3}),
    "attention": Lead(
        "attention at 16×16, too",
        {"unet": replace(UNET, down_block_types=EVERYWHERE[0], up_block_types=EVERYWHERE[1])},
    ),
    "noise-0": Lead("noise about 0", {"noise_mean": 0.0}),
    "noise-1.4": Lead("noise about 1.4", {"noise_mean": 1.4}),
    "plain": Lead("plain weights, as the base once had", {"weight": "plain"}),
    "immiscible": Lead("noise assigned within the batch", twist=immiscible),
    "aligned": Lead("middle aligned with CLIP", twist=aligned),
    "ema-power": Lead("power-function EMA, a tenth of the training", twist=power_ema),
}


SEEDS = tuple(f"base@{seed}" for seed in (1, 2, 3))


def recipe_of(name: str, options: Options) -> Lead:
    """The lead of this name, that of an autoencoder included, or with another seed; ValueError where there is none."""
    known = LEADS | {f"vae:{Path(vae).name}": Lead("in other latents", {"vae": vae}) for vae in options.vaes}
    bare, _, seed = name.partition("@")
    if bare not in known or not (seed.isdecimal() or bare == name):
        raise ValueError(f"no lead {name!r}: there are {', '.join(known)}, and each with another seed as {bare}@1")
    lead = known[bare]
    return replace(lead, changes=lead.changes | {"seed": int(seed)}) if seed else lead


def all_leads(options: Options) -> tuple[str, ...]:
    """The base and its like first: a table that is cut off can be read."""
    names = [f"vae:{Path(vae).name}" for vae in options.vaes]
    if len(set(names)) < len(names):
        raise ValueError(f"--vaes {' '.join(options.vaes)}: expected folders of different names, which tell them apart")
    return tuple(dict.fromkeys(("base", *(options.leads or (*SEEDS, *LEADS, *names)))))


@lru_cache
def objects_for(every: int) -> tuple[str, ...]:
    """Objects that have a held-out pair which nothing but the choice of recipes is made by."""
    pairs = {row.object for row in draw_rows("held_out", 10**6, chosen(), PAINTED, None, choosing=True)}
    return tuple(name for name in chosen() if name in pairs)[::every]


def data_of(options: Options) -> str:
    return f"pictograms:{','.join(objects_for(options.every))}"


def config_of(name: str, options: Options) -> Config:
    base = replace(
        RECIPE,
        data=data_of(options),
        vae=options.vae,
        text_encoder=options.clip,
        unet=UNET,
        size=options.size,
        views=1,
        updates=options.updates,
        batch_size=options.batch,
        warmup=100,
        ema_decay=0.99,
        checkpoint_every=max(1, options.updates // 4) if name == "base" else options.updates,
        keep=4 if name == "base" else 1,
    )
    config = replace(base, **recipe_of(name, options).changes)
    known = digest(
        repr(config),
        weights_of(config.vae, "vae"),
        weights_of(config.text_encoder, *CLIP),
        drawings(base.data, options.size or 128),
        "" if recipe_of(name, options).twist is as_it_is else (Path(__file__).parent / "twists.py").read_bytes(),
    )
    output = options.work / f"{name.replace('/', '-')}-{known[:8]}"
    return replace(config, output=output, cache=options.cache, workers=options.workers)


def is_current(row: dict[str, Any], options: Options) -> bool:
    """Whether a row of an earlier call is of what the same name means now."""
    try:
        return row["run"] == config_of(row["lead"], options).output.name
    except ValueError:  # there is no such lead any more
        return False


@lru_cache
def weights_of(where: str, *parts: str) -> str:
    """A hash of the weights of these parts of a model's folder, or of all in a run's newest checkpoint."""
    folder = find_model(None) if where == "bundled" else newest(Path(where).expanduser())
    places = [place for name in parts if (place := folder / name).is_dir()]
    files = [file for place in places or [folder] for file in sorted(place.rglob("*.safetensors"))]
    if not files:
        raise ValueError(f"{where} holds no weights: expected a run, or a model's folder")
    return digest(*(file.read_bytes() for file in files))


@lru_cache
def drawings(data: str, size: int) -> str:
    return open_source(data, size).fingerprint()


def trained(name: str, options: Options) -> dict[str, Any]:
    """A lead's training, or what is kept of it: seconds of an update and on which machine, validation errors by noise
    level."""
    config = config_of(name, options)
    kept = config.output / "lead.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    shutil.rmtree(config.output, ignore_errors=True)  # of one that was killed: its time is lost
    times: list[float] = []
    errors: dict[str, float] = {}
    validate = train.ldm.validate

    def noted(*given: Any) -> dict[str, float]:
        errors.update(validate(*given))
        return errors

    with recipe_of(name, options).twist(options.clip) as goal:
        rate = train.ldm.learning_rate

        def timed(*given: Any, **named: Any) -> float:  # once an update, and never in the rehearsal
            times.append(time.perf_counter())
            return rate(*given, **named)

        with replaced(validate=noted, learning_rate=timed):
            train.ldm.main(config, goal)
    between = np.diff(times)
    ends = np.arange(1, len(between) + 1) % config.checkpoint_every == 0  # those with a checkpoint in them
    between = between[~ends] if not ends.all() else between
    seconds = float(between.mean())  # no median: a lead may do something in a part of its updates alone
    found = {"seconds_per_update": seconds, "machine": described(), "errors": errors}
    write_aside(kept, found)
    return found


def asked_rows(prompts: int, objects: tuple[str, ...]) -> dict[str, list[Row]]:
    """What is asked for, by split; ValueError where one has no pairs."""
    splits = ("train", "held_out")
    rows = {split: draw_rows(split, prompts, objects, PAINTED, None, choosing=True) for split in splits}
    for split, some in rows.items():
        if not some:
            raise ValueError(
                f"of {len(objects)} objects no {split.replace('_', '-')} pair is left to ask for: take more"
            )
    return rows


@lru_cache(2)
def drawn(prompts: int, objects: tuple[str, ...], size: int, where: Path) -> Moments:
    """Of the judge's features of fresh drawings of what is asked for."""
    rows = [row for some in asked_rows(prompts, objects).values() for row in some]
    pictures = drawn_afresh(rows, size, None)
    return Moments.of([open_extractor(str(where))([np.asarray(p) for p in pictures])])


def sureness(judge: Recogniser, images: list[Image.Image], rows: list[Row]) -> dict[str, float]:
    """The mean log-probability that the judge gives to what was asked for, in nats, by task."""
    found = {}
    for (task, answers), logits in zip(judge.config.tasks, logits_of(judge, images), strict=True):
        asked = torch.tensor([answers.index(getattr(row, task)) for row in rows])
        found[task] = -float(F.cross_entropy(logits, asked))
    return found


def painted(
    pipe: TextToImagePipeline, where: Path, prompts: int, *, seed: int = PAINTED, **call: Any
) -> dict[str, float]:
    """What the judge says of samples: shares of right objects and styles, how sure it is of them, and a Fréchet
    distance to fresh drawings.

    where: the judge. prompts: of pairs trained on, and as many held out. seed: of the noises. call: more arguments of
    the pipeline.
    """
    pipe.set_progress_bar_config(disable=True)
    objects = objects_of(pipe.model.defaults.data)
    judge, extractor = open_pictogram_judge(where, objects), open_extractor(str(where))
    found: dict[str, float] = {}
    images: list[Image.Image] = []
    for split, rows in asked_rows(prompts, objects).items():
        found |= {f"{split}_prompts": len(rows), f"{split}_pairs": len({row[:2] for row in rows})}
        asked = [captions(*row[:3])[0] for row in rows]
        mine: list[Image.Image] = []
        for i in range(0, len(asked), 50):
            mine += pipe(asked[i : i + 50], seed=seed * NOISES + len(images) + i, **call).images
        found |= {f"{split}_{task}": share for task, share in judged(judge, mine, rows).items()}
        found |= {f"{split}_{task}_nats": nats for task, nats in sureness(judge, mine, rows).items()}
        images += mine
    ours = Moments.of([extractor([np.asarray(picture) for picture in images])])
    theirs = drawn(prompts, objects, pipe.model.size, where)
    return found | {"distance": frechet_distance(ours, theirs), "samples": len(images)}


def reconstructed(pipe: TextToImagePipeline) -> dict[str, Any]:
    """The shape of the latents, and dB of what the autoencoder makes of freshly drawn pictures."""
    model, rows = pipe.model, draw_rows("train", 48, chosen(), 0, None)
    side = model.size // model.vae.downscale
    shape = [model.vae.latent_channels, side, side]
    return {"latents": shape, "psnr_db": reconstruction_psnr(pipe, rows, model.size, None)["all"]}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """A bar for each lead; the band is the mean ± two deviations of the base with several seeds (of few: no confidence
    interval)."""
    from matplotlib.figure import Figure

    names = [row["lead"] for row in rows][::-1]
    columns = {
        "held_out_object": "right objects, held-out pairs",
        "held_out_object_nats": "log-probability of those, nats",
        "held_out_style": "right styles, held-out pairs",
        "distance": "Fréchet distance, judge's features",
    }
    figure = Figure(figsize=(16, 0.32 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True)
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        colors = ["tab:blue" if name.partition("@")[0] == "base" else "0.6" for name in names]
        axis.barh(names, [row[column] for row in rows][::-1], color=colors)
        alike = [row[column] for row in rows if row["lead"].partition("@")[0] == "base"]
        if len(alike) > 1:
            mean, spread = float(np.mean(alike)), 2 * float(np.std(alike, ddof=1))
            axis.axvspan(mean - spread, mean + spread, color="tab:blue", alpha=0.15)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=110)


def main(options: Options) -> None:
    names, settings = all_leads(options), {}
    for key in ("every", "updates", "batch", "prompts", "size"):
        settings[key] = getattr(options, key)
    settings |= {"vae": weights_of(options.vae, "vae")[:16], "clip": weights_of(options.clip, *CLIP)[:16]}
    needs("matplotlib", "scipy")
    objects = objects_of(data_of(options))  # what would be found out after hours of training is asked before
    asked_rows(options.prompts, objects)
    open_pictogram_judge(options.judge, objects)
    open_extractor(options.clip)
    runs = {name: config_of(name, options).output.name for name in names}
    settings["judge"] = open_extractor(str(options.judge)).digest
    rows = {row["lead"]: row for row in results_before(options.out, settings) if is_current(row, options)}
    failed = []
    for name in names:
        if name not in rows:
            about = {"lead": name, "what": recipe_of(name, options).what, "run": runs[name]}
            try:
                about |= trained(name, options)
            except ValueError as error:  # a loss that is no number, for instance
                print(f"{name}: {error}")
                failed.append(name)
                continue
            pipe = TextToImagePipeline.from_pretrained(config_of(name, options).output)
            usual = pipe.model.defaults
            about |= {"steps": usual.steps, "guidance": usual.guidance_scale, "sampler": usual.sampler}
            about |= painted(pipe, options.judge, options.prompts) | reconstructed(pipe)
            base = about if name == "base" else rows.get("base", {})
            same = base.get("machine") == about["machine"]
            rows[name] = about | {"time": about["seconds_per_update"] / base["seconds_per_update"] if same else None}
            write_aside(options.out, {"settings": settings, "rows": list(rows.values())})
            plot(list(rows.values()), options.out.with_suffix(".png"))
        line = "{lead}: objects {train_object:.1%} / {held_out_object:.1%} ({held_out_object_nats:.3f} nats), styles "
        line += "{train_style:.1%} / {held_out_style:.1%}, distance {distance:.3g}, seconds an update "
        print((line + "{seconds_per_update:.3g}").format(**rows[name]))
    if failed:
        raise ValueError(f"{len(failed)} of {len(names)} leads could not be trained: {', '.join(failed)}")


if __name__ == "__main__":
    with errors_said():
        main(tyro.cli(Options))
