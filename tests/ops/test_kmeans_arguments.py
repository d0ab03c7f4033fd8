"""What kmeans, kmeans_step and assign_and_pool take for numbers: arrays, integers and seeds."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fgfast import assign_and_pool, kmeans, kmeans_step, perturb, pivotal_mask
from fgfast.ops.kmeans.checks import as_floats

X = np.random.default_rng(0).normal(size=(2, 30, 4))
C, WEIGHT = X[:, :3], np.random.default_rng(1).uniform(size=(2, 30))
T = torch.from_numpy(X)


class Frame:
    """Converts itself to an array, as a DataFrame does."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The numbers."""
        return self.x


def read_only(x: np.ndarray) -> np.ndarray:
    """A copy that must not be written to."""
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    "call",
    [
        lambda x, c, w: kmeans(x, 3, init=c, weight=w),
        lambda x, c, w: kmeans_step(x, c, weight=w),
        lambda x, c, w: assign_and_pool(x, c, weight=w),
    ],
    ids=["kmeans", "kmeans_step", "assign_and_pool"],
)
@pytest.mark.parametrize("kind", [np.asarray, Frame])
def test_arrays_give_what_tensors_give(call: Callable[..., Any], kind: Callable[[np.ndarray], Any]) -> None:
    """Tensors on the CPU, in the dtype of the array."""
    ours, theirs = (call(*(wrap(a) for a in (X, C, WEIGHT))) for wrap in (kind, torch.from_numpy))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_maps_may_be_arrays() -> None:
    """A list means feature maps, of tensors or arrays; a list of lists is refused by the name of its first part."""
    maps = [np.random.default_rng(i).normal(size=(2, 3, side, side)) for i, side in enumerate((4, 2))]
    ours, theirs = (kmeans([wrap(m) for m in maps], 3, size=4, seed=0) for wrap in (np.asarray, torch.from_numpy))
    assert torch.equal(ours.labels, theirs.labels)
    with pytest.raises(TypeError, match=r"x\[0\] is a list: give a torch.Tensor or a NumPy array"):
        kmeans(X[0].tolist(), 3)


def test_arrays_go_to_the_device_of_x() -> None:
    """An array has none of its own."""
    assert as_floats("init", C, torch.device("meta")).device.type == "meta"
    with pytest.raises(ValueError, match="weight is on meta"):
        kmeans(T, 3, init=C, weight=torch.ones(2, 30, device="meta"))


@pytest.mark.parametrize("code", list("?bBhHiIlLqQefdg"))
def test_integers_become_the_float_dtype_that_holds_them(code: str) -> None:
    """float32 holds 16 bits, float64 the others (up to 2^53); floats stay, and what torch lacks becomes float64."""
    x = as_floats("x", np.ones((3, 2), code))
    exact = {"e": torch.float16, "f": torch.float32} | dict.fromkeys("?bBhH", torch.float32)
    assert x.dtype == exact.get(code, torch.float64)
    if code in "hi":
        extreme = np.array([np.iinfo(code).min, np.iinfo(code).max], code)
        assert as_floats("x", extreme).tolist() == extreme.tolist()
        assert as_floats("x", torch.from_numpy(extreme)).tolist() == extreme.tolist()


def test_integers_are_clustered_as_floats() -> None:
    """Pixels, centres and a mask as the weight."""
    pixels = torch.arange(60, dtype=torch.uint8).view(1, 20, 3)
    mask = torch.arange(20)[None] % 3 > 0
    ours = kmeans(pixels, 2, init=pixels[:, :2], weight=mask)
    theirs = kmeans(pixels.float(), 2, init=pixels[:, :2].float(), weight=mask.float())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        read_only,
        lambda x: x[::-1, :, ::-1],
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: np.rec.fromarrays([np.ones(x.shape, np.int8), x], names="a,b")["b"],
        lambda x: np.broadcast_to(x, (2, *x.shape))[0],
    ],
    ids=["read-only", "reversed", "Fortran", "byte order", "field of a record", "broadcast"],
)
def test_any_memory_layout_is_read(change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Without a warning."""
    x = change(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = as_floats("x", x)
    np.testing.assert_array_equal(tensor.numpy(), x)


def test_memory_is_shared_where_torch_can() -> None:
    """No copy of a plain array."""
    x = X.copy()
    assert as_floats("x", x).data_ptr() == x.ctypes.data


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0].astype(object), "x is an array of dtype object: give numbers"),
        (np.array([["a"]]), "x is an array of dtype <U1: give numbers"),
        (X[0] + 1j, "x is an array of dtype complex128"),
        (np.ma.masked_greater(X[0], 1), "x is a masked array"),
        (T[0].to_sparse(), "x is sparse"),
        (T[0] + 1j, "x has dtype torch.complex128"),
        (None, "x is a NoneType: give a torch.Tensor or a NumPy array"),
        ({}, "x is a dict"),
        ("x", "x is a str"),
    ],
)
def test_what_holds_no_real_numbers_is_named(x: object, message: str) -> None:
    """A TypeError of one sentence."""
    with pytest.raises(TypeError, match=message):
        kmeans(x, 1)


@pytest.mark.parametrize("name", ["init", "weight"])
def test_lists_are_refused_for_other_arguments(name: str) -> None:
    """Only x may be a list."""
    with pytest.raises(TypeError, match=f"{name} is a list: give a torch.Tensor or a NumPy array"):
        kmeans(T, 3, **{name: [1.0]})


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"tol": "small"}, TypeError, "tol is 'small': give a number"),
        ({"tol": None}, TypeError, "tol is None"),
        ({"init_samples": 40.5}, TypeError, "init_samples is 40.5: give a whole number"),
        ({"n_init": 1.0}, TypeError, "n_init is 1.0"),
    ],
)
def test_numbers_of_the_wrong_kind_are_named(option: dict, error: type[Exception], message: str) -> None:
    """Before anything is computed."""
    with pytest.raises(error, match=message):
        kmeans(T, 3, **option)


SEEDED = {
    "kmeans": lambda seed: kmeans(T, 3, seed=seed),
    "pivotal_mask": lambda seed: pivotal_mask(torch.rand(1, 2, 9), strategy="random", seed=seed),
    "perturb": lambda seed: perturb(torch.rand(2, 3), torch.rand(2, 3), std=torch.ones(3), seed=seed),
}


@pytest.mark.parametrize("op", SEEDED)
@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (1.5, TypeError),
        (True, TypeError),
        (np.True_, TypeError),
        ("1", TypeError),
        (-1, ValueError),
        (np.int64(-1), ValueError),
        (2**63, ValueError),
        (2**64, ValueError),
    ],
)
def test_a_seed_is_a_whole_number_below_2_to_63(op: str, seed: object, error: type[Exception]) -> None:
    """Anything else is refused, not cut or wrapped."""
    with pytest.raises(error, match=r"seed is .*: give a (whole )?number"):
        SEEDED[op](seed)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_a_seed_may_come_from_numpy_or_be_a_tensor(seed: int) -> None:
    """The same number, the same result."""
    first = kmeans(T, 3, seed=seed)
    others: list[object] = [np.int64(seed), np.uint64(seed), torch.tensor(seed)]
    for other in others:
        assert torch.equal(first.centroids, kmeans(T, 3, seed=other).centroids)


def test_a_seed_cut_to_32_bits_would_be_another() -> None:
    """All 63 bits count."""
    centroids: list[Tensor] = [kmeans(T, 3, seed=s, n_iter=0).centroids for s in (1, 1 + 2**32, 1 + 2**62)]
    assert not torch.equal(centroids[0], centroids[1])
    assert not torch.equal(centroids[0], centroids[2])
