"""Muon against PyTorch's own on matrices, and against what orthogonalization and AdamW are."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import train.muon
from train.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_orthogonalize_keeps_the_directions_and_levels_the_lengths(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = orthogonalize(x)
    assert torch.linalg.svdvals(out).min() > 0.6
    assert torch.linalg.svdvals(out).max() < 1.25
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ out @ v.mT  # diagonal: the singular vectors are those of x
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-9
    assert torch.allclose(orthogonalize(7 * x), out)
    assert orthogonalize(0 * x).abs().max() == 0


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv_in": nn.Conv2d(3, 8, 3), "norm": nn.GroupNorm(2, 8), "hidden": nn.Conv2d(8, 6, 3)}
    return nn.ModuleDict(
        layers | {"linear": nn.Linear(6, 12), "words": nn.Embedding(5, 4), "conv_out": nn.Conv2d(6, 3, 1)}
    )


def give_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_matrices_move_as_by_pytorchs_muon_and_the_rest_as_by_its_adamw():
    """PyTorch's Muon takes matrices only and orthogonalizes in bfloat16; kernels are handed to it as matrices."""
    ours, theirs = network(), network()
    optimizer = Muon(ours, lr=0.02, weight_decay=0.1)
    hidden = {"hidden.weight", "linear.weight"}
    flat = {n: nn.Parameter(p.detach().flatten(1).clone()) for n, p in theirs.named_parameters() if n in hidden}
    muon = torch.optim.Muon(flat.values(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [p for n, p in theirs.named_parameters() if n not in hidden]
    adam = torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1, betas=(0.9, 0.99))
    before = copy.deepcopy(dict(ours.named_parameters()))
    for update in range(4):
        give_gradients(ours, update)
        give_gradients(theirs, update)
        for name, p in theirs.named_parameters():
            if name in hidden:
                flat[name].grad = p.grad.flatten(1)
        optimizer.step()
        muon.step()
        adam.step()
    for name, p in ours.named_parameters():
        expected = flat[name].view_as(p) if name in hidden else theirs.get_parameter(name)
        moved = (expected - before[name]).norm()
        assert moved > 0.01
        assert (p - expected).norm() < (0.03 if name in hidden else 1e-5) * moved, name


def test_gradients_stay_and_a_saved_state_goes_on_alike():
    one = network()
    optimizer = Muon(one, lr=0.02)
    give_gradients(one, 0)
    kept = [p.grad.clone() for p in one.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, k) for p, k in zip(one.parameters(), kept, strict=True))

    two = copy.deepcopy(one)
    other = Muon(two, lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((one, optimizer), (two, other)):
        give_gradients(net, 1)
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_what_does_not_train_is_left_alone():
    net = network()
    net["hidden"].requires_grad_(False)
    optimizer = Muon(net, lr=0.02)
    give_gradients(net, 0)
    net["linear"].weight.grad = None
    frozen = [p.detach().clone() for p in (net["hidden"].weight, net["linear"].weight)]
    optimizer.step()
    assert torch.equal(net["hidden"].weight, frozen[0])
    assert torch.equal(net["linear"].weight, frozen[1])


def moved() -> nn.Module:
    """Two alike and a third layer, three updates later."""
    net = nn.ModuleList([network(), network(), nn.Linear(7, 5)])
    optimizer = Muon(net, 0.02, 0.1, torch.bfloat16)
    for update in range(3):
        give_gradients(net, update)
        optimizer.step()
    return net


def one_of_three(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    given = []
    whole = train.muon.orthogonalize
    train.muon.orthogonalize = lambda matrices: given.append(len(matrices)) or whole(matrices)
    torch.save((moved().state_dict(), sum(given)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_the_matrices_and_all_get_what_one_does(tmp_path):
    torch.multiprocessing.spawn(one_of_three, (tmp_path,), nprocs=3)
    alone, found = moved().state_dict(), [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for weights, _ in found:
        assert all(torch.equal(weights[name], weight) for name, weight in alone.items())
    assert [count for _, count in found] == [3, 3, 9]  # in three updates: a large matrix, another, three small ones
