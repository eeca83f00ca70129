"""Quality against what it costs, a curve each:

    python benchmarks/quality.py evaluations runs/mnist --reference mnist-test.parquet --extractor runs/mnist-recogniser
    python benchmarks/quality.py guidance    runs/mnist …
    python benchmarks/quality.py training    runs/mnist …          trained with --keep 100: its checkpoints
    python benchmarks/quality.py size        runs/small runs/large …

`evaluations` asks every sampler for about as many evaluations of the network, guidance counted; the others take the
model's own sampler, steps and guidance unless they are given. Every point is `train.measure.measure`, on as many
samples as every other, with the same prompts and seeds; with several --seeds the mean is drawn, and the least and most.
Writes OUT.json (settings, machine, all numbers), OUT.csv and OUT.png; what was painted is kept in --work, so that a run
that was killed goes on there.
"""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from benchmarks.curves import DISTANCES
from benchmarks.files import RESULTS
from benchmarks.packages import needs
from train.launch import errors_said
from train.machine import described

LABELS = {
    "evaluations": "evaluations of the network for a picture",
    "guidance": "guidance scale",
    "pictures_seen": "pictures trained on",
    "parameters": "parameters of the U-Net",
}
X = {"evaluations": "evaluations", "guidance": "guidance", "training": "pictures_seen", "size": "parameters"}


@dataclass(frozen=True)
class Options:
    along: tyro.conf.Positional[Literal["evaluations", "guidance", "training", "size"]]
    models: tyro.conf.Positional[tuple[str, ...]]  # model folders or runs
    reference: str
    extractor: str
    metrics: str = "fid"  # as of `atelier evaluate`, but for bpd
    template: str = ""  # makes the captions of the reference
    lora: tuple[str, ...] = ()  # merged into every model
    lora_weight: tuple[float, ...] = (1.0,)
    samples: int = 1000  # of each point
    seeds: tuple[int, ...] = (0,)
    samplers: tuple[str, ...] = ("euler", "heun", "dpmpp_2m", "unipc", "ddpm")  # of evaluations
    evaluations: tuple[int, ...] = (4, 8, 16, 32, 64)  # about: a sampler takes whole steps; those of guidance double
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)  # of guidance
    sampler: str | None = None  # of the other curves, as `steps` and `guidance`; None: the model's own
    steps: int | None = None
    guidance: float | None = None
    batch: int = 50
    out: str = ""  # without ending; "": results/quality_CURVE_MODEL
    work: Path = Path("runs/quality")
    cache: Path = Path("cache")
    workers: int = 2


@dataclass(frozen=True)
class Point:
    """A model, and how it paints."""

    model: str
    sampler: str | None
    steps: int | None
    guidance: float | None


def count_evaluations(pipe: Any, point: Point) -> int:
    """Of the network, for one picture: a guided step has two."""
    rows = 0

    def note(_: Any, given: tuple, named: dict) -> None:
        nonlocal rows
        rows += len(given[0] if given else named["sample"])

    hook = pipe.model.unet.register_forward_pre_hook(note, with_kwargs=True)
    names = getattr(pipe.model.conditioner, "names", ("a picture",))
    try:
        options = {"steps": point.steps, "sampler": point.sampler, "guidance_scale": point.guidance}
        pipe([names[0] if pipe.model.is_told else ""], seed=0, output_type="latent", **options)
    finally:
        hook.remove()
    return rows


def steps_for(pipe: Any, sampler: str, wanted: int, guidance: float | None) -> int | None:
    """The steps with which a sampler has about as many evaluations; None where it has far more with the fewest."""
    few, more = (count_evaluations(pipe, Point("", sampler, steps, guidance)) for steps in (4, 6))
    each = (more - few) / 2
    steps = max(1, round(4 + (wanted - few) / each))
    while steps > 1 and count_evaluations(pipe, Point("", sampler, steps, guidance)) > 1.25 * wanted:
        steps -= 1
    return steps if count_evaluations(pipe, Point("", sampler, steps, guidance)) <= 1.5 * wanted else None


def points_of(options: Options, pipe: Any, model: str) -> list[Point]:
    if options.along == "evaluations":
        found = []
        for sampler in options.samplers:
            every = [steps_for(pipe, sampler, wanted, options.guidance) for wanted in options.evaluations]
            if few := [n for n, steps in zip(options.evaluations, every, strict=True) if steps is None]:
                print(f"{sampler} is left out at {', '.join(map(str, few))} evaluations: with one step it has far more")
            found += [Point(model, sampler, steps, options.guidance) for steps in dict.fromkeys(every) if steps]
        return found
    if options.along == "guidance":
        return [Point(model, options.sampler, options.steps, scale) for scale in options.scales]
    return [Point(model, options.sampler, options.steps, options.guidance)]


def pictures_seen(folder: Path) -> int | None:
    """By a checkpoint; None for a folder that says nothing of its training."""
    import torch

    file = folder / "training" / "state.pt"
    if not file.is_file():
        return None
    state = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    return int(state["update"]) * int(state.get("global_batch", 0)) or None


def is_asked(metric: str, metrics: str) -> bool:
    """Whether a number of `train.measure`, which has names of its own on other features, is one of --metrics."""
    name = {"frechet": "fid", "kernel": "kid"}.get(metric, metric.rpartition(" ")[2])
    return name in metrics.replace(" ", "").split(",")


def measured(options: Options) -> Iterator[list[dict[str, Any]]]:
    """A row for each point, seed and metric: after each point, all of them so far."""
    from pipelines.files import checkpoints, newest
    from pipelines.find import find_model
    from train.measure import Measuring, measure
    from train.pictures import digest
    from train.samples import Painting, model_digest, open_painter

    models = list(options.models)
    if options.along == "training":
        models = [str(folder) for run in models for folder in checkpoints(Path(run)) or [Path(run)]]
    rows = []
    for model in models:
        pipe = open_painter(model, options.lora, options.lora_weight)
        about: dict[str, Any] = {"model": model, "parameters": sum(p.numel() for p in pipe.model.unet.parameters())}
        about["pictures_seen"] = pictures_seen(newest(find_model(model)))
        if options.along == "guidance" and not pipe.model.is_told:
            raise ValueError(f"{model} is told nothing, and there is no guidance to vary")
        for point in points_of(options, pipe, model):
            about |= asdict(point) | {"evaluations": count_evaluations(pipe, point)}
            for seed in options.seeds:
                painting = Painting(point.steps, point.guidance, None, point.sampler, seed, options.batch)
                known = (model_digest(pipe), repr(pipe.model.defaults), options.reference, options.template)
                name = digest(*known, repr(painting))
                how = Measuring(
                    model,
                    options.reference,
                    options.metrics,
                    options.extractor,
                    template=options.template,
                    samples=options.samples,
                    painting=painting,
                    out=options.work / name,
                    cache=options.cache,
                    workers=options.workers,
                )
                result = measure(how, pipe)
                about |= {name: result["painted"][name] for name in ("sampler", "steps", "guidance")}  # its own, too
                common = {"samples": result["samples"], "extractor": result["extractor"]["hash"]}
                common["reference"] = result["reference"]["hash"]
                asked = [one for one in result["metrics"] if is_asked(one["metric"], options.metrics)]
                for found in asked:  # and not what an earlier call asked for, too
                    numbers = {"metric": found["metric"], "name": found["name"], "value": found["value"]}
                    rows.append(about | {"seed": seed} | numbers | common)
            yield rows


def line_of(row: dict[str, Any], along: str) -> str:
    """The line that a point is on: a model with a sampler, or a run, where its checkpoints lie along the curve."""
    if along == "training":
        return str(Path(row["model"]).parent)
    named = {"evaluations": ("model", "sampler"), "guidance": ("model", "sampler")}.get(along, ())
    return ", ".join(str(row[name]) for name in named if row.get(name))


def check(options: Options) -> None:
    """ValueError for what would be found out only after the first points were painted."""
    if not options.models or not options.seeds:
        raise ValueError("expected one model and one seed at least: quality.py CURVE MODEL… --reference … --seeds 0")
    if "bpd" in options.metrics.replace(" ", "").split(","):
        raise ValueError("--metrics bpd hangs on no sampler, steps or guidance: atelier evaluate MODEL --metrics bpd")
    needs("matplotlib")


def plot(rows: Sequence[dict[str, Any]], along: str, file: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    x, metrics = X[along], list(dict.fromkeys(row["metric"] for row in rows))
    figure = Figure(figsize=(6 * len(metrics), 4.2), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        chosen = [row for row in rows if row["metric"] == metric and None not in (row[x], row["value"])]
        for name in dict.fromkeys(line_of(row, along) for row in chosen):
            by_x: dict[float, list[float]] = {}
            for row in chosen:
                if line_of(row, along) == name:
                    by_x.setdefault(row[x], []).append(row["value"])
            places = sorted(by_x)
            middle = [sum(by_x[p]) / len(by_x[p]) for p in places]
            spread = [[m - min(by_x[p]) for p, m in zip(places, middle, strict=True)],
                      [max(by_x[p]) - m for p, m in zip(places, middle, strict=True)]]  # fmt: skip
            several = any(len(values) > 1 for values in by_x.values())  # of one seed there is no spread to show
            bars = {"yerr": spread, "capsize": 3} if several else {}
            axis.errorbar(places, middle, fmt="o-", markersize=4, label=name or None, **bars)
        axis.set(xlabel=LABELS[x], title=chosen[0]["name"] if chosen else metric)
        axis.title.set_fontsize(8)
        if along != "guidance":
            axis.set_xscale("log")
            places = []
            for place in sorted({row[x] for row in chosen}):
                if not places or place > 1.1 * places[-1]:  # labels would lie on one another
                    places.append(place)
            axis.set_xticks(places, [f"{place:,}" for place in places], fontsize=6, rotation=45)
            axis.set_xticks([], minor=True)
        if metric in DISTANCES:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(axis="y", which="minor", labelsize=6)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    columns = {
        name: {row[name] for row in rows} for name in ("model", "sampler", "steps", "guidance", "seed", "samples")
    }
    alike = [
        f"{name} {next(iter(values))}" for name, values in columns.items() if len(values) == 1 and None not in values
    ]
    figure.suptitle(f"of every point: {', '.join(alike)}", fontsize=8)
    figure.savefig(file, dpi=110)


def main(options: Options) -> None:
    check(options)
    first = Path(options.models[0]).name
    out = Path(options.out) if options.out else RESULTS / f"quality_{options.along}_{first}"
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        name: value for name, value in asdict(options).items() if name not in ("work", "cache", "workers", "out")
    }
    said: dict[str, Any] = {"settings": settings, "machine": described()}
    rows: list[dict[str, Any]] = []
    for rows in measured(options):  # written at once: what fails later costs no point
        out.with_name(out.name + ".json").write_text(json.dumps(said | {"rows": rows}, indent=2) + "\n")
        with open(out.with_name(out.name + ".csv"), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, options.along, out.with_name(out.name + ".png"))
    print(f"{len(rows)} numbers in {out}.json, .csv and .png")


if __name__ == "__main__":
    with errors_said():
        main(tyro.cli(Options))
