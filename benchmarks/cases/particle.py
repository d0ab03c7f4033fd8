"""One PARTICLE step with parts clustered inside it: fgfast against hypercolumns built in plain PyTorch.

Forward and backward of one batch under bf16 autocast, without a loader. Both start k-means from the same pixels and
take ten Lloyd steps; the plain step resizes and concatenates the levels, measures distances by cdist, pools by a
one-hot product and stores the full matrix of logits. In float32 loss and gradients must agree to 1e-4; under autocast,
where the plain step rounds its own products to bfloat16, the losses must agree to 1%.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common import judge_by, sizes
from benchmarks.timing import Answer, Case, Run, Variant, distance
from fgfast import kmeans
from fgfast.data.views import Batch
from fgfast.methods.particle import PARTICLE, PARTICLEConfig

ITERATIONS = 10


def start(maps: list[Tensor], k: int) -> Tensor:
    """Hypercolumns of k pixels on a diagonal band, [B, k, D]."""
    at = torch.linspace(-0.9, 0.9, k, device=maps[0].device)
    grid = torch.stack([at, at.roll(k // 2)], 1).expand(len(maps[0]), 1, k, 2)
    each = [F.grid_sample(m, grid, padding_mode="border", align_corners=False)[:, :, 0] for m in maps]
    return torch.cat(each, 1).transpose(1, 2).contiguous()


class Fused(PARTICLE):
    """PARTICLE from a given start."""

    config: PARTICLEConfig

    @torch.no_grad()
    def cluster(self, images: Tensor | None, size: int) -> Tensor:
        """Labels of hypercolumns that are never built."""
        maps = self.levels(images)
        k = self.config.n_parts
        return kmeans(maps, k, size=(size, size), n_iter=ITERATIONS, tol=0, empty="keep", init=start(maps, k)).labels

    def levels(self, images: Tensor | None) -> list[Tensor]:
        """The pyramid of the momentum encoder."""
        assert images is not None
        assert self.target is not None
        return [m.float() for m in self.target.eval().pyramid(images, self.config.levels)]


class Plain(Fused):
    """The same step as one would write it without the library."""

    @torch.no_grad()
    def cluster(self, images: Tensor | None, size: int) -> Tensor:
        """Labels of the built hypercolumns."""
        maps = self.levels(images)
        k = self.config.n_parts
        c = start(maps, k)
        up = [F.interpolate(m, (size, size), mode="bilinear", align_corners=False) for m in maps]
        x = torch.cat(up, 1).flatten(2).transpose(1, 2).contiguous()  # [B, N, D]
        for _ in range(ITERATIONS):
            hot = F.one_hot(torch.cdist(x, c).argmin(2), k).to(x.dtype)
            area = hot.sum(1)[..., None]
            c = torch.where(area > 0, hot.transpose(1, 2) @ x / area.clamp(min=1), c)
        return torch.cdist(x, c).argmin(2).view(-1, size, size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The part contrast by dense products."""
        labels, k = self.labels(batch), self.config.n_parts
        both = torch.cat(batch.views)
        maps = self.encoder.features(both)
        assert self.target is not None
        with torch.no_grad():
            targets = self.target.features(both)
        hot = torch.cat([F.one_hot(ids + 1, k + 1)[..., 1:].permute(0, 3, 1, 2).float() for ids in labels])
        votes = F.adaptive_avg_pool2d(hot, (maps.shape[2], maps.shape[3]))
        cells = F.one_hot(votes.argmax(1), k) * (votes.amax(1) > 0)[..., None]
        cells = cells.flatten(1, 2).transpose(1, 2).float()  # [2B, K, h w]
        area = cells.sum(2)
        mean = cells / area.clamp(min=1)[..., None]
        loss = self.part_loss
        assert loss.predictor is not None
        assert loss.target_projector is not None
        q = loss.predictor(loss.projector((mean @ maps.float().flatten(2).transpose(1, 2)).flatten(0, 1)))
        with torch.no_grad():
            t = loss.target_projector((mean @ targets.float().flatten(2).transpose(1, 2)).flatten(0, 1))
        logits = F.normalize(q.float()) @ F.normalize(t.float()).T / self.config.temperature
        part = torch.arange(len(q), device=q.device)
        here = (area > 0).flatten()
        half = len(q) // 2
        pair = (part + half) % len(q)
        own = torch.eye(len(q), dtype=torch.bool, device=q.device)
        logits = logits.masked_fill(own | ~here, -torch.inf)
        valid = here & here[pair]
        each = logits.logsumexp(1) - logits[part, pair]
        return {"loss": each[valid].mean()}


METHODS = {"fgfast": Fused, "plain": Plain}


def batch(side: int, images: int, device: torch.device, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    whole = torch.randn(images, 3, 16, 16, generator=g)
    whole = F.interpolate(whole, (2 * side, 2 * side), mode="bicubic").to(device, memory_format=torch.channels_last)
    boxes = torch.tensor([[0.0, 0.0, 0.7, 0.7, 0], [0.2, 0.2, 0.8, 0.8, 1]], device=device).expand(images, 2, 5)
    first, last = int(1.4 * side), int(0.4 * side)
    windows = (whole[:, :, :first, :first], whole[:, :, last:, last:].flip(3))
    return Batch(
        views=[F.interpolate(w, (side, side), mode="bilinear").to(memory_format=torch.channels_last) for w in windows],
        boxes=boxes, whole=whole, index=torch.arange(images, device=device),
        target=torch.zeros(images, dtype=torch.int64), valid=torch.ones(images, dtype=torch.bool, device=device),
    )  # fmt: skip


def step(x: Batch, method: PARTICLE, exact: bool = False) -> Answer:
    """The loss of one step, and in float32 a gradient of the heads."""
    method.zero_grad(set_to_none=True)
    with torch.autocast(x.views[0].device.type, torch.bfloat16, enabled=not exact):
        loss = method(x)["loss"]
    loss.backward()
    first = next(method.part_loss.projector.parameters()).grad
    return [loss.detach(), first.clone()] if exact and first is not None else [loss.detach()]


def case(model: str, side: int, images: int, map_size: int, device: torch.device, weigh: bool) -> Case:
    def method(name: str) -> PARTICLE:
        torch.manual_seed(0)
        config = PARTICLEConfig(parts="online", model=model, size=side, map_size=4 * map_size, max_parts=0)
        return METHODS[name](config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def make(name: str) -> Run:
        return partial(step, method=method(name))

    def reference(x: Batch) -> Answer:
        error = distance(step(x, method("fgfast"), exact=True), step(x, method("plain"), exact=True))
        assert error < 1e-4, f"loss or gradient is off by {error:.2g} in float32"
        return step(x, method("plain"))

    shape = f"online step {model} {sizes(B=images, S=side, H=map_size)}"
    return Case(
        "particle", shape, "bf16", partial(batch, side, images, device),
        tuple(Variant(name, partial(make, name)) for name in METHODS),
        judge_by(reference), 0.01, weigh=weigh,
    )  # fmt: skip


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    if tiny:
        yield case("resnet18", 32, 2, 8, device, False)
    elif device.type == "cpu":
        yield case("resnet18", 96, 8, 48, device, True)
    else:
        yield case("resnet50", 224, 64, 56, device, False)
