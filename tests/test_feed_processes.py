"""Two real processes are fed what one is: cached pictures in buckets, streams, text states; and go on alike."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.sets import tars
from tests.test_launch import ACCELERATE, ROOT, free_port, run

SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
import torch, train.cache, train.texts
train.cache.SHARD, train.texts.SHARD, train.texts.TABLE_BYTES = 3, 3, 1
from pathlib import Path
from tests.conftest import tiny_text_encoder
from train.feed import open_feed
from train.launch import start
from train.texts import Texts
from vae.autoencoder import Identity

accelerator = start()
rank, processes, size = accelerator.process_index, accelerator.num_processes, 8 // accelerator.num_processes
place = Path({place!r})


def taken(feed, updates):
    return [feed.take(u, rank * size, size, 8).captions for u in updates]


def opened(data, **more):
    return open_feed(str(place / data), Identity(), 16, seed=1, global_batch=8, cache=place / f"cache{{processes}}",
                     accelerator=accelerator, workers=0, **more)


cached = opened("folder", buckets=True, multiple=4)
stream = opened("tars", streaming=True)
found = {{"cached": taken(cached, range(9)), "stream": taken(stream, range(9))}}
state = json.loads(json.dumps(stream.state()))
further = opened("tars", streaming=True)
further.load(state)
found["further"] = taken(further, range(9, 14))
found["state"] = state
texts = Texts(tiny_text_encoder(), cached.captions, accelerator.device, cache=place / f"cache{{processes}}",
              accelerator=accelerator)
found["files"] = len(texts.files)
found["sum"] = float(texts([c for c, *_ in cached.captions])["encoder_hidden_states"].sum())
(place / f"{{processes}}-{{rank}}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_are_fed_what_one_is(tmp_path: Path) -> None:
    tars(tmp_path / "tars", 3, 50)
    for name, size in (("square", (16, 16)), ("wide", (26, 16))):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", size, (i * 9, 0, 0)).save(tmp_path / "folder" / name / f"{i}.png")
            (tmp_path / "folder" / name / f"{i}.txt").write_text(f"{name} {i}")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), place=str(tmp_path)))
    one = ("launch", "--num_processes", "1", script)
    two = ("launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()), script)
    for words in (one, two):
        result = run(ACCELERATE, *words, cwd=ROOT, ACCELERATE_USE_CPU="true")
        assert result.returncode == 0, result.stderr
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    for kind in ("cached", "stream", "further"):
        assert [a + b for a, b in zip(first[kind], second[kind], strict=True)] == alone[kind]
    assert first["state"] == second["state"] == alone["state"]
    assert first["files"] == second["files"] == alone["files"] > 2
    torch.testing.assert_close(torch.tensor([first["sum"], second["sum"]]), torch.tensor([alone["sum"]] * 2))
    shards = [len(list((tmp_path / f"cache{n}").rglob("*.safetensors"))) for n in (1, 2)]
    assert shards[0] == shards[1]
