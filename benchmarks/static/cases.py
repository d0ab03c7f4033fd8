"""The operations at the shapes of the goals: what is called, what its limit is, which loops run how often."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.static import nvcc
from benchmarks.static.capture import Launch, pretend
from benchmarks.static.rates import Rates
from benchmarks.static.tiles import Region

HALF, FULL = torch.bfloat16, torch.float32


class Goal(NamedTuple):
    """An operation at one shape.

    ``prepare`` makes what the operation is given and returns the call whose launches count. The limit is that of
    ``flops`` of a product of ``kind`` where there are any, else of a copy of ``bytes``.
    """

    op: str
    shape: str
    dtype: str
    prepare: Callable[[], Callable[[], object]]
    goal: float
    flops: int = 0
    bytes: int = 0
    kind: str = "bf16"
    flops_done: int = 0  # of the products that the kernels make: more than the fewest where tiles are made again

    def done_by(self, launch: Launch, launches: int) -> int:
        """Flops of one of the launches of :data:`PRODUCTS`; one triangle is half of all logits."""
        done = self.flops_done // max(1, launches)
        return done // 2 if launch.arguments.get("TRIANGULAR") else done


PRODUCTS = ("forward", "gradient")  # kernels whose loops over tiles depend on data


def captured(goal: Goal, arch: str, rates: Rates, known: Collection[str] = ()) -> list[Launch]:
    """The launches of a goal; kernels with ``known`` keys are not compiled."""
    if goal.op == "pivotal_mask":
        return [nvcc.launch(arch, MASKS, DEPTH, DEPTH, PATCHES)]
    with pretend(arch, rates.processors, rates.shared_limit, known) as found:
        call = goal.prepare()
        found.clear()
        call()
    return list(found)


def floats(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    """Random numbers on the device; without memory in :func:`benchmarks.static.capture.pretend`."""
    return torch.randn(shape, dtype=dtype, device="cuda")


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Zeros on the device."""
    return torch.zeros(shape, dtype=dtype, device="cuda")


def _contrast(d: int, same: bool, backward: bool) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        from fgfast.ids import Ids
        from fgfast.kernels.contrast import launch

        query, key = floats(VECTORS, d), None if same else floats(VECTORS, d)
        image, zero = torch.arange(VECTORS, device="cuda"), zeros(VECTORS, dtype=torch.int64)
        ids = Ids(image, zero, zero)
        given: tuple[Any, ...] = (query, ids, key, None if same else ids, None, None, 0.1, "all", True, "ieee")
        if not backward:
            return lambda: launch.forward(*given)
        loss, lse, count = launch.forward(*given)
        return lambda: launch.backward(loss, lse, count, [True, not same, False, False], *given)

    return prepare


def _step(dtype: torch.dtype) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        from fgfast.kernels.kmeans import step

        x, centroids = floats(128, 3136, 768, dtype=dtype).mT, floats(128, CLUSTERS, 768, dtype=FULL)
        return lambda: step.kmeans_step(x, centroids, None, "euclidean", "ieee", True)

    return prepare


def _pool(shape: tuple[int, ...], last: bool, backward: bool) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        from fgfast.kernels.part_pool import launch

        b, d, height, width = shape
        x = floats(b, height, width, d).permute(0, 3, 1, 2) if last else floats(*shape)
        labels = torch.randint(PARTS, (b, height, width), device="cuda")
        if not backward:
            return lambda: launch.pool(x, labels, PARTS, None, True)
        pooled, area = launch.pool(x, labels, PARTS, None, True)
        out = torch.empty_like(x)
        return lambda: launch.pool_backward(pooled, labels, None, area, True, out)

    return prepare


MASKS, DEPTH, PATCHES = 1024, 12, 196
LEVELS = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # channels and side of the maps of a ResNet-50
VECTORS, PARTS, CLUSTERS, SIDE, IMAGES = 65_536, 10, 25, 56, 128


def _pyramid() -> Callable[[], object]:
    """One iteration of Lloyd's loop: score, sums, move."""
    from fgfast.kernels.kmeans import pyramid

    levels = pyramid.Levels([floats(IMAGES, d, n, n) for d, n in LEVELS], (SIDE, SIDE))
    zero = levels.pad_channels(None)
    norms = levels.squares(zero)
    solver = pyramid.Solver(levels, CLUSTERS, None, norms, norms, zero, "euclidean", "ieee")
    c, limit = floats(IMAGES, CLUSTERS, levels.channels, dtype=FULL), zeros(IMAGES, dtype=FULL)
    done, steps = zeros(IMAGES), zeros(IMAGES)
    solver.move(c, limit, done, steps, "farthest", begin=True)

    def step() -> None:
        solver.score(done)
        solver.sums(done)
        solver.move(c, limit, done, steps, "farthest")

    return step


def _mask() -> Callable[[], object]:
    """Timed on a GPU; the launch is not taken from the host code, which is C++ (:mod:`benchmarks.static.nvcc`)."""
    from fgfast import pivotal_mask

    attention = floats(DEPTH, MASKS, DEPTH, PATCHES, dtype=FULL).softmax(3).to(HALF)
    return lambda: pivotal_mask(attention, keep=0.3)


def goals() -> Iterator[Goal]:
    """Every operation and shape of the goals."""
    for d, forward, gradient in ((256, 0.8, 0.8), (128, 0.65, 0.65), (512, 0.8, 0.55), (768, 0.8, 0.55)):
        product = 2 * VECTORS**2 * d
        shape = f"M=T=65536 D={d}"
        yield Goal("contrast forward", shape, "bf16", _contrast(d, False, False), forward, product, flops_done=product)
        yield Goal(
            "contrast gradient", shape, "bf16", _contrast(d, False, True), gradient, 4 * product, flops_done=4 * product
        )
        if d <= 256:
            yield Goal(
                "contrast forward",
                f"{shape} same",
                "bf16",
                _contrast(d, True, False),
                forward,
                product // 2,
                flops_done=product,
            )
            yield Goal(
                "contrast gradient",
                f"{shape} same",
                "bf16",
                _contrast(d, True, True),
                gradient,
                2 * product,
                flops_done=2 * product,
            )
    for dtype, name, goal in ((HALF, "bf16", 0.8), (FULL, "fp32", 0.6)):
        moved = 128 * (3136 * 768 * dtype.itemsize + 2 * 4 * CLUSTERS * 768 + 8 * 3136)
        yield Goal("kmeans_step", "B=128 N=3136 D=768 K=25", name, _step(dtype), goal, bytes=moved)
    for size, last, forward, backward in (((32, 1024, 64, 64), True, 0.8, 0.8), ((320, 2048, 7, 7), False, 0.6, 0.6)):
        b, d, n = size[0], size[1], size[2] * size[3]
        moved = b * (2 * d * n + 8 * n + 2 * PARTS * d)
        shape = f"B={b} D={d} N={n} K={PARTS}{' channels last' * last}"
        yield Goal("part_pool", shape, "bf16", _pool(size, last, False), forward, bytes=moved)
        yield Goal("part_pool backward", shape, "bf16", _pool(size, last, True), backward, bytes=moved)
    pixels = sum(d * n * n for d, n in LEVELS)
    yield Goal(
        "kmeans_pyramid step", f"B={IMAGES} ResNet-50 N={SIDE**2} K={CLUSTERS}", "bf16", lambda: _pyramid(), 0.7,
        bytes=2 * 2 * IMAGES * pixels,
    )  # fmt: skip

    moved = MASKS * (DEPTH * DEPTH * PATCHES * 2 + PATCHES + 8 * int(0.3 * PATCHES))
    shape = f"B={MASKS} L={DEPTH} heads={DEPTH} P={PATCHES}"
    yield Goal("pivotal_mask", shape, "bf16", _mask, 0.75, bytes=moved)


def assume(launch: Launch, whole: Region, flops: int) -> None:
    """Set what depends on data.

    A branch is not taken ("then" is the rare case), and a loop runs once. Of the loops over tiles of logits only that
    of most operations runs, over all of them: at these sizes ids meet in one tile in 512. The strips of a pyramid's
    rows are each finished by one program.

    Args:
        launch: the launch.
        whole: the regions of one of its programs.
        flops: of the products of a program.
    """
    strips = launch.name == "score" and "strips" in launch.arguments
    products = [r for r in whole.all() if r.trips is None and not r.branch and r.total()] if flops else []
    for region in whole.all():
        if region.branch and region.trips is None:
            needed = any(x in products for x in region.all())
            region.trips = int(strips or needed or region.branch == "else")
    for region in whole.all():
        region.trips = region.times
    if not products:
        return
    innermost = [r for r in products if not any(x in products for x in r.all())]
    main = max(innermost, key=lambda r: r.total())
    for region in products:
        region.trips = int(main in region.all())
    once = whole.total()
    main.trips = 1
    main.trips = max(1, round((flops - once) / (whole.total() - once)))


__all__ = ["Goal", "assume", "goals"]
