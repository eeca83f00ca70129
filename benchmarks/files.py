"""Where results lie, and how they are written: whole or not at all."""

import json
from pathlib import Path
from typing import Any

from train.aside import written_aside

RESULTS = Path(__file__).parent / "results"


def write_aside(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def results_before(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that `out` holds; ValueError where they were measured under other settings."""
    if not out.is_file():
        return []
    before = json.loads(out.read_text())
    if changed := [name for name, value in settings.items() if before["settings"].get(name) != value]:
        raise ValueError(f"{out} holds results of another {', '.join(changed)}: give another --out, or remove it")
    return before["rows"]
