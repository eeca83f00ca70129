"""Is it new, or copied? How near samples come to the pictures that a model was trained on, against how near real
pictures come that it was not trained on; and the nearest shown beside the samples."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from pipelines.picture import to_pil
from train.aside import written_aside
from train.cache import weights_digest
from train.data import to_unit
from train.folders import FolderSource, open_pictures
from train.grid import grid
from train.metrics import nearest
from train.pictures import digest
from train.reference import Reference
from train.samples import drawn_rows
from vae.autoencoder import Autoencoder

SHOWN = 12  # samples with their nearest training pictures: the nearest of all, and as many others
SAME = 1e-5  # distance, as a share of the features' length, below which pictures are the same one
NEAR = 0.01  # share of the held-out pictures that are as near as a "near" sample


def in_words(found: dict[str, Any], held_out: str) -> list[str]:
    """What a person is told of `memorisation`; held_out: what those pictures are."""
    counts = found["pictures"]
    share = found["share_of_samples_nearer_than_1%_of_held_out"]
    nearer = f"all of {held_out} are in the training set, so that nothing tells how near is too near"
    if share is not None:
        nearer = f"nearer than the nearest {NEAR:.0%} of {held_out} are {share:.1%} of {counts['samples']} samples"
    lines = [
        f"distance to the nearest training picture, median: of samples {found['samples_to_training']:.4g}, "
        f"of {held_out} {_said(found['held_out_to_training'])}; {nearer}; side by side in {found['sheet']} "
        f"[{counts['training']} training pictures {found['training_hash']}, {counts['held_out']} of {held_out} "
        f"{found['held_out_hash']}; extractor {found['extractor']}]"
    ]
    if (share := found.get("share_of_copies_nearer_than_1%_of_held_out")) is not None:
        lines.append(
            f"of {counts['copies']} training pictures that the autoencoder gives back {share:.1%} are as near, at a "
            f"median of {found['copies_to_training']:.4g}: so well would copies be seen"
        )
    if known := found["held_out_that_are_in_training"]:
        lines.append(
            f"{known} of {counts['held_out']} pictures of {held_out} are in the training set, and count in no distance"
        )
    return lines


def _said(distance: float | None) -> str:
    return "none" if distance is None else f"{distance:.4g}"


def copies(training: Reference, vae: Autoencoder, count: int, out: Path, accelerator: Accelerator) -> FolderSource:
    """`count` training pictures, drawn at random, as the autoencoder gives them back: what a model that had learnt them
    by heart would paint. Kept in a folder below `out`; a collective call: every process has to make it, and the first
    one computes."""
    folder = out / f"copies-{digest(training.hash, weights_digest(vae), str(count))[:8]}"
    if accelerator.is_main_process and len(list(folder.glob("*.png"))) < min(count, len(training)):
        _write_copies(training, vae, count, folder)
    accelerator.wait_for_everyone()
    return open_pictures(folder, say=lambda _: None)  # they have no captions, and need none


@torch.no_grad()
def _write_copies(training: Reference, vae: Autoencoder, count: int, folder: Path) -> None:
    weight = next(vae.parameters(), torch.empty(0))
    folder.mkdir(parents=True, exist_ok=True)
    for rows in torch.tensor(drawn_rows(len(training), count)).split(32):
        pixels = torch.stack([torch.from_numpy(np.array(training.picture(row))) for row in rows.tolist()])
        latents = vae.encode(to_unit(pixels).to(weight)).mode
        for row, picture in zip(rows.tolist(), vae.decode(latents), strict=True):
            with written_aside(folder / f"{row:08d}.png") as partial:
                to_pil(picture).save(partial, format="png")


def memorisation(
    samples: Reference,
    held_out: Reference,
    training: Reference,
    sheet: Path,
    learnt: Reference | None = None,
    extractor: str = "",
) -> dict[str, Any]:
    """Compares the distances, in features, and writes the sheet.

    Args:
        samples, held_out, training: features of what was painted, of pictures that were not trained on, of those that
            were.
        sheet: the PNG to write.
        learnt: what `copies` makes, which shows whether copies would be seen: an autoencoder changes pictures as well.
        extractor: names the features.

    Returns the medians of the distances to the nearest training picture, their ratio, and which share of the samples is
    nearer than all but NEAR of the held-out pictures are: about NEAR where nothing is memorised, 1 in n + 1 where these
    n are fewer than 1 / NEAR. Held-out pictures that are in the training set count in neither; where there are no
    others, all that is of them is None. With `learnt` the same two of those.
    """
    known = training.features()
    distances, indices = nearest(samples.features(), known)
    theirs = nearest(held_out.features(), known).values[:, 0]
    ours = distances[:, 0]
    order = ours.argsort()
    rest = order[SHOWN:]
    others = rest[torch.linspace(0, len(rest) - 1, min(SHOWN, len(rest))).long()] if len(rest) else rest
    tiles, said = [], []
    for row in [*order[:SHOWN].tolist(), *others.tolist()]:
        tiles += [samples.picture(row), training.picture(int(indices[row, 0]))]
        said += ["sample", f"nearest in training, at {float(ours[row]):.3g}"]
    sheet.parent.mkdir(parents=True, exist_ok=True)
    grid(tiles, said, columns=8).save(sheet)
    same = theirs < SAME * known.square().sum(1).mean().sqrt()
    apart = theirs[~same]  # beside pictures that are in the training set nothing would look like a copy
    near = apart.quantile(NEAR, interpolation="lower") if len(apart) else None
    one, other = float(ours.median()), float(apart.median()) if len(apart) else None

    def share(distances: torch.Tensor) -> float | None:
        return None if near is None else float((distances < near).double().mean())

    counts = {"samples": len(samples), "held_out": len(held_out), "training": len(training)}
    control: dict[str, Any] = {}
    if learnt is not None:
        copied = nearest(learnt.features(), known).values[:, 0]
        control["copies_to_training"] = float(copied.median())
        control["share_of_copies_nearer_than_1%_of_held_out"] = share(copied)
        counts["copies"] = len(learnt)
    return {
        "samples_to_training": one,
        "held_out_to_training": other,
        "ratio": one / other if other else None,
        "share_of_samples_nearer_than_1%_of_held_out": share(ours),
        **control,
        "held_out_that_are_in_training": int(same.sum()),
        "pictures": counts,
        "training_hash": training.hash,
        "held_out_hash": held_out.hash,
        "extractor": extractor,
        "sheet": str(sheet),
    }
