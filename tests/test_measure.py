"""Measuring a model's samples: the same numbers from its pictures, from several processes, and after a kill."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import train.measure
from pipelines import TextToImagePipeline
from pipelines.files import save_network
from tests.conftest import tiny_text_encoder
from tests.test_bits import silent_model
from tests.test_extractors import CLIP
from tests.test_launch import ACCELERATE, ROOT, run
from tests.test_metrics import by_definition
from train.bits import measure_bits
from train.clip_model import load_clip, save_clip
from train.data import fit, to_unit
from train.extractors import Extractor, open_extractor
from train.measure import Measuring, measure
from train.metrics import Moments, frechet_distance, kernel_distance
from train.neighbours import in_words
from train.recogniser_model import Recogniser, RecogniserConfig, load_recogniser
from train.samples import NOISES, Painting, is_model
from vae.autoencoder import Identity

pytestmark = pytest.mark.usefixtures("in_process")

EVERY = "fid,kid,precision,recall,diversity"


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("extractor")
    network = Recogniser(RecogniserConfig(tasks=(("class", ("a", "b")),), sample_size=9, widths=(8, 6)))
    network(torch.randn(64, 3, 9, 9))
    save_network(network, folder)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of stripes in five colours, with captions."""
    folder, rng = tmp_path_factory.mktemp("reference"), np.random.default_rng(0)
    for i in range(20):
        colour = ("red", "green", "blue", "white", "black")[i % 5]
        image = Image.new("RGB", (20, 16), colour)
        image.paste("grey", (0, int(rng.integers(12)), 20, 16))
        image.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {colour} circle\n")
    return folder


@pytest.fixture(scope="module")
def measuring(
    model_folder: Path, reference: Path, extractor: Path, tmp_path_factory: pytest.TempPathFactory
) -> Measuring:
    return Measuring(
        model=str(model_folder),
        reference=str(reference),
        metrics=EVERY,
        extractor=str(extractor),
        samples=10,
        painting=Painting(steps=2, batch=4, seed=3),
        out=tmp_path_factory.mktemp("unused"),
        cache=tmp_path_factory.mktemp("cache"),
        workers=0,
    )


@pytest.fixture(scope="module")
def whole(measuring: Measuring, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The numbers of a run that nothing disturbed, and its folder."""
    out = tmp_path_factory.mktemp("whole")
    return measure(replace(measuring, out=out)), out


def values(result: dict) -> dict[str, float]:
    return {found["metric"]: found["value"] for found in result["metrics"]}


def painted(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (folder / "samples").glob("*.png")}


def test_every_number_says_what_it_hangs_on(whole: tuple[dict, Path], extractor: Path, capsys) -> None:
    result, out = whole
    assert json.loads((out / "metrics.json").read_text()) == result
    assert list(values(result)) == ["frechet", "kernel", "precision", "recall", "diversity"]  # not FID, not KID
    assert all(np.isfinite(value) for value in values(result).values())
    assert result["samples"] == 10
    assert result["size"] == 16
    assert result["reference"]["pictures"] == 20
    assert result["extractor"]["resize"].startswith("to 9×9, bicubic")
    assert result["painted"]["steps"] == 2
    assert result["painted"]["guidance"] == 3.0  # the model's own
    fid, kid, precision, *_ = result["metrics"]
    assert fid["name"] == f"Fréchet distance on {extractor} features (not FID)"
    assert kid["name"].endswith("(not KID)")
    assert (precision["samples"], precision["pictures"]) == (10, 10)
    rows = [json.loads(line) for line in (out / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert len({row["text"] for row in rows}) == 5  # the reference's captions
    with Image.open(out / "samples" / rows[3]["file_name"]) as image:
        assert image.text["prompt"] == rows[3]["text"]  # type: ignore[attr-defined]
        assert image.text["seed"] == str(3 * NOISES + 3)  # type: ignore[attr-defined]


def test_its_pictures_give_the_same_numbers(
    whole: tuple[dict, Path], measuring: Measuring, tmp_path: Path, capsys
) -> None:
    result, out = whole
    again = measure(replace(measuring, model=str(out / "samples"), samples=None, out=tmp_path / "out"))
    assert values(again) == values(result)
    said = capsys.readouterr().out
    for found in result["metrics"]:
        line = next(line for line in said.splitlines() if line.startswith(found["name"]))
        assert f"{found['value']:.4f}" in line
        for needed in (result["reference"]["hash"], result["extractor"]["hash"], "10 samples", "bicubic", "16×16"):
            assert needed in line
    assert "warning: 10 samples" not in said  # and six features
    some = measure(replace(measuring, model=str(out / "samples"), samples=5, out=tmp_path / "five", metrics="fid"))
    assert some["samples"] == 5
    said = capsys.readouterr().out
    assert "warning: 5 samples, and 6 features" in said
    assert "pictures of --reference, and 6 features" not in said


def test_the_distance_is_that_of_the_pictures(whole: tuple[dict, Path], extractor: Path, reference: Path) -> None:
    network = open_extractor(str(extractor))
    files = sorted((whole[1] / "samples").glob("*.png")), sorted(reference.glob("*.png"))
    ours, theirs = (network([fit(Image.open(f).convert("RGB"), 16) for f in group]) for group in files)
    wanted = frechet_distance(Moments.of([ours]), Moments.of([theirs]))
    assert values(whole[0])["frechet"] == pytest.approx(wanted, rel=1e-4)


def test_few_near_copies_have_precision_and_no_recall(
    measuring: Measuring, reference: Path, extractor: Path, tmp_path: Path
) -> None:
    """Which of the two is which; and the kernel's distance of features over the reference's root mean square."""
    pictures, rng = tmp_path / "copies", np.random.default_rng(1)
    pictures.mkdir()
    first = np.asarray(fit(Image.open(reference / "00.png").convert("RGB"), 16)).astype(int)
    for i in range(20):
        copy = (first + rng.integers(-2, 3, first.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(copy).save(pictures / f"{i:02d}.png")
    how = replace(measuring, model=str(pictures), samples=None, metrics="kid,precision,recall", out=tmp_path / "out")
    found = values(measure(how))
    network = open_extractor(str(extractor))
    ours, theirs = (
        network([fit(Image.open(f).convert("RGB"), 16) for f in sorted(folder.glob("*.png"))])
        for folder in (pictures, reference)
    )
    m, n = ours.double().numpy(), theirs.double().numpy()
    assert found["precision"] == pytest.approx(by_definition(m, n, 3))
    assert found["recall"] == pytest.approx(by_definition(n, m, 3))
    assert found["precision"] > found["recall"]
    scale = float(theirs.square().mean().sqrt())
    assert found["kernel"] == pytest.approx(kernel_distance(theirs / scale, ours / scale)[0], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "fids", "called"),
    [
        ("inception", True, {"fid": "FID", "kid": "KID"}),
        (
            "inception:my.pth",
            False,
            {
                "frechet": "Fréchet distance, Inception weights of my.pth",
                "kernel": "kernel distance on inception:my.pth features (not KID)",
            },
        ),
    ],
)
def test_only_fids_own_weights_give_what_is_called_fid(
    measuring: Measuring, name: str, fids: bool, called: dict[str, str]
) -> None:
    """And Inception's features alone are of the size that the kernel was made for."""

    class Features:
        def __init__(self, seed: int):
            self.rows = 3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))

        def __len__(self) -> int:
            return len(self.rows)

        def features(self, most: int) -> torch.Tensor:
            return self.rows

        def moments(self) -> Moments:
            return Moments.of([self.rows])

    ours, theirs = Features(0), Features(1)
    extractor = Extractor(name, torch.nn.Identity(), 299, torch.nn.Identity(), is_fids=fids, reads="nothing")
    how = replace(measuring, metrics="fid,kid")
    found = list(train.measure._numbers(how, ours, theirs, extractor, extractor, theirs))  # type: ignore[arg-type]
    assert {one["metric"]: one["name"] for one in found} == called
    assert found[0]["value"] == pytest.approx(frechet_distance(ours.moments(), theirs.moments()))
    assert found[1]["value"] == pytest.approx(kernel_distance(theirs.rows, ours.rows)[0])


def test_a_killed_run_goes_on_to_the_same_numbers(
    whole: tuple[dict, Path], measuring: Measuring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    paint = TextToImagePipeline.__call__

    class Killed(Exception):
        pass

    def dying(self, prompts, **more):
        calls.append(prompts)
        if len(calls) == 2:
            raise Killed
        return paint(self, prompts, **more)

    how = replace(measuring, out=tmp_path / "out")
    monkeypatch.setattr(TextToImagePipeline, "__call__", dying)
    with pytest.raises(Killed):
        measure(how)
    assert len(painted(how.out)) == 4
    assert values(measure(how)) == values(whole[0])
    assert len(calls) == 4  # one, the killed one, and the two that lacked
    assert painted(how.out) == painted(whole[1])
    assert values(measure(how)) == values(whole[0])  # nothing lacks
    assert len(calls) == 4
    assert (
        values(measure(replace(how, samples=12)))["frechet"] != values(whole[0])["frechet"]
    )  # two more: the last batch again
    assert len(calls) == 5
    with pytest.raises(ValueError, match=r"painted otherwise .*seed: 3 before, 4 now"):
        measure(replace(how, painting=replace(how.painting, seed=4)))


def test_two_processes_measure_what_one_does(whole: tuple[dict, Path], measuring: Measuring, tmp_path: Path) -> None:
    command: list[str | Path] = [
        ACCELERATE,
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "-m",
        "atelier",
        "evaluate",
    ]
    flags = {"reference": measuring.reference, "metrics": EVERY, "extractor": measuring.extractor, "samples": 10}
    flags |= {"steps": 2, "batch": 4, "seed": 3, "out": tmp_path / "out", "cache": tmp_path / "cache", "workers": 0}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = run(*command, measuring.model, *words, cwd=ROOT, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert painted(tmp_path / "out") == painted(whole[1])
    assert values(found) == values(whole[0])
    assert found["reference"]["hash"] == whole[0]["reference"]["hash"]


def test_a_model_that_is_told_nothing(measuring: Measuring, tmp_path: Path) -> None:
    """And bits per dimension, as `atelier bits` has them."""
    model = silent_model(tmp_path / "model", Identity(3))
    how = replace(measuring, model=str(model), metrics="fid,bpd", out=tmp_path / "out", samples=8)
    with pytest.raises(ValueError, match="accuracy compares pictures with their prompts"):
        measure(replace(how, metrics="accuracy"))
    result = measure(how)
    assert not (how.out / "samples" / "metadata.jsonl").exists()
    bits = measure_bits(str(model), how.reference, seed=3, workers=0)
    assert values(result)["bpd"] == bits["bits_per_dim"]
    assert measure(replace(how, metrics="bpd"))["metrics"] == result["metrics"]  # the distance stays
    edm = silent_model(tmp_path / "edm", Identity(3), path="edm")
    found = measure(replace(how, model=str(edm), metrics="bpd"))["metrics"]
    assert found[0]["method"] == "flow"


def test_clip_score_of_pictures_and_their_captions(measuring: Measuring, reference: Path, tmp_path: Path) -> None:
    """By another network than that of the features, as CLIP's own code has it."""
    torch.manual_seed(0)
    tokenizer = tiny_text_encoder().clip_tokenizer
    arguments = CLIP | {"text_cfg": {**CLIP["text_cfg"], "vocab_size": len(tokenizer)}}  # type: ignore[dict-item]
    save_clip(tmp_path / "run", open_clip.CLIP(**arguments), arguments, tokenizer)
    judge = load_clip(tmp_path / "run" / "clip")
    pixels = [torch.from_numpy(fit(Image.open(f), 16).copy()) for f in sorted(reference.glob("*.png"))]
    said = [f.read_text().strip() for f in sorted(reference.glob("*.txt"))]
    cosines = (judge.encode_image(to_unit(torch.stack(pixels))) * judge.encode_text(said)).sum(1)
    how = replace(
        measuring, model=str(reference), samples=None, size=16, metrics="fid,clip", clip=str(tmp_path / "run")
    )
    fid, clip = measure(replace(how, out=tmp_path / "out"))["metrics"]
    assert clip["value"] == pytest.approx(100 * float(cosines.clamp(min=0).mean()), abs=1e-3)
    assert clip["samples"] == 20
    assert clip["clip"]["hash"] != json.loads((tmp_path / "out" / "metrics.json").read_text())["extractor"]["hash"]
    assert fid["value"] == pytest.approx(0, abs=1e-6)
    torch.manual_seed(1)
    save_clip(tmp_path / "second", open_clip.CLIP(**arguments), arguments, tokenizer)
    other = measure(replace(how, metrics="clip", clip=str(tmp_path / "second"), out=tmp_path / "out"))
    assert [one["metric"] for one in other["metrics"]] == ["frechet", "clip", "clip"]
    assert other["metrics"][1] == clip
    alone = replace(how, metrics="clip", extractor="inception:nowhere.pth", out=tmp_path / "alone")
    assert measure(alone)["metrics"] == [clip]  # features that no number is made of are not computed


def test_numbers_of_the_same_pictures_stand_side_by_side(measuring: Measuring, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    for i in range(6):
        Image.effect_noise((16, 16), 40 + i).convert("RGB").save(folder / f"{i}.png")
    how = replace(measuring, model=str(folder), samples=None, out=out)
    one = measure(replace(how, metrics="fid"))
    both = measure(replace(how, metrics="precision"))
    assert values(both) == values(one) | {"precision": values(both)["precision"]}
    assert json.loads((out / "metrics.json").read_text()) == both
    Image.new("RGB", (16, 16), "red").save(folder / "0.png")  # now they are others
    other = measure(replace(how, metrics="precision"))
    assert list(values(other)) == ["precision"]
    assert json.loads((out / "metrics.json").read_text()) == other
    assert other["earlier"] == [both]
    network = load_recogniser(how.extractor)
    torch.nn.init.ones_(network.blocks[0].norm1.bias)
    save_network(network, tmp_path / "another")
    third = measure(replace(how, metrics="recall", extractor=str(tmp_path / "another")))
    assert [values(result) for result in third["earlier"]] == [values(other), values(both)]
    again = measure(replace(how, metrics="recall"))
    assert list(values(again)) == ["precision", "recall"]
    assert len(again["earlier"]) == 2


def test_diversity_needs_two_of_one_prompt(measuring: Measuring, reference: Path, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), ("red", "blue", "green")[i]).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    how = replace(measuring, model=str(tmp_path / "pictures"), samples=None, metrics="diversity", out=tmp_path / "out")
    (found,) = measure(how)["metrics"]
    assert (found["value"], found["prompts"], found["reference_captions"]) == (None, 0, 5)
    assert found["reference_value"] > 0
    assert "NaN" not in (how.out / "metrics.json").read_text()


def test_diversity_of_pictures_that_say_nothing_is_that_of_all(
    measuring: Measuring, reference: Path, tmp_path: Path
) -> None:
    """On both sides: the same pictures, with captions and without, are as diverse."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in reference.glob("*.png"):
        (bare / file.name).write_bytes(file.read_bytes())
    how = replace(measuring, model=str(bare), samples=None, size=16, metrics="diversity", out=tmp_path / "out")
    (found,) = measure(how)["metrics"]
    assert found["name"].startswith("diversity of all")
    assert found["value"] == pytest.approx(found["reference_value"])
    (within,) = measure(replace(how, model=str(reference), out=tmp_path / "told"))["metrics"]
    assert within["name"].startswith("diversity within a prompt")
    assert within["value"] < 0.9 * found["value"]


def test_copies_of_the_training_set_are_found_out(measuring: Measuring, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out").mkdir()
    for i, colour in enumerate(("orange", "purple", "brown", "cyan", "yellow")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / "held_out" / f"{i}.png")
        (tmp_path / "held_out" / f"{i}.txt").write_text(colour)
    how = replace(measuring, model=str(reference), reference=str(tmp_path / "held_out"), training=str(reference))
    how = replace(how, size=16, samples=None, metrics="fid", out=tmp_path / "out")
    found = measure(how)["memorisation"]
    assert found["samples_to_training"] < 1e-4 < found["held_out_to_training"]
    assert found["share_of_samples_nearer_than_1%_of_held_out"] == 1
    assert found["pictures"] == {"samples": 20, "held_out": 5, "training": 20}
    with Image.open(found["sheet"]) as sheet:
        pixels = np.asarray(sheet)[4:68]
    assert (pixels[:, 4:68] == pixels[:, 72:136]).all()  # the sample, and its like in training
    known = measure(replace(how, reference=str(reference), out=tmp_path / "same"))["memorisation"]
    assert known["held_out_that_are_in_training"] == 20
    assert known["share_of_samples_nearer_than_1%_of_held_out"] is None  # nothing tells how near is too near
    assert known["held_out_to_training"] is known["ratio"] is None
    assert "all of the reference are in the training set" in in_words(known, "the reference")[0]
    # Those of the held-out pictures that are in it don't bring the others nearer.
    shutil.copytree(tmp_path / "held_out", tmp_path / "both")
    for file in reference.iterdir():
        (tmp_path / "both" / f"known-{file.name}").write_bytes(file.read_bytes())
    mixed = measure(replace(how, reference=str(tmp_path / "both"), out=tmp_path / "mixed"))["memorisation"]
    assert mixed["held_out_that_are_in_training"] == 20
    assert mixed["held_out_to_training"] == pytest.approx(found["held_out_to_training"])
    assert mixed["ratio"] == mixed["samples_to_training"] / mixed["held_out_to_training"]
    assert "copies_to_training" not in found  # of a folder: there is no autoencoder to bring copies through
    # Against another training set nothing of the former one is left in the file.
    file = how.out / "metrics.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"memorisation": before["memorisation"] | {"copies_to_training": 7}}))
    measure(replace(how, training=str(tmp_path / "held_out")))
    assert "copies_to_training" not in json.loads(file.read_text())["memorisation"]


def test_accuracy_is_of_samples_and_of_the_reference(measuring: Measuring, reference: Path, tmp_path: Path) -> None:
    """By a network that sees one class everywhere."""
    names = tuple(f"a {colour} circle" for colour in ("black", "blue", "green", "red", "white"))
    network = Recogniser(RecogniserConfig(tasks=(("class", names),), sample_size=9, widths=(4, 4)))
    torch.nn.init.zeros_(network.linear_out.weight)
    save_network(network, tmp_path / "judge")
    how = replace(measuring, extractor=str(tmp_path / "judge"), metrics="accuracy", out=tmp_path / "out")
    samples = tmp_path / "samples"
    samples.mkdir()
    for i, said in enumerate(("a black circle", "a black circle", "a red circle")):
        Image.new("RGB", (16, 16), "grey").save(samples / f"{i}.png")
        (samples / f"{i}.txt").write_text(said)
    (found,) = measure(replace(how, model=str(samples), samples=None))["metrics"]
    assert found["metric"] == "class accuracy"
    assert (found["value"], found["reference_value"]) == (pytest.approx(2 / 3), pytest.approx(0.2))
    assert (found["samples"], found["pictures"]) == (3, 20)


def test_accuracy_where_a_template_made_the_captions(measuring: Measuring, tmp_path: Path) -> None:
    network = Recogniser(RecogniserConfig(tasks=(("class", ("cat", "dog")),), sample_size=9, widths=(4, 4)))
    torch.nn.init.zeros_(network.linear_out.weight)
    save_network(network, tmp_path / "judge")
    for i in range(8):
        (tmp_path / "pets" / ("dog", "cat")[i % 4 > 0]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "pets" / ("dog", "cat")[i % 4 > 0] / f"{i}.png")
    how = replace(measuring, extractor=str(tmp_path / "judge"), metrics="accuracy", reference=str(tmp_path / "pets"))
    (found,) = measure(replace(how, template="a photo of a {label}", out=tmp_path / "out"))["metrics"]
    assert found["reference_value"] == 0.75
    rows = (tmp_path / "out" / "samples" / "metadata.jsonl").read_text().splitlines()
    assert {json.loads(row)["text"] for row in rows} == {"a photo of a cat", "a photo of a dog"}


def test_what_is_a_model_and_what_a_folder_of_pictures(model_folder: Path, reference: Path, tmp_path: Path) -> None:
    assert is_model(str(model_folder))
    assert is_model("bundled")
    assert is_model("owner/name")
    assert not is_model(str(reference))
    sheets = tmp_path / "lora" / "samples"
    sheets.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(sheets / "0000400.png")
    assert not is_model(str(tmp_path / "lora"))
    (tmp_path / "lora" / "checkpoint-0000400").mkdir()  # a run of something else: its sheets are no samples
    assert is_model(str(tmp_path / "lora"))


def test_what_can_not_be_measured(measuring: Measuring, model_folder: Path, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--metrics 'is': expected some of fid,kid,"):
        replace(measuring, metrics="fid,is")
    with pytest.raises(ValueError, match="--metrics is empty"):
        replace(measuring, metrics="")
    with pytest.raises(ValueError, match="--samples 1: expected at least 2"):
        replace(measuring, samples=1)
    with pytest.raises(ValueError, match="--batch 0"):
        Painting(batch=0)
    with pytest.raises(ValueError, match="bpd is measured by a model"):
        measure(replace(measuring, model=str(reference), metrics="bpd"))
    with pytest.raises(ValueError, match="the CLIP score needs a CLIP"):
        measure(replace(measuring, metrics="clip"))
    with pytest.raises(ValueError, match="the judge knows no class 'a black circle'"):
        measure(replace(measuring, metrics="accuracy"))
    with pytest.raises(ValueError, match=r"20×16: give --size"):
        measure(replace(measuring, model=str(reference), samples=None))
    with pytest.raises(ValueError, match=r"--samples 21: .* holds 20 pictures"):
        measure(replace(measuring, model=str(reference), samples=21, size=16))
    with pytest.raises(ValueError, match="--size 8 is for folders of pictures"):
        measure(replace(measuring, size=8))
    (tmp_path / "other").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "picture.png")
    with pytest.raises(ValueError, match="have no caption"):  # which this model is to be asked for
        measure(replace(measuring, reference=str(tmp_path / "other")))


def test_the_command_line(measuring: Measuring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import atelier
    import train.measure

    seen: list[Measuring] = []
    monkeypatch.setattr(train.measure, "measure", seen.append)
    words = f"evaluate m --reference r --metrics fid --steps 7 --guidance 2 --sampler euler --seed 5 --out {tmp_path}"
    words += " --guidance-interval 0.3 6"
    monkeypatch.setattr(sys, "argv", ["atelier", *words.split()])
    atelier.main()
    painting = Painting(steps=7, guidance=2.0, guidance_interval=(0.3, 6.0), sampler="euler", seed=5)
    assert seen == [Measuring("m", "r", "fid", painting=painting, out=Path(os.fspath(tmp_path)))]
    monkeypatch.setattr(sys, "argv", ["atelier", "evaluate", *f"{measuring.reference} --reference r --steps 7".split()])
    with pytest.raises(SystemExit, match=r"--steps is for a model that paints, and .* is a folder of pictures"):
        atelier.main()
    for stray in ("--size 7", "--training x", "--metrics bpd"):
        monkeypatch.setattr(sys, "argv", ["atelier", "evaluate", *stray.split()])
        with pytest.raises(SystemExit, match=rf"^error: {stray.split()[0]} is for a comparison with a reference"):
            atelier.main()
