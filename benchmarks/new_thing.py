"""Teaches the bundled model something new from 20 pictures, and asks for it, and for the old, before and after:

    python benchmarks/new_thing.py --judge runs/pictograms-recogniser

Draws 20 pictures of an object that the model was never shown, plain and in three styles, with captions of one's own
("an oil painting of zog the dragon on a red background"); runs `accelerate launch train/ldm.py` on the folder as a user
would, who names a few old things that shall stay as they are (--prior); then asks for it in the combinations of style
and ground that are not among the 20, two styles it was never seen in included, and for old objects, of which none was
named. A sample is right when, of all objects painted by the data's own code in that style on that ground, its own is
the nearest (train/evaluate.py); whether the style is the one asked for, the judge says, which was shown other objects
only. Writes OUT.json, and a sheet of pictures as OUT.png.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from PIL import Image

from benchmarks.files import write_aside
from pipelines import TextToImagePipeline
from train.evaluate import closest_object, draw_rows, judged, open_pictogram_judge
from train.extractors import open_extractor
from train.grid import grid
from train.launch import errors_said
from train.machine import described
from train.pictograms import GROUNDS, STYLES, Row, captions, chosen, paint
from train.samples import model_digest

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {  # the grounds of the 20 pictures, by style
    "plain": tuple(GROUNDS),
    "oil": ("white", "red", "green", "purple"),
    "pencil": ("grey", "yellow", "blue", "pink"),
    "watercolour": ("white", "yellow", "green", "pink"),
}
# Named by --prior; what is asked for afterwards is other things.
KEPT = ("fox", "house", "rose", "boat", "owl", "apple")


@dataclass(frozen=True)
class Options:
    judge: Path  # a run of train/recogniser.py --preset pictograms
    model: str = "bundled"
    object: str = "dragon"  # in train/objects.csv, but not among those that the model knows
    name: str = "zog the dragon"  # as captions call it
    prior: bool = True  # name KEPT, in every style, by --prior
    old: int = 100  # pairs trained on that are asked for before and after, and half as many held out
    flags: str = "--updates 600 --batch-size 16"  # more of train/ldm.py
    out: Path = ROOT / "benchmarks" / "results" / "new_thing.json"
    work: Path = Path("runs/new-thing")  # a folder in it for each call: the 20 pictures, the run


def caption(options: Options, style: str, ground: str) -> str:
    return f"{STYLES[style]} of {options.name} on a {ground} background"


def unseen(options: Options) -> list[Row]:
    """What is asked for afterwards: every combination of style and ground that is not among the 20."""
    return [Row(options.object, s, g, 0) for s in STYLES for g in GROUNDS if g not in SHOWN.get(s, ())]


def draw(options: Options) -> list[Image.Image]:
    """The 20 pictures and their captions, as files in a folder."""
    folder = options.work / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    size = TextToImagePipeline.from_pretrained(options.model).model.size
    images = []
    for i, (style, ground) in enumerate((style, ground) for style, grounds in SHOWN.items() for ground in grounds):
        images.append(paint(options.object, style, ground, size, 500 + i))
        images[-1].save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption(options, style, ground) + "\n", encoding="utf-8")
    return images


def tune(options: Options) -> float:
    """Seconds that the command takes, from its start to its end."""
    words = ["--data", str(options.work / "pictures"), "--model", options.model, "--output", str(options.work / "run")]
    words += ["--cache", str(options.work / "cache"), *shlex.split(options.flags)]
    if options.prior:
        named = (captions(thing, style, "white")[0] for style in STYLES for thing in KEPT)
        words += ["--prior", *(caption.removesuffix(" on a white background") for caption in named)]
    print("accelerate launch train/ldm.py", shlex.join(words))
    began = time.perf_counter()
    launcher = Path(sys.executable).with_name("accelerate")
    if code := subprocess.run([str(launcher), "launch", str(ROOT / "train" / "ldm.py"), *words]).returncode:
        raise ValueError(f"the training ended with exit status {code}: what it said is above")
    return time.perf_counter() - began


def asked(pipe: TextToImagePipeline, prompts: list[str]) -> list[Image.Image]:
    pipe.set_progress_bar_config(disable=True)
    return [image for i in range(0, len(prompts), 8) for image in pipe(prompts[i : i + 8], seed=i).images]


def share(images: list[Image.Image], rows: list[Row], objects: tuple[str, ...]) -> float:
    found = [closest_object(image, row, objects) == row.object for image, row in zip(images, rows, strict=True)]
    return sum(found) / len(found)


def ask(options: Options, model: str, rows: list[Row], known: tuple[str, ...]) -> tuple[dict[str, Any], list, list]:
    """The shares of right samples, and of some the pictures and their prompts."""
    judge = open_pictogram_judge(options.judge, known)
    pipe = TextToImagePipeline.from_pretrained(model)
    objects = (*known, options.object)
    prompts = [caption(options, row.style, row.ground) for row in rows]
    images = asked(pipe, prompts)
    found: dict[str, Any] = {"new": share(images, rows, objects), "new_prompts": len(rows)}
    found["new_style"] = judged(judge, images, rows)["style"]
    for style in dict.fromkeys(row.style for row in rows):
        of_style = [i for i, row in enumerate(rows) if row.style == style]
        found[f"new_{style}"] = share([images[i] for i in of_style], [rows[i] for i in of_style], objects)
    chosen = range(0, len(rows), max(1, len(rows) // 8))[:8]
    shown, said = [images[i] for i in chosen], [prompts[i] for i in chosen]
    for split, count in (("train", options.old), ("held_out", options.old // 2)):
        rows = draw_rows(split, count, tuple(name for name in known if name not in KEPT), 0, None)
        prompts = [captions(*row[:3])[0] for row in rows]
        images = asked(pipe, prompts)
        found[f"old_{split}"], found[f"old_{split}_prompts"] = share(images, rows, objects), len(rows)
        found[f"old_{split}_pairs"] = len({row[:2] for row in rows})
        found[f"old_{split}_style"] = judged(judge, images, rows)["style"]
        if split == "train":
            shown, said = shown + images[:8], said + prompts[:8]
    return found, shown, said


def main(options: Options) -> dict[str, Any]:
    known = chosen()
    if options.object in known:
        raise ValueError(f"--object {options.object}: the bundled model knows it; take one that is not everyday")
    if options.old < 2:
        raise ValueError(f"--old {options.old}: expected at least 2")
    open_pictogram_judge(options.judge, known)
    last = max((int(folder.name) for folder in options.work.glob("[0-9][0-9][0-9]")), default=-1)
    options = replace(options, work=options.work / f"{last + 1:03d}")  # a new one: the time is that of a whole training
    images = draw(options)
    sheet, said = images[:8], [caption(options, "plain", ground) for ground in SHOWN["plain"]]
    result: dict[str, Any] = {"object": options.object, "pictures": len(images), "flags": options.flags}
    result["prior"] = KEPT if options.prior else ()
    result |= {"machine": described(), "judge": open_extractor(str(options.judge)).digest}
    result["weights"] = model_digest(TextToImagePipeline.from_pretrained(options.model))
    rows = unseen(options)
    for when, model in {"before": options.model, "after": str(options.work / "run")}.items():
        if when == "after":
            result["seconds"] = tune(options)
        result[when], pictures, prompts = ask(options, model, rows, known)
        sheet, said = sheet + pictures, said + prompts
        print(
            f"{when}:",
            ", ".join(f"{k} {v:.1%}" for k, v in result[when].items() if not k.endswith(("prompts", "pairs"))),
        )
        write_aside(options.work / "new_thing.json", result)  # at once: what comes next may fail
    write_aside(options.out, result)
    grid(sheet, said, columns=8).save(options.out.with_suffix(".png"))
    print(f"{result['seconds'] / 60:.1f} minutes of training; figures and pictures in {options.out} and .png")
    return result


if __name__ == "__main__":
    with errors_said():
        main(tyro.cli(Options))
