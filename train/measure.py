"""How good are the pictures? Distances of a model's samples, or of a folder's pictures, to a reference.

Every number is said with what it hangs on: the extractor and its hash, the counts, the resizing, the reference's hash.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm.schedule import VariancePreserving
from pipelines import TextToImagePipeline
from train.aside import written_aside
from train.bits import Method, measure_bits
from train.extractors import Extractor, open_extractor
from train.folders import FolderSource
from train.hashes import FileHashes
from train.judge import right_by_caption
from train.launch import start
from train.metrics import clip_score, diversity, frechet_distance, kernel_distance, precision_recall
from train.neighbours import copies, in_words, memorisation
from train.pictures import digest
from train.recogniser_model import Recogniser
from train.reference import Reference, open_reference, warn_of_few
from train.results import joined, write_result
from train.samples import (
    NOTES,
    Painting,
    common_side,
    drawn_rows,
    is_model,
    model_digest,
    notes_of,
    open_painter,
    paint_samples,
    prompts_of,
    read_samples,
)
from train.sources import Drawn, describe, open_source
from vae.autoencoder import Autoencoder

FILE = "metrics.json"
OF_PICTURES = ("weights", "samples_hash", "painted", "size")  # alike, as the extractor, for all numbers side by side
METRICS = ("fid", "kid", "precision", "recall", "clip", "diversity", "accuracy", "bpd")
BITS_OF = "held_out"  # of drawn sets
PAIRED = {"kid", "precision", "recall"}
PAIRS = 10_000  # pictures of each set, at most, whose distances or products with one another are computed
FEWEST = {"fid": 2, "kid": 4, "precision": 4, "recall": 4}  # pictures of each set


@dataclass(frozen=True)
class Measuring:
    """What is measured, and how. `atelier evaluate` has the same names."""

    model: str  # model, or folder of pictures
    reference: str
    metrics: str = "fid,kid,precision,recall"
    extractor: str = "inception"
    clip: str = ""  # of the CLIP score; "": the extractor
    template: str = ""  # makes the captions of the reference
    lora: tuple[str, ...] = ()  # merged into the model
    lora_weight: tuple[float, ...] = (1.0,)
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
    """Paints or reads the samples, prints every number and writes it to `out`/metrics.json as soon as it is known;
    returns what that file holds.

    pipe: the model, where it is open already, with its LoRAs.

    Raises ValueError for what can't be measured, before anything is painted.
    """
    accelerator = start()
    say = accelerator.print
    if pipe is None and is_model(how.model):
        pipe = open_painter(how.model, how.lora, how.lora_weight, accelerator.device)
    elif pipe is None and how.lora:
        raise ValueError(f"--lora {how.lora[0]} is loaded into a model, and {how.model} is a folder of pictures")
    if how.clip and "clip" not in how.wanted:
        raise ValueError(f"--clip {how.clip} is of the CLIP score: add clip to --metrics {how.metrics}")
    if "bpd" in how.wanted:
        _check_bits(how, pipe)
    if set(how.wanted) == {"bpd"}:
        _check_out(how, {"data": how.reference})
    result: dict[str, Any] = {"model": how.model, "weights": pipe and model_digest(pipe), "metrics": []}
    bits = None
    if "bpd" in how.wanted and pipe is not None and accelerator.is_main_process:
        bits = _bits(how, pipe)  # first: it may find out what is wrong with the pictures
    if set(how.wanted) - {"bpd"} or how.training:
        _of_features(how, pipe, accelerator, result)
    else:
        result["reference"] = {"data": how.reference}
    if bits:
        result["metrics"].append(bits)
        line = "bits per dimension: {value:.4f} ± {standard_error:.4f} [by the {method}, {pictures} pictures of the "
        say((line + "{split} set {hash} at {size}×{size}, seed {seed}]").format(**bits))
        _write(how, result)
    if accelerator.is_main_process:
        say(f"written to {how.out / FILE}")
        result = json.loads((how.out / FILE).read_text(encoding="utf-8"))
    accelerator.wait_for_everyone()
    return result


def _write(how: Measuring, result: dict[str, Any]) -> None:
    """Beside what the file holds of the same pictures and extractor; of others, it stays as it is."""

    def of(one: dict[str, Any]) -> dict[str, Any]:
        return {key: one.get(key) for key in OF_PICTURES} | {"extractor": one.get("extractor", {}).get("hash")}

    def asked(one: dict[str, Any]) -> tuple[Any, ...]:
        """What two numbers of one name may differ in, though pictures and extractor are the same."""
        return one["metric"], one.get("clip", {}).get("hash"), one.get("seed"), one.get("template")

    def join(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
        new = {asked(one): one for one in now["metrics"]}
        metrics = [new.pop(asked(one), one) for one in before["metrics"]] + list(new.values())
        whole = {key: now[key] for key in ("memorisation",) if key in now}  # of another training set nothing is left
        return joined(before, now) | whole | {"metrics": metrics}

    write_result(how.out / FILE, result, of, join)


def _check_out(how: Measuring, reference: dict[str, Any]) -> None:
    """ValueError where the numbers would replace those of another reference."""
    file = how.out / FILE
    before = json.loads(file.read_text(encoding="utf-8")).get("reference", {}) if file.is_file() else {}
    key = "hash" if "hash" in before and "hash" in reference else "data"
    if before.get(key, reference[key]) != reference[key]:
        raise ValueError(
            f"{file} holds numbers against another reference, {before['data']}: give another --out (of a model's "
            f"samples, {how.out / 'samples'} can stand in the place of the model: they are not painted again)"
        )


def _open_real(how: Measuring, flag: str, size: int, *, needed: bool, split: str = "train", views: int = 1) -> Any:
    """What --reference or --training names, which may do without captions, unless they are needed."""
    opened = partial(open_source, getattr(how, flag), size, split=split, font=how.font, views=views)
    try:
        return opened(template=how.template)  # where they are there, the set is the same one for all
    except ValueError as error:
        with suppress(ValueError):
            if not needed and not how.template:
                return opened(captions=False)
        raise ValueError(str(error).replace("--data", f"--{flag}")) from None


def _open_extractors(how: Measuring, accelerator: Accelerator) -> tuple[Extractor, Extractor]:
    """That of the distances, and the CLIP of the score (the same, where it is one, or no score was asked for).

    Raises ValueError for one that has no part in what was asked for."""
    alone = _clip_alone(how)
    with accelerator.main_process_first():  # which fetches what the others then find
        extractor = open_extractor(how.clip if alone else how.extractor, accelerator.device)
    if "accuracy" in how.wanted and not isinstance(extractor.network, Recogniser):
        raise ValueError(
            f"accuracy is the verdict of a run of train/recogniser.py, and {extractor.name} is none: give one as "
            "--extractor"
        )
    clip = extractor
    if "clip" in how.wanted:
        clip = open_extractor(how.clip, accelerator.device) if how.clip and not alone else extractor
        if clip.embed is None:
            raise ValueError(
                f"the CLIP score needs a CLIP, and {clip.name} is none: give --clip RUN (of train/clip.py), a folder "
                "or hub id of transformers, or ARCHITECTURE:WEIGHTS of open_clip"
            )
    return extractor, clip


def _clip_alone(how: Measuring) -> bool:
    """Whether no features but those of --clip are asked for."""
    return bool(how.clip) and not how.training and set(how.wanted) <= {"clip", "bpd"}


def _of_features(
    how: Measuring, pipe: TextToImagePipeline | None, accelerator: Accelerator, result: dict[str, Any]
) -> None:
    """Everything that is measured on features, from the pictures to what is written."""
    say = accelerator.print
    extractor, clip = _open_extractors(how, accelerator)
    needing = [name for name in how.wanted if name in ("clip", "accuracy")]
    if needing and pipe is not None and not pipe.model.is_told:
        raise ValueError(f"{needing[0]} compares pictures with their prompts, and {how.model} is told nothing")

    def open_set(source: Any, of: Extractor, cache: Path) -> Reference:
        return open_reference(source, of, size, cache, accelerator, workers=how.workers)

    if pipe is None:
        given: FolderSource = read_samples(how.model, how.samples, say)
        size, count = how.size or common_side(given), len(given)
        if needing and not any(given.captions):
            raise ValueError(f"{needing[0]} compares pictures with their captions, and those of {how.model} have none")
    else:
        if len(set(pipe.model.sides)) > 1:
            raise ValueError(
                f"{how.model} paints {' × '.join(map(str, pipe.model.sides))}: expected a model of squares"
            )
        if how.size not in (None, pipe.model.size):
            raise ValueError(f"--size {how.size} is for folders of pictures: this model paints {pipe.model.size}")
        size, count = pipe.model.size, how.samples or (10_000 if accelerator.device.type == "cuda" else 1000)
    needed = "accuracy" in how.wanted or (pipe is not None and pipe.model.is_told)
    source = _open_real(how, "reference", size, needed=needed)
    say(f"reference: {describe(source, size)}")
    reference = open_set(source, extractor, how.cache)
    said = {"data": how.reference, "pictures": len(reference), "hash": reference.hash}
    _check_out(how, said)
    for name in how.wanted:
        if min(count, len(reference)) < (fewest := FEWEST.get(name, 1)):
            raise ValueError(
                f"{name} of {count} samples and {len(reference)} pictures of --reference: expected {fewest} or more of "
                "each"
            )
    if "accuracy" in how.wanted:
        _right(extractor, reference, how.template)  # which says what it can't judge
    training = learnt = None
    if how.training:
        views = pipe.model.defaults.views if pipe else notes_of(how.model).get("views", 1)
        real = _open_real(replace(how, template=""), "training", size, needed=False, views=views)
        training = open_set(real, extractor, how.cache)
        if pipe is not None and isinstance(pipe.model.vae, Autoencoder):
            given_back = copies(training, pipe.model.vae, min(count, 400), how.out, accelerator)
            learnt = open_set(given_back, extractor, how.out / "features")
    if pipe is not None:
        prompts = prompts_of(pipe, reference.captions, count, how.painting.seed)
        pipe.set_progress_bar_config(disable=True)
        folder = how.out / "samples"
        given = paint_samples(pipe, prompts, folder, how.painting, accelerator, reference=reference.hash)
        result["painted"] = json.loads((folder / NOTES).read_text())
    samples = open_set(given, extractor, how.out / "features")
    embedded = samples if clip is extractor or "clip" not in how.wanted else open_set(given, clip, how.out / "features")
    if not accelerator.is_main_process:
        return
    result |= {"samples": len(samples), "samples_hash": samples.hash, "size": size, "reference": said}
    if not _clip_alone(how):
        result["extractor"] = extractor.described()
    if "fid" in how.wanted:
        warn_of_few(samples, "samples", say)
        warn_of_few(reference, "pictures of --reference", say)
    for found in _numbers(how, samples, reference, extractor, clip, embedded):
        result["metrics"].append(found)
        say(_line(found, size, reference, clip if found["metric"] == "clip" else extractor))
        _write(how, result)  # what comes next may fail
    if training is not None:
        sheet, of = how.out / "neighbours.png", f"{extractor.name}, {extractor.digest}"
        result["memorisation"] = memorisation(samples, reference, training, sheet, learnt, of)
        _write(how, result)
        for line in in_words(result["memorisation"], "the reference"):
            say(line)


def _numbers(
    how: Measuring, samples: Reference, reference: Reference, extractor: Extractor, clip: Extractor, embedded: Reference
) -> Iterator[dict[str, Any]]:
    """Each metric that was asked for, in the order of METRICS, as soon as it is known."""
    wanted, on = set(how.wanted), f"on {extractor.name} features"
    counts = {"samples": len(samples), "pictures": len(reference)}
    some = {key: min(count, PAIRS) for key, count in counts.items()}
    if "fid" in wanted:
        distance = frechet_distance(samples.moments(), reference.moments())
        named = ("frechet", f"Fréchet distance {on} (not FID)")
        if extractor.is_inception:
            named = ("frechet", f"Fréchet distance, Inception weights of {extractor.name.partition(':')[2]}")
        metric, name = ("fid", "FID") if extractor.is_fids else named
        yield {"metric": metric, "name": name, "value": distance, **counts}
    ours, theirs = (z.features(PAIRS) if wanted & PAIRED else torch.empty(0) for z in (samples, reference))
    if "kid" in wanted:
        name, scale = "KID" if extractor.is_fids else f"kernel distance {on} (not KID)", 1.0
        if not extractor.is_inception:  # whose features alone are of the size that the kernel was made for
            name = f"kernel distance {on} of mean square 1 (not KID)"
            scale = float(theirs.double().square().mean().sqrt())
        mean, deviation = kernel_distance(theirs / scale, ours / scale)
        metric = "kid" if extractor.is_fids else "kernel"
        yield {"metric": metric, "name": name, "value": mean, "deviation": deviation, **some}
    if wanted & {"precision", "recall"}:
        equal = min(len(ours), len(theirs))  # as that paper has it: the supports grow with the counts
        support = precision_recall(theirs[drawn_rows(len(theirs), equal)], ours[drawn_rows(len(ours), equal)])
        alike = {"samples": equal, "pictures": equal, "k": 3}
        for metric in ("precision", "recall"):
            if metric in wanted:
                yield {"metric": metric, "name": f"{metric} {on}", "value": getattr(support, metric), **alike}
    if "clip" in wanted:
        yield _clip(embedded, clip)
    if "accuracy" in wanted:
        (real, pictures), (shares, judged) = (_right(extractor, z, how.template) for z in (reference, samples))
        for task, share in shares.items():
            both: dict[str, Any] = {"value": share, "reference_value": real[task]}
            both |= {"samples": judged, "pictures": pictures} | ({"template": how.template} if how.template else {})
            yield {"metric": f"{task} accuracy", "name": f"{task} right, by {extractor.name}", **both}
    if "diversity" in wanted:
        told = all(any(pictures.captions) for pictures in (samples, reference))
        (value, groups), (real_value, real_groups) = (_diversity(z, by_caption=told) for z in (samples, reference))
        more: dict[str, Any] = {"value": value if groups else None}
        more |= {"reference_value": real_value if real_groups else None}
        if told:
            more |= {"prompts": groups, "reference_captions": real_groups}
        of = "within a prompt" if told else "of all"
        yield {"metric": "diversity", "name": f"diversity {of} {on}", **more, **some}


def _diversity(pictures: Reference, *, by_caption: bool) -> tuple[float, int]:
    """Among pictures of one caption, those without left out; or among all."""
    rows = [i for i, caption in enumerate(pictures.captions) if caption or not by_caption]
    chosen = [rows[i] for i in drawn_rows(len(rows), PAIRS)]
    groups = [pictures.captions[i] if by_caption else "" for i in chosen]
    return diversity(pictures.features()[chosen], groups)


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
    cut = {caption for caption in embedded.captions if caption and clip.is_cut and clip.is_cut(caption)}
    return found | {"clip": clip.described(), "cut_prompts": len(cut)}


def _right(extractor: Extractor, pictures: Reference, template: str) -> tuple[dict[str, float], int]:
    """Share of the pictures in which the extractor sees what their captions say, by task; of how many."""
    assert isinstance(extractor.network, Recogniser)
    said = [i for i, caption in enumerate(pictures.captions) if caption]
    if not said:
        raise ValueError("accuracy needs captions that say what pictures show: there are none")
    captions = [pictures.captions[i] for i in said]
    return right_by_caption(extractor.network, pictures.features()[said], captions, template), len(said)


def _line(found: dict[str, Any], size: int, reference: Reference, extractor: Extractor) -> str:
    value = _said(found["value"]) + (f" ± {found['deviation']:.4f}" if "deviation" in found else "")
    if "reference_value" in found:
        value += f" (of the reference {_said(found['reference_value'])})"
    against = f", {found['pictures']} pictures of" if "pictures" in found else ","
    against += f" reference {reference.hash}"
    if found.get("cut_prompts"):
        against += f", {found['cut_prompts']} of the prompts longer than it reads"
    return (
        f"{found['name']}: {value} [{found['samples']} samples{against}; extractor {extractor.digest}, pictures of "
        f"{size}×{size} {extractor.resize}]"
    )


def _said(value: float | None) -> str:
    return "none, no two of one" if value is None else f"{value:.4f}"


def _check_bits(how: Measuring, pipe: TextToImagePipeline | None) -> None:
    """ValueError where no bits per dimension could be measured."""
    if pipe is None:
        raise ValueError(f"bpd is measured by a model: {how.model} is a folder of pictures")
    if pipe.loras:
        raise ValueError(f"bpd is of models without LoRAs, and {min(pipe.loras)} is loaded: leave one of both out")
    if pipe.model.inpaints:
        raise ValueError(f"bpd is of models of whole pictures, and {how.model} paints what is missing in one")
    source = _told_pictures(how, pipe)
    if len(source) < 2:
        raise ValueError(f"bpd of {len(source)} picture of --reference: expected two or more")


def _told_pictures(how: Measuring, pipe: TextToImagePipeline) -> Any:
    """The reference as bits are measured on it: with captions, which may be empty where the model is told nothing."""
    return _open_real(how, "reference", pipe.model.size, needed=pipe.model.is_told, split=BITS_OF)


def _bits(how: Measuring, pipe: TextToImagePipeline) -> dict[str, Any]:
    """By the bound, or by the flow on a path that has no table of rows."""
    method: Method = "elbo" if isinstance(pipe.model.schedule, VariancePreserving) else "flow"
    source, seed = _told_pictures(how, pipe), how.painting.seed
    of = {"split": BITS_OF if isinstance(source, Drawn) else "given", "hash": source.fingerprint(FileHashes(how.cache))}
    asked: dict[str, Any] = {"method": method, "seed": seed}
    key = digest(model_digest(pipe), json.dumps(of | asked))
    file = how.out / f"bits-{key[:8]}.json"  # kept, in case that the painting after it is interrupted
    if not file.is_file():
        found = measure_bits(how.model, how.reference, **asked, workers=how.workers, source=source)
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(file) as partial:
            partial.write_text(json.dumps(found))
    found = json.loads(file.read_text())
    numbers = {"value": found["bits_per_dim"], "standard_error": found["standard_error"], "pictures": found["pictures"]}
    said = {"method": method, "seed": seed, "size": pipe.model.size, **of}
    return {"metric": "bpd", "name": "bits per dimension", **numbers, **said}
