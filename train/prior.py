"""Pictures that keep a word what it is while a model learns something new (DreamBooth, arXiv:2208.12242, section 3.3).

They are painted by the model itself before it is trained, and are then half of what it sees. Picture i has the seed
--seed + i and is always painted with the same others: any number of processes paint the same pictures.
"""

from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from pipelines.files import checkpoints
from pipelines.folder import Model
from pipelines.text_to_image import TextToImagePipeline
from train.settings import Config
from train.sources import open_source, parts_of, split_parts

BATCH = 8  # pictures painted at once


def with_prior(model: Model, config: Config, size: int, accelerator: Accelerator) -> str:
    """Paints the prior's pictures that are not there yet, each process its share; --data with them, of equal share, as
    its last part.

    Raises ValueError when they are lost from a run that has learnt already.
    """
    folder = config.output / "prior"
    files = [folder / f"{i:05d}.png" for i in range(config.prior_pictures)]
    missing = _missing(files)
    if missing and checkpoints(config.output):
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(files)} pictures, and the model is no longer what it was"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Shares of all batches, not of the missing ones: those are fewer for a process that looks when others have begun.
    mine = range(0, len(files), BATCH)[accelerator.process_index :: accelerator.num_processes]
    share = [start for start in mine if _missing(files[start : start + BATCH])]
    pipe = TextToImagePipeline(model)
    pipe.set_progress_bar_config(disable=True)
    quiet = not accelerator.is_main_process or not share
    for start in tqdm(share, desc=f"painting {config.prior!r}", unit="batch", disable=quiet):
        batch = files[start : start + BATCH]
        call = {"seed": config.seed + start, "num_images_per_prompt": len(batch), "height": size, "width": size}
        for file, image in zip(batch, pipe(config.prior, **call).images, strict=True):
            image.save(file)
            file.with_suffix(".txt").write_text(config.prior)  # written last: says that the picture is whole
    accelerator.wait_for_everyone()
    if lacking := _missing(files):
        raise ValueError(
            f"{folder} lacks {len(lacking)} of {len(files)} pictures, which other processes have painted: --output has "
            "to be a folder that all of them share"
        )
    source = open_source(config.data, size, font=config.font, views=config.views)
    own = sum(len(part) * repeats for part, repeats in parts_of(source))
    data = f"{config.data}+{own / len(files):.9f}*{folder}"
    if len(split_parts(data)) != len(parts_of(source)) + 1:
        raise ValueError(f"--data {config.data!r}, --output {str(config.output)!r}: with --prior no name may hold a +")
    return data


def _missing(files: list[Path]) -> list[Path]:
    return [file for file in files if not file.with_suffix(".txt").is_file()]
