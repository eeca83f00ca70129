"""What to guide a model of pictograms by, and how far:

    python benchmarks/guides.py --judge runs/pictograms-recogniser                    the bundled one
    python benchmarks/guides.py --judge … --model runs/leads/base-… --weaker runs/leads/base-…/checkpoint-0000130

Classifier-free guidance at several scales, everywhere and between two noise levels, and, with --weaker, autoguidance
(`ldm.guidance.autoguided`) by an earlier checkpoint of the same training, which the bundled model comes without: what
the judge finds right in samples of pairs trained on and held out, and their Fréchet distance to fresh drawings in its
features (benchmarks/leads.py). Finished points are kept in --out.
"""

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

import pipelines.text_to_image
from benchmarks.files import RESULTS, results_before, write_aside
from benchmarks.leads import painted
from benchmarks.packages import needs
from ldm.denoiser import Context, Denoise, Denoiser
from ldm.guidance import autoguided, classifier_free
from pipelines import TextToImagePipeline
from pipelines.folder import Model, load_model
from train.cache import weights_digest
from train.extractors import open_extractor
from train.launch import errors_said
from train.machine import described
from train.samples import model_digest

METRICS = ("train_object", "held_out_object", "held_out_object_nats", "held_out_style", "distance")


@dataclass(frozen=True)
class Options:
    judge: Path  # a run of train/recogniser.py --preset pictograms
    model: str = "bundled"
    weaker: Path | None = None  # an earlier checkpoint, or a smaller model of the same latents and contexts
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0)
    interval: tuple[float, float] = (0.3, 6.0)  # noise levels
    steps: int | None = None  # by default the model's own
    prompts: int = 200  # pairs that were trained on, and as many held out
    seeds: tuple[int, ...] = (1, 2)  # of the noises; points and their spread are over these
    out: Path = RESULTS / "guides.json"


@contextmanager
def guided_by(weaker: Model) -> Iterator[None]:
    """Inside, pipelines guide by a weaker model, which is told the same, instead of by what is told nothing."""

    def guide(denoiser: Denoiser, cond: Context, _: Context, scale: float, **options: Any) -> Denoise:
        assert not any(options.values()), f"{options} would be left out"
        return autoguided(told(denoiser, cond), told(weaker.denoiser, cond), scale)

    def told(denoiser: Denoiser, cond: Context) -> Denoise:
        return lambda x, sigma: denoiser(x, sigma, cond)

    pipelines.text_to_image.classifier_free = guide
    try:
        yield
    finally:
        pipelines.text_to_image.classifier_free = classifier_free


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(METRICS), 3), layout="constrained")
    axes = figure.subplots(1, len(METRICS))
    for axis, metric in zip(axes, METRICS, strict=True):
        for guide in dict.fromkeys(row["guide"] for row in rows):
            mine = [row for row in rows if row["guide"] == guide]
            scales = sorted({row["scale"] for row in mine})
            found = [[row[metric] for row in mine if row["scale"] == scale] for scale in scales]
            middle = [statistics.mean(some) for some in found]
            spread = [(max(some) - min(some)) / 2 for some in found]
            axis.errorbar(scales, middle, spread, fmt="o-", markersize=4, capsize=2, label=guide)
        axis.set(title=metric.replace("_", " "), xlabel="scale")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main(options: Options) -> list[dict[str, Any]]:
    needs("matplotlib")
    pipe = TextToImagePipeline.from_pretrained(options.model)
    weaker = load_model(options.weaker, device=pipe.device, dtype=pipe.dtype) if options.weaker else None
    everywhere = (0.0, float("inf"))
    kinds: dict[str, dict[str, Any]] = {"null": {"guidance_interval": everywhere}}
    low, high = options.interval
    kinds[f"null, {low:g} < sigma <= {high:g}"] = {"guidance_interval": options.interval}
    if weaker:
        kinds[f"weaker model {weights_digest(weaker.unet)[:8]}"] = {"guidance_interval": everywhere}
    settings: dict[str, Any] = {"weights": model_digest(pipe), "judge": open_extractor(str(options.judge)).digest}
    defaults = pipe.model.defaults
    settings |= {"steps": options.steps or defaults.steps, "sampler": defaults.sampler, "prompts": options.prompts}
    rows = results_before(options.out, settings)
    points = [(guide, scale, seed) for guide in kinds for scale in options.scales for seed in options.seeds]
    done = {(row["guide"], row["scale"], row["seed"]) for row in rows}
    for guide, scale, seed in (point for point in points if point not in done):
        alike = [row for row in rows if (row["scale"], row["seed"]) == (scale, seed)]
        if scale == 1 and alike:  # whatever would guide: nothing does
            found = alike[0]
        else:
            with guided_by(weaker) if weaker and guide.startswith("weaker") else nullcontext():
                call = kinds[guide] | {"guidance_scale": scale, "steps": options.steps}
                found = painted(pipe, options.judge, options.prompts, seed=seed, **call)
        rows.append({**found, "guide": guide, "scale": scale, "seed": seed})
        print(guide, scale, seed, ", ".join(f"{metric} {found[metric]:.3g}" for metric in METRICS))
        write_aside(options.out, {"settings": settings, "machine": described(), "rows": rows})
    plot(rows, options.out.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    with errors_said():
        main(tyro.cli(Options))
