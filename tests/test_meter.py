"""The numbers of a log: losses by noise level, what jumps, what a picture costs; and room for what is to be written."""

import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import train.launch
from tests.conftest import tiny_model
from train.launch import Interruption
from train.meter import Meter, matrix_rate, training_flops
from train.watch import check_room

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def meter() -> Meter:
    return Meter(Accelerator(cpu=True))


def test_losses_are_told_apart_by_level(meter: Meter) -> None:
    meter.add(torch.tensor([0.05, 0.2, 0.25, 5.0]), torch.tensor([1.0, 2.0, 4.0, 7.0]))
    meter.add(torch.tensor([0.01, 50.0]), torch.tensor([3.0, 9.0]))
    numbers = meter.read(1, 6)
    levels = {name.removeprefix("loss/sigma "): value for name, value in numbers.items() if name.startswith("loss/")}
    assert levels == {"below 0.1": 2.0, "0.1-0.3": 3.0, "3.0-10.0": 7.0, "above 10.0": 9.0}
    assert numbers["pictures_per_second"] > 0
    assert 0.01 < numbers["memory_gb"] < 100
    assert not any(name.startswith("loss/") for name in meter.read(2, 6))  # since the last reading


def test_a_jump_is_counted_and_survives_a_restart(meter: Meter) -> None:
    jumped = [meter.is_spike(loss) for loss in [1.0, 9.0] * 5 + [1.0] * 50 + [3.9, 4.1, 1.0]]
    assert [i for i, jump in enumerate(jumped) if jump] == [61]  # the first losses say nothing yet
    again = Meter(meter.accelerator)
    again.load(meter.state())
    assert again.spikes == 1
    assert again.is_spike(4.1)
    assert again.read(1, 1)["spikes"] == 2


def test_a_pictures_cost_is_that_of_its_products(meter: Meter) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 16, 7))
    forward = 2 * (4 * 4 * 5 * 3 * 9) + 2 * (5 * 16 * 7)
    for batch in (1, 4):
        assert training_flops(network, torch.zeros(batch, 3, 4, 4)) == 3 * forward
    model = tiny_model()
    meter.measure(model, (4, 8, 8), model.conditioner([""]), 3)
    assert meter.flops > 1e6
    numbers = meter.read(5, 10)
    share = numbers["pictures_per_second"] * meter.flops / meter.peak
    assert numbers["share_of_peak"] == pytest.approx(share)
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32) < 1e14


def test_room_is_asked_for_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rehearsal" / "unet").mkdir(parents=True)
    (tmp_path / "rehearsal" / "unet" / "weights").write_bytes(bytes(1000))
    usage = namedtuple("usage", "free")
    for free, there, keep, fits in ((2000, 0, 2, True), (1999, 0, 2, False), (0, 2, 2, True), (1000, 1, 2, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free))
        for i in range(there):
            (tmp_path / f"checkpoint-{i}").mkdir(exist_ok=True)
        if fits:
            check_room(tmp_path, tmp_path / "rehearsal", keep)
        else:
            with pytest.raises(ValueError, match="make room, choose another --output, or --keep fewer"):
                check_room(tmp_path, tmp_path / "rehearsal", keep)
        for i in range(there):
            (tmp_path / f"checkpoint-{i}").rmdir()


def test_a_later_signal_ends_at_once_and_handlers_come_back(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(s) for s in Interruption.SIGNALS]
    with Interruption() as interruption:
        assert not interruption.asked(meter.accelerator)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.asked(meter.accelerator)
        assert interruption.exit_code() == 143
        signal.raise_signal(signal.SIGINT)  # handed on by a launcher
        monkeypatch.setattr(train.launch, "PATIENCE", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(s) for s in Interruption.SIGNALS] == before
