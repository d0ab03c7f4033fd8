"""DetConBLoss and DetConSLoss: lightly's values, and a loop over images and regions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast import losses
from fgfast.ids import Ids
from fgfast.ops.contrast import contrastive_loss
from tests.losses.peers import assert_same, lightly, randn


@pytest.mark.parametrize(("b", "m", "ids"), [(4, 5, 3), (3, 6, 20), (1, 1, 1), (40, 8, 4)])  # repeats, absentees, one
def test_detcon_equals_lightly(b: int, m: int, ids: int) -> None:
    g = torch.Generator().manual_seed(1)
    masks = [torch.randint(0, ids, (b, m), generator=g) for _ in range(2)]
    x = [randn(i, b, m, 7) for i in range(4)]
    ours, theirs = losses.DetConBLoss(), lightly.DetConBLoss()
    assert_same(lambda *v: ours(*v, *masks), lambda *v: theirs(*v, *masks), *x)
    ours_s, theirs_s = losses.DetConSLoss(), lightly.DetConSLoss()
    assert_same(lambda *v: ours_s(*v, *masks), lambda *v: theirs_s(*v, *masks), *x[:2])


def naive_detcon(pred: Tensor, same: Tensor, other: Tensor, mask: Tensor, mask_other: Tensor, local: bool) -> Tensor:
    """One view of DetCon-B by loops over image and region; with the targets of this view and of the other."""
    b, m, _ = pred.shape
    pred, same, other = (F.normalize(x, dim=-1) for x in (pred, same, other))
    total = pred.new_zeros(())
    for i in range(b):
        for r in range(m):
            logits, label = [], []
            for j in range(b):
                for s in range(m):
                    positive = i == j and mask[i, r] == mask_other[j, s]
                    if positive or i != j or local:
                        logits.append(pred[i, r] @ other[j, s] / 0.1)
                        label.append(float(positive))
                    if (i != j or local) and not (i == j and mask[i, r] == mask[j, s]):
                        logits.append(pred[i, r] @ same[j, s] / 0.1)
                        label.append(0.0)
            y = pred.new_tensor(label)
            if y.any():
                weight = 1 / (mask[i] == mask[i, r]).sum()
                total = total - weight * (y / y.sum() * torch.stack(logits).log_softmax(0)).sum()
    return total / (b * m)


@pytest.mark.parametrize("local", [True, False])
def test_detcon_is_the_loop_over_images_and_regions(local: bool) -> None:
    masks = torch.randint(0, 5, (2, 3, 4), generator=torch.Generator().manual_seed(3))
    p, t = randn(0, 2, 3, 4, 6), randn(1, 2, 3, 4, 6)
    expected = sum(naive_detcon(p[v], t[v], t[1 - v], masks[v], masks[1 - v], local) for v in (0, 1))
    if local:
        torch.testing.assert_close(losses.DetConBLoss()(*p, *t, *masks), expected)
    view, image, _ = (i.reshape(-1) for i in torch.meshgrid(*map(torch.arange, masks.shape), indexing="ij"))
    ids = Ids(image, masks.reshape(-1), view)
    weight = 1 / (masks[..., None] == masks[..., None, :]).sum(-1).reshape(-1)
    got = contrastive_loss(
        p.flatten(0, 2), t.flatten(0, 2), query_ids=ids, key_ids=ids, weight=weight,
        negatives="all" if local else "other_images",
    )  # fmt: skip
    torch.testing.assert_close(2 * got, expected)


def test_detcon_with_one_region_per_image_is_infonce_with_same_view_negatives() -> None:
    p, t = randn(0, 2, 6, 1, 5), randn(1, 2, 6, 1, 5)
    masks = torch.zeros(2, 6, 1, dtype=torch.int64)
    expected = torch.zeros((), dtype=torch.float64)
    for v in (0, 1):
        query, same, other = (F.normalize(x[:, 0], dim=-1) for x in (p[v], t[v], t[1 - v]))
        own = (query @ same.T / 0.1).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
        expected += F.cross_entropy(torch.cat([query @ other.T / 0.1, own], 1), torch.arange(6))
    torch.testing.assert_close(losses.DetConBLoss()(*p, *t, *masks), expected)
