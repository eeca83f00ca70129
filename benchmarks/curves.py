"""Quality against cost, side by side: where a curve reaches another's end, and pictures of both."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DISTANCES = ("fid", "frechet")  # as `train.measure` calls them: on the features of FID's own Inception, and on others
SHOWN = 3  # samples of a class of each side on the sheet


def reached(costs: Sequence[float], distances: Sequence[float], level: float) -> tuple[float, bool] | None:
    """The cost at which a curve first comes down to a level, on straight lines between its points on log axes; whether
    it had come there before its first point, so that it may be less. None: never."""
    for i, (cost, distance) in enumerate(zip(costs, distances, strict=True)):
        if distance <= level:
            if i == 0:
                return cost, distance < level
            share = math.log(distances[i - 1] / level) / math.log(distances[i - 1] / distance)
            return costs[i - 1] * (cost / costs[i - 1]) ** share, False
    return None


def curve(rows: Sequence[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    """A side's distances to the test set, in the order of its training, of the first seed."""
    mine = [row for row in rows if (row["side"], row["reference"]) == (side, "test") and row["metric"] in DISTANCES]
    return [row for row in mine if row["seed"] == mine[0]["seed"]]


def verdicts(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> list[dict[str, Any]]:
    """Of each side against the first: its distance in the end, and the arithmetic at which it reached the other's."""
    found, last = [], curve(rows, sides[0])[-1]
    for side in sides[1:]:
        points = curve(rows, side)
        there = reached([p["gflop"] for p in points], [p["value"] for p in points], last["value"])
        verdict = {"side": side, "baseline": sides[0], "ratio_of_distances": points[-1]["value"] / last["value"]}
        verdict |= {"minutes": points[-1]["minutes"], "baseline_minutes": last["minutes"]}
        verdict |= {"gflop_at_the_baselines_distance": there and there[0], "baseline_gflop": last["gflop"]}
        verdict |= {"ratio_of_arithmetic": there and there[0] / last["gflop"], "at_most": bool(there and there[1])}
        found.append(verdict)
    return found


def said(verdict: dict[str, Any]) -> str:
    text = f"{verdict['side']} after {verdict['minutes']:.1f} minutes: {verdict['ratio_of_distances']:.3f} times the "
    text += f"distance of {verdict['baseline']} after {verdict['baseline_minutes']:.1f}; reaches that distance "
    if verdict["ratio_of_arithmetic"] is None:
        return text + "at no checkpoint"
    most = "at most " if verdict["at_most"] else ""
    return text + (
        f"with {most}{verdict['gflop_at_the_baselines_distance']:,.0f} of {verdict['baseline_gflop']:,.0f} GFLOP, "
        f"{most}{verdict['ratio_of_arithmetic']:.3f} times the arithmetic"
    )


def plot(rows: Sequence[dict[str, Any]], sides: dict[str, str], floor: float, samples: int, file: Path) -> None:
    """sides: what each is called there."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, x, unit, label in zip(
        axes, ("minutes", "gflop"), (1, 1000), ("minutes of training", "TFLOP spent in training"), strict=True
    ):
        for side, name in sides.items():
            points = curve(rows, side)
            axis.plot([p[x] / unit for p in points], [p["value"] for p in points], "o-", markersize=4, label=name)
        axis.axhline(floor, color="grey", linestyle=":", label=f"{samples} real training pictures")
        axis.set(xlabel=label, yscale="log")
        axis.set_xlim(left=0)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=6)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("Fréchet distance")
    axes[0].legend(fontsize=7)
    figure.suptitle(
        f"{curve(rows, next(iter(sides)))[0]['name']}, to the test set; {samples} samples of each point", fontsize=8
    )
    figure.savefig(file, dpi=110)


def sheet(folders: dict[str, Path], file: Path) -> None:
    """The first samples of each class, of every side the same ones."""
    from PIL import Image

    from train.grid import grid

    rows = []
    for folder in folders.values():  # the prompts of a side that has some
        if not rows and (folder / "metadata.jsonl").is_file():
            rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    classes = sorted({row["text"] for row in rows})
    chosen = [[row["file_name"] for row in rows if row["text"] == name][:SHOWN] for name in classes]
    shown = min(map(len, chosen), default=0)
    names = [names[i] for i in range(shown) for names in chosen]
    pictures = [Image.open(folder / name).convert("RGB") for folder in folders.values() for name in names]
    told = {side: (folder / "metadata.jsonl").is_file() for side, folder in folders.items()}
    captions = [f"{s}: {text}" if told[s] else s for s in folders for _ in range(shown) for text in classes]
    if pictures:
        grid(pictures, captions, columns=len(classes)).save(file)
