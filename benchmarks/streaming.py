"""Streaming: time to the first batch, rows a second and memory against the size of the set, on generated rows.

    python benchmarks/streaming.py [--rows 1000 10000 100000 1000000]

Writes sets of tiny pictures with captions (parquet files, about 100 bytes a row) into a temporary folder and reads each
of them once from one end to the other through the feed that `train/ldm.py --streaming` trains from: shuffled, decoded,
as tensors. Each set is read by a process of its own, whose memory is the figure; of the largest, memory is followed
over the rows, too. `datasets` alone, streaming with a shuffle buffer of 1000 and decoding, reads the same files.
"""

import io
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from train.machine import described

FILES = 32  # of each set
BATCH = 64
SIDE = 16
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    rows: tuple[int, ...] = (1000, 10_000, 100_000)  # sizes of the sets
    at_most: int = 1_000_000  # rows that are read of one
    out: Path = RESULTS / "streaming"  # .json and .png
    side: Literal["all", "ours", "datasets"] = "all"  # one of the two: in this process, of the folder `data`
    data: Path = Path()


def generate(folder: Path, rows: int) -> float:
    """A set of `rows` rows; megabytes on the disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    pictures = []
    for i in range(512):  # different ones, which the rows take in turn
        file = io.BytesIO()
        Image.linear_gradient("L").resize((SIDE, SIDE)).rotate(i).convert("RGB").save(file, "webp", quality=50)
        pictures.append(file.getvalue())
    for f in range(FILES):
        numbers = range(f * rows // FILES, (f + 1) * rows // FILES)
        table = pa.table(
            {
                "image": [{"bytes": pictures[i % 512], "path": None} for i in numbers],
                "text": [f"picture number {i}" for i in numbers],
            }
        )
        pq.write_table(
            table, folder / f"{f:03d}.parquet", row_group_size=10_000, compression="none", use_dictionary=False
        )
    return sum(f.stat().st_size for f in folder.iterdir()) / 1e6


def megabytes() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def ours(data: Path, rows: int) -> dict[str, Any]:
    import datasets  # noqa: F401, as the other side has it, whose import is not measured either
    from accelerate import Accelerator

    from train.feed import open_feed
    from vae.autoencoder import Identity

    accelerator = Accelerator(cpu=True)
    before = megabytes()
    began = time.perf_counter()
    feed = open_feed(
        str(data),
        Identity(),
        SIDE,
        seed=0,
        global_batch=BATCH,
        cache=Path("unused"),
        accelerator=accelerator,
        workers=2,
        streaming=True,
    )
    feed.take(0, 0, BATCH, BATCH)
    first = time.perf_counter() - began
    over = []
    began = time.perf_counter()
    updates = max(2, rows // BATCH)
    for update in range(1, updates):
        feed.take(update, 0, BATCH, BATCH)
        if update % max(1, updates // 50) == 0:
            over.append((update * BATCH, megabytes()))
    seconds = time.perf_counter() - began
    return {
        "first_batch_seconds": first,
        "rows_per_second": (updates - 1) * BATCH / seconds,
        "megabytes": megabytes(),
        "megabytes_before": before,
        "megabytes_over_rows": over,
    }


def peer(data: Path, rows: int) -> dict[str, Any]:
    import datasets
    import numpy as np
    import torch  # both sides pay for it

    before = megabytes()
    began = time.perf_counter()
    files = sorted(str(f) for f in data.glob("*.parquet"))
    table = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    table = table.cast_column("image", datasets.Image()).shuffle(seed=0, buffer_size=1000)
    first, read, batch = 0.0, 0, []
    for row in table:
        batch.append(np.asarray(row["image"].convert("RGB")))
        if len(batch) == BATCH:
            torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float()
            batch, read = [], read + BATCH
            if not first:
                first = time.perf_counter() - began
                began = time.perf_counter()
        if read >= rows:
            break
    rate = max(read - BATCH, 1) / (time.perf_counter() - began)
    return {
        "first_batch_seconds": first,
        "rows_per_second": rate,
        "megabytes": megabytes(),
        "megabytes_before": before,
    }


def measured(side: str, data: Path, rows: int) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--data", str(data), "--at-most", str(rows)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def plot(found: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4), layout="constrained")
    axes = figure.subplots(1, 4)
    rows = [one["rows"] for one in found]
    for axis, key, title in zip(
        axes,
        ("first_batch_seconds", "rows_per_second", "megabytes"),
        ("seconds to the first batch", "rows a second", "peak memory of the process, MB"),
        strict=False,
    ):
        axis.plot(rows, [one["ours"][key] for one in found], "o-", label="Atelier's feed")
        axis.plot(rows, [one["datasets"][key] for one in found], "s--", label="datasets alone")
        top = 1.15 * max(one[side][key] for one in found for side in ("ours", "datasets"))
        axis.set(xscale="log", xlabel="rows in the set", title=title, ylim=(0, top))
    axes[0].legend()
    over = found[-1]["ours"]["megabytes_over_rows"]
    axes[3].plot([n for n, _ in over], [m for _, m in over])
    top = 1.15 * max(m for _, m in over)
    axes[3].set(title=f"the same over a pass of {rows[-1]:,} rows", xlabel="rows read", ylim=(0, top))
    figure.savefig(file, dpi=110)


def main(options: Options) -> None:
    if options.side != "all":
        print(json.dumps((ours if options.side == "ours" else peer)(options.data, options.at_most)))
        return
    found = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            size = generate(Path(folder), rows)
            read = min(rows, options.at_most)
            one = {
                "rows": rows,
                "megabytes_on_disk": size,
                "ours": measured("ours", Path(folder), read),
                "datasets": measured("datasets", Path(folder), min(read, 50_000)),
            }
        found.append(one)
        for side in ("ours", "datasets"):
            print(
                f"{rows:>9,} rows ({size:,.1f} MB), {side}: first batch {one[side]['first_batch_seconds']:.2f} s, "
                f"{one[side]['rows_per_second']:,.0f} rows/s, peak {one[side]['megabytes']:,.0f} MB",
                flush=True,
            )
    machine = {"machine": described(), "python": platform.python_version()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps({**machine, "sets": found}, indent=1))
    plot(found, options.out.with_suffix(".png"))
    print(options.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
