"""Streams: every row once an epoch, the same for any number of processes, and exact to go on from."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import train.data
import train.streams
from tests.conftest import tiny_model
from tests.sets import numbered, parquet, png, tars, write_parquet, write_tar
from train.feed import open_feed
from train.shards import open_shards
from train.streamed import StreamFeed
from train.streams import Cursor, Stream, Unusable, first_held_out
from vae.autoencoder import Identity

pytestmark = pytest.mark.usefixtures("in_process", "own_datasets_cache")


def feed(data: str | Path, **settings) -> StreamFeed:
    given = {"seed": 3, "global_batch": 8, "workers": 1, "streaming": True, "cache": Path("unused")} | settings
    vae = given.pop("vae", Identity())
    opened = open_feed(str(data), vae, 8, accelerator=Accelerator(cpu=True), **given)
    assert isinstance(opened, StreamFeed)
    return opened


def numbers(taken) -> list[int]:
    found = [int(captions[0].split()[1]) for captions in taken.captions]
    colours = ((taken.mean[:, :, 0, 0] + 1) * 127.5).round().long()
    assert [int(r + 256 * g) for r, g, _ in colours] == found  # the pixels are those of the caption
    return found


def stream(data: Path, number: int = 0, streams: int = 1, held: set | None = None) -> Stream:
    return Stream(open_shards(str(data)), number, streams, 3, held or set(), Unusable())


def given(one: Stream, count: int, first: int = 0) -> list[str]:
    found = []
    for item in range(first, first + count):
        block = one.block_of(item)
        found.append(block.rows[item - block.cursor.item].captions[0])
    return found


# One stream


@pytest.mark.parametrize("make", [tars, parquet])
def test_every_epoch_holds_every_row_once(tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.streams, "BLOCK_ROWS", 7)
    make(tmp_path, 3, 20)
    first, second = (sorted(given(stream(tmp_path), 60, first=start)) for start in (0, 60))
    assert first == second == sorted(f"number {i}" for i in range(60))
    order = given(stream(tmp_path), 120)
    assert order[:60] != order[60:]
    assert order == given(stream(tmp_path), 120)
    halves = [given(stream(tmp_path, number, 2), 20 * (2 - number)) for number in (0, 1)]  # files 0 and 2, file 1
    assert sorted(halves[1]) == sorted(f"number {i}" for i in range(20, 40))
    assert sorted(halves[0] + halves[1]) == first


@pytest.mark.parametrize("make", [tars, parquet])
def test_a_stream_goes_on_from_a_block(tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.streams, "BLOCK_ROWS", 7)
    make(tmp_path, 3, 20)
    whole = given(stream(tmp_path), 150)
    for item in (0, 6, 7, 50, 61, 130):
        one = stream(tmp_path)
        given(one, item + 1)
        cursor = one.block_of(item).cursor
        assert item - 7 < cursor.item <= item
        other = stream(tmp_path)
        other.start(Cursor(*json.loads(json.dumps(cursor))))
        read: list[int] = []
        rows = other.shards.rows
        monkeypatch.setattr(other.shards, "rows", lambda f, p, rows=rows, read=read: counted(rows(f, p), read))
        assert given(other, 15, first=item) == whole[item : item + 15]
        assert len(read) <= 4 * 7  # no row before the block's, and no more than the blocks need


def counted(rows, read: list[int]):
    for row in rows:
        read.append(1)
        yield row


def test_blocks_hold_a_share_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars(tmp_path, 1, 40)
    size = len(numbered(0))
    monkeypatch.setattr(train.streams, "BLOCK_BYTES", 10 * size)
    block = stream(tmp_path).block_of(0)
    assert 10 <= len(block.rows) <= 12


# Feeds


def test_every_process_count_sees_the_same(tmp_path: Path) -> None:
    tars(tmp_path, 5, 24)
    whole = feed(tmp_path)
    updates = [numbers(whole.take(update, 0, 8, 8)) for update in range(20)]
    for processes, accumulate in ((2, 1), (2, 2), (4, 1)):
        size = 8 // processes // accumulate
        feeds = [feed(tmp_path) for _ in range(processes)]
        for update in range(20):
            seen = []
            for micro in range(accumulate):
                for rank, one in enumerate(feeds):
                    seen += numbers(one.take(update, (micro * processes + rank) * size, size, 8))
            assert seen == updates[update]
    assert len({tuple(update) for update in updates}) == 20
    assert all(len(one.streams) <= 2 for one in feeds)  # of four processes each opens only what it needs


def test_an_epoch_of_a_feed_is_the_set_without_what_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tars(tmp_path, 4, 30)
    fed = feed(tmp_path)
    held = {int(c[0].split()[1]) for c in fed.captions}
    assert len(held) == 6
    assert "6 pictures held out" in capsys.readouterr().out
    validation = fed.validation()
    assert {int(c[0].split()[1]) for c in validation.captions} == held
    assert validation.mean.shape == (6, 3, 8, 8)
    seen: Counter[int] = Counter()
    for update in range(4 * 57):  # streams have 24 or 30 rows: after 120 of each, all rows came 4 or 5 times
        seen.update(numbers(fed.take(update, 0, 4, 4)))
    assert set(seen) == set(range(120)) - held
    assert fed.count is None


def test_held_out_rows_leave_something_in_every_file(tmp_path: Path) -> None:
    rows, places = first_held_out(open_shards(str(tars(tmp_path, 300, 3))), 256)
    assert len(rows) == len(places) == 256
    assert Counter(file for file, _ in places) == dict.fromkeys(range(256), 1)
    few, none = first_held_out(open_shards(str(tmp_path / "000.tar")), 256)
    assert (len(few), none) == (3, set())


def test_a_feed_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.streams, "BLOCK_ROWS", 5)
    parquet(tmp_path, 3, 40)
    whole = feed(tmp_path)
    assert feed(tmp_path).state()["streams"] == {}
    updates = [numbers(whole.take(update, 0, 6, 6)) for update in range(40)]
    stopped = [feed(tmp_path), feed(tmp_path)]
    for update in range(17):
        for rank, one in enumerate(stopped):
            one.take(update, rank * 3, 3, 6)
    state = merged(stopped)
    assert set(state["streams"]) == {"0.0", "0.1", "0.2"}
    for processes in (1, 3):  # also other numbers of processes
        size = 6 // processes
        again = [feed(tmp_path) for _ in range(processes)]
        for one in again:
            one.load(state)
            assert one.state() == state
        for update in range(17, 40):
            seen = [n for rank, one in enumerate(again) for n in numbers(one.take(update, rank * size, size, 6))]
            assert seen == updates[update]
            if update == 25:  # a state of who went on from a state
                further = merged(again)
        last = feed(tmp_path)
        last.load(further)
        assert further["streams"]["0.0"] > state["streams"]["0.0"]
        assert numbers(last.take(26, 0, 6, 6)) == updates[26]
    late = feed(tmp_path)  # without its state it has to read all that lies before, and comes to the same
    assert numbers(late.take(17, 0, 6, 6)) == updates[17]
    other = feed(tars(tmp_path / "other", 1, 9))
    with pytest.raises(ValueError, match="names other streams"):
        other.load(state)


def merged(feeds: list[StreamFeed]) -> dict:
    """What every process of several says, each of which knows its own streams."""
    own = [(name, list(cursor)) for one in feeds for name, cursor in one.served.items()]
    states = []
    for one in feeds:
        one.gather = lambda _: own
        states.append(json.loads(json.dumps(one.state())))
    assert all(state == states[0] for state in states)
    return states[0]


def test_a_rehearsal_leaves_no_trace(tmp_path: Path) -> None:
    """The first update, then back to where all was: also with pictures that are already being read ahead."""
    tars(tmp_path, 3, 40)
    fresh, rehearsed = feed(tmp_path), feed(tmp_path)
    before = rehearsed.state()
    for update in range(4):
        rehearsed.take(update, 0, 6, 6)
    assert rehearsed.prepared
    rehearsed.load(before)
    for update in range(30):
        assert numbers(rehearsed.take(update, 0, 6, 6)) == numbers(fresh.take(update, 0, 6, 6))


def test_a_stream_only_goes_on(tmp_path: Path) -> None:
    fed = feed(tars(tmp_path, 1, 30))
    first = numbers(fed.take(3, 0, 4, 4))
    assert numbers(fed.take(3, 0, 4, 4)) == first  # a rehearsal of the first update may be repeated
    fed.take(4, 0, 4, 4)
    with pytest.raises(ValueError, match="update 3, position 0 asked of a stream after update 4, position 0"):
        fed.take(3, 0, 4, 4)
    with pytest.raises(ValueError, match="cut for 4"):
        fed.take(6, 0, 8, 8)


def test_sets_share_the_positions(tmp_path: Path) -> None:
    tars(tmp_path / "a", 2, 40)
    parquet(tmp_path / "b", 2, 40)
    fed = feed(f"3*{tmp_path / 'a'}+{tmp_path / 'b'}")
    for update in range(3):
        taken = fed.take(update, 0, 8, 8)
        assert taken.parts.tolist() == [0] * 6 + [1] * 2
        assert [len(captions) for captions in taken.captions] == [1] * 6 + [2] * 2
    with pytest.raises(ValueError, match=r"a global batch of 2 has no position for .*b"):
        feed(f"30*{tmp_path / 'a'}+{tmp_path / 'b'}", global_batch=2)  # and not only when it is asked


def test_what_is_unusable_is_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = []
    for i in range(100):
        members += [(f"{i:05d}.png", numbered(i) if i != 33 else b"broken")]
        members += [(f"{i:05d}.txt", {44: b"", 55: b"\xff\xfe"}.get(i, f"number {i}".encode()))]
        members += [(f"{i:05d}.json", b"{")] if i == 66 else []
    write_tar(tmp_path / "a.tar", *members)
    fed = feed(tmp_path)
    seen = {n for update in range(24) for n in numbers(fed.take(update, 0, 8, 8))}
    assert not seen & {33, 44, 55, 66}
    out = capsys.readouterr().out
    assert f"left out {tmp_path / 'a.tar'}: 00033: no picture in a format that Pillow knows" in out
    assert f"left out {tmp_path / 'a.tar'}: 00044: no caption" in out
    assert all(f"{tmp_path / 'a.tar'}: 000{i}: no caption" in out for i in (55, 66))
    monkeypatch.setattr(train.streams, "JUDGED", 50)
    monkeypatch.setattr(train.data, "MAX_UNUSABLE", 0.005)
    with pytest.raises(ValueError, match=r"pictures cannot be used .* for instance .*a.tar: 000(33|44|55|66)"):
        [fed.take(update, 0, 8, 8) for update in range(24, 60)]


def test_a_set_of_nothing_usable_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[b"broken"] * 5, text=["a"] * 5)
    with pytest.raises(ValueError, match="no picture with a caption can be read"):
        feed(tmp_path)


def test_latents_and_pixels_are_those_of_the_autoencoder(tmp_path: Path) -> None:
    vae = tiny_model().vae
    write_parquet(tmp_path / "a.parquet", image=[png("red", (12, 8))] * 4, text=["red"] * 4)
    taken = feed(tmp_path, vae=vae, pixels=True).take(0, 0, 2, 2)
    assert taken.pixels is not None
    assert taken.pixels.shape == (2, 3, 8, 8)
    assert taken.sizes.tolist() == [[8, 12, 0, 2, 8, 8]] * 2
    with torch.no_grad():
        wanted = vae.encode(taken.pixels)
    torch.testing.assert_close(taken.mean, wanted.mean)
    torch.testing.assert_close(taken.logvar, wanted.logvar)


@pytest.mark.parametrize(("batch", "ratio"), [(8, 2), (10, 1)])
def test_files_that_come_more_often_than_others_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, batch: int, ratio: int
) -> None:
    fed = feed(tars(tmp_path, 5, 40), global_batch=batch)
    said = f"with {batch} of its pictures in an update, those of some of its 5 files come 2 times as often as others"
    assert (said in capsys.readouterr().out) == (ratio == 2)
    files = Counter(number // 40 for update in range(10) for number in numbers(fed.take(update, 0, batch, batch)))
    assert max(files.values()) == ratio * min(files.values())
