"""The examples with the bundled model, and the likelihoods: they run, small, and what their figures claim is so."""

import math
from pathlib import Path

import pytest

from examples import forward_process, inversion, likelihood
from tests.test_drawn import needs_font
from tests.test_examples_toys import ran


@needs_font
def test_a_picture_turns_to_noise_as_the_closed_form_says(tmp_path: Path) -> None:
    results = ran(forward_process, tmp_path)
    deviation = 1 / math.sqrt(40_000)
    assert results["mean"][0] < 4 * deviation
    assert results["std"][0] < 4 * deviation / math.sqrt(2)
    for name in ("pixels", "latents"):
        clean, *_, noisy = results[name]
        assert results[name] == sorted(results[name], reverse=True)
        assert clean > 0.99
        assert noisy < 0.2
    for way in ("forward", "reverse"):
        for units in forward_process.UNITS:
            few, many = results[f"{way}, {units}"]  # four times as many
            assert math.log(few / many, 4) == pytest.approx(1.1, abs=0.5), (way, units)


@needs_font
def test_inverted_and_sampled_the_picture_comes_back(tmp_path: Path) -> None:
    results = ran(inversion, tmp_path)
    first, second = results["order 1"], results["order 2"]
    assert 1.6 < first[5] / first[10] < 2.4
    assert second[5] / second[10] > 4
    assert second[10] < first[10] / 10
    assert max(results["distance"].values()) < 0.1
    assert results["correlation"][0.0] > 0.999
    assert 0.3 < results["correlation"][0.5] < 0.7
    assert abs(results["correlation"][1.0]) < 0.15


def test_the_flow_gives_the_log_likelihood_and_both_bounds_lie_below(tmp_path: Path) -> None:
    results = ran(likelihood, tmp_path)
    loose, middle, tight = results["exact trace"].values()
    assert tight < 1e-3
    assert loose > 30 * middle > 900 * tight
    assert results["Hutchinson"][16] < 0.6 * results["Hutchinson"][1]
    posterior, neighbours = likelihood.FORMS
    for form in likelihood.FORMS:
        for rows, gap in results[f"gap, {form}"].items():
            assert gap > -3 * results[f"error, {form}"][rows], form
    for rows, gap in results[f"gap, {posterior}"].items():  # one mean
        error = math.hypot(*(results[f"error, {form}"][rows] for form in likelihood.FORMS))
        assert abs(results[f"gap, {neighbours}"][rows] - gap) < 3 * error
        assert results[f"spread, {neighbours}"][rows] > 1.5 * results[f"spread, {posterior}"][rows]
    few, many = results[f"gap, {posterior}"].values()
    assert many < few / 2
    few, many = results[f"spread, {neighbours}"].values()
    assert many > 1.5 * few
