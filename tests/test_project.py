"""The project's shape: who may import whom, what a picture must not load, what is declared, and what make does."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # room -> the rooms it may import from
    "ldm": {"ldm"},
    "vae": {"vae", "ldm.blocks"},
    "conditioning": {"conditioning"},
    "pipelines": {"pipelines", "ldm", "vae", "conditioning"},
    "train": {"train", "pipelines", "ldm", "vae", "conditioning"},
}
TRAINING_ONLY = {"accelerate", "datasets"}
HEAVY = {"transformers", "diffusers", "open_clip", "torchvision", "lpips", "xformers", "scipy", "gradio", "matplotlib"}
NOT_FOR_PAINTING = {"conditioning/open_clip.py", "vae/losses.py"}  # and train/
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What a distribution is imported as, where the two names differ.
IMPORTED_AS = {"pillow": "PIL", "open-clip-torch": "open_clip"}

SOURCES = [*(f for room in ROOMS for f in sorted((ROOT / room).rglob("*.py"))), ROOT / "atelier.py"]


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names that a module imports; without `lazy`, only what importing the module itself imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room that they come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, lazy=lazy)


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 11))


def within(module: str, allowed: set[str]) -> bool:
    return any(module == a or module.startswith(f"{a}.") for a in allowed)


def test_the_rule_sees_what_it_should() -> None:
    tree = ast.parse("import a.b\nfrom c import d\ndef f():\n    import e\nif x:\n    import g\n")
    assert list(imports(tree)) == ["a.b", "c.d", "e", "g"]
    assert list(imports(tree, lazy=False)) == ["a.b", "c.d", "g"]
    assert within("ldm.blocks.ResnetBlock", ROOMS["vae"])
    assert not within("ldm.unet.UNet", ROOMS["vae"])
    assert not within("ldm_other", ROOMS["ldm"])


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    others = {*ROOMS, "tests", "benchmarks", "atelier"}
    for file in (ROOT / room).rglob("*.py"):
        for module in imports(parse(file)):
            if within(module, others):
                assert within(module, ROOMS[room]), f"{name(file)} imports {module}"
            if within(module, TRAINING_ONLY):
                assert room == "train", f"{name(file)} imports {module}"


def test_what_paints_imports_nothing_heavy() -> None:
    files = [f for f in SOURCES if name(f) not in NOT_FOR_PAINTING and f.parent.name != "train"]
    assert len(files) > 15
    for file in files:
        for module in imports(parse(file), lazy=False):
            assert not within(module, HEAVY | TRAINING_ONLY), f"importing {name(file)} imports {module}"
            assert name(file) != "atelier.py" or not within(module, {"torch", "numpy", "PIL", *ROOMS})


def test_a_picture_loads_nothing_that_it_does_not_need(model_folder: Path) -> None:
    code = (
        "import json, sys\n"
        "from pipelines import TextToImagePipeline\n"
        "first = sorted(sys.modules)\n"
        f"TextToImagePipeline.from_pretrained({str(model_folder)!r}, device='cpu')('a fox', steps=2)\n"
        "print(json.dumps([first, sorted(sys.modules)]))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for modules in json.loads(result.stdout):
        loaded = {module.split(".")[0] for module in modules}
        assert "torch" in loaded
        assert not loaded & (HEAVY | TRAINING_ONLY | {"huggingface_hub", "tensorboard", "sympy"})
        assert "torch._dynamo" not in modules


def test_nothing_is_unpickled() -> None:
    loads = 0
    for file in SOURCES:
        tree = parse(file)
        for module in imports(tree):
            assert not within(module, {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}), name(file)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            where, called = f"{name(file)}, line {call.lineno}", ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            loads += called == "torch.load"
            assert called not in ("eval", "exec"), where
            assert called != "torch.load" or given.get("weights_only") == "True", where
            assert given.get("allow_pickle", "False") == "False", where
            assert given.get("trust_remote_code", "False") == "False", where
    assert loads  # the state of a training run, at least


def test_every_package_and_file_is_shipped() -> None:
    folders = {f.parent.relative_to(ROOT).as_posix() for f in SOURCES if f.parent != ROOT}
    assert {folder.replace("/", ".") for folder in folders} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert PROJECT["tool"]["setuptools"]["py-modules"] == ["atelier"]
    assert PROJECT["project"]["scripts"] == {"atelier": "atelier:main"}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for room in ROOMS:
        shipped = {f for pattern in patterns.get(room, ()) for f in (ROOT / room).glob(pattern) if f.is_file()}
        others = {f for f in (ROOT / room).rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
        assert others == shipped
    assert (ROOT / "train" / "objects.csv").is_file()
    for file in PROJECT["project"]["license-files"]:
        assert (ROOT / file).is_file()


def declared(names: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in names]
    return {IMPORTED_AS.get(one.name, one.name.replace("-", "_")): one for one in found}


def test_everything_imported_is_declared() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    always = declared(PROJECT["project"]["dependencies"])
    optional = {module for group, names in extras.items() if group != "dev" for module in declared(names)}
    for file in SOURCES:
        tree = parse(file)
        known = {*sys.stdlib_module_names, *ROOMS, *always}
        for module in imports(tree):
            assert module.split(".")[0] in known | optional, f"{name(file)} imports {module}"
        for module in imports(tree, lazy=False):
            assert module.split(".")[0] in known, f"{name(file)} needs {module}, which is an extra"
    for_tests = {*sys.stdlib_module_names, *ROOMS, *always, *declared(extras["dev"]), "atelier", "tests", "packaging"}
    for_examples = {*sys.stdlib_module_names, *ROOMS, *always, *declared(extras["examples"])}
    for folder, known in (("tests", for_tests), ("examples", for_examples)):
        for file in (ROOT / folder).glob("*.py"):
            for module in imports(parse(file)):
                assert module.split(".")[0] in known | {"examples"}, f"{name(file)} imports {module}"


def test_version_bounds_are_true_here() -> None:
    groups = PROJECT["project"]["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["project"]["dependencies"], *groups["dev"]]):
        assert requirement.specifier, f"{requirement} has no bounds"
        assert requirement.specifier.contains(version(requirement.name)), f"{requirement}: {version(requirement.name)}"


def test_readme_holds_both_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'make image PROMPT="an oil painting of a fox"' in text
    assert re.search(r"^make test\b", text, re.MULTILINE)
    assert "accelerate launch train/ldm.py" in text
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", re.sub(r"(?s)```.*?```", "", text))) <= targets | {"them", "a", "the"}
    assert set(re.findall(r"^make (\w+)", text, re.MULTILINE)) <= targets


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of the repository."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not in a clone of the repository")
    return [name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_no_dead_link(tracked: list[str]) -> None:
    for name in (name for name in tracked if name.endswith(".md")):
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", (ROOT / name).read_text(encoding="utf-8")):
            if link.startswith("https://"):
                continue
            page = (ROOT / name).parent / link if link else ROOT / name
            assert page.exists(), f"{name} links to {link}"
            assert not anchor or anchor in anchors(page), f"{name} links to {link}#{anchor}"


def test_sizes_that_were_promised(tracked: list[str]) -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in tracked}
    assert sum(sizes.values()) < 40 * 2**20, "the checkout"
    assert sum(size for name, size in sizes.items() if name.startswith("pipelines/bundled/")) <= 24 * 2**20


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile in a folder whose installed programs only say what they were given."""
    if not shutil.which("make"):
        pytest.skip("no make on this machine")
    (tmp_path / "pyproject.toml").write_text("")
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / "python"  # stands for python3: `-m venv` makes a folder with programs of the same kind
    said = '#!/bin/sh\nfor word in "$(basename "$0")" "$@"; do printf "[%s]" "$word"; done >>said; echo >>said\n'
    copies = "".join(f"cp python .venv/bin/{program}; " for program in ("pip", "python", "atelier"))
    python.write_text(said + f'if [ "$2" = venv ]; then mkdir -p .venv/bin; {copies}fi\n')
    python.chmod(0o755)
    return tmp_path


def make(project: Path, *words: str, **environment: str) -> list[str]:
    """The calls that `make` does, one a line."""
    (project / "said").write_text("")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("PROMPT", "OUT")}
    command = ["make", "--silent", "PYTHON=./python", *words]
    result = subprocess.run(command, cwd=project, env=clean | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return (project / "said").read_text().splitlines()


def test_make_image_installs_once_and_paints(project: Path) -> None:
    first = make(project, "image", 'PROMPT=an oil painting of a "fox"', "OUT=my fox.png")
    assert any(call.startswith("[python][-m][venv]") for call in first)
    assert [call for call in first if call.startswith("[pip][install]")] == [first[-2]]
    assert first[-1] == '[atelier][paint][an oil painting of a "fox"][--out][my fox.png]'
    assert make(project, "image") == ["[atelier][paint][an oil painting of a fox][--out][picture.png]"]
    os.utime(project / "pyproject.toml", (2e9, 2e9))  # other requirements: these are installed
    assert any(call.startswith("[pip][install]") for call in make(project, "image"))


def test_make_test_installs_what_the_tests_need_once(project: Path) -> None:
    first = make(project, "test")
    assert any(call.startswith("[pip][install]") and "[.[dev]]" in call for call in first)
    assert first[-1].startswith("[python][-m][pytest]")
    assert make(project, "test") == first[-1:]
    assert [call for call in make(project, "image") if not call.startswith("[atelier]")] == []  # dev has it all


@pytest.mark.parametrize(
    "prompt",
    [
        "it's a fox",
        "a `date` fox",
        "a $(date) fox",
        "a $HOME fox",
        "a fox; date",
        "a\\fox",
        "a #1 fox",
        "data",
        "a $(shell touch broken) fox",
        "a $( fox",
    ],
)
def test_make_image_takes_any_prompt_as_it_is(project: Path, prompt: str) -> None:
    for said in (make(project, "image", PROMPT=prompt), make(project, "image", f"PROMPT={prompt}")):
        (call,) = [c for c in said if c.startswith("[atelier]")]
        assert call == f"[atelier][paint][{prompt}][--out][picture.png]"
    assert not (project / "broken").exists()


def test_ci_runs_the_tests_and_a_training() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "make test" in text
    assert "make lint" in text
    assert "accelerate launch train/ldm.py" in text
