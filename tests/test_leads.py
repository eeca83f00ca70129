"""The benchmarks of recipes and of new things: each change does what it says and only inside; 20 pictures are 20."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import train.ldm
from pipelines import TextToImagePipeline
from pipelines.files import load_autoencoder, save_network
from pipelines.folder import load_model
from train.pictograms import GROUNDS, STYLES, things
from train.recogniser_model import Recogniser, RecogniserConfig
from train.settings import Config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def leads() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "leads.py"))


@pytest.fixture(scope="module")
def options(leads: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return leads["Options"]("bundled", "bundled", Path("nowhere"), work=tmp_path_factory.mktemp("leads"))


def test_every_lead_is_one_change_of_the_base(leads: dict[str, Any], options: Any) -> None:
    base = leads["config_of"]("base", options)
    twisted = 0
    for name, lead in leads["LEADS"].items():
        config = leads["config_of"](name, options)  # which refuses settings that make no sense
        checkpoints = {"checkpoint_every": base.checkpoint_every, "keep": base.keep}  # the base has more of them
        config = replace(config, **checkpoints)
        same = replace(config, output=base.output, **{key: getattr(base, key) for key in lead.changes})
        assert same == base
        plain = lead.twist is leads["as_it_is"]
        twisted += not plain
        assert (config == replace(base, output=config.output)) == (not plain or name == "base")
    assert twisted >= 3


def test_another_autoencoder_is_a_lead(leads: dict[str, Any], options: Any, model_folder: Path, tmp_path: Path) -> None:
    more = replace(options, vaes=(str(tmp_path / "one"), str(tmp_path / "two")))
    for name in ("one", "two"):
        save_network(load_autoencoder(model_folder / "vae"), tmp_path / name)
    assert leads["all_leads"](more)[-2:] == ("vae:one", "vae:two")  # and no path, which a result would carry along
    with pytest.raises(ValueError, match="expected folders of different names"):
        leads["all_leads"](replace(more, vaes=(*more.vaes, "other/one")))
    base, one, two = (leads["config_of"](name, more) for name in ("base@0", "vae:one", "vae:two"))
    assert len({config.output.parent for config in (base, one, two)}) == 1
    assert len({config.output for config in (base, one, two)}) == 3
    assert replace(two, vae=base.vae, output=base.output) == base
    assert two.vae == str(tmp_path / "two")
    assert leads["config_of"]("vae:two@3", more).seed == 3
    with pytest.raises(ValueError, match=r"no lead 'vae:three': there are base, .*vae:two, and each with another seed"):
        leads["config_of"]("vae:three", more)

    pipe = TextToImagePipeline.from_pretrained(model_folder)
    found = leads["reconstructed"](pipe)
    assert found["latents"] == list(pipe("a", steps=1, output_type="latent").images.shape[1:])
    assert -10 < found["psnr_db"] < 20  # of an untrained one


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the pictures that a CLIP of one's own making is shown: its feature is their mean colour."""
    shown: list[int] = []

    def clip(pictures: list[np.ndarray]) -> torch.Tensor:
        shown.append(len(pictures))
        return torch.stack([torch.from_numpy(p.astype(np.float32)).mean((0, 1)) for p in pictures])

    monkeypatch.setattr("benchmarks.twists.open_extractor", lambda _: clip)
    return shown


def test_alignment_looks_at_each_picture_once_and_stops(
    seen: list[int], leads: dict[str, Any], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(model_folder)
    latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    feed = SimpleNamespace(rehearses=True, order=lambda update, *_: (None, torch.tensor([[0, 1], [2, 0]][update % 2])))

    def draw_batch(config: Config, feed: Any, update: int, *_: Any) -> Any:
        rows = [3, 3] if feed.rehearses else feed.order(update)[1].tolist()
        return SimpleNamespace(x0=latents[rows])

    monkeypatch.setattr(train.ldm, "draw_batch", draw_batch)
    monkeypatch.setattr(train.ldm, "build", lambda *_: model)
    config = replace(Config(), updates=10, batch_size=2)
    with leads["aligned"]("bundled") as goal:
        train.ldm.build()  # type: ignore[call-arg]
        loss = goal(model, config, None).loss
        context = model.conditioner(["a", "b"])
        extra = []
        plain = train.ldm.denoising(model, config, None).loss
        for update, feed.rehearses in ((0, True), (0, False), (1, False), (2, False), (4, False)):
            x0 = train.ldm.draw_batch(config, feed, update, 0, 2).x0  # type: ignore[call-arg, arg-type]
            given = model.denoiser, x0, context, torch.ones(2), torch.zeros_like(x0), torch.ones_like
            extra.append((loss(*given) - plain(*given)).detach())
    assert seen == [2, 1]  # rows 0 and 1, then row 2; none in the rehearsal, none twice
    assert not extra[0].any()
    assert all(bool((more > 0).all()) and bool((more <= 1).all()) for more in extra[1:4])
    assert not extra[4].any()  # past 40% of the updates


@pytest.mark.parametrize("name", ["immiscible", "ema-power"])
def test_a_change_ends_with_its_block(leads: dict[str, Any], name: str) -> None:
    before = dict(vars(train.ldm))
    with leads["LEADS"][name].twist("bundled"):
        inside = dict(vars(train.ldm))
    assert vars(train.ldm) == before
    assert inside != before


def test_immiscible_noise_is_the_batchs_own_and_nearer(leads: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 8, 1, 2, 2, generator=draw)
    monkeypatch.setattr(train.ldm, "draw_batch", lambda: SimpleNamespace(x0=x0, noise=noise))
    with leads["immiscible"]("bundled"):
        given = train.ldm.draw_batch().noise  # type: ignore[call-arg]
    order = torch.cdist(given.flatten(1), noise.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == list(range(8))
    assert torch.equal(given, noise[order])
    assert (given - x0).flatten(1).norm(dim=1).sum() < (noise - x0).flatten(1).norm(dim=1).sum()


def test_the_power_function_average_weighs_updates_by_a_power(leads: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    with leads["power_ema"]("bundled"):
        ema = train.ldm.EMA([weight], 0.5)
        for update in range(200):
            weight.data.fill_(float(update + 1))
            ema.step(update)
    # the mean of t under a density of t^6.94 on [0, 200]
    assert float(ema.weights[0]) == pytest.approx(200 * 7.94 / 8.94, rel=0.01)


def test_the_twenty_pictures_and_what_is_asked_for_afterwards(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = runpy.run_path(str(ROOT / "benchmarks" / "new_thing.py"))
    known = tuple(name for name, thing in things().items() if thing.everyday)
    tasks = (("object", known), ("style", tuple(STYLES)))
    judge = Recogniser(RecogniserConfig(tasks=tasks, sample_size=17, widths=(4, 4)))
    torch.nn.init.zeros_(judge.linear_out.weight)  # it sees the first style everywhere
    save_network(judge, tmp_path / "judge")
    few = new["Options"](judge=tmp_path / "judge", model=str(model_folder), work=tmp_path, old=8)
    assert not things()[few.object].everyday
    assert len(new["draw"](few)) == len(list((tmp_path / "pictures").glob("*.png"))) == 20
    said = [file.read_text() for file in sorted((tmp_path / "pictures").glob("*.txt"))]
    assert len(set(said)) == 20
    assert all("zog the dragon" in line for line in said)

    asked: list[str] = []

    def remembered(pipe: TextToImagePipeline, prompts: list[str]) -> list[Any]:
        asked.extend(prompts)
        return [new["paint"](few.object, "plain", "white", 32, 1) for _ in prompts]

    monkeypatch.setitem(new["ask"].__globals__, "asked", remembered)
    rows = new["unseen"](few)
    assert len(rows) == len(STYLES) * len(GROUNDS) - 20
    found, shown, prompts = new["ask"](few, str(model_folder), rows, known[:20])
    assert not {line.strip() for line in said} & set(asked)
    assert len(shown) == len(prompts) >= 8
    assert found["new_prompts"] == len(rows)
    assert found["old_train"] == found["old_held_out"] == 0  # it painted nothing but dragons
    assert found["new_style"] == sum(row.style == next(iter(STYLES)) for row in rows) / len(rows)
    with pytest.raises(ValueError, match="--old 1: expected at least 2"):
        new["main"](replace(few, old=1))


def test_a_model_guided_by_itself_is_not_guided(model_folder: Path) -> None:
    guided_by = runpy.run_path(str(ROOT / "benchmarks" / "guides.py"))["guided_by"]
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    call = {"seed": 0, "steps": 3, "output_type": "pt"}
    alone = pipe("a red circle", guidance_scale=1.0, **call).images
    usual = pipe("a red circle", guidance_scale=3.0, **call).images
    with guided_by(pipe.model):
        torch.testing.assert_close(pipe("a red circle", guidance_scale=3.0, **call).images, alone)
    torch.testing.assert_close(pipe("a red circle", guidance_scale=3.0, **call).images, usual)
    assert not torch.allclose(usual, alone, atol=1e-3)


def test_detail_is_that_of_the_pattern_by_style() -> None:
    decoders = runpy.run_path(str(ROOT / "benchmarks" / "decoders.py"))
    flat, board = torch.ones(3, 8, 8) * 0.5, torch.ones(3, 8, 8)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = -1
    found = decoders["detail"](torch.stack([flat, board]))
    torch.testing.assert_close(found, torch.tensor([0.0, 255.0 * 4]))  # to each of four neighbours from black to white
    rows = [SimpleNamespace(style=style) for style in ("plain", "oil", "plain")]
    assert decoders["by_style"](torch.tensor([1.0, 5.0, 3.0]), rows) == {"all": 3.0, "oil": 5.0, "plain": 2.0}
    assert decoders["first_of_styles"](rows) == {"oil": 1, "plain": 0}
