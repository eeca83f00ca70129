"""Does it paint what was asked for? Retrieval of the object by nearest neighbour in pixels, over all candidate objects.

A sample of "an oil painting of a fox on a blue background" counts as right when, of all objects painted by the data's
own code in that style on that ground, the fox is the closest. Pictures are compared at 32×32 pixels, where strokes and
grain have averaged out; each candidate is drawn in two placements that no model was trained on.

With a judge (train/recogniser.py --preset pictograms) it also says which objects and styles that one sees, how far the
samples are from fresh drawings of the same prompts, how near they come to the pictures of training, and how much those
of one prompt differ.
"""

import json
import time
from collections.abc import Sequence
from functools import cache as remembered
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from pipelines import TextToImagePipeline
from train.data import generator, to_unit
from train.extractors import open_extractor
from train.grid import grid
from train.judge import answers_of, logits_of, open_judge
from train.launch import start
from train.machine import described
from train.metrics import diversity, frechet_distance, precision_recall, psnr
from train.neighbours import copies, in_words, memorisation
from train.pictograms import GROUNDS, STYLES, Pictograms, Row, captions, is_drawn, objects_of, paint
from train.pictures import digest
from train.recogniser_model import Recogniser
from train.reference import InMemory, Reference, open_reference, warn_of_few
from train.results import counted, in_percent, write_result
from train.samples import NOTES, Painting, open_painter, paint_samples
from train.sources import open_source, split_parts
from vae.autoencoder import Autoencoder, Identity

SIDE = 32  # pixels at which pictures are compared
PLACEMENTS = (10_001, 10_002)  # seeds of the candidates' drawings
UNSEEN = 20_001  # first of those of drawings that stand for real pictures which no model was trained on
SPLITS = ("train", "held_out")
PAINTED = "pictograms"  # the folder in OUT; "samples" is that of pictures for a --reference
RECONSTRUCTED = 240  # fresh drawings that the autoencoder is asked for
ALIKE, EACH = 8, 6  # prompts whose samples are compared with one another, and how many of each


def small(image: Image.Image) -> np.ndarray:
    """A picture as the vector that is compared: [SIDE * SIDE * 3] float32."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel()


@remembered
def candidates(objects: tuple[str, ...], style: str, ground: str, size: int, font: str | None) -> np.ndarray:
    """All objects in this style on this ground, [objects, placements, SIDE * SIDE * 3]."""
    return np.stack([[small(paint(o, style, ground, size, seed, font=font)) for seed in PLACEMENTS] for o in objects])


def closest_object(image: Image.Image, row: Row, objects: tuple[str, ...], font: str | None = None) -> str:
    """The object whose painting, in the row's style and ground, is closest to the picture."""
    known = candidates(objects, row.style, row.ground, image.width, font)
    distances = np.square(known - small(image)).sum(-1).min(1)
    return objects[int(distances.argmin())]


def closest_objects(
    images: Sequence[Image.Image], rows: Sequence[Row], objects: tuple[str, ...], font: str | None = None
) -> list[str]:
    """The `nearest` of each picture; each process draws the candidates of its own styles and grounds."""
    state, looks = PartialState(), [(style, ground) for style in STYLES for ground in GROUNDS]
    mine = [
        (i, closest_object(image, row, objects, font))
        for i, (image, row) in enumerate(zip(images, rows, strict=True))
        if looks.index((row.style, row.ground)) % state.num_processes == state.process_index
    ]
    return [found for _, found in sorted(gather_object(mine))]


def draw_rows(
    split: str, count: int, objects: tuple[str, ...], seed: int, font: str | None, *, choosing: bool = False
) -> list[Row]:
    """`count` distinct rows of the split, or all there are, drawn at random.

    choosing: of the held-out pairs, those that recipes are chosen by, and not those of the verdict.
    """
    rows = Pictograms(size=64, objects=objects, split=split, font=font).rows
    if split == "held_out":
        rows = [row for row in rows if (int(digest(row.object, row.style), 16) % 2 == 1) == choosing]
    order = torch.randperm(len(rows), generator=generator(seed, len(split)))
    return [rows[i] for i in order[:count].tolist()]


def drawn_afresh(rows: Sequence[Row], size: int, font: str | None, first: int = 0) -> list[Image.Image]:
    """The rows, each in its own placement and brushwork, that of `first` and so on, which no model is trained on (pixel
    art has so few placements, and no brushwork, that some such drawings are those of training)."""
    return [paint(*row[:3], size, UNSEEN + i, font=font) for i, row in enumerate(rows, first)]


@torch.no_grad()
def reconstruction_psnr(pipe: TextToImagePipeline, rows: list[Row], size: int, font: str | None) -> dict[str, float]:
    """PSNR in dB of the autoencoder's reconstructions of freshly drawn pictures, the mean over pictures, in all and by
    style; and the standard error of that over all."""
    every: list[float] = []
    for pixels in torch.from_numpy(np.stack([np.array(one) for one in drawn_afresh(rows, size, font)])).split(16):
        images = to_unit(pixels).to(pipe.device, pipe.dtype)
        every += psnr(pipe.model.vae.decode(pipe.model.vae.encode(images).mode).clamp(-1, 1), images).tolist()
    by_style: dict[str, list[float]] = {}
    for row, decibels in zip(rows, every, strict=True):
        by_style.setdefault(row.style, []).append(decibels)
    spread = {"standard_error": float(np.std(every, ddof=1) / len(every) ** 0.5)}
    return {"all": float(np.mean(every)), **spread, **{s: float(np.mean(v)) for s, v in sorted(by_style.items())}}


def judged(judge: Recogniser, images: list[Image.Image], rows: list[Row]) -> dict[str, float]:
    """Share of the pictures in which the judge sees what was asked for, by task: object, style."""
    asked = {"object": [row.object for row in rows], "style": [row.style for row in rows]}
    shares = {}
    for (task, answers), logits in zip(judge.config.tasks, logits_of(judge, images), strict=True):
        found = [answers[place] for place in logits.argmax(1).tolist()]
        shares[task] = sum(a == b for a, b in zip(found, asked[task], strict=True)) / len(rows)
    return shares


def open_pictogram_judge(where: Path, objects: tuple[str, ...]) -> Recogniser:
    """A judge of objects and styles; ValueError where it is none, or does not know all objects of the model."""
    judge = open_judge(where)
    known = answers_of(judge)
    if not isinstance(judge, Recogniser) or set(known) != {"object", "style"}:
        raise ValueError(
            f"the judge {where} tells {', '.join(known)}: expected one of train/recogniser.py --preset pictograms"
        )
    if strange := set(objects) - set(known["object"]):
        raise ValueError(
            f"the judge {where} does not know {len(strange)} of the model's {len(objects)} objects, such as "
            f"{min(strange)!r}: train one with --data pictograms:all"
        )
    return judge


def beside_training(
    images: list[Image.Image],
    rows: list[Row],
    alike: list[Image.Image],
    judge: Path,
    out: Path,
    *,
    data: str,
    views: int,
    font: str | None,
    cache: Path,
    vae: Autoencoder | Identity,
) -> dict[str, Any]:
    """Likeness to drawings, memorisation and diversity of the samples of training pairs, in the judge's features.

    alike: EACH samples of the prompt of each of the first ALIKE rows.
    """
    accelerator, size = start(), images[0].width
    extractor = open_extractor(str(judge), accelerator.device)

    def opened(images: list[Image.Image], captions: list[str]) -> Reference:
        return open_reference(InMemory(images, captions), extractor, size, out / "features", accelerator, workers=0)

    asked = [captions(*row[:3])[0] for row in rows]
    real = drawn_afresh(rows, size, font)
    training = open_reference(
        open_source(data, size, font=font, views=views), extractor, size, cache, accelerator, workers=0
    )
    learnt = None
    if isinstance(vae, Autoencoder):
        given_back = copies(training, vae, len(rows), out, accelerator)
        learnt = open_reference(given_back, extractor, size, out / "features", accelerator, workers=0)
    ours, theirs = opened(images, asked), opened(real, asked)
    others = opened(drawn_afresh(rows, size, font, len(rows)), asked)
    some = several(asked)
    drawn = drawn_afresh(several(rows), size, font)
    apart, drawings = (diversity(opened(pictures, some).features(), some)[0] for pictures in (alike, drawn))
    if not accelerator.is_main_process:
        return {}
    of = f"features of {judge}, {extractor.digest}, pictures {extractor.resize}"
    fresh = f"fresh drawings of the same, {theirs.hash}"
    likeness = {"samples": among(ours, theirs), "other_drawings": among(others, theirs)}
    for name, found in likeness.items():
        said = ", ".join(f"{metric} {value:.4g}" for metric, value in found.items())
        print(f"{len(rows)} {name.replace('_', ' ')} among {fresh}: {said} ({of})")
    warn_of_few(ours, "samples", print)
    near = memorisation(ours, theirs, training, out / "neighbours.png", learnt, f"{judge}, {extractor.digest}")
    spread = {"of_a_prompt": apart, "of_its_drawings": drawings, "prompts": len(rows[:ALIKE]), "each": EACH}
    for line in in_words(near, "fresh drawings"):
        print(line)
    print(f"between pictures of one prompt: samples {apart:.3g}, drawings {drawings:.3g} ({of})")
    told = {"pictures": len(rows), "drawings_hash": theirs.hash}
    return {"likeness": likeness | told, "memorisation": near, "diversity": spread}


def among(pictures: Reference, real: Reference) -> dict[str, float]:
    """Fréchet distance of pictures to as many real ones, to be compared at one count only, and, of more than three,
    precision and recall."""
    found = {"frechet": frechet_distance(pictures.moments(), real.moments())}
    if len(real) > 3:
        found |= precision_recall(real.features(), pictures.features())._asdict()
    return found


def _of(result: dict[str, Any]) -> dict[str, Any]:
    """What a result is of: results of the same are joined (`train.results`)."""
    of = {split: [result[split]["prompts"], result[split].get("painted")] for split in SPLITS if split in result}
    return {split: of.get(split) for split in SPLITS} | {"judge": (result.get("judged_by") or {}).get("hash")}


def several(asked: list[Any]) -> list[Any]:
    """The first prompts or rows, each as often as its samples are compared with one another."""
    return [one for one in asked[:ALIKE] for _ in range(EACH)]


def evaluate(
    model: str | Path | None,
    out: Path,
    *,
    prompts: int = 100,
    painting: Painting | None = None,
    font: str | None = None,
    judge: Path | None = None,
    cache: Path = Path("cache"),
    lora: Sequence[str] = (),
    lora_weight: Sequence[float] = (1.0,),
) -> dict:
    """Paints `prompts` training pairs and half as many held-out ones, judges them, and writes figures and sheets. The
    pictures are kept in `out`/pictograms (`train.samples.paint_samples`); with more prompts the first ones stay.

    Returns what evaluation.json says of these pictures: the shares of right objects, the misses, the autoencoder's
    PSNR, the settings; with a judge the shares that it finds right, and what `beside_training` says.
    """
    if prompts < 2:
        raise ValueError(f"--prompts {prompts}: expected at least 2")
    accelerator = start()
    painting = painting or Painting()
    say, seed = accelerator.print, painting.seed
    pipe = open_painter(model, lora, lora_weight, accelerator.device)
    trained_on = split_parts(pipe.model.defaults.data)[0][1]  # the first part, without a prior's pictures
    if not is_drawn(trained_on):
        raise ValueError(
            f"this model was trained on {trained_on or 'unknown data'}, not on pictograms: where it paints classes, "
            "train a judge of them (train/recogniser.py) and give --judge RUN; or a --reference to compare with"
        )
    objects = objects_of(trained_on)
    network = open_pictogram_judge(judge, objects) if judge else None
    out.mkdir(parents=True, exist_ok=True)

    known = digest(*objects, str(seed))  # from which rows are drawn: of fewer prompts they are the first ones

    def painted(name: str, asked: list[str]) -> list[Image.Image]:
        source = paint_samples(pipe, asked, out / PAINTED / name, painting, accelerator, reference=known)
        return [source[i].image for i in range(len(source))]

    result: dict = {"model": str(model), "objects": len(objects), "seed": seed, "judge": "nearest in 32×32 pixels"}
    result["judged_by"] = told = open_extractor(str(judge)).described() if judge else None
    for split, count in zip(SPLITS, (prompts, prompts // 2), strict=True):
        rows = draw_rows(split, count, objects, seed, font)
        if not (count := len(rows)):
            say(f"{split} pairs: there are none of these {len(objects)} objects")
            continue
        asked = [captions(*row[:3])[0] for row in rows]
        there, began = any((out / PAINTED / split).glob("*.png")), time.perf_counter()
        images = painted(split, asked)
        seconds = None if there else (time.perf_counter() - began) / count  # of all that were painted now
        found = closest_objects(images, rows, objects, font)
        misses = [f"{row.style} {row.object} -> {f}" for row, f in zip(rows, found, strict=True) if f != row.object]
        said = [a if f == row.object else f"wrong ({f}): {a}" for a, f, row in zip(asked, found, rows, strict=True)]
        if accelerator.is_main_process:
            grid(images, said, columns=10).save(out / f"{split}.png")
        pairs = len({row[:2] for row in rows})  # whose pictures, on several grounds, are right or wrong together
        result[split] = {"prompts": count, **counted(count - len(misses), count, pairs), "misses": misses}
        shown = len({row.object for row in rows})
        result[split] |= {"seconds_per_picture": seconds, "pairs": pairs, "objects": shown}
        if seconds:
            result[split] |= {"processes": accelerator.num_processes, "machine": described()}
        result[split]["painted"] = json.loads((out / PAINTED / split / NOTES).read_text())
        of = f"{count} prompts of {pairs} pairs of {shown} objects"
        say(f"{split}: {in_percent(result[split])} of {of} closest to their own object")
        if network and judge and told:
            drawn = judged(network, drawn_afresh(rows, pipe.model.size, font), rows)
            result[split] |= {"judged": judged(network, images, rows), "judged_drawings": drawn}
            shares = (f"{task} {share:.1%} ({drawn[task]:.1%})" for task, share in result[split]["judged"].items())
            by = f"{judge} [{told['hash']}, pictures {told['resize']}]"
            say(f"{split} pairs, by {by} (and of as many fresh drawings): {', '.join(shares)}")
            if split == "train":
                beside: dict[str, Any] = {"data": trained_on, "views": pipe.model.defaults.views}
                beside |= {"font": font, "cache": cache, "vae": pipe.model.vae}
                alike = painted("several", several(asked))
                result |= beside_training(images, rows, alike, judge, out, **beside)
    rows = draw_rows("train", RECONSTRUCTED, objects, seed + 1, font)
    result["reconstruction_psnr_db"] = reconstruction_psnr(pipe, rows, pipe.model.size, font)
    every = ", ".join(f"{style} {db:.1f}" for style, db in result["reconstruction_psnr_db"].items())
    say(f"reconstructions of {len(rows)} fresh drawings, mean of their dB: {every}")
    if accelerator.is_main_process:
        write_result(out / "evaluation.json", result, _of)
    say(f"figures and sheets in {out}")
    return result
