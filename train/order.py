"""Which pictures an update sees: pure functions of (seed, update, position in the global batch).

Pictures lie in groups of one shape (aspect-ratio buckets; without them there is one group) and come `repeats` times an
epoch. A group is an endless sequence of epochs, each of them a permutation. An update takes the next whole global batch
of G positions of one group: group b, whose epochs before epoch e have C_b(e) positions, gives
floor(C_b(e + 1) / G) - floor(C_b(e) / G) batches in epoch e, and what is left waits for the next: nothing is dropped.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train.data import generator, permutation


class Group:
    """The endless sequence of the pictures of one shape."""

    def __init__(self, members: Tensor, repeats: Tensor, seed: int, number: int | None):
        """members: [n] int64, indices of pictures; repeats: [n] float64, how often each comes in an epoch, on average;
        number: of the group among several, None where it is alone."""
        self.members, self.repeats, self.seed, self.number = members, repeats, seed, number
        self.even = bool((repeats == 1).all())
        # It decides when a picture of 2.5 repeats comes twice in an epoch and when three times: 2.5 times on average.
        self.phase = torch.rand(len(members), generator=generator(seed, -3, number or 0), dtype=torch.float64)
        self.kept: OrderedDict[int, Tensor] = OrderedDict()
        self.counts: dict[int, int] = {}

    def before(self, epoch: int) -> int:
        """Positions that the epochs before this one have."""
        if self.even:
            return epoch * len(self.members)
        if epoch not in self.counts:
            self.counts[epoch] = int((epoch * self.repeats + self.phase).floor().sum())
        return self.counts[epoch]

    def order(self, epoch: int) -> Tensor:
        """The pictures of an epoch, in order: int64."""
        if epoch not in self.kept:
            members = self.members
            if not self.even:
                counts = ((epoch + 1) * self.repeats + self.phase).floor() - (epoch * self.repeats + self.phase).floor()
                members = members.repeat_interleave(counts.long())
            if self.number is None:
                chosen = permutation(len(members), self.seed, epoch)
            else:
                chosen = torch.randperm(len(members), generator=generator(self.seed, self.number, epoch, 0))
            self.kept[epoch] = members[chosen]
            if len(self.kept) > 2:  # a batch may lie in two epochs
                self.kept.popitem(last=False)
        return self.kept[epoch]

    def at(self, start: int, size: int) -> Tensor:
        """The pictures at positions start … start + size - 1 of the sequence. [size] int64."""
        found = []
        epoch = last_epoch(self.before, start)
        while size:
            offset = start - self.before(epoch)
            part = self.order(epoch)[offset : offset + size]
            found.append(part)
            start, size, epoch = start + len(part), size - len(part), epoch + 1
        return torch.cat(found)


class Order:
    """The pictures of every update of a run."""

    def __init__(self, groups: Sequence[Tensor], repeats: Tensor, seed: int):
        """groups: of each shape the indices of its pictures; repeats: [N] float64, of every picture of the set."""
        several = len(groups) > 1
        self.groups = [Group(g, repeats[g], seed, i if several else None) for i, g in enumerate(groups)]
        self.seed = seed
        self.labels: tuple[int, int, Tensor] | None = None  # (epoch, global batch, the group of each of its batches)

    def __call__(self, update: int, first: int, size: int, global_batch: int) -> tuple[int, Tensor]:
        """(group, pictures): positions first … first + size - 1 of an update's global batch. [size] int64."""
        if len(self.groups) == 1:
            return 0, self.groups[0].at(update * global_batch + first, size)

        def before(epoch: int) -> int:
            return sum(group.before(epoch) // global_batch for group in self.groups)

        epoch = last_epoch(before, update)
        labels = self._labels(epoch, global_batch)
        place = update - before(epoch)
        number = int(labels[place])
        group = self.groups[number]
        batch = group.before(epoch) // global_batch + int((labels[:place] == number).sum())
        return number, group.at(batch * global_batch + first, size)

    def _labels(self, epoch: int, global_batch: int) -> Tensor:
        if self.labels is None or self.labels[:2] != (epoch, global_batch):
            counts = [g.before(epoch + 1) // global_batch - g.before(epoch) // global_batch for g in self.groups]
            labels = torch.arange(len(self.groups)).repeat_interleave(torch.tensor(counts))
            order = torch.randperm(len(labels), generator=generator(self.seed, -4, epoch))
            self.labels = (epoch, global_batch, labels[order])
        return self.labels[2]


def last_epoch(before: Callable[[int], int], place: int) -> int:
    """The last epoch e with before(e) <= place, where `before` does not fall and grows without bound."""
    high = 1
    while before(high) <= place:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if before(middle) <= place else (low, middle)
    return low
