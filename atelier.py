"""The front door: `atelier PROMPT` paints, and a first word that is a command is that command.

Nothing heavy is imported here: a room is loaded when its command is called.
"""

import random
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

BATCH = 8  # pictures painted at once: the memory of any --count


@dataclass(frozen=True)
class Paint:
    """Paints pictures from a prompt."""

    prompt: tyro.conf.Positional[str]
    """What to paint, such as "an oil painting of a fox"."""
    out: Path = Path("picture.png")
    """The file to write; several pictures get -1, -2, … before its ending."""
    model: str | None = None
    """Model folder, training run or hub id; the bundled model by default."""
    seed: int | None = None
    """Picture i is painted from the noise of seed + i; random by default."""
    count: int = 1
    """How many pictures; 8 at a time are in memory, or fewer where a GPU has too little."""
    steps: int | None = None
    """Sampler steps; the model's own by default."""
    guidance: float | None = None
    """Guidance scale, 1 is none; the model's own by default."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest noise level (sigma) at which to guide; the model's own by default, mostly all."""
    negative: str | None = None
    """What to steer away from."""
    sampler: str | None = None
    """ddim, euler, heun, dpmpp_2m, unipc or another of `ldm.samplers.SAMPLERS`; the model's own by default."""
    classifier: Path | None = None
    """A classifier's run (train/classifier.py), which guides to the class that the prompt names."""
    classifier_scale: float = 1.0
    """Of its guidance; 1 is the class's own distribution."""
    lora: tuple[str, ...] = ()
    """LoRA files, folders, training runs, hub ids or "bundled-student"; several add up."""
    lora_weight: tuple[float, ...] = (1.0,)
    """Of each --lora, or one for all: 1 as it was trained."""
    embedding: tuple[str, ...] = ()
    """Learned words (textual inversion) for use in the prompt: files, folders, training runs, hub ids."""
    image: Path | None = None
    """A picture to begin from, instead of noise alone."""
    mask: Path | None = None
    """Of --image: white where to paint, black where it stays."""
    strength: float | None = None
    """Share of the steps that are run on --image: at 1 little of it is left. By default 0.8, with --mask 1."""
    width: int | None = None
    """In pixels. By default the model's own; with --image in its ratio, of about as many pixels as the model's own."""
    height: int | None = None
    """In pixels."""
    device: str | None = None
    """cuda, mps or cpu; the first of these that is there by default."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights: by default bfloat16 on a CUDA GPU that has it, else float32."""

    def run(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count {self.count}: expected at least 1")
        if not self.out.suffix:
            raise ValueError(f"--out {self.out} has no ending that names a format: for instance {self.out}.png")
        from PIL import Image

        ending = self.out.suffix.lower()
        if Image.registered_extensions().get(ending) not in Image.SAVE:  # known before painting, not after it
            raise ValueError(f"--out {self.out}: {ending} names no format of pictures: expected .png, for instance")
        if self.mask and not self.image:
            raise ValueError(f"--mask {self.mask} says where to paint on a picture: give --image, too")
        begin, mask = (_picture(flag, file) for flag, file in (("--image", self.image), ("--mask", self.mask)))
        from pipelines.device import as_many_as_fit
        from pipelines.image import trained_sides

        pipe = _opened(self)
        seed = random.randrange(2**31) if self.seed is None else self.seed
        where = f"{pipe.device.type}, {str(pipe.dtype).removeprefix('torch.')}"
        print(f"painting on {where}, seed {seed}", file=sys.stderr)
        width, height = self.width, self.height
        if begin is not None:
            width, height = trained_sides(begin, pipe.model.size, pipe.model.vae.downscale, width, height)

        def paint(first: int, pictures: int) -> Any:
            return pipe(
                self.prompt,
                height=height,
                width=width,
                steps=self.steps,
                guidance_scale=self.guidance,
                guidance_interval=self.guidance_interval,
                negative_prompt=self.negative,
                num_images_per_prompt=pictures,
                seed=seed + first,
                sampler=self.sampler,
                classifier=self.classifier,
                classifier_scale=self.classifier_scale,
                image=begin,
                mask=mask,
                strength=self.strength,
            ).images

        self.out.parent.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(as_many_as_fit(self.count, BATCH, paint), 1):
            file = self.out if self.count == 1 else self.out.with_stem(f"{self.out.stem}-{i}")
            image.save(file)
            print(file)


@dataclass(frozen=True)
class Web:
    """Opens a page to paint on, in a browser."""

    model: tyro.conf.Positional[str | None] = None
    """Model folder, training run or hub id; the bundled model by default."""
    lora: tuple[str, ...] = ()
    """As of `paint`."""
    lora_weight: tuple[float, ...] = (1.0,)
    """Of each --lora, or one for all."""
    embedding: tuple[str, ...] = ()
    """As of `paint`."""
    device: str | None = None
    """cuda, mps or cpu; the first of these that is there by default."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """As of `paint`."""
    host: str = "127.0.0.1"
    """Address to listen on: 0.0.0.0 lets other machines in, too."""
    port: int = 7860

    def run(self) -> None:
        from pipelines.web import page

        pipe = _opened(self)
        pipe.set_progress_bar_config(disable=True)
        page(pipe).launch(server_name=self.host, server_port=self.port)


def _opened(command: Paint | Web) -> Any:
    """The pipeline of a command, with its LoRAs and learned words."""
    from pipelines import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained(command.model, device=command.device, dtype=command.dtype)
    pipe.load_loras(command.lora, command.lora_weight)
    for learned in command.embedding:
        print(f"learned {', '.join(pipe.load_embedding(learned))}", file=sys.stderr)
    return pipe


def _picture(flag: str, file: Path | None) -> Any:
    """The picture of a flag; None when there is none."""
    if file is None:
        return None
    from PIL import Image

    from pipelines.image import UNREADABLE

    try:
        picture = Image.open(file)
        picture.load()
        return picture
    except UNREADABLE as error:
        raise ValueError(f"{flag} {file} can't be opened as a picture ({error})") from None


@dataclass(frozen=True)
class Show:
    """Shows what a source of captioned pictures holds, and three of its rows."""

    data: tyro.conf.Positional[str]
    """Folder, .parquet or .tar files, data set of the hub, "shapes" or "pictograms"; several joined by +."""
    size: int = 128
    """Side in pixels to which pictures are brought."""
    sheet: Path | None = None
    """Write a contact sheet of 32 pictures to this file."""
    font: str | None = None
    """The colour emoji font's file, for pictograms."""

    def run(self) -> None:
        from train.data import read
        from train.grid import grid
        from train.sources import describe, open_source

        if self.size < 1:
            raise ValueError(f"--size {self.size}: expected at least 1")
        source = open_source(self.data, self.size, font=self.font)
        print(describe(source, self.size))
        if self.sheet:
            count = min(32, len(source))
            chosen = [i * len(source) // count for i in range(count)]
            (rows,) = read(source, self.size, chosen, batch=count, workers=0, progress=None)
            whole = [(one.pixels, (*one.captions, "(no caption)")[0]) for one in rows if one.pixels is not None]
            if not whole:
                raise ValueError(f"none of {count} pictures can be read, for instance {rows[0].error}")
            grid([pixels for pixels, _ in whole], [said for _, said in whole], columns=8).save(self.sheet)
            print(self.sheet)


@dataclass(frozen=True)
class Check:
    """Decodes every picture of a source and says what was found, and whether a training would start (exit status)."""

    data: tyro.conf.Positional[str]
    """Folder, .parquet or .tar files, data set of the hub, remote path, "shapes", "pictograms"; several joined by +."""
    size: int = 512
    """Side in pixels to which pictures would be brought."""
    buckets: bool = False
    """Show the aspect-ratio buckets, too."""
    multiple: int = 64
    """Of the buckets' sides, in pixels: the autoencoder's factor times the U-Net's; Stable Diffusion's is 64."""
    batch: int = 32
    """Pictures of an update; buckets with fewer are merged."""
    template: str = ""
    """Makes the captions of columns or fields, such as "a photo of {label}"."""
    streaming: bool = False
    """Read .parquet and .tar files and sets of the hub as they come, without a copy on the disk."""
    text_encoder: str | None = None
    """Model folder whose tokens are counted; the bundled one by default. "none": pictures need no captions."""
    workers: int = 2
    """That decode."""
    font: str | None = None
    """The colour emoji font's file, for pictograms."""

    def run(self) -> None:
        from train.check import check
        from train.config import at_least_one

        at_least_one(self, "size", "multiple", "batch")
        if not check(**vars(self)):
            sys.exit(1)


@dataclass(frozen=True)
class Cache:
    """Computes the latents of a source beforehand, as train/ldm.py does when it starts; two may run at once."""

    data: tyro.conf.Positional[str]
    """As --data of train/ldm.py."""
    vae: str = "bundled"
    """Autoencoder: model folder, "bundled", "none" or "grey"."""
    size: int | None = None
    """Side of the pictures in pixels; what the autoencoder was trained on by default."""
    text_encoder: str = ""
    """Model folder or "bundled": compute its states of the captions, too, where they are too many for memory. "none":
    for a model that is told nothing, which takes pictures without a caption as well."""
    buckets: bool = False
    """Aspect-ratio buckets."""
    multiple: int = 0
    """Of the buckets' sides, in pixels: the autoencoder's factor times the U-Net's; 0: the autoencoder's alone."""
    batch: int = 32
    """Pictures of an update; buckets with fewer are merged."""
    template: str = ""
    """Makes the captions of columns or fields, such as "a photo of {label}"."""
    cache: Path = Path("cache")
    """Folder for the latents."""
    workers: int = 2
    """Processes that read pictures."""
    font: str | None = None
    """The colour emoji font's file, for pictograms."""
    views: int = 1
    """How often each drawn pictogram is drawn."""

    def run(self) -> None:
        from train.config import at_least_one
        from train.fill import fill

        at_least_one(self, "size", "batch", "views")
        fill(**vars(self))


@dataclass(frozen=True)
class Data:
    """Shows what a source of captioned pictures holds, checks all of it, or computes its latents beforehand."""

    command: (
        Annotated[Show, tyro.conf.subcommand("show", prefix_name=False)]
        | Annotated[Check, tyro.conf.subcommand("check", prefix_name=False)]
        | Annotated[Cache, tyro.conf.subcommand("cache", prefix_name=False)]
    )

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True)
class Evaluate:
    """Measures pictures: against a reference (--reference), or whether they are what was asked for, by a judge, and of
    pictograms by the closest drawing. Several processes share the painting: accelerate launch -m atelier evaluate …"""

    model: tyro.conf.Positional[str] = "bundled"
    """Model folder, training run or hub id; with --reference also a folder of pictures."""
    out: Path = Path("evaluation")
    """Folder for the samples, the sheets and the figures; a run that was killed goes on there."""
    reference: str = ""
    """Real pictures with captions to compare with: folder, .parquet or .tar file, as --data of a training."""
    metrics: str = "fid,kid,precision,recall"
    """Of fid, kid, precision, recall, clip, diversity, accuracy (by a recogniser as --extractor) and bpd."""
    extractor: str = "inception"
    """Whose features are compared: inception, inception:FILE, a run of train/recogniser.py, train/classifier.py or
    train/clip.py, bundled, a network of transformers (folder, hub id), a CLIP of open_clip (ARCHITECTURE:WEIGHTS). Only
    Inception's distance is called FID."""
    clip: str = ""
    """The CLIP of the CLIP score, likewise; the extractor by default."""
    samples: int | None = None
    """How many; by default all of a folder, of a model 10,000, on a CPU 1,000."""
    template: str = ""
    """Makes the captions of the reference's columns or fields, such as "a photo of {label}"; with a judge of classes
    the prompts of their names."""
    lora: tuple[str, ...] = ()
    """LoRAs that are merged into the model, as of `paint`."""
    lora_weight: tuple[float, ...] = (1.0,)
    """Of each --lora, or one for all."""
    training: str = ""
    """What the model was trained on: each sample's nearest picture there is looked for, and shown."""
    size: int | None = None
    """Side to which the pictures of a folder are brought; their own by default."""
    steps: int | None = None
    """Sampler steps; the model's own by default."""
    guidance: float | None = None
    """Guidance scale; the model's own by default."""
    guidance_interval: tuple[float, float] | None = None
    """As of `paint`."""
    sampler: str | None = None
    """As of `paint`."""
    batch: int = 32
    """Pictures painted at once."""
    prompts: int | None = None
    """Without --reference: prompts of training pairs, and half as many of held-out pairs; of classes, all together; by
    default 100."""
    judge: Path | None = None
    """A run of train/recogniser.py (or train/classifier.py --preset clean) that says what pictures show."""
    seed: int = 0
    """Decides the prompts; picture i is painted from the noise of seed · 1,000,000 + i."""
    cache: Path = Path("cache")
    """Folder for the features of references."""
    workers: int = 2
    """Processes that read pictures."""
    font: str | None = None
    """The colour emoji font's file, for pictograms."""

    def run(self) -> None:
        from train.samples import Painting

        how = {field.name: getattr(self, field.name) for field in fields(Painting)}
        painting = Painting(**how)
        if self.reference:
            if self.judge or self.prompts is not None:
                other = f"--judge {self.judge}" if self.judge else f"--prompts {self.prompts}"
                raise ValueError(
                    f"{other} is for an evaluation without --reference: with one, --extractor {self.judge or 'RUN'} "
                    "--metrics accuracy has a judge's verdict, and --samples is how many"
                )
            from train.measure import Measuring, measure
            from train.samples import is_model

            said = [name.replace("_", "-") for name in how if getattr(self, name) != getattr(Evaluate, name)]
            if said and not is_model(self.model):
                raise ValueError(f"--{said[0]} is for a model that paints, and {self.model} is a folder of pictures")
            same = {name: value for name, value in vars(self).items() if name in Measuring.__dataclass_fields__}
            measure(Measuring(painting=painting, **same))
            return
        given = {name for name, value in vars(self).items() if value != getattr(Evaluate, name)}
        used = {"model", "out", "prompts", "judge", "lora", "lora_weight", *how}
        classes = False
        if self.judge:
            from train.judge import answers_of, evaluate_classes, open_judge

            classes = "object" not in answers_of(open_judge(self.judge))
        used |= {"template"} if classes else {"cache", "font"}
        if stray := given - used:
            compared = "a comparison with a reference: give --reference, too"
            why = "models of pictograms: leave it out" if stray <= {"cache", "font"} else compared
            raise ValueError(f"--{min(stray).replace('_', '-')} is for {why}")
        asked: dict[str, Any] = {"painting": painting, "lora": self.lora, "lora_weight": self.lora_weight}
        asked["prompts"] = 100 if self.prompts is None else self.prompts
        if self.judge and classes:
            evaluate_classes(self.model, self.judge, self.out, template=self.template, **asked)
            return
        from train.evaluate import evaluate

        options: dict[str, Any] = {name: getattr(self, name) for name in ("font", "judge", "cache")}
        evaluate(self.model, self.out, **options, **asked)


@dataclass(frozen=True)
class Bits:
    """Measures what pictures cost under a model, in bits for each value of a pixel: a bound, the lower the better."""

    model: tyro.conf.Positional[str]
    """Model folder, training run or hub id."""
    data: str
    """Pictures that the model has not seen, and their captions: folder, .parquet file, "shapes" or "pictograms"."""
    method: Literal["elbo", "consistency", "flow"] = "elbo"
    """The variational bound over the rows of the beta table, in one form or the other (docs/equations.md); or the
    probability flow's likelihood, for any path."""
    count: int = 256
    """Pictures, drawn at random."""
    rows: int = 100
    """Of the beta table, asked for each picture; the rest is estimated from them."""
    tolerance: float = 1e-3
    """Of the solver of the flow."""
    batch: int = 32
    """Pictures at once; those of a batch share the rows that they ask."""
    seed: int = 0

    def run(self) -> None:
        from train.bits import measure_bits

        found = measure_bits(**vars(self))
        print("{bits_per_dim:.3f} ± {standard_error:.3f} bits per dimension, {pictures} pictures".format(**found))
        terms = [f"{name} {found[name]:.3f}" for name in ("reconstruction", "prior", "denoising") if name in found]
        if terms:
            print("the terms of the bound: " + ", ".join(terms))


COMMANDS = {"paint": Paint, "web": Web, "data": Data, "evaluate": Evaluate, "bits": Bits}
Command = (
    Annotated[Paint, tyro.conf.subcommand("paint")]
    | Annotated[Web, tyro.conf.subcommand("web")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Bits, tyro.conf.subcommand("bits")]
)


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in COMMANDS and arguments[0] not in ("-h", "--help"):
        arguments = ["paint", *arguments]  # anything else is a prompt
    if arguments[:1] == ["data"] and arguments[1:2] and arguments[1] not in ("show", "check", "cache", "-h", "--help"):
        arguments.insert(1, "show")
    from train.config import gathered

    command = tyro.cli(
        Command,
        prog="atelier",
        args=gathered(arguments, Paint, Web, Evaluate),
        config=(tyro.conf.OmitArgPrefixes,),
        description='Paints from a sentence: atelier "an oil painting of a fox" --out fox.png',
    )
    try:
        command.run()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which is not imported only to ask
            raise
        sys.exit(f"error: {error}\nTake a smaller --batch, or a smaller model or --size")


if __name__ == "__main__":
    main()
