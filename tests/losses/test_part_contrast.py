"""PartContrastiveLoss: pooling, sampling of parts, targets."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast import losses
from fgfast.ids import Ids
from fgfast.ops.contrast import contrastive_loss
from tests.losses.peers import assert_same, randn


class TestPartContrastiveLoss:
    def inputs(self, k: int = 4) -> tuple[list[Tensor], list[Tensor]]:
        g = torch.Generator().manual_seed(0)
        return [randn(i, 3, 6, 4, 4) for i in range(2)], [
            torch.randint(-1, k, (3, 16, 16), generator=g) for _ in range(2)
        ]

    def naive(self, maps: list[Tensor], ids: list[Tensor], targets: list[Tensor], heads: list[nn.Module]) -> Tensor:
        """Vote, mean, heads and contrast by loops over images and parts."""
        rows, keys, where = [], [], []
        for v in (0, 1):
            for b in range(3):
                votes = F.one_hot(ids[v][b] + 1, 5)[..., 1:].reshape(4, 4, 4, 4, 4).sum((1, 3))
                grid = torch.where(votes.sum(-1) > 0, votes.argmax(-1), -1)
                for part in range(4):
                    cells = grid == part
                    if cells.any():
                        where.append((b, part, v))
                        rows.append(maps[v][b][:, cells].mean(1))
                        keys.append(targets[v][b][:, cells].mean(1))
        query, key = heads[1](heads[0](torch.stack(rows))), heads[2](torch.stack(keys))
        ids_ = Ids(*torch.tensor(where).T)
        return contrastive_loss(query, key, query_ids=ids_, key_ids=ids_, reduction="mean_valid", backend="reference")

    def test_is_the_loop_over_images_and_parts(self) -> None:
        maps, ids = self.inputs()
        targets = [randn(i + 5, 3, 6, 4, 4) for i in range(2)]
        heads = [nn.Linear(6, 5).double(), nn.Linear(5, 5).double(), nn.Linear(6, 5).double()]
        loss = losses.PartContrastiveLoss(4, *heads)
        assert_same(
            lambda a, b: loss(a, b, *ids, *targets), lambda a, b: self.naive([a, b], ids, targets, heads), *maps
        )
        own = losses.PartContrastiveLoss(4, heads[0])
        plain = [heads[0], nn.Identity(), heads[0]]
        assert_same(lambda a, b: own(a, b, *ids), lambda a, b: self.naive([a, b], ids, [a, b], plain), *maps)

    def test_targets_get_no_gradient(self) -> None:
        maps, ids = self.inputs()
        targets = [m.clone().requires_grad_() for m in maps]
        loss = losses.PartContrastiveLoss(4, nn.Linear(6, 5).double())
        loss(maps[0].requires_grad_(), maps[1], *ids, *targets).backward()
        assert maps[0].grad is not None
        assert targets[0].grad is None

    def test_max_parts_draws_present_parts_once_each(self) -> None:
        loss = losses.PartContrastiveLoss(8, nn.Identity(), max_parts=3)
        areas = torch.tensor([[[1, 0, 2, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]] * 2).float()
        for _ in range(20):
            chosen, part = loss._sample(areas)
            assert chosen[0].tolist() == [0, 2, 4]
            assert sorted(part[0, 1].tolist()) == [-1, -1, 0]

    def test_nothing_present_gives_zero(self) -> None:
        maps, ids = self.inputs()
        loss = losses.PartContrastiveLoss(4, nn.Linear(6, 5).double())
        assert loss(*maps, *(i * 0 - 1 for i in ids)) == 0
