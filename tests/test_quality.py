"""The benchmark of quality: points that cost what they are said to cost, and files that hold every number."""

import csv
import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import TextToImagePipeline
from pipelines.files import save_network
from train.checkpoints import save_checkpoint
from train.recogniser_model import Recogniser, RecogniserConfig

pytestmark = pytest.mark.usefixtures("in_process")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quality() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "quality.py"))


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("sampler", "wanted"), [("euler", 8), ("heun", 8), ("dpmpp_2m", 20)])
def test_steps_have_about_the_evaluations_asked_for(
    quality: dict[str, Any], pipe: TextToImagePipeline, sampler: str, wanted: int
) -> None:
    steps = quality["steps_for"](pipe, sampler, wanted, None)
    found = quality["count_evaluations"](pipe, quality["Point"]("", sampler, steps, None))
    assert 0.7 * wanted <= found <= 1.25 * wanted
    single = quality["count_evaluations"](pipe, quality["Point"]("", sampler, steps, 1.0))
    assert found == 2 * single  # guidance is another evaluation
    assert single == (2 * steps - 1 if sampler == "heun" else steps)


@pytest.fixture(scope="module")
def options(quality: dict[str, Any], model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from PIL import Image

    folder = tmp_path_factory.mktemp("quality")
    torch.manual_seed(0)
    network = Recogniser(RecogniserConfig(tasks=(("class", ("a", "b")),), sample_size=9, widths=(8, 6)))
    network(torch.randn(64, 3, 9, 9))
    save_network(network, folder / "extractor")
    (folder / "reference").mkdir()
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (16, 16), colour).save(folder / "reference" / f"{i}.png")
        (folder / "reference" / f"{i}.txt").write_text(f"a {colour} circle")
    places = {"reference": str(folder / "reference"), "extractor": str(folder / "extractor")}
    few = {"samples": 4, "batch": 4, "workers": 0, "work": folder / "work", "cache": folder / "cache"}
    return quality["Options"]("guidance", (str(model_folder),), **places, **few, scales=(1.0, 3.0), steps=2)


def test_a_curve_and_its_files(quality: dict[str, Any], options: Any, tmp_path: Path) -> None:
    quality["main"](replace(options, seeds=(0, 1), metrics="fid,kid", out=str(tmp_path / "curve")))
    said = json.loads((tmp_path / "curve.json").read_text())
    rows = said["rows"]
    assert [(row["guidance"], row["seed"], row["metric"]) for row in rows] == [
        (scale, seed, metric) for scale in (1.0, 3.0) for seed in (0, 1) for metric in ("frechet", "kernel")
    ]
    assert {row["evaluations"] for row in rows if row["guidance"] == 1} == {2}
    assert said["settings"]["samples"] == 4
    with open(tmp_path / "curve.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["value"]) for row in table] == [row["value"] for row in rows]
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_every_model_and_sampler_has_a_line_of_its_own(quality: dict[str, Any]) -> None:
    rows = [{"model": m, "sampler": s} for m in ("one", "two") for s in ("euler", "heun")]
    assert len({quality["line_of"](row, "evaluations") for row in rows}) == 4
    runs = [{"model": f"runs/{run}/checkpoint-{n}", "sampler": None} for run in "ab" for n in (1, 2)]
    assert {quality["line_of"](row, "training") for row in runs} == {"runs/a", "runs/b"}
    assert quality["line_of"](runs[0], "size") == ""


@pytest.mark.parametrize(
    ("metric", "metrics", "asked"),
    [
        ("frechet", "fid", True),
        ("kernel", "fid, kid", True),
        ("kernel", "fid", False),
        ("fid", "kid,fid", True),
        ("style accuracy", "fid,accuracy", True),
        ("style accuracy", "fid", False),
    ],
)
def test_numbers_of_other_features_go_by_the_names_that_were_asked_for(
    quality: dict[str, Any], metric: str, metrics: str, asked: bool
) -> None:
    assert quality["is_asked"](metric, metrics) == asked


def test_what_can_not_be_drawn_is_said_first(quality: dict[str, Any], options: Any, tmp_path: Path) -> None:
    options = replace(options, work=tmp_path / "work")
    with pytest.raises(ValueError, match="bpd hangs on no sampler"):
        quality["main"](replace(options, metrics="fid,bpd"))
    with pytest.raises(ValueError, match="one model and one seed at least"):
        quality["main"](replace(options, models=()))
    assert not options.work.exists()


def test_along_the_checkpoints_of_a_run(
    quality: dict[str, Any], options: Any, pipe: TextToImagePipeline, tmp_path: Path
) -> None:
    from pipelines.folder import save_model

    run = tmp_path / "run"
    for update in (10, 30):
        state = {"global_batch": 8}
        save_checkpoint(run, update, lambda f: save_model(pipe.model, f), state, options)
    *_, rows = quality["measured"](replace(options, along="training", models=(str(run),)))
    assert [row["pictures_seen"] for row in rows] == [80, 240]
    assert rows[0]["value"] == rows[1]["value"]  # the same weights
    *_, size = quality["measured"](replace(options, along="size"))
    assert size[0]["parameters"] == sum(p.numel() for p in pipe.model.unet.parameters())
    assert size[0]["pictures_seen"] is None


def test_distances_of_known_faults(options: Any, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "set").mkdir()
    for i in range(48):
        colour = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (9, 9), colour).save(tmp_path / "set" / f"{i}.png")
        (tmp_path / "set" / f"{i}.txt").write_text(colour)
    distances = runpy.run_path(str(ROOT / "benchmarks" / "distances.py"))
    asked = distances["Options"](
        str(tmp_path / "set"), str(tmp_path / "set"), options.extractor, count=48, levels=(1.0, 60.0), without="red"
    )
    asked = replace(asked, out=tmp_path / "distances.json", cache=tmp_path / "cache")
    found = distances["main"](asked)
    assert abs(found["48 pictures"]) < 1e-3  # of a set to itself
    assert found["without 'red'"] > 10 * abs(found["48 pictures"])
    assert found["noise of 60"] > found["noise of 1"] > abs(found["48 pictures"])
    assert json.loads(asked.out.read_text())["distances"] == found
    with pytest.raises(ValueError, match="blue, green, red: leaving out those of 'pink'"):
        distances["main"](replace(asked, without="pink"))
