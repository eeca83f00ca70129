"""How good are the pictures? Distances of a model's samples, or of a folder's pictures, to a reference.

Every number is said with what it hangs on: the extractor and its hash, the counts, the resizing, the reference's hash.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipelines import TextToImagePipeline
from pipelines.files import newest
from train.bits import measure_bits
from train.extractors import Extractor, open_extractor
from train.folders import FolderSource
from train.judge import right_by_caption
from train.launch import start
from train.metrics import clip_score, diversity, frechet_distance, kernel_distance, precision_recall
from train.neighbours import memorisation
from train.recogniser import ACCURACY, Recogniser
from train.reference import Reference, open_reference
from train.samples import NOTES, Painting, common_side, is_model, is_told, paint_samples, prompts_of, read_samples
from train.sources import describe, open_source

METRICS = ("fid", "kid", "precision", "recall", "clip", "diversity", "accuracy", "bpd")
PAIRED = {"kid", "precision", "recall"}
PAIRS = 10_000  # pictures of each set, at most, whose distances or products with one another are computed


@dataclass(frozen=True)
class Measuring:
    """What is measured, and how. `atelier evaluate` has the same names."""

    model: str  # model, or folder of pictures
    reference: str
    metrics: str = "fid,kid,precision,recall"
    extractor: str = "inception"
    clip: str = ""  # of the CLIP score; "": the extractor
    samples: int | None = None  # None: all of a folder's; of a model 10,000, on a CPU 1,000
    painting: Painting = field(default_factory=Painting)
    training: str = ""  # what the model was trained on: its nearest pictures are looked for
    size: int | None = None  # side of the pictures of a folder; None: their own
    out: Path = Path("evaluation")
    cache: Path = Path("cache")
    workers: int = 2
    font: str | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.wanted if name not in METRICS]:
            raise ValueError(f"--metrics {unknown[0]!r}: expected some of {','.join(METRICS)}")
        if self.samples is not None and self.samples < 2:
            raise ValueError(f"--samples {self.samples}: expected at least 2")
        if not self.wanted and not self.training:
            raise ValueError(f"--metrics is empty: expected some of {','.join(METRICS)}")

    @property
    def wanted(self) -> list[str]:
        return [name for name in self.metrics.replace(" ", "").split(",") if name]


def measure(how: Measuring, pipe: TextToImagePipeline | None = None) -> dict[str, Any]:
    """Paints or reads the samples, prints every number, and writes them to `out`/metrics.json; returns what it holds.

    pipe: the model, where it is open already.

    Raises ValueError for what can't be measured, before anything is painted.
    """
    accelerator = start()
    say = accelerator.print
    painted = pipe is not None or is_model(how.model)
    if painted and pipe is None:
        pipe = TextToImagePipeline.from_pretrained(how.model, device=accelerator.device)
    if "bpd" in how.wanted and pipe is None:
        raise ValueError(f"bpd is measured by a model: {how.model} is a folder of pictures")
    result: dict[str, Any] = {"model": how.model, "metrics": []}
    if set(how.wanted) - {"bpd"} or how.training:
        _of_features(how, pipe, accelerator, result)
    if "bpd" in how.wanted and accelerator.is_main_process:
        bits = _bits(how)
        result["metrics"].append(bits)
        spread = f"{bits['value']:.4f} ± {bits['deviation']:.4f}"
        say(f"bits per dimension: {spread} [by the {bits['method']}, {bits['pictures']} pictures of {how.reference}]")
    if accelerator.is_main_process:
        how.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        (how.out / "metrics.json").write_text(text, encoding="utf-8")
        say(f"written to {how.out / 'metrics.json'}")
    accelerator.wait_for_everyone()
    return result


def _of_features(
    how: Measuring, pipe: TextToImagePipeline | None, accelerator: Accelerator, result: dict[str, Any]
) -> None:
    say = accelerator.print
    with accelerator.main_process_first():  # which fetches what the others then find
        extractor = open_extractor(how.extractor, accelerator.device)
    clip = extractor
    if "clip" in how.wanted:
        clip = open_extractor(how.clip, accelerator.device) if how.clip else extractor
        if clip.embed is None:
            raise ValueError(
                f"the CLIP score needs a CLIP, and {clip.name} is none: give --clip RUN (of train/clip.py), a folder "
                "or hub id of transformers, or ARCHITECTURE:WEIGHTS of open_clip"
            )

    needing = [name for name in how.wanted if name in ("clip", "accuracy")]
    if needing and pipe is not None and not is_told(pipe):
        raise ValueError(f"{needing[0]} compares pictures with their prompts, and {how.model} is told nothing")

    def open_set(source: Any, of: Extractor, cache: Path) -> Reference:
        return open_reference(source, of, size, cache, accelerator, workers=how.workers)

    if pipe is None:
        given: FolderSource = read_samples(how.model, how.samples, say)
        size = how.size or common_side(given)
    else:
        if how.size not in (None, pipe.model.size):
            raise ValueError(f"--size {how.size} is for folders of pictures: this model paints {pipe.model.size}")
        size = pipe.model.size
    source = open_source(how.reference, size, font=how.font)
    say(f"reference: {describe(source, size)}")
    reference = open_set(source, extractor, how.cache)
    if "accuracy" in how.wanted:
        _right(extractor, reference)  # which says what it can't judge
    training = None
    if how.training:
        training = open_set(open_source(how.training, size, font=how.font), extractor, how.cache)
    if pipe is not None:
        count = how.samples or (10_000 if accelerator.device.type == "cuda" else 1000)
        prompts = prompts_of(pipe, reference.captions, count, how.painting.seed)
        pipe.set_progress_bar_config(disable=True)
        folder = how.out / "samples"
        given = paint_samples(pipe, prompts, folder, how.painting, accelerator, reference=reference.hash)
        result["painted"] = json.loads((folder / NOTES).read_text())
    samples = open_set(given, extractor, how.out / "features")
    embedded = samples if clip is extractor or "clip" not in how.wanted else open_set(given, clip, how.out / "features")
    if not accelerator.is_main_process:
        return
    result |= {
        "samples": len(samples),
        "size": size,
        "reference": {"data": how.reference, "pictures": len(reference), "hash": reference.hash},
        "extractor": _described(extractor),
    }
    if len(samples) <= (dim := samples.moments().mean.numel()) and "fid" in how.wanted:
        say(
            f"warning: {len(samples)} samples, and {dim} features: a covariance of fewer samples than features is "
            "singular, and the Fréchet distance far too large; compare it only at equal counts"
        )
    for found in _numbers(how, samples, reference, extractor, clip, embedded):
        result["metrics"].append(found)
        say(_line(found, size, reference, clip if found["metric"] == "clip" else extractor))
    if training is not None:
        found = memorisation(samples, reference, training, how.out / "neighbours.png")
        result["memorisation"] = found
        say(
            f"distance to the nearest training picture, median: of samples {found['samples_to_training']:.4g}, of the "
            f"reference {found['held_out_to_training']:.4g}; side by side in {found['sheet']}"
        )


def _numbers(
    how: Measuring, samples: Reference, reference: Reference, extractor: Extractor, clip: Extractor, embedded: Reference
) -> list[dict[str, Any]]:
    """Each metric that was asked for, in the order of METRICS."""
    wanted, on = set(how.wanted), f"on {extractor.name} features"
    counts = {"samples": len(samples), "pictures": len(reference)}
    some = {key: min(count, PAIRS) for key, count in counts.items()}
    found: list[dict[str, Any]] = []
    if "fid" in wanted:
        name = "FID" if extractor.is_inception else f"Fréchet distance {on} (not FID)"
        distance = frechet_distance(samples.moments(), reference.moments())
        found.append({"metric": "fid", "name": name, "value": distance, **counts})
    ours, theirs = (z.features(PAIRS) if wanted & PAIRED else torch.empty(0) for z in (samples, reference))
    if "kid" in wanted:
        name, scale = "KID", 1.0
        if not extractor.is_inception:  # whose features alone are of the size that the kernel was made for
            name = f"kernel distance {on} of mean square 1 (not KID)"
            scale = float(theirs.double().square().mean().sqrt())
        mean, deviation = kernel_distance(theirs / scale, ours / scale)
        found.append({"metric": "kid", "name": name, "value": mean, "deviation": deviation, **some})
    if wanted & {"precision", "recall"}:
        equal = min(len(ours), len(theirs))  # as that paper has it: the supports grow with the counts
        support = precision_recall(theirs[_some(len(theirs), equal)], ours[_some(len(ours), equal)])
        alike = {"samples": equal, "pictures": equal, "k": 3}
        for metric in ("precision", "recall"):
            if metric in wanted:
                found.append({"metric": metric, "name": f"{metric} {on}", "value": getattr(support, metric), **alike})
    if "clip" in wanted:
        found.append(_clip(embedded, clip))
    if "accuracy" in wanted:
        real = _right(extractor, reference)
        for task, share in _right(extractor, samples).items():
            both = {"value": share, "reference_value": real[task], **counts}
            found.append({"metric": f"{task} accuracy", "name": f"{task} right, by {extractor.name}", **both})
    if "diversity" in wanted:
        (value, groups), (real_value, real_groups) = map(_diversity, (samples, reference))
        more: dict[str, Any] = {"value": value if groups else None}
        more |= {"reference_value": real_value if real_groups else None}
        more |= {"prompts": groups, "reference_captions": real_groups, **some}
        found.append({"metric": "diversity", "name": f"diversity within a prompt {on}", **more})
    return found


def _some(count: int, wanted: int) -> torch.Tensor:
    """`wanted` of `count` rows, spread evenly."""
    return torch.arange(wanted) * count // wanted


def _diversity(pictures: Reference) -> tuple[float, int]:
    chosen = _some(len(pictures), min(len(pictures), PAIRS)).tolist()
    return diversity(pictures.features()[chosen], [pictures.captions[i] for i in chosen])


def _clip(embedded: Reference, clip: Extractor) -> dict[str, Any]:
    assert clip.embed is not None
    said = [i for i, caption in enumerate(embedded.captions) if caption]
    if not said:
        raise ValueError("the CLIP score needs prompts: these samples have none")
    texts = []
    with torch.no_grad():
        for part in torch.tensor(said).split(256):
            texts.append(clip.embed([embedded.captions[i] for i in part.tolist()]).float().cpu())
    value = clip_score(embedded.features()[said], torch.cat(texts))
    found = {"metric": "clip", "name": f"CLIP score by {clip.name}", "value": value, "samples": len(said)}
    return found | {"clip": _described(clip)}


def _right(extractor: Extractor, pictures: Reference) -> dict[str, float]:
    """Share of the pictures in which the extractor sees what their captions say, by task."""
    if not isinstance(extractor.network, Recogniser):
        raise ValueError(f"accuracy is the verdict of a run of train/recogniser.py, and {extractor.name} is none")
    said = [i for i, caption in enumerate(pictures.captions) if caption]
    if not said:
        raise ValueError("accuracy needs captions that say what pictures show: there are none")
    return right_by_caption(extractor.network, pictures.features()[said], [pictures.captions[i] for i in said])


def _described(extractor: Extractor) -> dict[str, Any]:
    said: dict[str, Any] = {"name": extractor.name, "hash": extractor.digest, "resize": extractor.resize}
    accuracy = newest(Path(extractor.name).expanduser()) / ACCURACY
    return said | ({"accuracy": json.loads(accuracy.read_text())} if accuracy.is_file() else {})


def _line(found: dict[str, Any], size: int, reference: Reference, extractor: Extractor) -> str:
    value = _said(found["value"]) + (f" ± {found['deviation']:.4f}" if "deviation" in found else "")
    if "reference_value" in found:
        value += f" (of the reference {_said(found['reference_value'])})"
    against = f", {found['pictures']} pictures of reference {reference.hash}" if "pictures" in found else ""
    return (
        f"{found['name']}: {value} [{found['samples']} samples{against}; extractor {extractor.digest}, pictures of "
        f"{size}×{size} {extractor.resize}]"
    )


def _said(value: float | None) -> str:
    return "none, no two of one" if value is None else f"{value:.4f}"


def _bits(how: Measuring) -> dict[str, Any]:
    measured: Callable[..., dict[str, float]] = measure_bits
    try:
        method, found = "elbo", measured(how.model, how.reference, cache=how.cache, seed=how.painting.seed)
    except ValueError as error:
        if "take --method flow" not in str(error):  # a path that has no table of rows
            raise
        method = "flow"
        found = measured(how.model, how.reference, method=method, cache=how.cache, seed=how.painting.seed)
    numbers = {"value": found["bits_per_dim"], "deviation": found["standard_error"], "pictures": found["pictures"]}
    return {"metric": "bpd", "name": "bits per dimension", "method": method, **numbers}
