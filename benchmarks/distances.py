"""How far pictures are from real ones whose faults are known, in a recogniser's features:

    python benchmarks/distances.py mnist-train.parquet --test mnist-test.parquet --extractor runs/mnist-recogniser

Fréchet distances to all test pictures: of real ones from the training set, many, a tenth and a twentieth of them; of
the many with noise; of the many without the pictures of one caption, where captions are classes. They are the scale
that a model's distance is read on. Writes --out.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro
from accelerate import Accelerator

from benchmarks.files import RESULTS, write_aside
from train.data import permutation
from train.extractors import open_extractor
from train.launch import errors_said
from train.machine import described
from train.metrics import Moments, frechet_distance
from train.reference import open_reference
from train.sources import open_source

BATCH = 500


@dataclass(frozen=True)
class Options:
    train: tyro.conf.Positional[str]  # --data of the pictures that are measured
    test: str  # those that they are compared with, all of them
    extractor: str
    count: int = 10_000  # of `train`, drawn at random
    levels: tuple[float, ...] = (10.0, 20.0, 40.0)  # of Gaussian noise: standard deviations, in grey levels of 255
    without: str | None = None  # the caption that is left out; None: the most frequent
    out: Path | None = None  # None: results/distances_EXTRACTOR.json
    cache: Path = Path("cache")


def main(options: Options) -> dict[str, float]:
    if options.count < 40:
        raise ValueError(f"--count {options.count}: expected at least 40, of which a twentieth has a covariance")
    accelerator, extractor = Accelerator(cpu=True), open_extractor(options.extractor)
    train, test = (
        open_reference(open_source(data, extractor.side), extractor, extractor.side, options.cache, accelerator)
        for data in (options.train, options.test)
    )
    rows = permutation(len(train), 0, 0)[: options.count].tolist()
    captions = Counter(train.captions[row] for row in rows)
    without = captions.most_common(1)[0][0] if options.without is None else options.without
    if without not in captions or len(captions) == 1:
        raise ValueError(
            f"{options.train} has pictures of {', '.join(sorted(captions)[:10])}: leaving out those of {without!r} "
            "changes nothing or all; expected classes, of which --without names one"
        )
    left = [row for row in rows if train.captions[row] != without]
    features, real = train.features(), test.moments()
    known = {
        f"{len(rows)} pictures": Moments.of([features[rows]]),
        **{f"{few} of them": Moments.of([features[rows[:few]]]) for few in (len(rows) // 10, len(rows) // 20)},
        f"without {without!r}": Moments.of([features[left]]),
    }
    found = {name: frechet_distance(moments, real) for name, moments in known.items()}
    pictures = [np.asarray(train.picture(row), np.float32) for row in rows]
    for level in options.levels:
        rng = np.random.default_rng(0)
        noisy = [(p + level * rng.standard_normal(p.shape[:2])[..., None]).round().clip(0, 255) for p in pictures]
        parts = (noisy[i : i + BATCH] for i in range(0, len(noisy), BATCH))
        moments = Moments.of(extractor([p.astype(np.uint8) for p in part]) for part in parts)
        found[f"noise of {level:g}"] = frechet_distance(moments, real)
    for name, distance in found.items():
        print(f"{name}: {distance:.3g}")
    said: dict[str, Any] = {"extractor": extractor.described(), "machine": described()}
    for name, data, reference in (("train", options.train, train), ("test", options.test, test)):
        said[name] = {"data": data, "hash": reference.hash, "pictures": len(reference)}
    out = options.out or RESULTS / f"distances_{Path(options.extractor).name}.json"
    write_aside(out, said | {"without": without, "distances": found})
    return found


if __name__ == "__main__":
    with errors_said():
        main(tyro.cli(Options, description=__doc__))
