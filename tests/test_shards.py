"""Files that are read from one end to the other: parquet and tars, local and remote, and sets of the hub."""

import json
from pathlib import Path

import pytest

from tests.sets import parquet, tars
from tests.test_streams import feed, numbers
from train.build import class_names
from train.settings import Config
from train.shards import Shards, open_shards

pytestmark = pytest.mark.usefixtures("in_process", "own_datasets_cache")


@pytest.mark.parametrize("make", [tars, parquet])
def test_rows_can_be_read_from_any_of_them_on(tmp_path: Path, make) -> None:
    shards = open_shards(str(make(tmp_path, 2, 30)))
    for file in range(2):
        every = list(shards.rows(file, []))
        assert [row.captions[0] for row, _ in every] == [f"number {i}" for i in range(30 * file, 30 * file + 30)]
        assert every[3][0].example().image.getpixel((0, 0))[0] == 30 * file + 3
        for i in (0, 6, 7, 20, 29):
            place = json.loads(json.dumps(every[i][1]))
            assert list(shards.rows(file, place)) == every[i:]


def test_parquet_rows_are_those_of_datasets(tmp_path: Path) -> None:
    import datasets

    parquet(tmp_path, 1, 20)
    theirs = datasets.load_dataset("parquet", data_files=[str(tmp_path / "000.parquet")], split="train")
    ours = [row for row, _ in open_shards(str(tmp_path)).rows(0, [])]
    assert [list(row.captions) for row in ours] == theirs["text"]
    assert open_shards(str(tmp_path), template="<{text}>").rows(0, []).__next__()[0].captions == (
        "<number 0>",
        "<no. 0>",
    )


def test_remote_paths(tmp_path: Path) -> None:
    """In fsspec's own remote file system, that of the memory: a file, a pattern, a folder, in both kinds of files."""
    remote = pytest.importorskip("fsspec").filesystem("memory")
    tars(tmp_path / "t", 3, 10)
    parquet(tmp_path / "p", 2, 10)
    for kind in "tp":
        for file in sorted((tmp_path / kind).iterdir()):
            remote.pipe(f"/bucket/{kind}/{file.name}", file.read_bytes())
    for data, files in (
        ("memory://bucket/t/001.tar", 1),
        ("memory://bucket/t/{000..002}.tar", 3),
        ("memory://bucket/t", 3),
        ("memory://bucket/p/", 2),
    ):
        shards = open_shards(data)
        assert len(shards.files) == files
        kind, first = ("p", 0) if "/p" in data else ("t", 10 if files == 1 else 0)
        rows = [row for row, _ in shards.rows(0, [])]
        assert [row.captions[0] for row in rows] == [f"number {i}" for i in range(first, first + 10)]
        assert rows[0].example().image.getpixel((0, 0))[0] == first
    fed = feed("memory://bucket/t", streaming=False)  # which a remote path is by itself
    assert sorted(numbers(fed.take(0, 0, 8, 8))) != []


def test_classes_of_streams_are_those_of_their_tables(tmp_path: Path) -> None:
    """--text-encoder labels: no stream is read for them, and where they are not listed only what lies here is."""
    import datasets

    remote = pytest.importorskip("fsspec").filesystem("memory")
    pictures = datasets.load_dataset("parquet", data_files=str(parquet(tmp_path / "p", 1, 4) / "*"), split="train")
    kinds = pictures.remove_columns("text").add_column("label", [2, 0, 0, 2])
    kinds = kinds.cast_column("label", datasets.ClassLabel(names=["fox", "boat", "cat"]))
    kinds.to_parquet(tmp_path / "kinds.parquet")
    remote.pipe("/kinds/0.parquet", (tmp_path / "kinds.parquet").read_bytes())
    remote.pipe("/told/0.parquet", (tmp_path / "p" / "000.parquet").read_bytes())
    assert class_names(Config(data="memory://kinds/0.parquet")) == ["boat", "cat", "fox"]
    assert class_names(Config(data=str(tmp_path / "kinds.parquet"))) == ["cat", "fox"]  # those that there are
    numbers = [f"number {i}" for i in range(4)]
    assert class_names(Config(data=str(tmp_path / "p"), streaming=True)) == numbers
    assert class_names(Config(data=f"memory://kinds/0.parquet+{tmp_path / 'p'}")) == ["boat", "cat", "fox", *numbers]
    with pytest.raises(ValueError, match=r"needs all classes before the first picture.*memory://told/0\.parquet"):
        class_names(Config(data="memory://told/0.parquet"))


def test_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` with the network replaced by a folder."""
    import datasets

    parquet(tmp_path / "data", 2, 5)
    (tmp_path / "data" / "000.parquet").rename(tmp_path / "data" / "train-000.parquet")
    (tmp_path / "data" / "001.parquet").rename(tmp_path / "data" / "test-000.parquet")
    load = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: load(str(tmp_path)))
    for data, first in (("someone/numbers", 0), ("someone/numbers:test", 5)):
        (row, _), *_ = open_shards(data).rows(0, [])
        assert row.captions[0] == f"number {first}"
    with pytest.raises(ValueError, match=r"its splits are train, test: name one as someone/numbers:SPLIT"):
        open_shards("someone/numbers:validation")


def test_a_set_of_the_hub_stays_itself_from_commit_to_commit() -> None:
    names = [f"hf://datasets/a/b@{commit * 40}/{file}.tar" for commit in "ab" for file in ("x", "y")]
    first, second = (Shards("a/b", names[i : i + 2]).fingerprint() for i in (0, 2))
    assert first == second != Shards("a/b", names[1:3]).fingerprint()


def test_what_cannot_be_streamed_is_refused(tmp_path: Path, picture_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be streamed: expected .parquet files or .tar files"):
        open_shards(str(picture_folder))
    with pytest.raises(ValueError, match="does not exist"):
        open_shards(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"memory://nowhere/a.tar cannot be read .* see that it is there and can be"):
        list(open_shards("memory://nowhere/a.tar").rows(0, []))
    with pytest.raises(ValueError, match=r"--template names 'who', but the fields of .*000.tar are text"):
        open_shards(str(tars(tmp_path, 1, 4)), "a {who}")
    whole = (parquet(tmp_path / "p", 1, 60) / "000.parquet").read_bytes()
    (tmp_path / "p" / "001.parquet").write_bytes(whole[:200] + bytes(200) + whole[400:])
    with pytest.raises(ValueError, match=r"001.parquet cannot be read .* see that a whole file is in its place"):
        list(open_shards(str(tmp_path / "p")).rows(1, []))
    with pytest.raises(ValueError, match="--buckets needs the sizes"):
        feed(tars(tmp_path, 1, 4), buckets=True)
    with pytest.raises(ValueError, match=r"cannot be streamed|does not exist"):
        feed(f"{tmp_path}+shapes")


@pytest.mark.parametrize("make", [tars, parquet])
def test_a_shard_that_vanishes_is_named(tmp_path: Path, make) -> None:
    """After the set was opened; what was read before counts."""
    shards = open_shards(str(make(tmp_path, 2, 10)))
    assert len(list(shards.rows(0, []))) == 10
    Path(shards.files[1]).unlink()
    with pytest.raises(
        ValueError, match=r"001\.\w+ cannot be read \(FileNotFoundError: .*\): put it back where it was"
    ):
        list(shards.rows(1, []))
    remote = pytest.importorskip("fsspec").filesystem("memory")
    name = f"/gone/{Path(shards.files[0]).name}"
    remote.pipe(name, Path(shards.files[0]).read_bytes())
    shards = open_shards(f"memory:/{name}")
    remote.rm(name)
    with pytest.raises(ValueError, match=r"memory://gone/000\.\w+ cannot be read .* can be reached, and type the same"):
        list(shards.rows(0, []))


def test_what_the_network_brings_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises, after the tries that `datasets` makes."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    tries: list[Exception] = []

    class Refused(Exception):
        """As those of HTTP libraries, which are no OSError."""

    class Lost(MemoryFileSystem):
        protocol = "lost"

        def open(self, *args, **kwargs):
            tries.append(Refused("403") if "refused" in args[0] else TimeoutError("slow"))
            raise tries[-1]

    fsspec.register_implementation("lost", Lost, clobber=True)
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_RETRY_INTERVAL", 0)
    with pytest.raises(ValueError, match=r"lost://a/b.tar cannot be read \(ConnectionError: Server Disconnected\)"):
        list(open_shards("lost://a/b.tar").rows(0, []))
    assert len(tries) > 1
    with pytest.raises(ValueError, match=r"lost://refused/b.tar cannot be read \(Refused: 403\): see that it is there"):
        list(open_shards("lost://refused/b.tar").rows(0, []))
