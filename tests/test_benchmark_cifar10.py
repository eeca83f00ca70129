"""The comparison at equal time: what is counted, what is kept, and what it comes to."""

import csv
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train.ldm
from ldm.pixel_unet import PixelUNetConfig
from pipelines.files import checkpoints, save_network
from tests.sets import png, write_parquet
from tests.training import COLOURS, UNET, Killed, kill_at
from train.presets import PRESETS
from train.recogniser_model import Recogniser, RecogniserConfig
from train.set_presets import PHOTOS

cifar10, curves, timed = (importlib.import_module(f"benchmarks.{name}") for name in ("cifar10", "curves", "timed"))
pytestmark = pytest.mark.usefixtures("in_process", "own_datasets_cache")
CAPTIONS = [f"a photo of something {colour}" for colour in COLOURS[:4]]
MEASURED = (1, 4, 8)  # of 8 updates
REFERENCES = ["test", "train", "validation"]


def in_turn(jobs: dict[str, tuple], places: Any, logs: Path) -> dict[str, Any]:
    """`together`, in this process."""
    return {name: function(*arguments) for name, (function, *arguments) in jobs.items()}


@pytest.fixture
def options(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.manual_seed(0)
    network = Recogniser(RecogniserConfig(tasks=(("class", tuple(sorted(CAPTIONS))),), sample_size=9, widths=(8, 6)))
    network(torch.randn(64, 3, 9, 9))
    save_network(network, tmp_path / "recogniser")
    for name, count in (("train", 40), ("test", 12)):
        images = [{"bytes": png(COLOURS[i % 4], (8, 8)), "path": None} for i in range(count)]
        write_parquet(tmp_path / f"{name}.parquet", image=images, text=[CAPTIONS[i % 4] for i in range(count)])
    small = replace(PHOTOS, size=8, batch_size=4, updates=8, warmup=1, steps=2, mixed_precision=None)
    network = PixelUNetConfig(block_out_channels=(4, 4), layers_per_block=(1, 1), attention_heads=(0, 0))
    unet = replace(UNET, block_out_channels=(8, 8))
    monkeypatch.setitem(PRESETS, "slow", replace(small, text_encoder="labels", unet=network, steps=3))
    monkeypatch.setitem(PRESETS, "quick", replace(small, text_encoder=str(model_folder), unet=unet))
    monkeypatch.setattr(cifar10, "together", in_turn)
    monkeypatch.setattr(cifar10, "EIGHTHS", MEASURED)
    places = {key: str(tmp_path / name) for key, name in (("data", "train.parquet"), ("test", "test.parquet"))}
    places["extractor"] = str(tmp_path / "recogniser")
    few: dict[str, Any] = {"sides": ("slow", "quick"), "minutes": 0.0, "samples": 6, "batch": 4, "seeds": (5, 6)}
    few["precision"] = "no"
    return cifar10.Options(**places, **few, out=tmp_path / "found", work=tmp_path / "work")


def test_both_sides_are_measured_alike_and_nothing_is_done_twice(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10.main(options)
    text = options.out.with_name("found.json").read_text()
    told = json.loads(text)
    rows = told["rows"]
    assert {row["samples"] for row in rows} == {6}
    assert {row["metric"] for row in rows} == {"frechet", "kernel", "class accuracy"}
    for side in options.sides:
        points = curves.curve(rows, side)
        assert [point["update"] for point in points] == list(MEASURED)
        assert [point["pictures_seen"] for point in points] == [4 * update for update in MEASURED]
        minutes = [point["minutes"] for point in points]
        assert minutes == sorted(set(minutes))
        assert minutes[0] > 0
        assert [point["gflop"] / point["update"] for point in points] == pytest.approx([points[0]["gflop"]] * 3)
        last = [r["reference"] for r in rows if (r["side"], r["metric"], r["update"]) == (side, "frechet", 8)]
        assert last == REFERENCES * 2
        values = [r["value"] for r in rows if (r["side"], r["metric"], r["update"]) == (side, "frechet", 8)]
        assert len(set(values)) == 6  # of two seeds
    assert [told["sides"][side]["evaluations"] for side in options.sides] == [2 * 3, 2 * 2]  # guidance counted
    assert list(told["floor"]) == REFERENCES
    ends = [curves.curve(rows, side)[-1]["value"] for side in options.sides]
    assert told["verdicts"][0]["ratio_of_distances"] == ends[1] / ends[0]
    painted = sorted(options.work.glob("*/samples-*/samples/*.png"))
    assert len(painted) == 2 * (3 + 1) * 6  # at the end with another seed, too
    asked = {file.read_text() for file in options.work.glob("*/samples-*/samples/metadata.jsonl")}
    assert len(asked) == 2  # of each seed: both sides and all checkpoints the same
    with open(options.out.with_name("found.csv"), encoding="utf-8") as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [row["value"] for row in rows]
    for ending in (".png", "_samples.png"):
        assert options.out.with_name(f"found{ending}").stat().st_size > 1000

    before = {file: file.stat().st_mtime_ns for file in [*painted, *options.work.glob("*/run/checkpoint-*")]}
    monkeypatch.delattr(train.ldm, "main")
    cifar10.main(options)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert options.out.with_name("found.json").read_text() == text


def test_a_judge_of_other_words_is_not_asked_what_is_right(options: Any, tmp_path: Path) -> None:
    data = cifar10.prepare(options)
    some = {name: data[name] for name in ("test", "train")}
    found = cifar10.judge(options, data["real"], some, tmp_path / "known")
    for metrics in found["metrics"].values():
        assert [one["metric"] for one in metrics] == ["frechet", "kernel", "class accuracy"]
    network = Recogniser(RecogniserConfig(tasks=(("class", tuple(COLOURS[:4])),), sample_size=9, widths=(8, 6)))
    save_network(network, tmp_path / "other")  # of the same classes, by other names
    other = replace(options, extractor=str(tmp_path / "other"))
    found = cifar10.judge(other, data["real"], some, tmp_path / "unknown")
    assert [one["metric"] for one in found["metrics"]["test"]] == ["frechet", "kernel"]


@pytest.fixture
def side(options: Any) -> Any:
    return cifar10.sides_of(replace(options, sides=("slow",)), cifar10.prepare(options)["train"], [None])[0]


def test_time_goes_on_where_a_killed_training_was(side: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "times.json"
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            timed.learn(side.config, file)
    before = json.loads(file.read_text())["seconds"]
    assert list(before) == ["1", "2", "3", "4", "5"]
    found = timed.learn(side.config, file)
    seconds = list(found["seconds"].values())
    assert found["seconds"].items() > before.items()
    assert seconds == sorted(seconds)
    assert len(seconds) == len(checkpoints(side.config.output)) == 8


def test_time_beside_the_updates_is_left_out(side: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second with each update and by a hundred with each checkpoint."""
    now = 0.0

    def slower(function: Callable[..., Any], by: float) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += by
            return function(*arguments, **options)

        return called

    monkeypatch.setattr(timed.time, "perf_counter", lambda: now)
    monkeypatch.setattr(train.ldm, "draw_batch", slower(train.ldm.draw_batch, 1))
    monkeypatch.setattr(train.ldm, "save_checkpoint", slower(train.ldm.save_checkpoint, 100))
    monkeypatch.setattr(train.meter, "matrix_rate", lambda *_: 1.0)  # which no time passes for
    found = timed.learn(side.config, tmp_path / "times.json")
    assert found["seconds"] == {str(update): update for update in range(1, 9)}
    assert timed.calibrate(replace(side.config, output=tmp_path / "calibration"), 3.0) == 4  # pictures an update


def test_a_rate_gives_updates_that_fill_the_time_and_stays(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cifar10.prepare(options)["train"]
    asked: list[str] = []

    def rated(jobs: dict[str, tuple], places: Any, logs: Path) -> dict[str, float]:
        asked.extend(jobs)
        return dict.fromkeys(jobs, 10.0)

    monkeypatch.setattr(cifar10, "together", rated)
    for _ in range(2):
        sides = cifar10.sides_of(replace(options, minutes=2), data, [None])
        assert [side.config.updates for side in sides] == [8 * round(2 * 60 * 10 / 4 / 8)] * 2
        assert all(side.config.checkpoint_every * 8 == side.config.updates for side in sides)
    assert asked == ["calibrating slow", "calibrating quick"]
    with pytest.raises(ValueError, match="leave no 8 updates to slow"):
        cifar10.sides_of(replace(options, minutes=0.001), data, [None])
    monkeypatch.setitem(PRESETS, "latent", replace(PRESETS["quick"], vae="runs/vae"))
    latent = replace(options, sides=("latent",), minutes=2)
    (counted,) = cifar10.sides_of(replace(latent, autoencoder=(1.0, 3.0)), data, [None])
    assert counted.config.updates == 8 * round(60 * 10 / 4 / 8)
    assert (counted.minutes, counted.gflop) == (1.0, 3000.0)
    alone = cifar10.sides_of(replace(options, sides=("slow",), minutes=2), data, [None])
    assert asked[-1] == "calibrating slow"  # its rate beside another side is another one
    assert alone[0].folder != sides[0].folder


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sides": ("slowest",)}, "not slowest"),
        ({"sides": ("slow", "slow")}, "expected each once"),
        ({"updates": (8,)}, "a number for each of --sides"),
        ({"sides": ("latent",)}, "--autoencoder MINUTES TFLOP"),
        ({"minutes": 2, "sides": ("slow", "quick", "cifar10")}, "3 --sides on 2 cores: .* Expected 2 at most"),
        ({"samples": 3}, "--samples 3: expected 4 or more"),
        ({"extractor": "nowhere"}, "'nowhere': expected inception"),
    ],
)
def test_what_is_wrong_is_said_before_the_hours(
    options: Any, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], said: str
) -> None:
    monkeypatch.setitem(PRESETS, "latent", replace(PRESETS["quick"], vae="runs/vae"))
    cifar10.check(options, 2)
    cifar10.check(replace(options, minutes=2), 8)  # a core each, as many as there are
    with pytest.raises(ValueError, match=said):
        cifar10.check(replace(options, **changed), 2)


def test_all_sides_compute_alike(options: Any) -> None:
    data = cifar10.prepare(options)["train"]
    sides = cifar10.sides_of(replace(options, precision="bf16"), data, [None])
    assert [side.config.mixed_precision for side in sides] == ["bf16", "bf16"]


def test_data_that_is_not_there_is_named(options: Any) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.parquet.*uoft-cs/cifar10"):
        cifar10.prepare(replace(options, data="nowhere.parquet"))


@pytest.mark.parametrize(
    ("level", "expected"),
    [(10.0, (100.0, False)), (50.0, (2.0, False)), (100.0, (1.0, False)), (200.0, (1.0, True)), (9.0, None)],
)
def test_where_a_curve_reaches_a_level(level: float, expected: tuple[float, bool] | None) -> None:
    found = curves.reached([1, 4, 100], [100, 25, 10], level)  # distance = 100 / cost at first: 50 at a cost of 2
    assert found == (expected and (pytest.approx(expected[0]), expected[1]))


def test_verdicts_of_known_curves() -> None:
    def rows(side: str, points: list[tuple[float, float]]) -> list[dict[str, Any]]:
        common = {"side": side, "reference": "test", "metric": "frechet", "seed": 3}
        return [common | {"gflop": g, "minutes": 2 * g, "value": v} for g, v in points]

    every = rows("slow", [(10, 90), (100, 40)]) + rows("quick", [(5, 160), (20, 10)]) + rows("other", [(5, 70)])
    every += [every[0] | {"reference": "train", "value": 1}, every[0] | {"metric": "kernel", "value": 1}]
    every.append(every[1] | {"seed": 4, "value": 1})  # the spread is no point of the curve
    quick, other = curves.verdicts(every, ["slow", "quick", "other"])
    assert quick["ratio_of_distances"] == 0.25
    assert quick["gflop_at_the_baselines_distance"] == pytest.approx(10)
    assert quick["ratio_of_arithmetic"] == pytest.approx(0.1)
    assert (quick["minutes"], quick["baseline_minutes"], quick["at_most"]) == (40, 200, False)
    assert (other["ratio_of_distances"], other["ratio_of_arithmetic"]) == (1.75, None)


def test_processes_have_a_core_each_and_say_what_failed(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    jobs: dict[str, tuple] = {"one": (os.getpid,), "two": (os.getpid,)}
    if core is not None:
        jobs["three"] = (os.sched_getaffinity, 0)
    found = timed.together(jobs, [core, core], tmp_path)
    assert list(found) == list(jobs)
    assert len({found["one"], found["two"], os.getpid()}) == 3
    assert core is None or found["three"] == {core}
    with pytest.raises(ValueError, match="bad: invalid literal for int"):
        timed.together({"bad": (int, "x")}, [None], tmp_path)
    with pytest.raises(ValueError, match="gone: ended without a result"):
        timed.together({"gone": (os._exit, 3)}, [None], tmp_path)
