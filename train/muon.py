"""Muon: steps of equal length in every direction of a weight matrix.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. Gradients of matrices are nearly of
low rank, so the few directions that they agree on are learnt and the rest hardly move. Muon replaces the momentum by
the nearest orthogonal matrix; of several processes each does so with its share of the matrices. After 520 updates of 64
a U-Net between the bundled autoencoder and text encoder painted 84% of held-out objects right, and with AdamW at a
third or two thirds of the rate 24% and 31% (benchmarks/leads.py).
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM = 0.95  # of Muon
BETAS = (0.9, 0.99)  # of AdamW
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of x -> a x + b x^3 + c x^5, which drives (0, 1] to about 1
NEWTON_SCHULZ_STEPS = 5
AT_ONCE = 2**24  # numbers orthogonalized together, which bounds the memory


def orthogonalize(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> the same with its singular values at about 1 (0.7 to 1.2).

    But for those below some 1/500 of the norm: they stay small, and so does the noise of rounding.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the largest singular value is below this norm
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, square, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the hidden matrices of a network, a convolution's kernel [out, in, y, x] being one [out, in * y * x].

    AdamW moves the rest: biases, norms, embeddings, and each first and last convolution (`conv_in`, `conv_out`), as the
    authors advise; a last layer that is linear, as a recogniser's, stays with Muon. Steps are scaled to the size of
    AdamW's (J. Liu et al., "Muon is scalable for LLM training", 2025, eq. 4), so that one rate serves both, and it may
    be larger than AdamW's usual ones: 2e-3 to 5e-3.

    dtype: in which matrices are orthogonalized; bfloat16 is enough and, where it is native, three times as fast.
    """

    def __init__(
        self, network: nn.Module, lr: float, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.dtype = dtype
        hidden = {
            module.weight: None
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and name.rpartition(".")[2] not in ("conv_in", "conv_out")
        }
        rest = [p for p in network.parameters() if p not in hidden and p.requires_grad]
        groups = [
            {"params": [p for p in hidden if p.requires_grad], "muon": True},
            {"params": rest, "muon": False, "updates": 0},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if moving:
                torch._foreach_mul_(moving, 1 - group["lr"] * group["weight_decay"])
                (self._muon if group["muon"] else self._adam)(moving, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        alike = defaultdict(list)  # matrices of one shape are orthogonalized together
        for p in parameters:
            alike[p.shape].append(p)
        parts = [part for shape, same in alike.items() for part in _parts(same, AT_ONCE // shape.numel())]
        for same, owners in zip(parts, _owners(parts), strict=True):
            self._orthogonal_step(same, owners, group["lr"])

    def _orthogonal_step(self, same: list[Tensor], owners: list[int], lr: float) -> None:
        gradients = _gradients(same)
        momenta = self._remembered("momentum", same)
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        update = _orthogonalized(torch.stack(ahead).flatten(2).to(self.dtype), owners).to(same[0].dtype)
        length = 0.2 * max(update.shape[1:]) ** 0.5
        torch._foreach_add_(same, list(update.unflatten(2, same[0].shape[1:])), alpha=-lr * length)

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Kingma & Ba (2015), algorithm 1."""
        group["updates"] += 1
        first, second = (1 - beta ** group["updates"] for beta in BETAS)
        gradients = _gradients(parameters)
        mean, square = self._remembered("mean", parameters), self._remembered("square", parameters)
        torch._foreach_lerp_(mean, gradients, 1 - BETAS[0])
        torch._foreach_mul_(square, BETAS[1])
        torch._foreach_addcmul_(square, gradients, gradients, 1 - BETAS[1])
        spread = torch._foreach_sqrt(torch._foreach_div(square, second))
        torch._foreach_add_(spread, 1e-8)
        torch._foreach_addcdiv_(parameters, mean, spread, -group["lr"] / first)

    def _remembered(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _owners(parts: list[list[Tensor]]) -> list[list[int]]:
    """Which process orthogonalizes each matrix: the one that has least to do, the largest being given away first."""
    work = [0.0] * _processes()
    owners = [[0] * len(part) for part in parts]
    costs = [first.numel() * min(len(first), first[0].numel()) for first, *_ in parts]
    for i in sorted(range(len(parts)), key=lambda i: -costs[i]):
        for j in range(len(parts[i])):
            owners[i][j] = work.index(min(work))
            work[owners[i][j]] += costs[i]
    return owners


def _orthogonalized(matrices: Tensor, owners: list[int]) -> Tensor:
    """`orthogonalize`, each process its own matrices, which all then have."""
    if (processes := _processes()) == 1:
        return orthogonalize(matrices)
    held = [[i for i, owner in enumerate(owners) if owner == process] for process in range(processes)]
    mine = matrices.new_zeros(max(map(len, held)), *matrices.shape[1:])
    if own := held[dist.get_rank()]:
        mine[: len(own)] = orthogonalize(torch.stack([matrices[i] for i in own]))  # a list as index waits for a GPU
    every = mine.new_empty(processes * len(mine), *mine.shape[1:])
    dist.all_gather_into_tensor(every, mine)
    found = {i: part[j] for part, its in zip(every.split(len(mine)), held, strict=True) for j, i in enumerate(its)}
    return torch.stack([found[i] for i in range(len(matrices))])


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _parts(parameters: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    size = max(1, size)
    return (parameters[start : start + size] for start in range(0, len(parameters), size))
