"""Small cases of every method, and batches for them that no file is read for."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fgfast.data.views import Batch
from fgfast.methods.base import Method, method_class
from tests.conftest import TINY

IMAGES, STEPS = 12, 4  # places of the joined batch; 12 and 6 are for 1 to 3 ranks
VALID = (range(12), range(7), (0, 6), ())  # of each step: all; uneven; none but on the first rank; none
VIT: dict[str, Any] = {"model": "test_vit", "model_args": ""}
HEADS: dict[str, Any] = {"hidden": 16, "projection": 8}
PAIRS: dict[str, Any] = HEADS | {"queue": 10, "latent": 8, "decoder_width": 16, "synth_warmup": 0.25}
PARTS: dict[str, Any] = HEADS | {"n_parts": 4, "max_parts": 2, "prototypes": 32}
CROPS: dict[str, Any] = HEADS | {"prototypes": 32, "local_size": 16}
CASES: dict[str, dict[str, Any]] = {
    "byol": HEADS,
    "color": {"hidden": 16},
    "detcon": HEADS | {"masks": 5},
    "detcon self": HEADS | {"masks": 5, "target": "self"},
    "dino": CROPS | {"local_crops": 2, "norm_last_layer": False, "freeze_last": 0.25, "koleo": 0.1},
    "dino sinkhorn": CROPS | VIT | {"local_crops": 1, "centering": "sinkhorn", "freeze_last": 0.0},
    "jigsaw": {"grid": 2, "n_permutations": 10, "dropout": 0.0},
    "lcr moco": HEADS | {"queue": 10, "channels": 4, "rationale_weight": 0.5},
    "lcr byol": HEADS | {"base": "byol", "channels": 4, "target": "raw"},
    "lodisc": HEADS | VIT | {"strategy": "topk"},
    "lodisc sample": HEADS | VIT | {"strategy": "sample", "drop_tokens": True},
    "lodisc random": HEADS | VIT | {"strategy": "random"},
    "mocov2": HEADS | {"queue": 10},
    "mocov3": HEADS | VIT,
    "particle": PARTS | {"parts": "truth"},
    "particle online": PARTS | {"parts": "online", "map_size": 16, "image_weight": 0.5, "target": "self"},
    "particle random": PARTS | VIT | {"parts": "random"},
    "simclr": HEADS,
    "simsiam": HEADS,
    "srgan": {"model": "srgan", "model_args": "", "width": 4, "blocks": 1, "gan_share": 0.5},
    "supervised": {"n_classes": 3},
    "synthpair simclr": PAIRS | {"base": "simclr", "both_views": True, "synth_share": 0.4},
    "synthpair moco": PAIRS | {"base": "moco", "criterion": "random", "synth_share": 0.6},
    "synthpair simsiam": PAIRS | {"base": "simsiam", "strategy": "swap", "synth_share": 0.6},
    "synthpair byol": PAIRS | {"base": "byol", "criterion": "variance", "synth_share": 0.1},
}


def build(case: str) -> Method:
    """The method of a case, with group norms for batch norms; the same weights in every process."""
    torch.manual_seed(0)
    cls, options = method_class(case.split()[0]), {"model": TINY, "model_args": "output_stride=8"} | CASES[case]
    if options.get("parts") == "truth":
        options |= {"parts": "discovered"}  # the maps of the batch, without the files
    method = cls(replace(cls.Config(), size=32, batch_size=6, amp="off", **options))
    method.train()
    for parent in list(method.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, _BatchNorm):
                trained = any(p.requires_grad for p in norm.parameters())
                setattr(parent, name, nn.GroupNorm(1, norm.num_features, affine=norm.affine).requires_grad_(trained))
    return method


def joined_batch(step: int, local_crops: int = 0) -> Batch:
    """The batch of all ranks, with further views of half the size."""
    g = torch.Generator().manual_seed(step)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.25, 0.25, 0.5, 0.5, 1.0]])
    patch = torch.rand(IMAGES, 3, 32, 32, generator=g)
    valid = torch.zeros(IMAGES, dtype=torch.bool)
    valid[list(VALID[step])] = True
    order = torch.randperm(40, generator=g)
    index = torch.where(valid, order[:IMAGES], order[0])  # padding repeats an image
    views = [torch.randn(IMAGES, 3, 32, 32, generator=g) for _ in range(2)]
    views += [torch.randn(IMAGES, 3, 16, 16, generator=g) for _ in range(local_crops)]
    return Batch(
        views=views, boxes=box.repeat(IMAGES, 1, 1),
        labels=[torch.randint(-1, 4, (IMAGES, 32, 32), generator=g) for _ in range(2)],
        whole=torch.randn(IMAGES, 3, 64, 64, generator=g), target=torch.randint(3, (IMAGES,), generator=g),
        index=index, valid=valid, patch=patch, reduced=torch.nn.functional.avg_pool2d(patch, 4),
    )  # fmt: skip
