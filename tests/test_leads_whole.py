"""benchmarks/leads.py and guides.py from beginning to end, on a handful of objects and pixels."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import train.ldm
import train.pictograms
from pipelines.files import save_network
from tests.test_drawn import needs_font
from train.pictograms import STYLES, things
from train.recogniser_model import Recogniser, RecogniserConfig

pytestmark = [pytest.mark.usefixtures("in_process"), needs_font]

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OBJECTS = ("apple", "fox", "whale", "house", "car")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The font has few objects, two of which have a pair that is held out."""
    known = {name: things()[name]._replace(everyday=True) for name in OBJECTS}
    monkeypatch.setattr(train.pictograms, "things", lambda: known)
    monkeypatch.setattr(train.pictograms, "held_out", lambda name, style: style == "oil" and name in ("fox", "car"))


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tasks = (("object", OBJECTS), ("style", tuple(STYLES)))
    network = Recogniser(RecogniserConfig(tasks=tasks, sample_size=17, widths=(8, 16)))
    network(torch.randn(64, 3, 17, 17))
    save_network(network, tmp_path / "judge")
    return tmp_path / "judge"


def test_leads_and_guides_from_beginning_to_end(
    few: None, judge: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leads = runpy.run_path(str(BENCHMARKS / "leads.py"))
    places = {"out": tmp_path / "leads.json", "work": tmp_path / "work", "cache": tmp_path / "cache"}
    vae = str(model_folder / "vae")
    sizes: dict[str, Any] = {"updates": 2, "batch": 4, "prompts": 4, "size": 16, "workers": 0}
    options = leads["Options"](vae, str(model_folder), judge, ("base@1", "aligned"), **sizes, **places)
    clip = lambda pictures: torch.stack([torch.from_numpy(p).float().mean((0, 1)) for p in pictures])  # noqa: E731
    opened = leads["open_extractor"]
    opening = lambda name: clip if name == str(model_folder) else opened(name)  # noqa: E731
    monkeypatch.setitem(leads["main"].__globals__, "open_extractor", opening)
    monkeypatch.setattr("benchmarks.twists.open_extractor", opening)
    leads["main"](options)
    said = json.loads(places["out"].read_text())
    assert [row["lead"] for row in said["rows"]] == ["base", "base@1", "aligned"]
    base, seed, _ = said["rows"]
    assert base["samples"] == base["train_prompts"] + base["held_out_prompts"] == 8
    assert base["held_out_object_nats"] < 0
    assert base["latents"] == [4, 4, 4]
    assert base["time"] == 1
    assert base["errors"] != seed["errors"]
    assert all(0 <= base[f"{split}_{task}"] <= 1 for split in ("train", "held_out") for task in ("object", "style"))
    assert places["out"].with_suffix(".png").is_file()

    # What is finished is not done again, and another lead joins it; other settings do not mix with these.
    monkeypatch.setattr(train.ldm, "main", lambda *_: pytest.fail("trained again"))
    leads["main"](options)
    assert json.loads(places["out"].read_text()) == said
    others = leads["Options"](vae, str(model_folder), judge, **(sizes | {"prompts": 5}), **places)
    with pytest.raises(ValueError, match="holds results of another prompts: give another --out"):
        leads["main"](others)
    assert json.loads(places["out"].read_text()) == said

    guides = runpy.run_path(str(BENCHMARKS / "guides.py"))
    monkeypatch.setitem(guides["main"].__globals__, "painted", leads["painted"])  # which knows the few objects
    model = leads["config_of"]("base", options).output
    call = {"model": str(model), "scales": (1.0, 2.0), "steps": 2, "prompts": 4, "out": tmp_path / "guides.json"}
    call["seeds"] = (1,)
    rows = guides["main"](guides["Options"](judge, **call))
    assert [row["scale"] for row in rows] == [1, 2, 1, 2]
    assert rows[0] == rows[2] | {"guide": "null"}
    more = guides["main"](guides["Options"](judge, weaker=model, **call))
    assert more[:4] == rows
    assert len(more) == 6
    assert more[5]["guide"].startswith("weaker model")
    assert more[5]["distance"] != rows[1]["distance"]
    assert more[5]["distance"] == pytest.approx(rows[0]["distance"])  # its own guide: no guidance
    assert (tmp_path / "guides.png").is_file()
