"""The command line: what is a prompt and what a command, how fast it answers, and what it says when it can't."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import atelier
import pipelines.web
import train.bits
from pipelines import TextToImagePipeline

ATELIER = Path(sys.executable).with_name("atelier")


def call(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["atelier", *map(str, words)])
    atelier.main()


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str):
    """The command that these words are, not run."""
    seen: list = []
    for command in atelier.COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda self: seen.append(self))
    call(monkeypatch, *words)
    return seen[0]


def test_a_first_word_is_a_command_or_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    fox = "an oil painting of a fox"
    assert parsed(monkeypatch, fox) == atelier.Paint(fox)
    assert parsed(monkeypatch, "paint", fox) == atelier.Paint(fox)
    assert parsed(monkeypatch, "--seed", "7", fox) == atelier.Paint(fox, seed=7)
    for word in ("data", "evaluate", "paint"):
        assert parsed(monkeypatch, "paint", word) == atelier.Paint(word)
    assert parsed(monkeypatch, "data", "pictures/") == atelier.Data(atelier.Show("pictures/"))
    assert parsed(monkeypatch, "data", "show", "p/", "--size", "32") == atelier.Data(atelier.Show("p/", size=32))
    assert parsed(monkeypatch, "data", "check", "a+b", "--buckets") == atelier.Data(atelier.Check("a+b", buckets=True))
    assert parsed(monkeypatch, "data", "cache", "p/", "--vae", "none") == atelier.Data(atelier.Cache("p/", vae="none"))
    assert parsed(monkeypatch, "evaluate") == atelier.Evaluate()
    assert parsed(monkeypatch, "web", "runs/mine", "--port", "80") == atelier.Web("runs/mine", port=80)
    assert parsed(monkeypatch, "data centre, watercolour") == atelier.Paint("data centre, watercolour")
    assert parsed(monkeypatch, "") == atelier.Paint("")


def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "fox --out fox.jpg --seed -3 --count 2 --steps 5 --guidance 1.5 --negative blue --sampler ddim "
    words += "--dtype bfloat16 --width 64 --model runs/x --device cpu"
    assert parsed(monkeypatch, *words.split()) == atelier.Paint(
        "fox",
        out=Path("fox.jpg"),
        seed=-3,
        count=2,
        steps=5,
        guidance=1.5,
        negative="blue",
        sampler="ddim",
        dtype="bfloat16",
        width=64,
        model="runs/x",
        device="cpu",
    )


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--seed", "7"),
        ("a fox", "a cat"),
        ("a fox", "--steps", "many"),
        ("a fox", "--nonsense", "1"),
        ("a fox", "--dtype", "int8"),
        ("data",),
    ],
    ids=" ".join,
)
def test_what_is_no_command_is_refused(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *words)
    assert stopped.value.code == 2
    assert "--help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "0"), "steps=0"),
        (("--steps", "-3"), "steps=-3"),
        (("--count", "0"), "--count 0"),
        (("--width", "17"), "multiples of 4"),
        (("--sampler", "magic"), "'magic'.*dpmpp_2m"),
        (("--out", "picture"), "no ending.*picture.png"),
        (("--out", "picture.docx"), r"\.docx names no format"),
        (("--out", "picture.psd"), r"\.psd names no format"),  # which Pillow reads alone
        (("--model", "no/such/folder"), "not a model folder"),
        (("--device", "gpu"), "device 'gpu' can't be used here.*cuda"),
        (("--device", "cuda:99"), "device 'cuda:99' can't be used here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_can_not_be_painted_is_refused_with_a_sentence(
    words: tuple[str, ...], said: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = () if "--model" in words else ("--model", model_folder)
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        call(monkeypatch, "a fox", *model, *words)
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_written_is_said(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: .*file"):
        call(monkeypatch, "a fox", "--model", model_folder, "--steps", "1", "--out", tmp_path / "file" / "fox.png")


def test_several_pictures(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "fox.png"
    call(monkeypatch, "a fox", "--model", model_folder, "--steps", "1", "--count", "2", "--seed", "5", "--out", out)
    files = [tmp_path / "new" / "fox-1.png", tmp_path / "new" / "fox-2.png"]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert sorted(out.parent.iterdir()) == files
    seeds = []
    for file in files:
        with Image.open(file) as image:
            seeds.append(image.text["seed"])  # type: ignore[attr-defined]
    assert seeds == ["5", "6"]


def test_many_pictures_are_painted_a_few_at_a_time(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atelier, "BATCH", 2)
    words = ("a fox", "--model", model_folder, "--steps", "1", "--out", tmp_path / "fox.png")
    call(monkeypatch, *words, "--seed", "5", "--count", "5")
    seeds = []
    for i in range(1, 6):
        with Image.open(tmp_path / f"fox-{i}.png") as image:
            seeds.append(image.text["seed"])  # type: ignore[attr-defined]
    assert seeds == ["5", "6", "7", "8", "9"]
    sizes = []
    paint = TextToImagePipeline.__call__

    def counted(self: TextToImagePipeline, *args: object, **kwargs: object) -> object:
        output = paint(self, *args, **kwargs)  # type: ignore[arg-type]
        sizes.append(len(output.images))
        return output

    monkeypatch.setattr(TextToImagePipeline, "__call__", counted)
    call(monkeypatch, *words, "--count", "5")
    assert sizes == [2, 2, 1]


def test_data_shows_rows_and_a_sheet(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (picture_folder / "3.png").write_bytes(b"broken")
    sheet = tmp_path / "sheet.png"
    call(monkeypatch, "data", picture_folder, "--size", "16", "--sheet", sheet)
    out = capsys.readouterr().out
    assert out.startswith("8 pictures, captions: metadata.jsonl")
    assert out.splitlines()[-1] == str(sheet)
    with Image.open(sheet) as image:
        colours = {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 0, 255), (255, 165, 0)} <= colours  # the first, and the last: all that can be read
    with pytest.raises(SystemExit, match=r"^error: .*does not exist"):
        call(monkeypatch, "data", "nowhere")
    with pytest.raises(SystemExit, match=r"^error: --size 0"):
        call(monkeypatch, "data", picture_folder, "--size", "0")


def test_evaluation_refuses_what_it_can_not_judge(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*not on pictograms: .*give --judge RUN"):
        call(monkeypatch, "evaluate", model_folder, "--out", tmp_path / "figures")
    with pytest.raises(SystemExit, match=r"^error: --prompts 1"):
        call(monkeypatch, "evaluate", model_folder, "--prompts", "1")


def test_bits_and_classifiers_are_reached(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^error: --data 'nowhere' does not exist"):
        call(monkeypatch, "bits", model_folder, "--data", "nowhere")
    with pytest.raises(SystemExit, match=r"^error: .*nothing"):
        call(monkeypatch, "a fox", "--model", model_folder, "--steps", "1", "--classifier", tmp_path / "nothing")


def test_a_device_that_is_full_is_said(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.bits, "measure_bits", Mock(side_effect=torch.OutOfMemoryError("no room")))
    with pytest.raises(SystemExit, match=r"^error: no room\nTake a smaller --batch"):
        call(monkeypatch, "bits", model_folder, "--data", "shapes")


def test_a_damaged_picture_is_said(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(file := tmp_path / "damaged.png")
    monkeypatch.setattr(Image, "open", Mock(side_effect=SyntaxError("broken PNG file")))  # as some damages have it
    with pytest.raises(SystemExit, match=r"^error: --image .*damaged\.png can't be opened as a picture \(broken PNG"):
        call(monkeypatch, "a fox", "--model", model_folder, "--image", file)


def test_the_page_listens_where_it_is_told(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Mock()
    monkeypatch.setattr(pipelines.web, "page", page)
    call(monkeypatch, "web", model_folder, "--host", "0.0.0.0", "--port", "81")
    page.return_value.launch.assert_called_once_with(server_name="0.0.0.0", server_port=81)
    assert isinstance(page.call_args.args[0], TextToImagePipeline)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import json, sys, atelier\n"
        "sys.argv = ['atelier', '--help']\n"
        "try: atelier.main()\n"
        "finally: print(json.dumps(list(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    for command in atelier.COMMANDS:
        assert command in result.stdout
    modules = json.loads(result.stderr)
    loaded = {name.partition(".")[0] for name in modules}
    assert "tyro" in loaded
    assert not loaded & {"torch", "numpy", "PIL", "transformers", "diffusers", "ldm", "vae", "pipelines"}
    assert {name for name in modules if name.startswith("train.")} == {"train.config"}


def test_the_console_script_paints(model_folder: Path, tmp_path: Path) -> None:
    words = ["an oil painting of a fox", "--model", str(model_folder), "--seed", "7", "--steps", "2"]
    command = [str(ATELIER), *words, "--out", "fox.png", "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "fox.png\n"
    assert "painting on cpu, float32, seed 7" in result.stderr
    with Image.open(tmp_path / "fox.png") as image:
        text = image.text  # type: ignore[attr-defined]
        assert image.size == (16, 16)
        assert np.asarray(image).std() > 1
    assert (text["prompt"], text["seed"]) == ("an oil painting of a fox", "7")
    assert json.loads(text["atelier"])["steps"] == 2


def test_errors_leave_by_the_exit_status() -> None:
    result = subprocess.run([ATELIER, "a fox", "--count", "0"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: --count 0: expected at least 1\n"
    assert result.stdout == ""
