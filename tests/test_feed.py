"""What the loop is fed with: the pictures of an update as a function of (seed, update, position), nothing dropped."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.conftest import tiny_model
from train.cache import cache_latents
from train.data import batch_indices, permutation, to_unit
from train.feed import CachedFeed, open_feed
from train.order import Order, last_epoch
from train.sources import open_source
from vae.autoencoder import Identity

pytestmark = pytest.mark.usefixtures("in_process")
CPU = torch.device("cpu")


def pictures(folder: Path, count: int, size: tuple[int, int] = (16, 16)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (i, 100, 200)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"{folder.name} {i}")
    return folder


def feed(data: str | Path, cache: Path, size: int = 16, **settings) -> CachedFeed:
    given = {"seed": 3, "global_batch": 4, "workers": 0} | settings
    opened = open_feed(str(data), Identity(), size, cache=cache, accelerator=Accelerator(cpu=True), **given)
    assert isinstance(opened, CachedFeed)
    return opened


def test_one_group_is_the_order_of_batch_indices() -> None:
    """The order of every run so far: what `batch_indices` says of the pictures that are not held out."""
    members = permutation(50, 7, -1)[5:]
    order = Order([members], torch.ones(50, dtype=torch.float64), 7)
    for update in range(30):
        for first in (0, 3):
            number, found = order(update, first, 4, 8)
            assert number == 0
            assert found.equal(members[batch_indices(45, 7, update * 8 + first, 4)])


def test_a_feed_gives_what_the_loop_drew_from_latents(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 120)
    fed = feed(folder, tmp_path / "cache")
    latents = cache_latents(open_source(str(folder), 16), Identity(), 16, tmp_path / "cache", Accelerator(cpu=True), 0)
    order = permutation(120, 3, -1)
    train, held = latents.select(order[6:]), latents.select(order[:6])
    assert fed.count == 114
    assert fed.shapes == [(3, 16, 16)]
    assert fed.captions == latents.captions
    assert fed.validation().captions == held.captions
    assert fed.validation(2).mean.equal(held.mean[:2])
    for update in (0, 11, 40):
        taken = fed.take(update, 2, 5, 10)
        rows = batch_indices(114, 3, update * 10 + 2, 5)
        assert taken.captions == [train.captions[i] for i in rows.tolist()]
        assert taken.mean.equal(train.posterior(rows, CPU).mean)
        assert taken.logvar.equal(train.posterior(rows, CPU).logvar)
        assert taken.sizes.tolist() == [[16, 16, 0, 0, 16, 16]] * 5
        assert taken.parts.tolist() == [0] * 5
        assert taken.pixels is None
    assert fed.state()["pictures"] == 120


def test_few_pictures_are_validated_on_themselves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fed = feed(pictures(tmp_path / "p", 10), tmp_path / "cache")
    assert fed.count == len(fed.validation().captions) == 10
    assert "too few to hold any out" in capsys.readouterr().out


def test_pixels_come_with_their_latents(tmp_path: Path) -> None:
    fed = feed(pictures(tmp_path / "p", 8, (24, 16)), tmp_path / "cache", pixels=True)
    for update, first in ((0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (7, 0), (0, 0), (1, 0)):
        taken = fed.take(update, first, 2, 4)
        assert taken.pixels is not None
        torch.testing.assert_close(taken.pixels, taken.mean, atol=1e-3, rtol=0)  # a picture is its own latent here
    taken = fed.take(1, 0, 4, 4)
    assert taken.sizes.tolist() == [[16, 24, 0, 4, 16, 16]] * 4
    (tmp_path / "p" / "003.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match="could be read when its latent was cached"):
        fed.take(0, 0, 8, 8)


def test_latents_are_the_autoencoders(tmp_path: Path) -> None:
    vae = tiny_model().vae
    folder = pictures(tmp_path / "p", 4)
    accelerator = Accelerator(cpu=True)
    fed = open_feed(
        str(folder), vae, 16, seed=0, global_batch=4, cache=tmp_path / "c", accelerator=accelerator, workers=0
    )
    taken = fed.take(0, 0, 4, 4)
    shown = [Image.open(folder / f"{int(c.split()[1]):03d}.png") for (c,) in taken.captions]
    pixels = torch.stack([torch.tensor(list(s.tobytes()), dtype=torch.uint8).view(16, 16, 3) for s in shown])
    with torch.no_grad():
        wanted = vae.encode(to_unit(pixels))
    torch.testing.assert_close(taken.mean, wanted.mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(taken.logvar, wanted.logvar, atol=2e-3, rtol=2e-3)


# The order


def test_last_epoch_is_the_inverse_of_a_count() -> None:
    starts = [0, 3, 3, 7, 20]

    def before(epoch: int) -> int:
        return starts[epoch] if epoch < 5 else 20 + 5 * (epoch - 4)

    for place in range(40):
        epoch = last_epoch(before, place)
        assert before(epoch) <= place < before(epoch + 1)


def test_repeats_are_exact_over_the_epochs() -> None:
    """A picture with number r comes floor((e + 1) r + u) - floor(e r + u) times in epoch e: about e r times in all."""
    repeats = torch.tensor([1.0] * 6 + [3.0] * 4 + [0.4] * 10, dtype=torch.float64)
    order = Order([torch.arange(20)], repeats, 1)
    group = order.groups[0]
    total: Counter[int] = Counter()
    for epoch in range(10):
        found = Counter(group.order(epoch).tolist())
        assert group.before(epoch + 1) - group.before(epoch) == found.total()
        assert all(found[i] == 1 for i in range(6))
        assert all(found[i] == 3 for i in range(6, 10))
        assert all(found[i] <= 1 for i in range(10, 20))
        total += found
    assert all(total[i] == 4 for i in range(10, 20))
    whole = torch.cat([group.order(epoch) for epoch in range(10)])
    for start, size in ((0, 40), (17, 60), (150, 5)):  # from any start, also over several epochs
        assert group.at(start, size).equal(whole[start : start + size])


def test_groups_give_whole_batches_and_lose_nothing() -> None:
    groups = [torch.arange(0, 23), torch.arange(23, 30), torch.arange(30, 33)]
    order = Order(groups, torch.ones(33, dtype=torch.float64), 5)
    seen: Counter[int] = Counter()
    numbers: Counter[int] = Counter()
    for update in range(33):  # four epochs of 33 pictures are 33 batches of four
        number, chosen = order(update, 0, 4, 4)
        numbers[number] += 1
        seen.update(chosen.tolist())
        assert set(chosen.tolist()) <= set(groups[number].tolist())
        halves = [order(update, first, 2, 4)[1] for first in (0, 2)]
        assert torch.cat(halves).equal(chosen)
    assert numbers == {0: 23, 1: 7, 2: 3}
    assert all(seen[i] == 4 for i in range(33))
    labels = [order(update, 0, 1, 4)[0] for update in range(33)]
    assert labels != sorted(labels)
    assert labels != [Order(groups, torch.ones(33, dtype=torch.float64), 6)(u, 0, 1, 4)[0] for u in range(33)]


# Several sources


def test_numbers_say_how_often_pictures_come(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mine, regular = pictures(tmp_path / "mine", 3), pictures(tmp_path / "regular", 30)
    fed = feed(f"5*{mine}+0.5*{regular}", tmp_path / "cache")
    assert "3 pictures, each 5 times an epoch" in capsys.readouterr().out
    assert fed.count == 30
    seen: Counter[str] = Counter()
    for update in range(120):  # 4 epochs of 30 positions, give or take what begins in a fraction
        taken = fed.take(update, 0, 1, 1)
        (caption,) = taken.captions[0]
        assert taken.parts.tolist() == [0 if caption.startswith("mine") else 1]
        seen[caption] += 1
    assert all(19 <= seen[f"mine {i}"] <= 20 for i in range(3))
    assert all(1 <= seen[f"regular {i}"] <= 3 for i in range(30))
    other = feed(f"2*{mine}+{regular}", tmp_path / "cache")  # other numbers, the same latents
    assert other.count == 36
    assert "to compute" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"0\*.*above 0"):
        feed(f"0*{mine}+{regular}", tmp_path / "cache")
    with pytest.raises(ValueError, match="leave it out here"):
        cache_latents(open_source(f"2*{mine}", 16), Identity(), 16, tmp_path / "c", Accelerator(cpu=True), 0)


# Buckets


def test_a_feed_of_buckets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Wide, tall and square pictures in batches of their own, cut as little as may be, and the cut written down."""
    folder = tmp_path / "p"
    for name, count, size in (("square", 10, (40, 40)), ("wide", 9, (66, 40)), ("tall", 8, (40, 66))):
        pictures(folder / name, count, size)
    pictures(folder / "panorama", 2, (90, 30))  # fewer than a batch, but wide ones share their bucket
    fed = feed(folder, tmp_path / "cache", size=32, buckets=True, multiple=8)
    assert "40×24        11 ####" in capsys.readouterr().out
    assert fed.shapes == [(3, 32, 32), (3, 24, 40), (3, 40, 24)]
    seen: Counter[str] = Counter()
    for update in range(29):
        taken = fed.take(update, 0, 4, 4)
        kinds = {caption[0].split()[0] for caption in taken.captions}
        wanted = {(32, 32): {"square"}, (24, 40): {"wide", "panorama"}, (40, 24): {"tall"}}[tuple(taken.mean.shape[2:])]
        assert kinds <= wanted
        seen.update(c for (c,) in taken.captions)
        for (caption,), framing in zip(taken.captions, taken.sizes.tolist(), strict=True):
            told = {
                "square": [40, 40, 0, 0, 32, 32],
                "wide": [40, 66, 0, 0, 24, 40],
                "tall": [66, 40, 0, 0, 40, 24],
                "panorama": [30, 90, 0, 16, 24, 40],
            }[caption.split()[0]]
            assert framing == told
    assert len(seen) == 29
    assert set(seen.values()) == {4}
    assert len(fed.validation().captions) == 11  # of the shape that most pictures have


def test_a_rehearsal_sees_the_largest_shape(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    for name, count, size in (("wide", 100, (90, 40)), ("square", 5, (40, 40))):
        pictures(folder / name, count, size)
    fed = feed(folder, tmp_path / "cache", size=32, buckets=True, multiple=8, pixels=True)
    before = [fed.take(update, 0, 4, 4) for update in range(3)]
    with fed.rehearsing():
        for update, first in ((0, 0), (0, 8), (1, 0), (1, 8)):  # more than there are of that shape
            taken = fed.take(update, first, 8, 16)
            assert taken.mean.shape == (8, 3, 32, 32)
            assert taken.pixels is not None
            torch.testing.assert_close(taken.pixels, taken.mean, atol=1e-3, rtol=0)
    assert any(taken.mean.shape != (4, 3, 32, 32) for taken in before)
    for update, was in enumerate(before):
        assert fed.take(update, 0, 4, 4).mean.equal(was.mean)


# What a run goes on with


def test_other_pictures_than_before_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 10)
    state = json.loads(json.dumps(feed(folder, tmp_path / "cache").state()))
    feed(folder, tmp_path / "elsewhere").load(state)
    feed(folder, tmp_path / "cache").load({})  # of a checkpoint that had none
    shutil.copytree(folder, tmp_path / "moved")
    feed(tmp_path / "moved", tmp_path / "cache").load(state)

    def refused(words: str, **settings) -> None:
        words += r".* Put back .* another --output, .* if --model names its folder"
        with pytest.raises(ValueError, match=words):
            feed(folder, tmp_path / "cache", **settings).load(state)

    pictures(folder, 11)
    refused("10 pictures then, 11 now")
    for end in (".png", ".txt"):
        (folder / f"010{end}").unlink()
    feed(folder, tmp_path / "cache").load(state)
    (folder / "003.txt").write_text("another caption")
    refused("10 pictures then, 10 now")
    (folder / "003.txt").write_text("p 3")
    (folder / "003.png").write_bytes((folder / "004.png").read_bytes())
    refused("10 pictures then, 10 now")
    Image.new("RGB", (16, 16), (3, 100, 200)).save(folder / "003.png")
    refused("10 pictures then, 10 now", size=24)
    refused("10 pictures then, 10 now", template="a {text}")
    feed(folder, tmp_path / "cache").load(state)
