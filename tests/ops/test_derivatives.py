"""Every operation under every transformation of PyTorch, at each size the same: against the definition in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

from fgfast import assign_and_pool, contrastive_loss, labels_to_grid, mask_images, part_pool, perturb, pivotal_mask
from fgfast.ops.contrast import contrast
from fgfast.reference import contrast as define_contrast
from fgfast.reference import mask as define_mask
from fgfast.reference import part_pool as define_pool
from fgfast.tensors import transformed
from tests.ops.contrast_fields import Field

Function = Callable[[Tensor], Tensor]

G = torch.Generator().manual_seed(0)
N = 6
FIELD = Field(3, m=N, t=9, d=3, bank=4)
SAME = Field(4, m=N, d=3, bank=None, same=True)
IDS = torch.randint(-1, 3, (2, 4, 3), generator=G)
MAP = torch.randint(-1, 3, (2, 8, 8), generator=G)
WEIGHT = torch.rand(2, 4, 3, generator=G).double()
CENTROIDS = torch.randn(2, 3, 2, generator=G).double()
KEPT = torch.rand(2, 4, generator=G) > 0.5
ATTENTION = torch.rand(2, 2, 4, generator=G).double()
PIXELS = torch.randn(2, 2, 4, 3, generator=G).double()
IMAGES = torch.randn(2, 3, 4, 4, generator=G).double()


def pool_by_definition(x: Tensor, ids: Tensor, weight: Tensor | None = None, reduce: str = "mean") -> Tensor:
    flat = None if weight is None else weight.flatten(1)
    return define_pool.part_pool(x.flatten(2).transpose(1, 2), ids.flatten(1), 3, flat, reduce)[0]


def contrast_of(field: Field, function: Callable[..., Tensor], which: str) -> Function:
    """The loss as a function of one of its arguments."""
    given = {"query": field.query, "key": field.key, "bank": field.bank, "temperature": torch.tensor(0.3).double()}

    def loss(x: Tensor) -> Tensor:
        changed = {"query": x, "key": x} if field is SAME else {which: x}
        merged = given | changed
        query, key = merged.pop("query"), merged.pop("key")
        ids = {"query_ids": field.query_ids, "key_ids": field.key_ids}
        return function(query, key, **ids, **merged, weight=field.weight, reduction="none")

    return loss


def nearest(x: Tensor) -> Tensor:
    """The labels that ``assign_and_pool`` gives to PIXELS, near which every x of these tests stays."""
    return assign_and_pool(PIXELS, CENTROIDS)[2]


assert FIELD.bank is not None
# name: the operation, its definition, and where to differentiate
CASES: dict[str, tuple[Function, Function, Tensor]] = {
    "contrast, query": (contrast_of(FIELD, contrastive_loss, "query"),
                        contrast_of(FIELD, define_contrast.contrastive_loss, "query"), FIELD.query),
    "contrast, bank": (contrast_of(FIELD, contrastive_loss, "bank"),
                       contrast_of(FIELD, define_contrast.contrastive_loss, "bank"), FIELD.bank),
    "contrast, temperature": (contrast_of(FIELD, contrastive_loss, "temperature"),
                              contrast_of(FIELD, define_contrast.contrastive_loss, "temperature"),
                              torch.tensor(0.3).double()),
    "contrast of itself": (contrast_of(SAME, contrastive_loss, "query"),
                           contrast_of(SAME, define_contrast.contrastive_loss, "query"), SAME.query),
    "part_pool": (lambda x: part_pool(x, IDS, 3, weight=WEIGHT).pooled,
                  lambda x: pool_by_definition(x, IDS, WEIGHT), PIXELS),
    "part_pool of id maps": (lambda x: part_pool(x, MAP, 3, reduce="sum").pooled,
                             lambda x: pool_by_definition(x, define_pool.labels_to_grid(MAP, (4, 3), 3), None, "sum"),
                             PIXELS),
    "assign_and_pool": (lambda x: assign_and_pool(x, CENTROIDS)[0],
                        lambda x: pool_by_definition(x, nearest(PIXELS)), PIXELS),
    "mask_images": (lambda x: mask_images(x, KEPT), lambda x: define_mask.mask_images(x, KEPT, (2, 2)), IMAGES),
    "pivotal_mask": (lambda x: as_images(pivotal_mask(ATTENTION, keep=0.5, images=x)),
                     lambda x: define_mask.mask_images(x, pivotal_mask(ATTENTION, keep=0.5).mask, (2, 2)), IMAGES),
}  # fmt: skip


def as_images(result: Any) -> Tensor:
    assert result.images is not None
    return result.images


def scalar(f: Function) -> Function:
    """A function with every derivative: the operations that are linear alone would have no second one."""
    return lambda x: (f(x) * torch.sin(f(x) + 1)).sum()


def direction(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)


def few(x: Tensor) -> Tensor:
    """Two points near x."""
    return torch.stack([x, x * 1.0001])


def forward_mode(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction(x)))).tangent
    return torch.zeros_like(f(x)) if tangent is None else tangent


def gradient(f: Function, x: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(f(x), x, **options)[0]


def twice(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return gradient(lambda y: (gradient(scalar(f), y, create_graph=True) * direction(y)).sum(), x)


def thrice(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()

    def second(y: Tensor) -> Tensor:
        first = gradient(scalar(f), y, create_graph=True)
        return gradient(lambda z: (first * direction(z)).sum(), y, create_graph=True)

    return gradient(lambda y: (second(y) * direction(y)).sum(), x)


def batched_backward(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = f(x)
    return gradient(lambda _: out, x, grad_outputs=few(direction(out)), is_grads_batched=True)


def forward_over_backward(f: Function, x: Tensor) -> Tensor:
    """The tangent of a gradient whose cotangent, and nothing else, has one."""
    x = x.clone().requires_grad_()
    out = f(x)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(out), direction(out))
        tangent = forward_ad.unpack_dual(gradient(lambda _: out, x, grad_outputs=cotangent)).tangent
    return torch.zeros_like(x) if tangent is None else tangent


def beside_a_gradient(f: Function, x: Tensor) -> Tensor:
    """A tensor that requires a gradient, and is none of vmap's."""
    x = x.clone().requires_grad_()
    return gradient(lambda y: vmap(lambda s: f(y) * s)(torch.arange(2.0)).sum(), x)


TRANSFORMS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "jvp": lambda f, x: jvp(f, (x,), (direction(x),))[1],
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "forward_ad": forward_mode,
    "grad": lambda f, x: grad(scalar(f))(x),
    "vmap": lambda f, x: vmap(f)(few(x)),
    "vmap of grad": lambda f, x: vmap(grad(scalar(f)))(few(x)),
    "grad of vmap": lambda f, x: grad(lambda y: vmap(scalar(f))(few(y)).sum())(x),
    "twice": twice,
    "thrice": thrice,
    "Hessian times vector": lambda f, x: jvp(grad(scalar(f)), (x,), (direction(x),))[1],
    "grad of grad": lambda f, x: grad(lambda y: (grad(scalar(f))(y) * direction(y)).sum())(x),
    "vmap beside a gradient": beside_a_gradient,
    "batched backward": batched_backward,
    "forward over backward": forward_over_backward,
}


SIZES = [(case, logits) for case in CASES for logits in ("few", "many") if logits == "few" or "contrast" in case]


@pytest.mark.parametrize(("case", "logits"), SIZES)
def test_every_transformation_is_that_of_the_definition(
    case: str, logits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if logits == "many":
        monkeypatch.setattr(contrast, "BREAK_EVEN", -1)
    function, definition, x = CASES[case]
    for name, transform in TRANSFORMS.items():
        got, expected = transform(function, x), transform(definition, x)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_derivatives_do_not_change_above_the_break_even_size() -> None:
    """The real size at which the tiles begin, in float32 as losses are used."""
    n = 257
    field = Field(0, m=n, t=n, d=4, bank=None, dtype=torch.float32)
    ids = {"query_ids": field.query_ids, "key_ids": field.key_ids}

    def loss(x: Tensor) -> Tensor:
        return contrastive_loss(x, field.key, **ids)

    def truth(x: Tensor) -> Tensor:
        return define_contrast.contrastive_loss(x, field.key.double(), **ids)

    assert n * n > contrast.BREAK_EVEN
    for name in ("jvp", "grad", "twice"):
        got, expected = TRANSFORMS[name](loss, field.query), TRANSFORMS[name](truth, field.query.double())
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [0.3, 0.01], ids=["bounded", "online"])
@pytest.mark.parametrize("field", [FIELD, SAME], ids=["", "itself"])
def test_gradgradcheck_of_the_tiles(field: Field, temperature: float) -> None:
    def loss(query: Tensor, key: Tensor, bank: Tensor | None, temperature: Tensor) -> Tensor:
        key = query if field is SAME else key
        return field.loss(query=query, key=key, bank=bank, temperature=temperature, reduction="none")

    inputs = [None if x is None else x[:N].clone().requires_grad_() for x in (field.query, field.key, field.bank)]
    inputs[1] = field.key.clone().requires_grad_()
    inputs.append(torch.tensor(temperature).double().requires_grad_())
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradgradcheck_of_part_pool(reduce: str) -> None:
    x = PIXELS.clone().requires_grad_()
    for ids, weight in ((IDS, WEIGHT), (MAP, None)):

        def pool(x: Tensor, ids: Tensor = ids, weight: Tensor | None = weight) -> Tensor:
            return part_pool(x, ids, 3, weight=weight, reduce=reduce).pooled

        assert torch.autograd.gradgradcheck(pool, x)


# name: an operation whose outputs are constants, and what vmap gives it
CONSTANT: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "perturb": (lambda x: perturb(x, x, strategy="swap").features, torch.randn(3, 4, 5, generator=G)),
    "labels_to_grid": (lambda x: labels_to_grid((2 * x).long().clamp(-1, 2), 2, 3).float(),
                       torch.randn(3, 2, 4, 4, generator=G)),
    "the mask": (lambda x: pivotal_mask(x.abs(), keep=0.5).index.float(), torch.randn(3, 2, 2, 4, generator=G)),
    "labels": (lambda x: assign_and_pool(x, CENTROIDS)[2].float(), torch.randn(3, 2, 4, 2, generator=G)),
}  # fmt: skip


@pytest.mark.filterwarnings("error::UserWarning")  # which vmap gives where an operation has no rule
@pytest.mark.parametrize("name", CONSTANT)
def test_constants_have_no_derivative_and_are_those_of_each_example(name: str) -> None:
    function, x = CONSTANT[name]
    assert torch.equal(vmap(function)(x), torch.stack([function(v) for v in x]))
    assert not jvp(lambda v: function(v) + 0 * v.sum(), (x[0],), (x[0],))[1].any()
    assert not vmap(grad(lambda v: function(v).sum() + 0 * v.sum()))(x).any()


def test_ids_labels_and_weights_may_be_batched() -> None:
    """What is not differentiable may belong to vmap as well."""
    weights, ids = torch.rand(2, *WEIGHT.shape).double(), torch.stack([IDS, IDS.flip(0)])
    pooled = vmap(lambda w, i: part_pool(PIXELS, i, 3, weight=w).pooled)(weights, ids)
    for one, i, w in zip(pooled, ids, weights, strict=True):
        torch.testing.assert_close(one, pool_by_definition(PIXELS, i, w))
    parts = torch.stack([FIELD.query_ids.part, FIELD.query_ids.part.flip(0)])

    def loss(part: Tensor) -> Tensor:
        return FIELD.loss(query_ids=FIELD.query_ids._replace(part=part), backend=None)

    torch.testing.assert_close(vmap(loss)(parts), torch.stack([loss(part) for part in parts]))


def test_values_are_checked_inside_a_transformation() -> None:
    with pytest.raises(ValueError, match="weight holds a negative"):
        vmap(lambda w: part_pool(PIXELS, IDS, 3, weight=w).pooled)(-torch.ones(2, *WEIGHT.shape))
    with pytest.raises(ValueError, match=r"temperature is -1\.0"):
        vmap(lambda t: FIELD.loss(temperature=t, backend=None))(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="labels holds 7"):
        vmap(lambda i: labels_to_grid(i, 2, 3))(torch.full((2, 1, 4, 4), 7))


CALLS: dict[str, Callable[[Tensor, str], Any]] = {
    "contrastive_loss": lambda x, backend: FIELD.loss(query=FIELD.query + x, backend=backend),
    "part_pool": lambda x, backend: part_pool(PIXELS + x, IDS, 3, backend=backend).pooled,
    "assign_and_pool": lambda x, backend: assign_and_pool(PIXELS + x, CENTROIDS, backend=backend)[0],
    "mask_images": lambda x, backend: mask_images((IMAGES + x).float(), KEPT, backend=backend),
}


@pytest.mark.parametrize("name", CALLS)
def test_kernels_that_are_asked_for_are_refused_in_one_sentence(name: str) -> None:
    backend = "native" if name == "mask_images" else "triton"
    pytest.importorskip("fgfast._native" if backend == "native" else "triton")
    with pytest.raises(RuntimeError, match=f"^{name} with backend '{backend}' .*: choose 'auto'.$"):
        jvp(lambda x: CALLS[name](x, backend), (torch.zeros(()),), (torch.ones(()),))


@pytest.mark.parametrize("bank", [None, 4])
def test_vectors_of_zeros_have_a_second_derivative(bank: int | None) -> None:
    """Below the smallest norm x / EPS is linear, so its second derivative is 0 and not NaN."""
    field = Field(1, m=N, d=3, bank=bank)
    x = field.query.clone()
    x[2] = 0
    found = twice(lambda q: field.loss(query=q, backend=None, temperature=1.0), x)
    assert found.isfinite().all()


def test_this_torch_has_what_finds_transformations() -> None:
    """Private names of torch; without one of them a derivative would silently be 0."""
    x = torch.ones(2)
    seen: list[bool] = []

    def look(v: Tensor) -> Tensor:
        seen.append(transformed(v))
        return v.sum()

    for run in (look, grad(look), lambda v: vmap(look)(v[None]), lambda v: jvp(look, (v,), (v,))):
        run(x)
    forward_mode(look, x)
    assert seen == [False, True, True, True, True]


@pytest.mark.parametrize(("logits", "dynamic"), [("few", False), pytest.param("many", True, marks=pytest.mark.slow)])
def test_compiled_transformations_give_the_same_numbers(
    logits: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if logits == "many":
        monkeypatch.setattr(contrast, "BREAK_EVEN", -1)

    def run(x: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        loss = FIELD.loss(query=x, backend=None)
        slope = grad(lambda q: FIELD.loss(query=q, backend=None))(x)
        return loss, slope, vmap(lambda v: part_pool(v, IDS, 3).pooled)(features)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(FIELD.query, few(PIXELS)), run(FIELD.query, few(PIXELS)))


def test_a_group_of_several_ranks_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 2)
    with pytest.raises(RuntimeError, match=r"^contrastive_loss over a group .*: give no group\.$"):
        jvp(lambda x: FIELD.loss(query=x, group=object(), backend=None), (FIELD.query,), (FIELD.query,))


def test_vmap_over_an_empty_batch_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="empty batch: give at least one example"):
        vmap(lambda i: labels_to_grid(i, 2, 3))(torch.zeros(0, 1, 4, 4, dtype=torch.int64))
