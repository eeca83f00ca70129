"""Pictures to be measured: painted by a model for the captions of a reference, or read from a folder.

Picture i has the prompt of row i of a fixed order of the reference's captions, and the noise of seed · NOISES + i, so
that no two seeds share one. It is written aside and renamed, so that a run which was killed goes on with the missing
pictures, by any number of processes.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from conditioning.labels import Labels
from pipelines import TextToImagePipeline
from pipelines.files import checkpoints, newest
from pipelines.scheduler import sampler_of
from train.aside import written_aside
from train.cache import weights_digest
from train.data import batch_indices, permutation
from train.folders import FolderSource, open_pictures
from train.pictures import PICTURES, digest

NOTES = "samples.json"  # in the folder of the pictures: what they were painted with
NOISES = 1_000_000  # of a seed: as many pictures have noise that no other seed has


@dataclass(frozen=True)
class Painting:
    """How a model paints; None takes its own default."""

    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None
    seed: int = 0  # picture i is painted from the noise of seed · NOISES + i
    batch: int = 32

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: expected at least 1")
        if abs(self.seed) >= 2**63 // NOISES:
            raise ValueError(f"--seed {self.seed}: expected less than {2**63 // NOISES}")


def open_painter(
    model: str | Path | None, lora: Sequence[str], weights: Sequence[float], device: Any = None
) -> TextToImagePipeline:
    """A model with LoRAs merged into it; weights: one for each, or one for all. Raises ValueError for others."""
    pipe = TextToImagePipeline.from_pretrained(model, device=device)
    pipe.load_loras(lora, weights)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts_of(pipe: TextToImagePipeline, captions: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts out of the captions of a reference, each as often as the next, in an order that the seed decides.

    Raises ValueError where the model is told something and the reference does not say what.
    """
    if not pipe.model.is_told:
        return [""] * count
    said = [caption for caption in captions if caption]
    if not said:
        raise ValueError(
            "the pictures of --reference have no captions, which the model would be asked for: give a reference with "
            "captions, or a folder of pictures in the place of the model"
        )
    prompts = [said[i] for i in batch_indices(len(said), seed, 0, count).tolist()]
    if isinstance(pipe.model.conditioner, Labels):
        pipe.model.conditioner(prompts)  # which says what a caption that is no class comes close to
    return prompts


def model_digest(pipe: TextToImagePipeline) -> str:
    """A hash of all weights of a model, and of its path."""
    parts = [weights_digest(part) for part in pipe.model.parts()]
    return digest(json.dumps(pipe.model.scheduler, sort_keys=True, default=str), *parts)[:16]


def paint_samples(
    pipe: TextToImagePipeline,
    prompts: Sequence[str],
    folder: Path,
    how: Painting,
    accelerator: Accelerator,
    *,
    reference: str = "",
) -> FolderSource:
    """Paints what the folder lacks of the pictures of these prompts, each process its share; they, as a source.

    reference: names what the prompts were drawn from; of a longer run the first ones are the same.

    Raises ValueError where the folder holds pictures that were painted otherwise, or for more than NOISES.
    """
    if len(prompts) > NOISES:
        raise ValueError(f"{len(prompts):,} samples: expected at most {NOISES:,}, for which a seed has noise")
    defaults, first = pipe.model.defaults, how.seed * NOISES
    notes: dict[str, Any] = {"model": model_digest(pipe), "seed": how.seed, "size": pipe.model.size}
    sampler = how.sampler or defaults.sampler or sampler_of(pipe.model.scheduler)
    notes |= {"steps": how.steps or defaults.steps, "sampler": sampler}
    scale = defaults.guidance_scale if how.guidance is None else how.guidance
    notes["guidance"] = max(1.0, scale) if pipe.model.is_told else 1.0
    low, high = how.guidance_interval or defaults.guidance_interval or (0.0, math.inf)
    notes["guidance_interval"] = [low, min(high, 1e9)] if low > 0 or high < math.inf else None  # JSON has no infinity
    notes |= {"loras": pipe.loras or None, "first_noise": first}
    notes |= {"dtype": str(pipe.dtype).removeprefix("torch."), "batch": how.batch}
    notes |= {"prompts": reference if any(prompts) else "", "views": defaults.views}
    folder.mkdir(parents=True, exist_ok=True)
    _check_notes(folder, notes, accelerator, guided=pipe.model.is_told)
    files = [folder / f"{i:06d}.png" for i in range(len(prompts))]
    batches = range(0, len(prompts), how.batch)
    mine = [start for n, start in enumerate(batches) if n % accelerator.num_processes == accelerator.process_index]
    lacking = [start for start in mine if not all(file.is_file() for file in files[start : start + how.batch])]
    for start in tqdm(lacking, desc="painting", unit="batch", disable=not accelerator.is_local_main_process):
        part = list(prompts[start : start + how.batch])
        painted = pipe(
            part,
            seed=first + start,
            steps=how.steps,
            guidance_scale=how.guidance,
            guidance_interval=how.guidance_interval,
            sampler=how.sampler,
        ).images
        for image, file in zip(painted, files[start : start + how.batch], strict=True):
            if not file.is_file():
                with written_aside(file) as partial:
                    image.save(partial, format="png")
    if accelerator.is_main_process and any(prompts):
        rows = [{"file_name": file.name, "text": said} for file, said in zip(files, prompts, strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        captions = folder / "metadata.jsonl"
        known = captions.read_text("utf-8").split("\n")[:-1] if captions.is_file() else []
        with written_aside(captions) as partial:  # of a longer run before this one the other pictures keep theirs
            partial.write_text("".join(line + "\n" for line in lines + known[len(lines) :]), encoding="utf-8")
    accelerator.wait_for_everyone()
    return FolderSource(files, [(said,) if said else () for said in prompts], "the prompts")


def _check_notes(folder: Path, notes: dict[str, Any], accelerator: Accelerator, *, guided: bool) -> None:
    """Writes them where there are no pictures yet; ValueError where some are there that were painted otherwise."""
    file, before = folder / NOTES, notes
    if any(f.suffix in PICTURES for f in folder.iterdir()):
        before = notes_of(folder)
        # Of earlier versions, whose seeds were not apart, and who noted what was asked for:
        before = {"first_noise": before.get("seed"), "views": notes["views"], **before}
        before["sampler"] = before.get("sampler") or notes["sampler"]
        before["guidance"] = max(1.0, before.get("guidance", 1.0)) if guided else 1.0
    if changed := [key for key in notes if before.get(key) != notes[key]]:
        told = "; ".join(
            "for other prompts" if key == "prompts" else f"{key}: {before.get(key)!r} before, {notes[key]!r} now"
            for key in changed
        )
        raise ValueError(
            f"{folder} holds pictures that were painted otherwise ({told}): give another --out, or delete that folder"
        )
    accelerator.wait_for_everyone()  # all have looked
    if accelerator.is_main_process:
        with written_aside(file) as partial:
            partial.write_text(json.dumps(notes, indent=2) + "\n")


def notes_of(folder: str | Path) -> dict[str, Any]:
    """What the pictures of a folder were painted with, where it says so."""
    file = Path(folder).expanduser() / NOTES
    return json.loads(file.read_text()) if file.is_file() else {}


def is_model(where: str) -> bool:
    """Whether MODEL_OR_FOLDER is to be opened as a model, and not as a folder of pictures."""
    folder = Path(where).expanduser()
    if not folder.is_dir() or (newest(folder) / "unet").is_dir() or checkpoints(folder):
        return True  # or a run of something else, whose sheets are no samples: opening it as a model says so
    return not any(f.suffix.lower() in PICTURES for f in folder.rglob("*"))


def drawn_rows(count: int, most: int | None) -> list[int]:
    """`most` of `count` rows in their order, drawn once and for all: the first ones may be all of one class."""
    return permutation(count, 0, 0)[:most].sort().values.tolist()


def read_samples(folder: str, count: int | None, say: Any = print) -> FolderSource:
    """The pictures of a folder and of those below it in the order of their names, `count` of them or all, with their
    captions, where there are any, as training finds them."""
    place = Path(folder).expanduser()
    found = open_pictures(place, say=say)
    if count is not None and count > len(found):
        raise ValueError(f"--samples {count}: {folder} holds {len(found)} pictures")
    if count in (None, len(found)):
        return FolderSource(found.files, found.captions, "the folder")
    say(f"{count} of the {len(found)} pictures in {folder}, drawn at random, always the same")
    rows = drawn_rows(len(found), count)
    return FolderSource([found.files[i] for i in rows], [found.captions[i] for i in rows], "the folder")


def common_side(source: FolderSource) -> int:
    """Of pictures that are all squares of one size; ValueError for others."""
    sizes = set()
    for i in range(len(source)):
        with suppress(ValueError):  # broken, which is counted when it is read
            sizes.add(source.picture_size(i))
    if len(sizes) != 1 or (side := next(iter(sizes)))[0] != side[1]:
        some = ", ".join(f"{w}×{h}" for w, h in sorted(sizes)[:4])
        raise ValueError(
            f"the pictures are of {len(sizes)} size(s), such as {some}: give --size, to which they and the reference "
            "are brought (their middle, as a square)"
        )
    return side[0]
