"""The examples on points run, small, and what their figures claim is so."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from examples import euler_heun, guidance, interpretations, langevin, samplers
from examples.toys import Mixture, distance, normal, sliced_wasserstein, spiral
from ldm.denoiser import score_from
from ldm.samplers import SAMPLERS


def ran(example: ModuleType, out: Path) -> Any:
    """The numbers of the figure, once it is there."""
    results = example.main(out, small=True)
    with Image.open(out / f"{example.__name__.rpartition('.')[2]}.png") as figure:
        assert min(figure.size) > 400
    return results


def test_the_mixture_knows_itself() -> None:
    """Tweedie's formula by automatic differentiation, and quantiles that lie as its draws do."""
    data = Mixture([0.4, 0.6], [[-1.0, 0.5], [1.0, 0.0]], [0.3, 0.0])
    x = data.draw(50, normal(0), 0.7).requires_grad_()
    (score,) = torch.autograd.grad(data.log_density(x, 0.7).sum(), x)
    torch.testing.assert_close(score_from(x, data.denoise(x, 0.7), 0.7), score)
    line = Mixture([0.4, 0.6], [[-1.0], [1.0]], [0.3, 0.5])
    exact = line.quantiles(20_000, 0.2)
    assert distance(line.draw(20_000, normal(1), 0.2), exact) < 0.03
    assert distance(line.draw(20_000, normal(1), 0.5), exact) > 0.03  # another level's


def test_the_spiral_has_the_moments_that_it_says() -> None:
    for turns in (1, 2):
        x = spiral(100_000, 0, turns)
        assert float(x.mean(0).norm()) < 0.02
        assert float(x.square().sum(1).mean()) == pytest.approx(2, abs=0.5)
    moved = spiral(5000, 1) + torch.tensor([0.3, 0.0])  # along it, by the mean of |cos| = 2 / pi
    assert sliced_wasserstein(spiral(5000, 1), moved) == pytest.approx(0.3 * 2 / math.pi, rel=0.1)


def test_five_interpretations_sample_one_distribution(tmp_path: Path) -> None:
    results = ran(interpretations, tmp_path)
    assert set(results) == {*interpretations.PREDICTIONS, "data"}
    for name in interpretations.PREDICTIONS:
        assert results[name]["distance"] < 0.15, name  # noise itself: 0.5
        assert results[name]["astray"] < 0.04, name
        assert results[name]["apart"] < 0.2, name
    assert results["data"]["apart"] > 1  # of points that have nothing to do with one another


def test_annealing_finds_the_weights_and_plain_langevin_does_not(tmp_path: Path) -> None:
    exact = langevin.DATA.weights.tolist()
    for found in ran(langevin, tmp_path).values():
        assert max(abs(a - b) for a, b in zip(found["plain Langevin"], exact, strict=True)) > 0.1
        for way in ("annealed Langevin", "predictor-corrector"):
            assert found[way] == pytest.approx(exact, abs=0.06), way


def test_heun_is_of_order_2_and_euler_of_order_1(tmp_path: Path) -> None:
    results = ran(euler_heun, tmp_path)
    for name, order in (("euler", 1), ("heun", 2)):
        *_, before, last = results[name].values()
        assert math.log2(before / last) == pytest.approx(order, abs=0.1), name
    both = results["euler"].keys() & results["heun"].keys()
    assert all(results["heun"][n] < results["euler"][n] for n in both)


def test_every_sampler_is_on_the_plot_and_comes_closer(tmp_path: Path) -> None:
    results = ran(samplers, tmp_path)
    (chance,) = results.pop("chance").values()
    assert set(results) == set(SAMPLERS)
    for name, errors in results.items():
        few, many = errors.values()
        if name in samplers.DRAWS_NOISE:
            assert many < max(few / 1.5, 2 * chance), name
        else:
            assert many < few / 3, name
    last = {name: [*errors.values()][-1] for name, errors in results.items()}
    assert last["ddim"] == pytest.approx(last["euler"], rel=1e-9)
    assert last["ddpm"] == pytest.approx(last["euler_ancestral"], rel=1e-9)
    assert max(last[name] for name in ("dpmpp_2m", "unipc", "lms", "plms")) < last["heun"] < last["euler"]


def test_guidance_makes_the_class_surer_and_the_samples_fewer_of_a_kind(tmp_path: Path) -> None:
    results = ran(guidance, tmp_path)
    data = results["data"][1.0]
    for way in guidance.WAYS:
        none, one, four = (results[way][scale] for scale in (0.0, 1.0, 4.0))
        assert one["distance"] < 2 * data["distance"]
        assert one["distance"] < min(none["distance"], four["distance"]) / 2
        assert one["right class"] == pytest.approx(data["right class"], abs=0.05)
        assert none["right class"] < one["right class"] < four["right class"]
        assert none["spread"] > one["spread"] > four["spread"]
    always, interval = results["always"][4.0], results["0.2 < σ ≤ 1"][4.0]
    assert interval["spread"] > 1.1 * always["spread"]
    assert interval["distance"] < 0.6 * always["distance"]
    assert interval["right class"] > 0.97
