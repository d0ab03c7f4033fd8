"""Random inputs of the contrastive loss, with the error bounds of the Triton kernels for them."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.contrast import problem as kernels
from fgfast.ops.contrast import contrastive_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

NEGATIVES = kernels.NEGATIVES

# Small tiles: a field of 50 vectors has tiles with common images, skipped tiles and partly filled ones.
WHOLE = kernels.TileShape(16, 32, 16, 64, True, 4, 2)
CHANNELS = kernels.TileShape(16, 32, 16, 16, False, 4, 2)
COPIED = kernels.TileShape(16, 32, 16, 64, True, 4, 2, copied=True, ahead=True)
HELD = COPIED._replace(d=128, ahead=False, held=64)  # one piece of channels in registers


def cut(patch: pytest.MonkeyPatch, tile: kernels.TileShape, programs: int = 1) -> None:
    """Use this tile in every kernel, and split columns into at least this many programs."""
    patch.setattr(kernels, "tile", lambda *unused: tile)
    patch.setattr(kernels, "programs_wanted", lambda device: programs)


class Field:
    """Random vectors and ids: ``values`` gives losses [M] and gradients, ``bounds`` their largest errors."""

    def __init__(
        self, seed: int = 0, m: int = 37, t: int = 45, d: int = 21, bank: int | None = 19, *, same: bool = False,
        sort: bool = True, absent: bool = True, images: int = 5, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def ids(n: int) -> Ids:
            image = torch.randint(0, images, (n,), generator=g)
            part = torch.randint(-1 if absent else 0, 3, (n,), generator=g)
            view = torch.randint(0, 2, (n,), generator=g)
            return Ids(*(i.to(DEVICE) for i in (image.sort().values if sort else image, part, view)))

        def vectors(n: int) -> Tensor:
            return torch.randn(n, d, generator=g).to(DEVICE, dtype)

        self.query, self.query_ids = vectors(m), ids(m)
        self.key, self.key_ids = (self.query, self.query_ids) if same else (vectors(t), ids(t))
        self.bank = None if bank is None else vectors(bank)
        self.weight = (torch.rand(m, generator=g) * (torch.rand(m, generator=g) > 0.3)).to(DEVICE)
        self.same = same

    def loss(self, **options: Any) -> Tensor:
        given = {"query": self.query, "key": self.key, "query_ids": self.query_ids, "key_ids": self.key_ids,
                 "bank": self.bank, "weight": self.weight, "reduction": "none", "backend": "triton"}  # fmt: skip
        merged = given | options
        return contrastive_loss(merged.pop("query"), merged.pop("key"), **merged)

    def upstream(self) -> Tensor:
        """dL/dloss [M] in ``values``, without the weights."""
        return torch.linspace(0.1, 1, len(self.query), device=DEVICE)

    def values(self, exact: bool = False, temperature: float = 0.1, **options: Any) -> dict[str, Tensor]:
        """Losses and gradients; ``exact``: those of the reference in float64, for the same inputs."""
        dtype = torch.float64 if exact else self.query.dtype
        query = self.query.detach().to(dtype).requires_grad_()
        key = query if self.same else self.key.detach().to(dtype).requires_grad_()
        bank = None if self.bank is None else self.bank.detach().to(dtype).requires_grad_()
        t = torch.tensor(temperature).to(torch.float64 if exact else torch.float32).requires_grad_()
        given = {"query": query, "key": key, "bank": bank, "temperature": t} | options
        if exact:
            given |= {"backend": "reference", "weight": self.weight.double()}
        loss = self.loss(**given)
        inputs = {"query": query, "temperature": t}
        inputs |= {} if self.same else {"key": key}
        inputs |= {} if bank is None else {"bank": bank}
        grads = torch.autograd.grad((loss * self.upstream()).sum(), list(inputs.values()))
        return {"loss": loss.detach()} | dict(zip(inputs, grads, strict=True))

    def bounds(self, temperature: float, normalize: bool, product: float = 0.0) -> dict[str, Tensor]:
        """Largest errors of each loss, of the gradient of each vector (Euclidean norm), and of that of the temperature.

        With eps = 2^-24 and S the largest |q| |k| / T, the error of a logit is at most delta = (D + 8) eps S +
        product S (sums of D products, the norms, the scale), where ``product`` is the rounding of the factors of a
        product; hence exp(s - lse) has a relative error e = 2 delta + (columns + 8) eps. A weight dL/ds and, for
        float16, the vector it multiplies are rounded to bfloat16: u = 2^-8. A row has sum_j |dL/ds_ij| <= 2 |g_i|,
        where g_i is its upstream gradient times weight; a column has at most sum_i 2 |g_i|. Both are multiplied by the
        longest vector of the other side, 1/T, and 1/norm (the projection shortens). The result is rounded once to its
        dtype. The gradient of the temperature is the sum over the rows of <row, its gradient> / T, D + M more sums.
        """
        norms = {
            name: x.double().norm(dim=1)
            for name, x in (("query", self.query), ("key", self.key), ("bank", self.bank))
            if x is not None
        }
        length = {name: torch.ones_like(n) if normalize else n for name, n in norms.items()}
        inverse = {name: 1 / n if normalize else torch.ones_like(n) for name, n in norms.items()}
        longest = {name: float(n.max()) if len(n) else 0.0 for name, n in length.items()}
        columns = max(longest["key"], longest.get("bank", 0.0))
        if self.same:
            columns = max(columns, longest["query"])
        s = longest["query"] * columns / temperature
        eps, n = 2.0**-24, len(self.key) + (0 if self.bank is None else len(self.bank))
        delta = ((self.query.shape[1] + 8) * eps + product) * s
        e = 2 * delta + (n + len(self.query) + 8) * eps
        u = 0.0 if self.query.dtype == torch.float32 else 2.0**-8
        half_ulp = torch.finfo(self.query.dtype).eps / 2
        g = (self.upstream() * self.weight).double()
        of_row = 2 * g * columns * (e + u + product) / temperature * inverse["query"]
        of_column = 2 * g.sum() * longest["query"] * (e + u + product) / temperature
        result = {
            "loss": (2 * delta + (n + 8) * eps * (1 + s)) * self.weight.double() + 1e-7,
            "query": of_row + (of_column * inverse["query"] if self.same else 0),
            "temperature": 2 * g.sum() * s / temperature * (e + u + product + sum(self.query.shape) * eps),
        }
        result |= {name: of_column * inverse[name] for name in ("key", "bank") if name in inverse}
        self.half_ulp = half_ulp
        return result


def assert_within_bounds(field: Field, temperature: float = 0.1, product: float = 0.0, **options: Any) -> None:
    got = field.values(temperature=temperature, **options)
    expected = field.values(exact=True, temperature=temperature, **options)
    bounds = field.bounds(temperature, options.get("normalize", True), product)
    for name, value in expected.items():
        error = (got[name].double() - value).abs()
        if name in ("query", "key", "bank"):
            assert got[name].dtype == field.query.dtype
            error = (error - field.half_ulp * value.abs()).clamp(min=0).norm(dim=1) / 1.01
            tiny = torch.finfo(field.query.dtype).smallest_normal
            assert (error <= bounds[name] + tiny).all(), (name, float((error / bounds[name]).max()))
        else:
            assert (error <= bounds[name]).all(), (name, float((error / bounds[name]).max()))


FAR = 2**31 + 64
seeds = st.integers(0, 10_000)
fields = st.builds(
    Field,
    seeds,
    st.sampled_from([1, 16, 37]),
    st.sampled_from([1, 32, 45]),
    st.sampled_from([1, 16, 21]),
    st.sampled_from([None, 0, 19]),
    same=st.booleans(),
    sort=st.booleans(),
    absent=st.booleans(),
    images=st.sampled_from([1, 5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


def count_launches(monkeypatch: pytest.MonkeyPatch, counter: Counter[str], *modules: Any, only: Any = None) -> None:
    """Count from now on, by name, the kernels that the modules launch; ``only``: names, all if None."""
    for module in modules:

        def counted(kernel: Any, *arguments: Any, launch: Any = module.launch, **options: Any) -> Any:
            if only is None or kernel.fn.__name__ in only:
                counter[kernel.fn.__name__] += 1
            return launch(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", counted)
