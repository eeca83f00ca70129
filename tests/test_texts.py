"""Captions' states: in memory, in files, or as they come, they are the encoder's."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train.texts
from conditioning.context import Unconditional
from conditioning.labels import Labels
from tests.conftest import tiny_text_encoder
from train.texts import Texts, flat, nested

CPU = torch.device("cpu")


@pytest.mark.parametrize(("limit", "windows"), [(train.texts.TABLE_BYTES, 1), (1, 1), (train.texts.TABLE_BYTES, 2)])
def test_texts_are_the_encoders(limit: int, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.texts, "TABLE_BYTES", limit)
    encoder = tiny_text_encoder()
    long = "a red circle on a blue background " * (4 if windows > 1 else 1)
    groups = [("a red circle", "a fox"), (long,)]
    texts = Texts(encoder, groups, torch.device("cpu"))
    assert (texts.table is None) == (limit == 1 or windows > 1)
    asked = ["a fox", "", long, "a fox"]
    context = texts(asked)
    wanted = encoder(asked)
    assert context.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(context[name], value, atol=1e-5, rtol=1e-5)
    null = encoder([""], chunks=context["encoder_hidden_states"].shape[1] // 16)["encoder_hidden_states"]
    torch.testing.assert_close(context["encoder_hidden_states"][1:2], null)
    short = texts(["a fox"])["encoder_hidden_states"]  # as in any other batch, however it was divided
    torch.testing.assert_close(short, context["encoder_hidden_states"][:1], atol=1e-5, rtol=1e-5)
    assert (wanted["encoder_hidden_states"].shape[1] > 16) == (windows > 1)


def test_texts_of_labels_and_of_nothing() -> None:
    labels = Labels(["cat", "dog"])
    texts = Texts(labels, [("cat",), ("dog",)], torch.device("cpu"))
    assert texts(["dog", "", "cat"])["class_labels"].tolist() == [1, 2, 0]
    assert Texts(Unconditional(), [("cat",)], torch.device("cpu"))(["cat", ""]) == {}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where states go when nothing fits into memory."""
    monkeypatch.setattr(train.texts, "TABLE_BYTES", 1)
    monkeypatch.setattr(train.texts, "SHARD", 3)
    return tmp_path


CAPTIONS = [(f"a fox number {i}", f"fox {i}") for i in range(5)]


def test_states_that_do_not_fit_are_mapped_from_files(files: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = tiny_text_encoder()
    texts = Texts(encoder, CAPTIONS, CPU, cache=files)
    assert not texts.encodes
    assert len(list(files.glob("texts-*/*.safetensors"))) == 4  # of eleven captions, the empty one included
    assert "4 of 4 files to compute" in capsys.readouterr().out
    asked = ["fox 3", "", "a fox number 0", "fox 3"]
    wanted = encoder(asked)["encoder_hidden_states"]
    found = texts(asked)["encoder_hidden_states"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    assert not found.equal(wanted)  # float16, from the files
    unforeseen = ["no such fox", ""]
    assert texts(unforeseen)["encoder_hidden_states"].equal(encoder(unforeseen)["encoder_hidden_states"])


def test_a_killed_encoding_goes_on_and_stale_files_are_not_used(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_text_encoder()
    save, calls = train.texts.save_whole, []

    def killed(tensors: dict, file: Path) -> None:
        calls.append(file)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(tensors, file)

    monkeypatch.setattr(train.texts, "save_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        Texts(encoder, CAPTIONS, CPU, cache=files)
    Texts(encoder, CAPTIONS, CPU, cache=files)
    assert len(calls) == 5
    Texts(encoder, CAPTIONS, CPU, cache=files)
    assert len(calls) == 5
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.01)  # other weights
    texts = Texts(encoder, CAPTIONS, CPU, cache=files)
    assert len(calls) == 9
    wanted = encoder(["fox 1"])["encoder_hidden_states"]
    torch.testing.assert_close(texts(["fox 1"])["encoder_hidden_states"], wanted, atol=2e-3, rtol=2e-3)
    Texts(encoder, CAPTIONS[:-1], CPU, cache=files)  # other captions
    assert len(calls) == 12


def test_a_broken_file_is_named(files: Path) -> None:
    encoder = tiny_text_encoder()
    Texts(encoder, CAPTIONS, CPU, cache=files)
    broken = next(files.glob("texts-*/*.safetensors"))
    broken.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=rf"{broken} is broken .*: delete it and start again"):
        Texts(encoder, CAPTIONS, CPU, cache=files)


def test_without_room_captions_are_encoded_as_they_come(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = train.texts.shutil.disk_usage
    monkeypatch.setattr(train.texts.shutil, "disk_usage", lambda place: usage(place)._replace(free=10))
    assert Texts(tiny_text_encoder(), CAPTIONS, CPU, cache=files).encodes
    assert "0 MB free: captions are encoded as they come" in capsys.readouterr().out


class Two(nn.Module):
    """A conditioner whose context has a dict within, as SDXL's has."""

    def forward(self, captions: Sequence[str]) -> dict[str, object]:
        lengths = torch.tensor([[float(len(c))] for c in captions])
        return {"encoder_hidden_states": lengths, "added_cond_kwargs": {"text_embeds": -lengths}}


@pytest.mark.parametrize("limit", [1, 10**9])
def test_contexts_with_a_dict_within(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.texts, "TABLE_BYTES", limit)
    texts = Texts(Two(), [("a", "bcd")], CPU, cache=tmp_path)
    context = texts(["bcd", "", "a"])
    embeds: Tensor = context["added_cond_kwargs"]["text_embeds"]
    assert embeds.tolist() == [[-3], [0], [-1]]
    assert context["encoder_hidden_states"].tolist() == [[3], [0], [1]]
    assert nested(flat(context)).keys() == context.keys()
