"""Pictures that keep a word what it is while a model learns something new (DreamBooth, arXiv:2208.12242, section 3.3).

They are painted by the model itself before it is trained, and are then half of what it sees.
"""

from accelerate import Accelerator
from tqdm import tqdm

from pipelines.files import checkpoints
from pipelines.folder import Model
from pipelines.text_to_image import TextToImagePipeline
from train.settings import Config
from train.sources import open_source, parts_of, split_parts

BATCH = 8  # pictures painted at once


def with_prior(model: Model, config: Config, size: int, accelerator: Accelerator) -> str:
    """Paints the prior's pictures that are not there yet; --data with them, of equal share, as its last part.

    Raises ValueError when they are lost from a run that has learnt already.
    """
    folder = config.output / "prior"
    files = [folder / f"{i:05d}.png" for i in range(config.prior_pictures)]
    missing = [i for i, file in enumerate(files) if not file.with_suffix(".txt").is_file()]
    if missing and checkpoints(config.output):
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(files)} pictures, and the model is no longer what it was"
        )
    if accelerator.is_main_process and missing:
        folder.mkdir(parents=True, exist_ok=True)
        pipe = TextToImagePipeline(model)
        pipe.set_progress_bar_config(disable=True)
        for start in tqdm(
            range(missing[0] // BATCH * BATCH, len(files), BATCH), desc=f"painting {config.prior!r}", unit="batch"
        ):
            count = min(BATCH, len(files) - start)
            call = {"seed": config.seed + start, "num_images_per_prompt": count, "height": size, "width": size}
            for file, image in zip(files[start:], pipe(config.prior, **call).images, strict=False):
                image.save(file)
                file.with_suffix(".txt").write_text(config.prior)  # written last: says that the picture is whole
    accelerator.wait_for_everyone()
    source = open_source(config.data, size, font=config.font, views=config.views)
    own = sum(len(part) * repeats for part, repeats in parts_of(source))
    data = f"{config.data}+{own / len(files):.9f}*{folder}"
    if len(split_parts(data)) != len(parts_of(source)) + 1:
        raise ValueError(f"--data {config.data!r}, --output {str(config.output)!r}: with --prior no name may hold a +")
    return data
