"""How long a picture of the bundled model takes, warm:  python benchmarks/bundled.py

By its default settings and by its student, one picture and a batch, all in turns in one process. Prints medians and all
ratios, and writes every time to OUT, with the machine.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from train.machine import described

STUDENT = "bundled-student"


@dataclass(frozen=True)
class Options:
    """Settings of the measurement."""

    repeats: int = 7
    batch: int = 32  # pictures at once, beside one
    prompt: str = "an oil painting of a fox"
    device: str | None = None
    out: Path = Path(__file__).parent / "results" / "bundled_speed.json"


def main(options: Options) -> None:
    from pipelines import TextToImagePipeline

    pipes = {name: TextToImagePipeline.from_pretrained(device=options.device) for name in ("default", "student")}
    pipes["student"].load_lora(STUDENT)
    sizes = (1, options.batch)
    seconds: dict[str, dict[str, list[float]]] = {name: {str(size): [] for size in sizes} for name in pipes}
    for turn in range(-1, options.repeats):  # the first one warms up
        for size in sizes:
            for name, pipe in pipes.items():
                pipe.set_progress_bar_config(disable=True)
                began = time.perf_counter()
                pipe(options.prompt, num_images_per_prompt=size, seed=0)
                if turn >= 0:
                    seconds[name][str(size)].append((time.perf_counter() - began) / size)
    said = {name: {"steps": pipe.model.defaults.steps, "dtype": str(pipe.dtype)} for name, pipe in pipes.items()}
    device = pipes["default"].device.type
    print(f"{described()}, {device}: seconds a picture, medians of {options.repeats}")
    for size in sizes:
        default, student = (statistics.median(seconds[name][str(size)]) for name in ("default", "student"))
        least, most = (pick(seconds["default"][str(size)]) for pick in (min, max))
        spread = f"{least:.3f} to {most:.3f}"
        print(f"{size} at once: default {default:.3f} ({spread}), student {student:.3f}, ratio {default / student:.1f}")
    result = {"machine": described(), "device": device, "settings": said, "seconds_per_picture": seconds}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
