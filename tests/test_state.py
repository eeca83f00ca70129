"""EMA, learning rate and checkpoints: closed forms, and what a kill at the worst moment leaves behind."""

import copy
import errno
import itertools
import pickle
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from pipelines.files import checkpoints, newest
from train.checkpoints import resume, save_checkpoint
from train.state import EMA, Carried, clamp_warmup, learning_rate, load_optimizer


def test_ema_is_its_recursion() -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    ema = EMA(network, decay=0.7)
    wanted = network.weight.detach().double().clone()
    assert len(ema.weights) == 1  # what is not trained is not averaged
    for update in range(60):
        with torch.no_grad():
            network.weight += torch.randn(2, 3)
        ema.step(update)
        decay = min(0.7, (1 + update) / (10 + update))
        wanted = decay * wanted + (1 - decay) * network.weight.detach().double()
        torch.testing.assert_close(ema.weights[0].double(), wanted, atol=1e-5, rtol=0)
    # Closed form: where the weights stay the same, what is left of the start is the product of the decays.
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = EMA(network, decay=0.9)
    nn.init.ones_(network.weight)
    for update in range(3):
        ema.step(update)
    assert float(ema.weights[0]) == pytest.approx(1 - (1 / 10) * (2 / 11) * (3 / 12), abs=1e-6)


def test_ema_is_float32_and_moves_where_bfloat16_would_not() -> None:
    network = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.ones_(network.weight)
    ema = EMA(network, decay=0.999)
    ema.step(10**6)
    assert ema.distance() == 0
    nn.init.constant_(network.weight, 1.0078125)  # the next bfloat16 number
    for _ in range(100):
        ema.step(10**6)
    assert ema.weights[0].dtype == torch.float32
    wanted = 1 + 0.0078125 * (1 - 0.999**100)  # in bfloat16, each of these steps would be rounded to none
    torch.testing.assert_close(ema.weights[0], torch.full((4, 4), wanted), atol=1e-5, rtol=0)
    assert ema.distance() == pytest.approx((1.0078125 - wanted) / 1.0078125, rel=1e-3)


def test_ema_swaps_in_and_back_whatever_happens() -> None:
    network = nn.Linear(2, 2)
    ema = EMA(network, decay=0.5)
    averaged = [w.clone() for w in ema.weights]
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    raw = [p.detach().clone() for p in network.parameters()]
    with ema.applied():
        assert all(p.equal(w) for p, w in zip(network.parameters(), averaged, strict=True))
    with pytest.raises(ZeroDivisionError), ema.applied():
        _ = 1 / 0
    assert all(p.equal(w) for p, w in zip(network.parameters(), raw, strict=True))
    assert all(w.equal(a) for w, a in zip(ema.weights, averaged, strict=True))
    other = EMA(network, decay=0.5)
    other.load(ema.weights)
    assert all(w.equal(a) for w, a in zip(other.weights, averaged, strict=True))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        other.load(ema.weights[:1])


def test_ema_follows_weights_that_an_optimizer_lays_out_anew() -> None:
    """bitsandbytes' optimizers put a contiguous copy in the place of each weight's memory."""
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ema = EMA(network, decay=0.0)
    with torch.no_grad():
        network.weight.data = network.weight.data.contiguous().add_(1)
        ema.step(0)
        torch.testing.assert_close(ema.weights[0], network.weight.detach())
        ema.weights[0].zero_()
    with ema.applied():
        assert float(network.weight.detach().abs().max()) == 0


def test_state_that_is_not_kept_has_no_tensors() -> None:
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    carried = Carried(dict(network.named_parameters()), optimizer, None, {})
    kept, asked = carried.state(), carried.state(keep=False)
    assert kept["weights"]["weight"].equal(network.weight.detach())
    assert asked["weights"] == {"weight": None, "bias": None}
    assert asked["optimizer"]["state"][0] == {"step": None, "exp_avg": None, "exp_avg_sq": None}
    carried.load(kept)


def test_quantised_moments_come_back_as_they_were() -> None:
    """Blocks of 8-bit numbers, of another shape than the weight's."""
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.AdamW([weight])
    carried = Carried({"weight": weight}, optimizer, None, {})
    blocks = torch.arange(3.0)
    state = {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 4), "absmax1": blocks}}
    saved = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    carried.load({"weights": {"weight": torch.ones(4, 4)}, "optimizer": saved, "scaler": None})
    assert optimizer.state[weight]["absmax1"].equal(blocks)
    assert optimizer.state[weight]["exp_avg"].equal(torch.ones(4, 4))


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    def rate(update: int, schedule: str = "cosine") -> float:
        return learning_rate(update, peak=2.0, warmup=10, updates=110, schedule=schedule)

    assert [rate(u) for u in range(10)] == pytest.approx([0.2 * (u + 1) for u in range(10)])
    assert rate(10) == 2.0
    assert rate(60) == pytest.approx(1.0)  # half way between the end of the warm-up and the end
    assert rate(110) == pytest.approx(0.0, abs=1e-12)
    assert rate(1000) == pytest.approx(0.0, abs=1e-12)
    curve = [rate(u) for u in range(10, 111)]
    assert all(a > b for a, b in itertools.pairwise(curve))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0), 100)
    for u in range(10, 110):
        assert rate(u) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        scheduler.optimizer.step()
        scheduler.step()
    assert rate(90, "constant") == 2.0
    assert rate(0, "constant") == pytest.approx(0.2)
    assert learning_rate(0, peak=1.0, warmup=0, updates=10) == 1.0
    # Pure: the order in which updates are asked for, as after a kill, changes nothing.
    assert [rate(u) for u in (7, 50, 7)] == [rate(7), rate(50), rate(7)]


@dataclass(frozen=True)
class Settings:
    output: Path
    rate: float = 0.1
    widths: tuple[int, ...] = (1, 2)
    workers: int = 2


def write(folder: Path) -> None:
    (folder / "weights.txt").write_text("whole")


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    assert resume(tmp_path / "never", settings) is None
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = {"weights": {"a": parameter.detach().clone()}, "optimizer": optimizer.state_dict()}
    saved = save_checkpoint(tmp_path, 12, write, state, settings)
    assert saved == tmp_path / "checkpoint-0000012"
    assert (saved / "weights.txt").read_text() == "whole"
    found = resume(tmp_path, settings)
    assert found is not None
    assert found[0] == saved
    assert found[1]["update"] == 12
    assert found[1]["weights"]["a"].equal(parameter)
    assert found[1]["optimizer"]["state"][0]["exp_avg"].equal(optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_kill_while_writing_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    save_checkpoint(tmp_path, 1, write, {"x": 1}, settings)

    def killed(folder: Path) -> None:
        (folder / "weights.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, killed, {"x": 2}, settings)
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-0000001"]
    found = resume(tmp_path, settings)
    assert found is not None
    assert found[1]["x"] == 1
    # The next attempt is not disturbed by what lies there, nor is one that writes the same update again.
    save_checkpoint(tmp_path, 2, write, {"x": 3}, settings)
    save_checkpoint(tmp_path, 2, write, {"x": 4}, settings)
    found = resume(tmp_path, settings)
    assert found is not None
    assert (found[0] / "weights.txt").read_text() == "whole"
    assert found[1]["x"] == 4
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-0000001", "checkpoint-0000002"]


def test_a_kill_while_a_checkpoint_is_replaced_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting takes its time, and comes when the new one is in place."""
    settings = Settings(tmp_path)
    save_checkpoint(tmp_path, 2, write, {"x": 1}, settings)

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, write, {"x": 2}, settings)
    monkeypatch.undo()
    found = resume(tmp_path, settings)
    assert found is not None
    assert found[1]["x"] == 2
    save_checkpoint(tmp_path, 3, write, {"x": 3}, settings)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-0000002", "checkpoint-0000003"]


def test_a_kill_between_the_two_names_of_a_checkpoint_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former one has another name already, the new one is not in its place yet."""
    settings = Settings(tmp_path)
    save_checkpoint(tmp_path, 2, write, {"x": 1}, settings)
    rename = Path.rename

    def killed(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, write, {"x": 2}, settings)
    monkeypatch.undo()
    assert not checkpoints(tmp_path)
    found = resume(tmp_path, settings)
    assert found is not None
    assert found[1]["x"] == 1
    save_checkpoint(tmp_path, 3, write, {"x": 3}, settings)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-0000002", "checkpoint-0000003"]


def test_a_run_goes_on_in_another_layout_of_its_weights() -> None:
    """bf16 on a CPU lays weights out otherwise than float32 does: fused AdamW goes through moments as they lie."""

    def trained(layout: torch.memory_format, state: dict | None, weight: torch.Tensor, grad: torch.Tensor) -> tuple:
        learns = nn.Parameter(weight.clone(memory_format=layout))
        optimizer = torch.optim.AdamW([learns], lr=0.1, fused=True)
        if state is not None:
            load_optimizer(optimizer, state)
        learns.grad = grad.clone(memory_format=layout)
        optimizer.step()
        return learns.detach(), optimizer.state_dict()

    weight, *grads = torch.randn(3, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    before, state = trained(torch.contiguous_format, None, weight, grads[0])
    same, other = (
        trained(layout, copy.deepcopy(state), before, grads[1])[0]
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    torch.testing.assert_close(same, other)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/16"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_named_and_the_former_checkpoint_stays(tmp_path: Path, error: Exception) -> None:
    save_checkpoint(tmp_path, 1, write, {"x": 1}, Settings(tmp_path))

    def full(folder: Path) -> None:
        (folder / "weights.txt").write_text("half")
        raise error

    with pytest.raises(ValueError, match=r"is full: the checkpoint of update 2 is not written, checkpoint-0000001 is"):
        save_checkpoint(tmp_path, 2, full, {"x": 2}, Settings(tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-0000001"]
    with pytest.raises(ValueError, match="there is none before it"):
        save_checkpoint(tmp_path / "other", 2, full, {"x": 2}, Settings(tmp_path))

    def forbidden(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):  # anything else says itself what it is
        save_checkpoint(tmp_path, 2, forbidden, {}, Settings(tmp_path))


def test_old_checkpoints_go(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own

    def kept() -> list[int]:
        return [int(f.name.split("-")[1]) for f in checkpoints(tmp_path)]

    for update in (5, 900, 10_000_000, 9_999_999):
        save_checkpoint(tmp_path, update, write, {}, Settings(tmp_path), keep=10)
    assert kept() == [5, 900, 9_999_999, 10_000_000]
    save_checkpoint(tmp_path, 10_000_001, write, {}, Settings(tmp_path))
    assert kept() == [10_000_000, 10_000_001]
    assert (tmp_path / "checkpoint-best").is_dir()
    assert newest(tmp_path) == tmp_path / "checkpoint-10000001"
    assert newest(tmp_path / "checkpoint-best") == tmp_path / "checkpoint-best"


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    save_checkpoint(tmp_path, 1, write, {}, settings)
    changed = replace(settings, rate=0.2, widths=(1, 3), workers=9)
    with pytest.raises(ValueError, match=r"rate: 0.1 before, 0.2 now; widths: \[1, 2\] before, \[1, 3\] now") as error:
        resume(tmp_path, changed)
    assert "workers" not in str(error.value)
    assert "another --output" in str(error.value)
    assert resume(tmp_path, replace(settings, workers=9)) is not None
    assert resume(tmp_path, replace(settings, rate=0.2), may_change=("rate",)) is not None
    # The run's folder is where it is found: moved, or named from another folder, it is the same run.
    tmp_path.joinpath("checkpoint-0000001").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "checkpoint-0000001")
    assert resume(tmp_path / "elsewhere", replace(settings, output=tmp_path / "elsewhere")) is not None


@pytest.mark.parametrize(("before", "now"), [("", ()), ("a dog", ("a dog",))])
def test_one_word_is_the_list_of_it(tmp_path: Path, before: str, now: tuple[str, ...]) -> None:
    save_checkpoint(tmp_path, 1, write, {}, replace(Settings(tmp_path), widths=before))  # type: ignore[arg-type]
    assert resume(tmp_path, replace(Settings(tmp_path), widths=now)) is not None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="widths"):
        resume(tmp_path, replace(Settings(tmp_path), widths=("a dog", "a cat")))  # type: ignore[arg-type]


def test_another_global_batch_is_refused(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    save_checkpoint(tmp_path, 1, write, {"global_batch": 8}, settings)
    assert resume(tmp_path, settings, global_batch=8) is not None
    with pytest.raises(ValueError, match=r"updates see 8 pictures .* now it would be 16"):
        resume(tmp_path, settings, global_batch=16)


def test_a_warm_up_is_at_most_half_of_the_updates() -> None:
    said: list[str] = []
    assert [clamp_warmup(100, n, said.append) for n in (1000, 200, 3)] == [100, 100, 1]
    assert said == ["--warmup 100 is more than half of 3 updates: 1 are taken"]


def test_state_opens_without_running_code(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write, {"custom": Settings(tmp_path)}, Settings(tmp_path))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        resume(tmp_path, Settings(tmp_path))
