"""Files of figures: nothing is lost, and a share says how much it is worth."""

import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from train.results import counted, in_percent, joined, write_result


def of(result: dict) -> dict:
    return {key: result.get(key) for key in ("model", "judge")}


def test_what_is_of_the_same_is_joined_and_the_rest_stays(tmp_path: Path) -> None:
    file = tmp_path / "new" / "figures.json"

    def written(result: dict) -> dict:
        write_result(file, result, of)
        return json.loads(file.read_text())

    one = {"model": "a", "train": {"right": 0.5, "seconds": 2.0}}
    assert written(one) == one
    both = {"model": "a", "judge": "j", "train": {"right": 0.6, "seconds": 2.0, "judged": 0.9}}
    assert written({"model": "a", "judge": "j", "train": {"right": 0.6, "seconds": None, "judged": 0.9}}) == both
    other = {"model": "b", "train": {"right": 0.1}}
    assert written(other) == other | {"earlier": [both]}
    assert written({"model": "a", "judge": "k"}) == {"model": "a", "judge": "k", "earlier": [other, both]}
    again = written({"model": "a", "judge": "j", "more": [1]})  # found among the earlier ones, and joined
    assert again == both | {"more": [1], "earlier": [{"model": "a", "judge": "k"}, other]}


def test_results_that_say_nothing_of_the_same_are_not_joined(tmp_path: Path) -> None:
    file, of_weights, of_pictures = tmp_path / "figures.json", {"model": "a", "bpd": 3.0}, {"judge": "j", "fid": 9.0}
    write_result(file, of_weights, of)
    write_result(file, of_pictures, of)
    assert json.loads(file.read_text()) == of_pictures | {"earlier": [of_weights]}


def test_what_is_said_now_replaces_what_was_said_and_nothing_is_changed() -> None:
    before, now = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3, "c": None}, "d": None, "e": None}
    assert joined(before, now) == {"a": {"b": 3, "c": 2}, "d": [1], "e": None}
    assert before == {"a": {"b": 1, "c": 2}, "d": [1]}


@pytest.mark.parametrize(("right", "of"), [(46, 50), (0, 8), (8, 8), (99, 100), (1, 3)])
def test_the_interval_of_a_share_is_wilsons(right: int, of: int) -> None:
    found = counted(right, of)
    theirs = binomtest(right, of).proportion_ci(0.95, method="wilson")
    assert found["right"] == right / of
    assert found["interval_95%"] == pytest.approx([theirs.low, theirs.high], abs=1e-6)


def test_pictures_of_one_pair_are_one_draw() -> None:
    assert counted(184, 200, 50)["interval_95%"] == counted(46, 50)["interval_95%"]


def test_what_a_person_is_told() -> None:
    assert in_percent(counted(46, 50)) == "92.0% (81% to 97%)"
