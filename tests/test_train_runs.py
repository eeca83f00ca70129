"""Runs that are stopped, divided, broken or started again: nothing of that shows in what they leave."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator

import train.ldm
import train.trained
import train.watch
from ldm.pixel_unet import PixelUNetConfig
from pipelines.files import checkpoints
from tests.training import Killed, kill_at, paint, poison, state, weights
from train.batch import draw_batch
from train.data import batch_indices
from train.feed import Taken
from train.ldm import main
from train.settings import Config

pytestmark = pytest.mark.usefixtures("in_process")


def test_a_killed_run_ends_with_the_same_bytes(
    latents: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(latents, updates=6, checkpoint_every=3, batch_size=3, accumulate=2, caption_dropout=0.3)
    whole = main(replace(config, output=tmp_path / "whole"))
    kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        main(replace(config, output=tmp_path / "killed"))
    monkeypatch.undo()
    torch.manual_seed(99)  # nothing hangs on what the process drew before
    again = main(replace(config, output=tmp_path / "killed"))
    for name in ("unet/diffusion_pytorch_model.safetensors", "atelier.json", "scheduler/scheduler_config.json"):
        assert (checkpoints(whole)[-1] / name).read_bytes() == (checkpoints(again)[-1] / name).read_bytes()
    a, b = state(whole), state(again)
    assert a["update"] == b["update"] == 6
    assert all(a["weights"][name].equal(b["weights"][name]) for name in a["weights"])
    for one, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(one[name].equal(other[name]) for name in one)
    assert (whole / "samples/0000006.png").read_bytes() == (again / "samples/0000006.png").read_bytes()
    # Done is done; other settings are another run; a longer run of the same goes on.
    before = (checkpoints(again)[-1] / "training" / "state.pt").stat().st_mtime_ns
    main(replace(config, output=tmp_path / "killed"))
    assert (checkpoints(again)[-1] / "training" / "state.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"learning_rate: 0.002 before, 0.5 now"):
        main(replace(config, output=tmp_path / "killed", learning_rate=0.5))
    assert state(main(replace(config, output=tmp_path / "killed", updates=7)))["update"] == 7


@pytest.mark.parametrize("settings", [{}, {"inpainting": True, "perturbation": 0.1}])
def test_drawing_ahead_changes_nothing(
    latents: Config, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
) -> None:
    """As on a GPU, for which the next batch is drawn while it computes; here, too, where a run goes on."""
    config = replace(
        latents, updates=4, checkpoint_every=2, batch_size=3, accumulate=2, caption_dropout=0.3, **settings
    )
    config = replace(config, schedule="constant")
    if settings:
        plain = Config()
        config = replace(
            config, model=str(model_folder), vae=plain.vae, text_encoder=plain.text_encoder, unet=plain.unet
        )
    whole = weights(main(replace(config, output=tmp_path / "as-it-is")))
    monkeypatch.setattr(train.ldm, "draws_ahead", lambda device, feed: True)
    main(replace(config, output=tmp_path / "ahead", updates=2))
    again = weights(main(replace(config, output=tmp_path / "ahead")))
    assert all(weight.equal(again[name]) for name, weight in whole.items())


def test_accumulated_steps_are_one_batch(latents: Config, tmp_path: Path) -> None:
    config = replace(latents, updates=1, clip=1e9)
    runs = {
        (size, parts): main(replace(config, output=tmp_path / f"{size}x{parts}", batch_size=size, accumulate=parts))
        for size, parts in ((8, 1), (4, 2), (4, 1))
    }
    # After one update the momentum, AdamW's or Muon's, is the gradient times a constant.
    moments = {
        key: torch.cat([s.get("momentum", s.get("mean")).flatten() for s in state(run)["optimizer"]["state"].values()])
        for key, run in runs.items()
    }
    scale = moments[8, 1].abs().max()
    torch.testing.assert_close(moments[4, 2], moments[8, 1], atol=1e-5 * float(scale), rtol=1e-4)
    assert (moments[4, 1] - moments[8, 1]).abs().max() > 0.01 * scale


class Six:
    """Six pictures with two captions each."""

    count = 6

    def __init__(self, mean: torch.Tensor):
        self.mean = mean

    def take(self, update: int, first: int, size: int, global_batch: int) -> Taken:
        chosen = batch_indices(6, 0, update * global_batch + first, size)
        captions = [(f"{i}", f"number {i}") for i in chosen.tolist()]
        none = torch.zeros(size, 6, dtype=torch.int64)
        return Taken(self.mean[chosen], torch.zeros_like(self.mean[chosen]), captions, none, none[:, 0], None)


def test_batches_do_not_hang_on_how_they_are_divided(pixels: Config) -> None:
    drawn = torch.Generator().manual_seed(0)
    mean = torch.randn(6, 3, 2, 2, generator=drawn)
    set_ = Six(mean)
    config = replace(pixels, batch_size=8, caption_dropout=0.25)
    whole = draw_batch(config, set_, 5, 0, 8, torch.device("cpu"))
    halves = [draw_batch(replace(config, batch_size=4), set_, 5, first, 8, torch.device("cpu")) for first in (0, 4)]
    for name in ("x0", "noise", "u"):
        assert torch.cat([getattr(half, name) for half in halves]).equal(getattr(whole, name))
    assert halves[0].captions + halves[1].captions == whole.captions
    # Each place in the batch has its share of the noise levels.
    assert (whole.u * 8).floor().tolist() == list(range(8))
    assert not draw_batch(config, set_, 6, 0, 8, torch.device("cpu")).noise.equal(whole.noise)
    many = [c for u in range(200) for c in draw_batch(config, set_, u, 0, 8, torch.device("cpu")).captions]
    assert 0.2 < many.count("") / len(many) < 0.3
    said = {f"{i}" for i in range(6)} | {f"number {i}" for i in range(6)}
    assert set(many) == said | {""}


@pytest.mark.parametrize(
    ("module", "broken"), [(train.ldm, "validate"), (train.watch, "grid"), (train.trained, "save_model")]
)
def test_what_cannot_work_fails_before_the_first_update(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, broken: str
) -> None:
    def failing(*args, **kwargs) -> None:
        raise OSError("no room")

    monkeypatch.setattr(module, broken, failing)
    monkeypatch.setattr(train.ldm, "learning_rate", None)  # is not come to
    with pytest.raises(OSError, match="no room"):
        main(replace(pixels, output=tmp_path))
    assert not (tmp_path / ".rehearsal").exists()


def test_what_is_rehearsed_is_a_whole_checkpoint(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large as those to come: its room on the disk, and a GPU's memory beside it, are asked for at once."""
    moments: list[int] = []
    check = train.ldm.check_room

    def noted(output: Path, checkpoint: Path, keep: int) -> None:
        saved = torch.load(checkpoint / "training" / "state.pt", weights_only=True)
        moments.append(len(saved["optimizer"]["state"]))
        check(output, checkpoint, keep)

    monkeypatch.setattr(train.ldm, "check_room", noted)
    run = main(replace(pixels, output=tmp_path))
    assert moments == [len(state(run)["optimizer"]["state"])]


def test_rehearsing_changes_nothing(pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = main(replace(pixels, output=tmp_path / "one"))
    assert not (one / ".rehearsal").exists()
    kill_at(monkeypatch, 0)
    with pytest.raises(Killed):
        main(replace(pixels, output=tmp_path / "other"))
    monkeypatch.undo()
    other = main(replace(pixels, output=tmp_path / "other"))  # which rehearses again
    carried = [torch.load(checkpoints(run)[-1] / "training" / "state.pt", weights_only=True) for run in (one, other)]
    assert carried[0]["meter"] == carried[1]["meter"]
    assert len(carried[0]["meter"]["last"]) == 2
    assert all(w.equal(weights(other)[name]) for name, w in weights(one).items())


def test_a_checkpoint_is_saved_before_its_samples_are_painted(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(monkeypatch, 1)
    with pytest.raises(Killed):
        main(replace(pixels, output=tmp_path))
    monkeypatch.undo()
    sheets = iter([train.watch.grid])  # of the rehearsal, and no other
    monkeypatch.setattr(train.watch, "grid", lambda *args, **kwargs: next(sheets)(*args, **kwargs))
    with pytest.raises(StopIteration):
        main(replace(pixels, output=tmp_path))
    assert state(tmp_path)["update"] == 2


def test_the_loss_scale_of_fp16_is_taken_up_again(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = train.ldm.start

    def scaling(*args, **kwargs) -> Accelerator:
        accelerator = started(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
        return accelerator

    monkeypatch.setattr(train.ldm, "start", scaling)
    for updates, scale in ((2, 4096.0), (3, 8192.0)):
        assert state(main(replace(pixels, output=tmp_path, updates=updates)))["scaler"]["scale"] == scale


def test_another_global_batch_is_refused(pixels: Config, tmp_path: Path) -> None:
    config = replace(pixels, output=tmp_path)
    main(config)
    with pytest.raises(ValueError, match=r"updates see 4 pictures .* now it would be 8"):
        main(replace(config, updates=3, accumulate=2))
    assert state(main(replace(config, updates=3, batch_size=2, accumulate=2)))["update"] == 3  # the same four


def test_a_loss_that_is_no_number_stops_the_run(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(pixels, output=tmp_path, updates=6, checkpoint_every=2)
    rate = train.ldm.learning_rate
    monkeypatch.setattr(
        train.ldm, "learning_rate", lambda update, **kwargs: 1e30 if update == 2 else rate(update, **kwargs)
    )
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at update 3 \(captions .*--learning-rate"):
        main(config)
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000002"]
    assert paint(tmp_path).std() > 0
    monkeypatch.undo()
    assert state(main(config))["update"] == 6  # goes on from the good one


def test_gradients_that_are_no_numbers_reach_no_checkpoint(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(
        monkeypatch, 5, lambda accelerator: accelerator._models[-1].denoiser.network.conv_in.weight
    )  # the first is the rehearsal's
    with pytest.raises(ValueError, match=r"gradient is nan at update 3"):
        main(replace(pixels, output=tmp_path, updates=6, checkpoint_every=2))
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000002"]
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


def test_running_statistics_are_taken_up_as_well(
    pixels: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of batch norms: neither a rehearsal nor a second one leaves a trace in them."""
    unet = PixelUNetConfig(block_out_channels=(8, 16), layers_per_block=(1, 1), attention_heads=(0, 2))
    config = replace(pixels, text_encoder="none", unet=unet, updates=4, checkpoint_every=2, prompts=())
    whole = main(replace(config, output=tmp_path / "whole"))
    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        main(replace(config, output=tmp_path / "killed"))
    monkeypatch.undo()
    again = main(replace(config, output=tmp_path / "killed"))
    moved = [name for name in weights(whole) if "running_mean" in name]
    assert moved
    assert all(weight.equal(weights(again)[name]) for name, weight in weights(whole).items())
    counts = {int(n) for name, n in weights(whole).items() if "num_batches_tracked" in name}
    assert counts == {4}  # not five: the rehearsal's does not count
