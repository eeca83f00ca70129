"""Pictures that keep words what they are while a model learns something new (DreamBooth, arXiv:2208.12242, sec. 3.3).

They are painted by the model itself before it is trained, and are then half of what it sees: of one caption, the kind
of the new thing, as in the paper, or of many in turn, so that it keeps its colours and styles, too. Picture i has the
seed --seed + i and is always painted with the same others: any number of processes paint the same pictures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from pipelines.files import checkpoints
from pipelines.folder import Model
from pipelines.text_to_image import TextToImagePipeline
from train.settings import Config
from train.sources import open_source, parts_of, split_parts

BATCH = 8  # pictures painted at once


@dataclass(frozen=True)
class Painted:
    """A picture of the prior, its caption in a text file beside it."""

    file: Path
    caption: str
    seed: int
    size: int
    by: str = ""  # the model, and how it paints; "" where that no longer counts

    def save(self, image: Image.Image) -> None:
        about = PngInfo()
        about.add_text("seed", str(self.seed))
        about.add_text("by", self.by)
        self._text.unlink(missing_ok=True)
        image.save(self.file, pnginfo=about)
        self._text.write_text(self.caption, encoding="utf-8")  # last: says that the picture is whole

    def is_there(self) -> bool:
        """False, too, for one of another caption, seed, size or model, as a killed run of other settings leaves it."""
        try:
            with Image.open(self.file) as image:
                seed = image.info.get("seed", str(self.seed))  # earlier pictures do not say theirs
                alike = seed == str(self.seed) and image.size == (self.size, self.size)
                alike = alike and (not self.by or image.info.get("by", self.by) == self.by)
            return alike and self._text.read_text(encoding="utf-8") == self.caption
        except OSError:  # not there, or another process is just painting it again
            return False

    @property
    def _text(self) -> Path:
        return self.file.with_suffix(".txt")


def with_prior(model: Model, config: Config, size: int, accelerator: Accelerator) -> str:
    """Paints the prior's pictures that are not there yet, each process its share; --data with them, of equal share, as
    its last part.

    Raises ValueError when they are lost from a run that has learnt already.
    """
    folder, learnt = config.output / "prior", bool(checkpoints(config.output))
    by = "" if learnt else f"{config.model}, {model.defaults}"
    files = [
        Painted(folder / f"{i:05d}.png", config.prior[i % len(config.prior)], config.seed + i, size, by)
        for i in range(config.prior_pictures)
    ]
    missing = _missing(files)
    if missing and learnt:
        raise ValueError(f"{folder} lacks {missing} of {len(files)} pictures, and the model is no longer what it was")
    folder.mkdir(parents=True, exist_ok=True)
    # Shares of all batches, not of the missing ones: those are fewer for a process that looks when others have begun.
    mine = range(0, len(files), BATCH)[accelerator.process_index :: accelerator.num_processes]
    share = [start for start in mine if _missing(files[start : start + BATCH])]
    pipe = TextToImagePipeline(model)
    pipe.set_progress_bar_config(disable=True)
    grey = Image.new("RGB", (size, size), "grey")
    whole: dict[str, Any] = {"image": grey, "mask": Image.new("L", grey.size, 255)} if model.inpaints else {}
    quiet = not accelerator.is_main_process or not share
    for start in tqdm(share, desc="painting what shall stay", unit="batch", disable=quiet):
        batch = files[start : start + BATCH]
        captions = [one.caption for one in batch]
        painted = pipe(captions, seed=config.seed + start, height=size, width=size, **whole).images
        for one, image in zip(batch, painted, strict=True):
            one.save(image)
    if accelerator.is_main_process:
        _remove_others(folder, files)
    accelerator.wait_for_everyone()
    if lacking := _missing(files):
        raise ValueError(
            f"{folder} lacks {lacking} of {len(files)} pictures, which other processes have painted: --output has "
            "to be a folder that all of them share"
        )
    source = open_source(config.data, size, font=config.font, views=config.views)
    own = sum(len(part) * repeats for part, repeats in parts_of(source))
    data = f"{config.data}+{own / len(files):.9f}*{folder}"
    if len(split_parts(data)) != len(parts_of(source)) + 1:
        raise ValueError(f"--data {config.data!r}, --output {str(config.output)!r}: with --prior no name may hold a +")
    return data


def _remove_others(folder: Path, files: list[Painted]) -> None:
    """Pictures of a killed run that was to paint more, which would be trained on."""
    for file in {*folder.glob("[0-9]*.png")} - {one.file for one in files}:
        file.with_suffix(".txt").unlink(missing_ok=True)
        file.unlink()


def _missing(files: list[Painted]) -> int:
    return sum(not one.is_there() for one in files)
