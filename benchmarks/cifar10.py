"""CIFAR-10 at equal time: what presets of train/ldm.py reach beside the first of them, the baseline.

    python benchmarks/cifar10.py --data cifar10-train.parquet --test cifar10-test.parquet \\
        --extractor runs/cifar10-recogniser               an hour of training on a core each, side by side; the painting
                                                          after it takes longer: the baseline needs 50 guided steps
    python benchmarks/cifar10.py … --extractor inception  the FID, where the reader has, or may fetch, those weights
    python benchmarks/cifar10.py … --minutes 0 --updates 250000 100000 250000 250000 --samples 10000 --seeds 0 1 2 \\
        --sides cifar10 cifar10-fast cifar10-unconditional cifar10-without-attention     on a GPU, for days

Each side's rate is measured first, all sides at once; it then gets the updates that fill --minutes at that rate
(--minutes 0: those of --updates, or of its preset), so that its learning rate ends when the time does. The sides train
together, each in a process of one thread on a core of its own, with equally busy neighbours: by the clock as many at a
time as there are cores; where there is one core, or a GPU, one after the other. All compute in --precision.
Time is that of the updates: what all do beside them (checkpoints, validation, a sample, decoding the data set once) is
left out; an autoencoder's own training and encoding with it count, --autoencoder says what they took. A text encoder,
which says ten captions once, costs nothing. Arithmetic is that of all matrix products and convolutions of an update,
the backward pass and the optimizer included.

Fréchet distances are of equally many samples, of the same prompts and seeds, each side painting as its preset does; to
the test set at every checkpoint, in the end to the training pictures and to those held out of them (a fifth), too, and
with the noise of every seed. The floor is that of as many real training pictures; an extractor that has learnt from
those (a recogniser) tells them from test pictures better than others would. Captions are the set's own, or those that
--template makes.

Writes OUT.json (settings, machine, every number), OUT.csv, OUT.png (curves) and OUT_samples.png. What was begun is kept
in --work, and the same command goes on with it.
"""

import csv
import io
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from benchmarks.curves import DISTANCES, plot, said, sheet, verdicts
from benchmarks.files import RESULTS
from benchmarks.packages import needs
from benchmarks.timed import calibrate, learn, places, together
from train.launch import MixedPrecision, errors_said
from train.machine import described

EIGHTHS = (1, 2, 4, 8)  # of the training, after which samples are measured
CALIBRATION = 90.0  # seconds of training from which a rate is taken
SEED = 0  # of what is held out


@dataclass(frozen=True)
class Options:
    """Settings of the comparison."""

    data: str  # training pictures with captions or classes: .parquet, folder or hub set, as of train/ldm.py
    test: str  # test pictures
    extractor: str  # as of `atelier evaluate`: a run of train/recogniser.py, inception, inception:FILE …
    sides: tuple[str, ...] = ("cifar10", "cifar10-fast")  # presets of train/ldm.py, the baseline first
    minutes: float = 60.0  # of training; 0: as many updates as the preset has
    precision: MixedPrecision = "bf16"  # of all sides
    updates: tuple[int, ...] = ()  # of each side, instead of --minutes
    samples: int = 500  # of every checkpoint that is measured
    seeds: tuple[int, ...] = (0,)  # of the samples in the end; the first one's make the curves
    batch: int = 50  # painted at once
    template: str = ""  # makes captions of columns, such as "a photo of a {label}"
    autoencoder: tuple[float, float] | None = None  # minutes and TFLOP that the one of sides in latents took
    out: Path | None = None  # without ending; by default results/cifar10_EXTRACTOR
    work: Path = Path("runs/cifar10-benchmark")

    @property
    def files(self) -> Path:
        """Where the results go, without ending."""
        return self.out or RESULTS / f"cifar10_{Path(self.extractor.partition(':')[0]).name}"


@dataclass(frozen=True)
class Side:
    """A preset in this comparison, and where its run lies."""

    name: str
    config: Any  # train.settings.Config
    folder: Path
    minutes: float = 0.0  # spent before, on an autoencoder
    gflop: float = 0.0

    @property
    def global_batch(self) -> int:
        return self.config.batch_size * self.config.accumulate

    def updates(self) -> list[int]:
        """Those whose checkpoints are measured."""
        return [eighth * self.config.checkpoint_every for eighth in EIGHTHS]


def prepare(options: Options) -> dict[str, str]:
    """Training, held-out and test pictures as parquet files, and a folder of as many training pictures as samples."""
    import datasets
    from PIL import Image
    from tqdm import tqdm

    from train.aside import written_aside
    from train.data import fit, permutation
    from train.hashes import FileHashes
    from train.pictures import digest
    from train.sources import open_source

    try:
        given, test = (open_source(name, 32, template=options.template) for name in (options.data, options.test))
    except ValueError as error:
        raise ValueError(
            f"{error}. CIFAR-10 is at https://www.cs.toronto.edu/~kriz/cifar.html and, as parquet files, among the "
            "sets of the Hugging Face hub (uoft-cs/cifar10)"
        ) from None
    hashes = FileHashes(options.work / "cache")
    known = [source.fingerprint(hashes) for source in (given, test)]
    folder = (options.work / f"data-{digest(*known, options.template)[:8]}").resolve()
    order = permutation(len(given), SEED, -1).tolist()
    held = len(order) // 5
    if options.samples > len(order) - held:
        raise ValueError(f"--samples {options.samples}: expected at most {len(order) - held}, the training pictures")
    parts = {"test": (test, range(len(test))), "train": (given, order[held:]), "validation": (given, order[:held])}
    files = {name: folder / f"{name}.parquet" for name in parts}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (source, rows) in parts.items():
        if files[name].is_file():
            continue
        table: dict[str, list] = {"image": [], "text": []}
        for i in tqdm(rows, desc=f"decoding {name}", unit="picture"):
            example, png = source[i], io.BytesIO()
            Image.fromarray(fit(example.image, min(example.image.size))).save(png, "png")
            table["image"].append({"bytes": png.getvalue(), "path": None})
            table["text"].append(example.captions[0] if example.captions else "")
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        with written_aside(files[name]) as partial:
            datasets.Dataset.from_dict(table, features=features).to_parquet(str(partial))
    real = folder / f"real-{options.samples}"
    if not (real / "metadata.jsonl").is_file():
        real.mkdir(exist_ok=True)
        source, lines = open_source(str(files["train"]), 32), []
        for i in range(options.samples):
            source[i].image.save(real / f"{i:06d}.png")
            lines.append(json.dumps({"file_name": f"{i:06d}.png", "text": (*source[i].captions, "")[0]}) + "\n")
        (real / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: str(path) for name, path in (files | {"real": real}).items()}


def check(options: Options, places: int) -> None:
    """ValueError for what would be found out only after hours."""
    from train.extractors import open_extractor
    from train.measure import FEWEST
    from train.presets import PRESETS

    needs("matplotlib")
    if (unknown := set(options.sides) - set(PRESETS)) or not options.sides or options.minutes < 0:
        raise ValueError(
            f"--sides {' '.join(options.sides)}, --minutes {options.minutes:g}: expected at least 0 minutes, and "
            f"presets of train/ldm.py, not {min(unknown, default='none')}: {', '.join(PRESETS)}"
        )
    if len(set(options.sides)) < len(options.sides) or not options.seeds:
        raise ValueError(f"--sides {' '.join(options.sides)}: expected each once; and one of --seeds at least")
    if options.updates and (options.minutes or len(options.updates) != len(options.sides)):
        raise ValueError(
            f"--updates {' '.join(map(str, options.updates))}: expected --minutes 0, and a number for each of --sides"
        )
    if options.minutes and len(options.sides) > places and len(options.sides) % places:
        raise ValueError(
            f"{len(options.sides)} --sides on {places} cores: the last ones would train with idle neighbours, and make "
            f"more of their time. Expected {places} at most, a multiple of it, or --minutes 0"
        )
    latent = [name for name in options.sides if PRESETS[name].vae not in ("none", "grey")]
    if latent and options.autoencoder is None:
        raise ValueError(
            f"--sides {latent[0]} paints in latents: give --autoencoder MINUTES TFLOP, of its autoencoder's training "
            "and of encoding the pictures, which count"
        )
    if options.samples < FEWEST["kid"]:
        raise ValueError(f"--samples {options.samples}: expected {FEWEST['kid']} or more")
    open_extractor(options.extractor)


def sides_of(options: Options, train: str, where: Sequence[int | None]) -> list[Side]:
    """Each with its updates, a multiple of 8; a rate that was measured stays what it was."""
    from train.aside import written_aside
    from train.pictures import digest
    from train.presets import PRESETS
    from train.sources import first_captions, open_source

    caption = min(first_captions(open_source(train, 32)))
    sides, jobs = [], {}
    for i, name in enumerate(options.sides):
        config = replace(PRESETS[name], data=train, template="", workers=0, keep=20, mixed_precision=options.precision)
        if options.updates:
            config = replace(config, updates=options.updates[i])
        config = replace(config, prompts=("" if config.text_encoder == "none" else caption,))
        beside = options.sides if options.minutes else ()  # whose rates were measured together
        folder = options.work / f"{name}-{options.minutes:g}-{digest(repr(config), *beside)[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        config = replace(config, output=folder / "run", cache=options.work / "cache")
        spent = (0.0, 0.0)
        if config.vae not in ("none", "grey"):
            assert options.autoencoder, "check asks for it"
            spent = options.autoencoder
        sides.append(Side(name, config, folder, spent[0], 1000 * spent[1]))
        if options.minutes and not (folder / "rate.json").is_file():
            jobs[f"calibrating {name}"] = (calibrate, replace(config, output=folder / "calibration"), CALIBRATION)
    rates = together(jobs, where, options.work / "logs")
    ready = []
    for side in sides:
        if rate := rates.get(f"calibrating {side.name}"):
            with written_aside(side.folder / "rate.json") as partial:
                partial.write_text(f"{rate}\n")
        eighth = side.config.updates / 8
        if options.minutes:
            rate = json.loads((side.folder / "rate.json").read_text())
            eighth = rate * 60 * (options.minutes - side.minutes) / side.global_batch / 8
            print(f"{side.name}: {rate:.1f} pictures/s, {8 * round(eighth)} updates of {side.global_batch}")
        if eighth < 0.5:
            raise ValueError(f"--minutes {options.minutes:g} leave no 8 updates to {side.name}: give it more")
        every = round(eighth)
        ready.append(replace(side, config=replace(side.config, updates=8 * every, checkpoint_every=every)))
    return ready


def samples_of(options: Options, side: Side, update: int, seed: int) -> Path:
    return side.folder / f"samples-{update}-{seed}-{options.samples}"


def judge(
    options: Options, model: str, references: dict[str, str], out: Path, seed: int | None = None
) -> dict[str, Any]:
    """Metrics of a model's samples, or of a folder's pictures, the same ones for each reference."""
    from benchmarks.quality import Point, count_evaluations
    from pipelines import TextToImagePipeline
    from pipelines.files import newest
    from train.launch import start
    from train.measure import Measuring, measure
    from train.samples import Painting, is_model
    from train.sources import first_captions, open_source

    start()  # which sets the threads
    about: dict[str, Any] = {}
    pipe, config = None, newest(Path(options.extractor).expanduser()) / "config.json"
    judges = json.loads(config.read_text()) if config.is_file() else {}
    answers = dict(judges["tasks"]) if judges.get("_class_name") == "Recogniser" else {}
    asked = set().union(*(first_captions(open_source(reference, 32)) for reference in references.values()))
    says = set(answers) == {"class"} and asked <= set(answers["class"])
    if answers and not says:
        print(f"no accuracy: captions such as {min(asked)!r} are none of the classes of {options.extractor}")
    if is_model(model):
        pipe = TextToImagePipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        about["evaluations"] = count_evaluations(pipe, Point(model, None, None, None))
        about["parameters"] = sum(weight.numel() for weight in pipe.model.unet.parameters())
        says = says and pipe.model.is_told
    how = Measuring(model, "", "fid,kid,accuracy" if says else "fid,kid", options.extractor, samples=options.samples)
    painting = Painting(seed=options.seeds[0] if seed is None else seed, batch=options.batch)
    how = replace(how, painting=painting, out=out, workers=0)
    about["metrics"] = {}
    for name, reference in references.items():
        place = how.out if not about["metrics"] else out / name
        found = measure(replace(how, reference=reference, cache=options.work / "cache", out=place), pipe)
        about["metrics"][name] = found["metrics"]
        about |= {key: found[key] for key in ("extractor", "painted") if key in found}
        if pipe:  # the others are compared with what was painted for the first
            how, pipe = replace(how, model=str(out / "samples")), None
    return about


def named(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def write(options: Options, told: dict[str, Any]) -> None:
    """The files but for the sheet, and what they come to."""
    rows, sides, out = told["rows"], told["sides"], options.files
    out.parent.mkdir(parents=True, exist_ok=True)
    named(out, ".json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with open(named(out, ".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    floor = next(one["value"] for one in told["floor"]["test"] if one["metric"] in DISTANCES)
    names = {name: f"{name}, {side['evaluations']} evaluations a sample" for name, side in sides.items()}
    plot(rows, names, floor, options.samples, named(out, ".png"))
    print(f"{rows[0]['name']}, {options.samples} samples; of as many real training pictures to test: {floor:.2f}")
    for name, side in sides.items():
        last = [row for row in rows if (row["side"], row["update"]) == (name, side["updates"])]
        ends = [row for row in last if row["metric"] in DISTANCES and row["seed"] == options.seeds[0]]
        again = [row["value"] for row in last if row["metric"] in DISTANCES and row["reference"] == "test"]
        print(
            f"{name}: {ends[0]['minutes']:.1f} minutes, {ends[0]['pictures_seen']:,} pictures of "
            f"{side['gflop_of_a_picture']:.2f} GFLOP, {side['evaluations']} evaluations a sample: "
            + ", ".join(f"{row['reference']} {row['value']:.2f}" for row in ends)
            + (f"; test {min(again):.2f} to {max(again):.2f} over {len(again)} seeds" if len(again) > 1 else "")
        )
    for verdict in told["verdicts"]:
        print(said(verdict))
    print(f"{len(rows)} numbers in {out}.json and .csv, curves in .png, samples in {out.name}_samples.png")


def said_of(found: dict[int, dict[str, Any] | None]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(seed, reference, metric) of all that was measured."""
    for seed, about in found.items():
        for reference, metrics in (about or {"metrics": {}})["metrics"].items():
            for one in metrics:
                yield seed, reference, one


def main(options: Options) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the processes
    where, logs = places(), options.work / "logs"
    check(options, len(where))
    data = prepare(options)
    references = {name: data[name] for name in ("test", "train", "validation")}
    real = (judge, options, data["real"], references, Path(data["train"]).parent / f"real-{options.samples}-judged")
    floor = together({"real pictures": real}, where, logs)["real pictures"]  # first: the references are kept
    sides = sides_of(options, data["train"], where)
    times = together({f"training {s.name}": (learn, s.config, s.folder / "times.json") for s in sides}, where, logs)
    jobs: dict[str, tuple] = {}
    points = [(update, side) for side in sides for update in side.updates()]
    for update, side in sorted(points, key=lambda point: -point[0] / point[1].config.updates):
        model = side.config.output / f"checkpoint-{update:07d}"
        some = references if update == side.config.updates else {"test": data["test"]}
        for seed in options.seeds if update == side.config.updates else options.seeds[:1]:
            place = samples_of(options, side, update, seed)
            jobs[f"measuring {side.name} {update} {seed}"] = (judge, options, str(model), some, place, seed)
    measured = together(jobs, where, logs)

    rows: list[dict[str, Any]] = []
    about: dict[str, dict[str, Any]] = {}
    for update, side in points:
        time = times[f"training {side.name}"]
        mine = {seed: measured.get(f"measuring {side.name} {update} {seed}") for seed in options.seeds}
        found = mine[options.seeds[0]]
        point = {"side": side.name, "update": update, "pictures_seen": update * side.global_batch}
        point["minutes"] = side.minutes + time["seconds"][str(update)] / 60
        point["gflop"] = side.gflop + update * time["gflop"]
        for seed, reference, one in said_of(mine):
            kept = {key: one.get(key) for key in ("metric", "name", "value", "deviation", "samples")}
            rows.append(point | {"reference": reference, "seed": seed} | kept)
        about[side.name] = {key: found[key] for key in ("parameters", "evaluations", "painted")}
        about[side.name] |= {"gflop_of_a_picture": time["gflop"] / side.global_batch, "batch": side.global_batch}
        about[side.name] |= {"updates": update, "precision": side.config.mixed_precision or "no"}
        about[side.name]["guidance_interval"] = side.config.guidance_interval
    told = {"settings": {key: value for key, value in asdict(options).items() if key not in ("out", "work")}}
    told |= {"machine": described(), "cores": len(where), "sides": about}
    told |= {"floor": floor["metrics"], "extractor": floor["extractor"]}
    write(options, told | {"verdicts": verdicts(rows, list(about)), "rows": rows})
    first = options.seeds[0]
    folders = {side.name: samples_of(options, side, side.config.updates, first) / "samples" for side in sides}
    sheet(folders, named(options.files, "_samples.png"))


if __name__ == "__main__":
    with errors_said():
        main(tyro.cli(Options))
