"""The two drawn data sets: what a row shows depends on the row alone, and its caption is true of it."""

import hashlib
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train import pictograms
from train.pictograms import GROUNDS, STYLES, Pictograms, Row, captions, find_font, glyph, held_out, paint, things
from train.shapes import CANONICAL_PROMPTS, COLOURS, KINDS, PLACES, RELATIONS, SIZES, Shapes
from train.sources import open_source

try:
    find_font()
    FONT_MISSING = ""
except ValueError as error:
    FONT_MISSING = str(error)
needs_font = pytest.mark.skipif(bool(FONT_MISSING), reason=FONT_MISSING)

ARTICLE = r"\b(an?) ([a-z]+)"
GROUND = rf" on an? ({'|'.join(COLOURS)}) background"
ONE = re.compile(rf"an? (?:({'|'.join(filter(None, SIZES))}) )?(\w+) (\w+)(?: ({'|'.join(PLACES)}))?{GROUND}")
TWO = re.compile(rf"an? (\w+) (\w+) ({'|'.join(RELATIONS)}) an? (\w+) (\w+){GROUND}")
# Share of its bounding box that each shape fills, from its formula.
FILL = {
    "circle": np.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "diamond": 0.5,
    "ring": np.pi / 4 * (1 - 0.6**2),
    "cross": (4 * 0.66 - 0.66**2) / 4,
    "star": 5 * 1.05 * 0.43 * np.sin(np.pi / 5) / (2 * 1.05**2 * np.sin(0.4 * np.pi) * (1 + np.cos(np.pi / 5))),
    "heart": 180 * np.pi / 256 / (2 * 1.808),
}


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64)


def _mask(image: Image.Image, colour: str) -> np.ndarray:
    """Where the picture is of just this colour; the softened rims are not."""
    return (_pixels(image) == COLOURS[colour]).all(-1)


def _direction(words: str) -> np.ndarray:
    """(x, y) in -1, 0, 1; y grows downwards."""
    x = ("right" in words) - ("left" in words)
    return np.array([x, ("bottom" in words or "below" in words) - ("top" in words or "above" in words)])


def _check_kind(mask: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The mask's bounding box fits the kind; returns its centre and extent (x, y), in sides of the picture."""
    y, x = np.nonzero(mask)
    low, high = np.array([x.min(), y.min()]), np.array([x.max(), y.max()]) + 1
    width, height = high - low
    assert len(x) / (width * height) == pytest.approx(FILL[kind], abs=0.07), kind
    middle = mask[(low[1] + high[1]) // 2, (low[0] + high[0]) // 2]
    assert middle == (kind != "ring")
    if kind in ("triangle", "diamond"):
        widest = mask.sum(1)[low[1] : high[1]].argmax() / height
        assert (widest > 0.8) == (kind == "triangle")
    return (low + high) / 2 / len(mask), (high - low) / len(mask)


def test_captions_of_shapes_are_true() -> None:
    source = Shapes(size=192, count=300, seed=3)
    single, kinds = 0, set()
    for i in range(len(source)):
        image, lines, _ = source[i]
        caption = lines[0]
        ground = caption.split()[-2]
        assert (_pixels(image)[[0, 0, -1, -1], [0, -1, 0, -1]] == COLOURS[ground]).all()
        for article, word in re.findall(ARTICLE, " ".join(lines)):
            assert (article == "an") == (word[0] in "aeiou"), caption
        if two := TWO.fullmatch(caption):
            colour, kind, relation, other_colour, other_kind, _ = two.groups()
            first, _ = _check_kind(_mask(image, colour), kind)
            second, _ = _check_kind(_mask(image, other_colour), other_kind)
            assert np.dot(first - second, _direction(relation)) > 0.4
            kinds |= {kind, other_kind}
            continue
        one = ONE.fullmatch(caption)
        assert one, caption
        size, colour, kind, place, _ = one.groups()
        centre, extent = _check_kind(_mask(image, colour), kind)
        whole = 0.85 if kind == "square" else 1.0  # a square of full extent would look larger than a circle
        assert extent.max() / 2 == pytest.approx(whole * SIZES[size or ""], rel=0.17)
        assert np.abs(centre - 0.5 - 0.25 * _direction(place or "")).max() < 0.075
        single, kinds = single + 1, kinds | {kind}
    assert single > 150
    assert kinds == set(KINDS)


def test_a_caption_with_its_background_has_one_picture() -> None:
    source, pictures = Shapes(size=16, count=3000), {}
    for i in range(len(source)):
        image, lines, _ = source[i]
        assert pictures.setdefault(lines[0], image.tobytes()) == image.tobytes(), lines[0]
    assert len(pictures) < 2500  # many were drawn twice


def test_shapes_are_a_function_of_seed_and_index() -> None:
    first, second = Shapes(count=30, seed=1), Shapes(count=300, seed=1)
    for i in (29, 3, 17, 3):
        assert first[i].captions == second[i].captions
        assert first[i].image.tobytes() == second[i].image.tobytes()
    assert Shapes(count=30, seed=2)[3].captions != first[3].captions
    assert first[3].image.size == (64, 64)
    assert first[-1].key == first[29].key
    with pytest.raises(IndexError):
        first[30]


def test_canonical_prompts_are_sentences_of_the_sets() -> None:
    assert len(CANONICAL_PROMPTS) == len(pictograms.CANONICAL_PROMPTS) == 8
    for prompt in CANONICAL_PROMPTS:
        assert ONE.fullmatch(prompt) or TWO.fullmatch(prompt), prompt
    everyday = [name for name, thing in things().items() if thing.everyday]
    said = {captions(n, s, g)[0]: (n, s) for n in everyday for s in STYLES for g in GROUNDS}
    for prompt in pictograms.CANONICAL_PROMPTS:
        assert not held_out(*said[prompt]), prompt


def test_the_list_of_objects() -> None:
    listed = Path(pictograms.__file__).with_name("objects.csv").read_text("utf-8").splitlines()[1:]
    assert len(listed) == len(things()), "two objects have one name"
    assert len({thing.text for thing in things().values()}) == len(listed)
    assert sum(thing.everyday for thing in things().values()) == 260
    assert set(things()) >= {"fox", "cat", "dog", "tree", "house", "apple", "boat", "car", "bicycle", "fish", "rose"}
    sounds_otherwise = {"hourglass", "unicorn"}
    for thing in things().values():
        assert thing.article in ("a", "an", "the", "")
        if thing.article in ("a", "an"):
            assert (thing.article == "an") == ((thing.name[0] in "aeiouAEIO") != (thing.name in sounds_otherwise)), (
                thing
            )
    for name in ("scissors", "cherries", "french fries", "broccoli", "headphones"):
        assert things()[name].article == ""


def test_captions_of_pictograms() -> None:
    assert captions("fox", "plain", "blue") == (
        "a picture of a fox on a blue background",
        "a picture of a fox",
        "a fox on a blue background",
        "a fox",
    )
    assert captions("owl", "oil", "grey")[0] == "an oil painting of an owl on a grey background"
    assert captions("scissors", "pixel", "red") == (
        "pixel art of scissors on a red background",
        "pixel art of scissors",
    )
    both = captions("unicorn", "watercolour", "pink")
    assert both[:2] == tuple(f"a {w} of a unicorn on a pink background" for w in ("watercolour", "watercolor"))


def test_held_out_pairs_are_apart_and_complete() -> None:
    pairs = [(name, style) for name in things() for style in STYLES]
    kept = [pair for pair in pairs if held_out(*pair)]
    assert 0.045 < len(kept) / len(pairs) < 0.075
    assert all(style != "plain" for _, style in kept)
    assert not held_out("fox", "oil")


@needs_font
def test_splits_of_pictograms() -> None:
    rows = {split: Pictograms(split=split, views=2).rows for split in ("train", "held_out", "all")}
    train, unseen = set(rows["train"]), set(rows["held_out"])
    assert train.isdisjoint(unseen)
    assert train | unseen == set(rows["all"])
    assert len(train) + len(unseen) == len(rows["all"])
    assert {row[:2] for row in train}.isdisjoint({row[:2] for row in unseen})
    name, style = next(iter(unseen))[:2]
    assert all(row.style != style for row in Pictograms(objects=[name]).rows)  # whatever else is in the list
    assert Pictograms(objects="teddy bear,fox").rows == Pictograms(objects=["teddy bear", "fox", "fox"]).rows
    every = ",".join(things())  # longer than a file's name may be
    assert len(open_source(f"pictograms:{every}", 32, split="all")) == len(things()) * len(STYLES) * len(GROUNDS)


DIGEST = """
import hashlib
from train.pictograms import Pictograms
source = Pictograms(size=64, objects=["owl", "fox", "boat"], split="all", views=2)
print(hashlib.sha256(b"".join(source[i].image.tobytes() for i in range(5, 288, 19))).hexdigest())
"""


@needs_font
def test_pictograms_are_a_function_of_seed_and_row() -> None:
    source = Pictograms(size=64, objects=["owl", "fox", "boat"], split="all", views=2)
    images = {i: source[i].image.tobytes() for i in reversed(range(5, 288, 19))}
    digest = hashlib.sha256(b"".join(images[i] for i in sorted(images))).hexdigest()
    elsewhere = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    root = Path(pictograms.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", DIGEST], cwd=root, env=elsewhere, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == digest
    alone = Pictograms(size=64, objects=["boat"], split="all", views=2)
    for i in (3, 40):
        assert alone[i].image.tobytes() == source[192 + i].image.tobytes()
        assert alone[i].captions == captions(*alone.rows[i][:3])
    other = Pictograms(size=64, objects=["boat"], split="all", seed=1)
    assert other[3].image.tobytes() != alone[6].image.tobytes()


@needs_font
def test_no_view_is_mirrored() -> None:
    source = Pictograms(size=64, objects=["boat", "teapot"], views=4, split="all")
    for name in ("boat", "teapot"):
        i = source.rows.index(Row(name, "plain", "grey", 0))
        first, *others = (_pixels(source[i + k].image) for k in range(4))
        for other in others:
            assert np.square(first - other).mean() < np.square(first[:, ::-1] - other).mean()


@needs_font
def test_every_object_has_a_picture_and_everyday_ones_differ() -> None:
    font, small = find_font(), []
    for thing in things().values():
        mark = glyph(thing.text, font)
        assert min(mark.size) > 8, thing
        if thing.everyday:
            ground = Image.new("RGBA", (24, 24), (128, 128, 128, 255))
            ground.alpha_composite(mark.resize((24, 24)))
            small.append(_pixels(ground.convert("RGB")) / 255)
    marks = np.stack(small).reshape(len(small), -1)
    square = (marks**2).sum(1)
    apart = np.sqrt(np.clip(square[:, None] + square - 2 * marks @ marks.T, 0, None) / marks.shape[1])
    assert (apart + np.eye(len(marks))).min() > 0.07


@needs_font
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("style", STYLES)
def test_grounds_are_told_by_their_colour(style: str, size: int) -> None:
    named = np.array(list(GROUNDS.values()), float)
    low, high = size // 12, size // 6
    for k, ground in enumerate(GROUNDS):
        for name in ("lemon", "whale"):
            pixels = _pixels(paint(name, style, ground, size, seed=k))
            assert pixels.shape == (size, size, 3)
            spans = (slice(low, high), slice(-high, -low))
            corners = np.concatenate([pixels[y, x].reshape(-1, 3) for y in spans for x in spans])
            colour = np.median(corners, axis=0)  # the median, since lead and hatching are not the ground
            assert np.square(named - colour).sum(1).argmin() == k, (name, ground)


@needs_font
def test_each_style_has_its_own_mark() -> None:
    for name, ground in (("fox", "blue"), ("house", "purple"), ("rose", "yellow")):
        pictures = {style: _pixels(paint(name, style, ground, 128, seed=4)) / 255 for style in STYLES}
        middle = {style: picture[34:94, 34:94] for style, picture in pictures.items()}
        corner = {style: picture[8:26, 8:26].mean(-1) for style, picture in pictures.items()}
        marks = {  # each is lowest, by far, in its own style
            "pixel": {s: len(np.unique(p.reshape(-1, 3), axis=0)) for s, p in pictures.items()},
            "watercolour": {s: 1 - p[1:3].min() for s, p in pictures.items()},  # a white margin
            "pencil": {s: 1 - np.corrcoef(m[..., 0].ravel(), m[..., 2].ravel())[0, 1] for s, m in middle.items()},
            "glass": {
                s: p[8:14, 8:-8].mean(-1).min() for s, p in pictures.items() if s != "pixel"
            },  # lead on the ground
        }
        for style, mark in marks.items():
            assert min(mark, key=mark.__getitem__) == style, (name, style, mark)
        rough = {style: np.abs(np.diff(c)).mean() for style, c in corner.items()}
        assert rough["oil"] > 3 * max(rough["plain"], rough["pixel"])  # brushwork on an even ground
        for one, two in combinations(STYLES, 2):
            assert np.abs(pictures[one] - pictures[two]).mean() > 0.03, (one, two)


def test_a_missing_font_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pictograms, "_font_folders", lambda: [tmp_path])
    find_font.cache_clear()
    try:
        with pytest.raises(ValueError, match="apt-get install fonts-noto-color-emoji") as caught:
            Pictograms()
        assert "--font" in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=r"no font file at .*nowhere\.ttf"):
            Pictograms(font=str(tmp_path / "nowhere.ttf"))
        text = tmp_path / "NotoColorEmoji.ttf"
        text.write_text("not a font")
        with pytest.raises(ValueError, match="can't be opened as a font"):
            paint("fox", "oil", "blue")
    finally:
        find_font.cache_clear()


def test_bad_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no object is named 'foxx'.*'fox'"):
        Pictograms(objects=["foxx"])
    with pytest.raises(ValueError, match=r"no style is named 'oils'.*'oil'"):
        paint("fox", "oils", "blue")
    with pytest.raises(ValueError, match="no ground is named 'teal'"):
        paint("fox", "oil", "teal")
    with pytest.raises(ValueError, match="expected 'train', 'held_out' or 'all'"):
        Pictograms(split="test")
    with pytest.raises(ValueError, match="no object is named 'some'; expected a name such as"):
        Pictograms(objects="some")
    with pytest.raises(ValueError, match=r"no object is named 'foxx'.*'fox'"):
        open_source("pictograms:house,foxx", 32)
