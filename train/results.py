"""Files of figures: what is measured next stands beside what was measured before, and nothing is lost."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.aside import written_aside

Result = dict[str, Any]


def joined(before: Result, now: Result) -> Result:
    """Both, at all depths; where both say something, what is said now. None says nothing."""
    both = dict(before)
    for key, value in now.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            both[key] = joined(before[key], value)
        elif value is not None or key not in before:
            both[key] = value
    return both


def write_result(
    file: Path, now: Result, of: Callable[[Result], Result], join: Callable[[Result, Result], Result] = joined
) -> None:
    """Writes a result to a JSON file.

    of: what a result was measured of, by name, None where it does not say. A result in the file that agrees with `now`
    in all that both say is joined with it; the others are kept whole, under "earlier".
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    others = [before, *before.pop("earlier", [])] if before else []
    if same := next((other for other in others if _alike(of(other), of(now))), None):
        others.remove(same)
        now = join(same, now)
    with written_aside(file) as partial:
        told = now | ({"earlier": others} if others else {})
        partial.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def counted(right: int, of: int, draws: int | None = None) -> Result:
    """A share, and the 95% interval of the chance behind it (Wilson, 1927).

    draws: how many of them are drawn apart, where several are of one thing (pictures of one pair); by default all.
    """
    z, share, n = 1.959964, right / of, draws or of
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return {"right": share, "interval_95%": [max(0.0, middle - half), min(1.0, middle + half)]}


def in_percent(found: Result) -> str:
    """What a person is told of `counted`."""
    low, high = found["interval_95%"]
    return f"{found['right']:.1%} ({low:.0%} to {high:.0%})"


def _alike(one: Result, other: Result) -> bool:
    """Whether two results are of the same: in all that both say, and that is something."""
    said = [one[key] == other[key] for key in one if None not in (one[key], other[key])]
    return bool(said) and all(said)
