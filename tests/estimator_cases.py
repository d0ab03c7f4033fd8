"""`fgfast.KMeans` beside ``sklearn.cluster.KMeans``: calls of both for every argument of the class and its methods."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import sklearn.cluster
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import make_blobs

import fgfast
from benchmarks.peers import Case, Comparison, Results

X, _ = make_blobs(120, n_features=4, centers=8, cluster_std=1.5, random_state=3)
APART, _ = make_blobs(90, n_features=4, centers=3, cluster_std=0.5, random_state=0)  # one best clustering, easy to find
NEW = X[:10] + 0.3
START = X[:8]
FAR = np.concatenate([START[:6], np.full((2, 4), 1e3) + np.arange(2)[:, None]])  # two clusters are empty at first
WEIGHT = np.random.RandomState(0).uniform(size=len(X))
OUTLIERS = np.concatenate([X, 100 * X[:9]])
NO_OUTLIERS = np.concatenate([WEIGHT, np.zeros(9)])
SOME_ZERO = np.where(WEIGHT < 0.3, 0, WEIGHT)

DRAWS = "An int `random_state` draws other initial centres: the random numbers are those of `fgfast.kmeans`."
SPARSE = "Sparse matrices are refused."
NEGATIVE = "Negative weights are refused."
VIEW = "A function `init` may return a part of X: scikit-learn then writes the centres into X."
MIXED = "`predict` and `score` take float32 after a fit of float64, which scikit-learn's compiled code refuses."
EMPTIED = (
    "A cluster that loses its only sample to an empty one stays where it was; scikit-learn moves it to the largest."
)
UNCOUNTED = "An empty cluster takes no sample of weight 0."
VERBOSE = "`verbose` prints one line for each fit, not one for each iteration."


def state(model: Any) -> Results:
    """What a fit leaves: values, and the sizes of their dtypes."""
    arrays = (model.labels_, model.cluster_centers_)
    return (*arrays, model.inertia_, model.n_iter_, model.n_features_in_, [a.dtype.itemsize for a in arrays])


def sorted_state(model: Any) -> Results:
    """Centres in order of their first coordinate, the size of each cluster, and inertia: whatever the numbering is."""
    order = model.cluster_centers_[:, 0].argsort()
    return model.cluster_centers_[order], np.bincount(model.labels_)[order], model.inertia_


def warned(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """The result, and how many warnings there were of the two kinds that KMeans gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    kinds = [warning.category.__name__ for warning in caught]
    return result, [kinds.count("RuntimeWarning"), kinds.count("ConvergenceWarning")]


def printed(model: Any) -> Results:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        model.fit(X)
    return (len(text.getvalue().splitlines()),)


def twice(cls: Any, make: Callable[[], Any]) -> Results:
    """Whether two fits from random states made in the same way give the same centres."""
    first, second = (cls(8, random_state=make()).fit(X).cluster_centers_ for _ in range(2))
    return (np.array_equal(first, second),)


def seeded() -> None:
    """The global generator, which is what None stands for."""
    np.random.seed(5)  # noqa: NPY002


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def fitted(cls: Any, x: Any = X, weight: Any = None, **options: Any) -> Any:
    """A fit from given centres."""
    return cls(8, **({"init": START} | options)).fit(x, sample_weight=weight)


Call = Callable[[Any], Results]


def constructor() -> Iterator[tuple[str, Call, str]]:
    """(argument and case, call of a class, why the results differ) for each argument of the class."""
    for name, count in (("default", None), ("1", 1), ("3", 3), ("one a sample", len(X))):
        options = {} if count is None else {"n_clusters": count}
        yield f"n_clusters: {name}", lambda c, o=options, n=count or 8: state(c(init=X[:n], **o).fit(X)), ""
    yield "n_clusters: more than distinct samples", _duplicates, ""
    for name, start in (
        ("float32", START.astype(np.float32)),
        ("integers", START.astype(int)),
        ("list", START.tolist()),
        ("Fortran order", np.asfortranarray(START)),
        ("far from all samples", FAR),
        ("all the same", np.repeat(START[:1], 8, 0)),
        ("function of X", lambda x, k, random_state: x[:k].copy()),
        ("function that ignores X", lambda x, k, random_state: START / 2),
    ):
        yield f"init: {name}", lambda c, s=start: state(c(8, init=s).fit(X)), ""
    yield (
        "init: function that draws",
        lambda c: state(
            c(8, init=lambda x, k, random_state: x[random_state.permutation(len(x))[:k]], random_state=2).fit(X)
        ),
        "",
    )
    yield (
        "init: function that returns a view of X",
        lambda c: state(c(8, init=lambda x, k, random_state: x[:k]).fit(X)),
        VIEW,
    )
    yield "init: a cluster of one sample, which is the farthest", lambda c: state(_line(c, [[60], [500], [1]])), EMPTIED
    for name in ("k-means++", "random"):
        run = lambda c, n=name: sorted_state(c(3, init=n, n_init=20, random_state=0).fit(APART))  # noqa: E731
        yield f"init: {name}", run, ""
        yield f"init: {name}, weights", lambda c, n=name: _weighted_start(c, n), ""
    for runs in ("auto", 1, 3):
        yield f"n_init: {runs}", lambda c, n=runs: _with_warnings(c, n_init=n), ""
    for steps in (1, 2, 300):
        yield f"max_iter: {steps}", lambda c, n=steps: state(fitted(c, max_iter=n)), ""
    for tol in (0, 1e-4, 1e-2, 1.0):
        yield f"tol: {tol}", lambda c, t=tol: state(fitted(c, tol=t)), ""
    yield "verbose: 0", lambda c: printed(c(8, init=START, verbose=0)), ""
    yield "verbose: 1", lambda c: printed(c(8, init=START, verbose=1)), VERBOSE
    for name, make in (
        ("int", lambda: 5),
        ("RandomState", lambda: np.random.RandomState(5)),
        ("None, global seed", seeded),
    ):
        yield f"random_state: {name}", lambda c, m=make: twice(c, m), ""
    yield "random_state: which draws", lambda c: state(c(8, random_state=5).fit(X)), DRAWS
    yield "copy_x: False leaves X as it was", _in_place, ""
    yield "algorithm: elkan", lambda c: state(fitted(c, algorithm="elkan")), ""
    yield "algorithm: elkan, one cluster", lambda c: _with_warnings(c, n_clusters=1, init=X[:1], algorithm="elkan"), ""


def methods() -> Iterator[tuple[str, Call, str]]:
    """The same for each argument of each method."""
    for name, x, why in (
        ("float32", X.astype(np.float32), ""),
        ("float16", X.astype(np.float16), ""),
        ("int32", (4 * X).astype(np.int32), ""),
        ("bool", X > 0, ""),
        ("list", X.tolist(), ""),
        ("objects that are numbers", X.astype(object), ""),
        ("Fortran order", np.asfortranarray(X), ""),
        ("reversed", X[::-1, ::-1], ""),
        ("read-only", read_only(X), ""),
        ("other byte order", X.astype(X.dtype.newbyteorder()), ""),
        ("far from 0", X + 1e4, ""),
        ("sparse", sparse.csr_array(X), SPARSE),
    ):
        yield f"fit: X, {name}", lambda c, x=x: state(fitted(c, x)), why
    yield "fit: y is ignored", lambda c: state(c(8, init=START).fit(X, "y")), ""
    for name, weight, why in (
        ("uniform", WEIGHT, ""),
        ("list", WEIGHT.tolist(), ""),
        ("integers", np.arange(len(X)) % 3 + 1, ""),
        ("one number", 0.1, ""),
        ("some 0", SOME_ZERO, ""),
        ("negative", WEIGHT - 0.1, NEGATIVE),
    ):
        yield f"fit: sample_weight, {name}", lambda c, w=weight: state(fitted(c, weight=w)), why
    yield "fit: sample_weight, 0 for outliers", lambda c: state(fitted(c, OUTLIERS, NO_OUTLIERS, tol=1e-3)), ""
    yield "fit: sample_weight, empty clusters", lambda c: state(fitted(c, weight=WEIGHT, init=FAR)), ""
    yield "fit: sample_weight, 0 for the farthest", lambda c: state(_line(c, [[1], [500]], [1, 1, 1, 1, 0])), UNCOUNTED
    yield "fit_predict: X, sample_weight", lambda c: [c(8, init=START).fit_predict(X, None, WEIGHT)], ""
    yield "fit_transform: X, sample_weight", lambda c: [c(8, init=START).fit_transform(X, None, WEIGHT)], ""
    for name, x in (("new", NEW), ("its own", X), ("float32", NEW.astype(np.float32)), ("list", NEW.tolist())):
        why = MIXED if name == "float32" else ""
        yield f"predict: X, {name}", lambda c, x=x: [fitted(c).predict(x)], why
        yield f"transform: X, {name}", lambda c, x=x: [fitted(c).transform(x)], ""
        yield f"score: X, {name}", lambda c, x=x: [fitted(c).score(x)], why
    yield "score: y is ignored, sample_weight", lambda c: [fitted(c).score(NEW, None, WEIGHT[:10])], ""
    yield "get_params", lambda c: [sorted(map(str, c(3, tol=0.5).get_params().items())) == PARAMS], ""
    yield "set_params", lambda c: state(c().set_params(n_clusters=4, init=X[:4]).fit(X)), ""
    yield "clone", lambda c: state(clone(fitted(c)).fit(X)), ""
    yield "get_feature_names_out", lambda c: [[n == f"kmeans{i}" for i, n in enumerate(_names(c))]], ""


def refusals() -> Iterator[tuple[str, Call]]:
    """(argument and case, call of a class) that both refuse."""
    for name, *values in (
        ("n_clusters", 2.5, 0, len(X) + 1, True),
        (
            "init",
            START[:7],
            START[:, :3],
            np.full_like(START, np.nan),
            "farthest",
            3,
            lambda x, k, random_state: x[1:k],
        ),
        ("n_init", 0, 2.5, "many", np.array([1, 2])),
        ("max_iter", 0, 1.5),
        ("tol", -1.0, "small", np.inf, np.nan),
        ("verbose", -1),
        ("random_state", -1, 1.5, 2**32, np.random, np.random.default_rng(5)),
        ("copy_x", "no", 1, np.array([True, False])),
        ("algorithm", "full", np.array(["lloyd", "elkan"])),
    ):
        for number, value in enumerate(values):
            options = {"n_clusters": 8, "init": "random", name: value}
            yield f"{name}: wrong, {number}", lambda c, o=options: state(c(**o).fit(X))
    for name, x in (
        ("one dimension", X[:, 0]),
        ("three dimensions", X[None]),
        ("no sample", X[:0]),
        ("NaN", np.where(X > 8, np.nan, X)),
        ("complex", X + 1j),
        ("strings", [["a", "b"]] * 9),
    ):
        yield f"fit: X, {name}", lambda c, x=x: state(c(3).fit(x))
    for name, weight in (
        ("too few", WEIGHT[:-1]),
        ("NaN", np.where(WEIGHT > 0.9, np.nan, WEIGHT)),
    ):
        yield f"fit: sample_weight, {name}", lambda c, w=weight: state(fitted(c, weight=w))
    for method in ("predict", "transform", "score"):
        yield f"{method}: X, other features", lambda c, m=method: [getattr(fitted(c), m)(NEW[:, :3])]
        yield f"{method}: X, NaN", lambda c, m=method: [getattr(fitted(c), m)(NEW * np.nan)]
        yield f"{method}: before fit", lambda c, m=method: [getattr(c(8), m)(NEW)]
    yield "score: sample_weight, too few", lambda c: [fitted(c).score(NEW, sample_weight=WEIGHT)]
    yield "set_params: unknown", lambda c: [c().set_params(n_centres=4)]


PARAMS = sorted(map(str, sklearn.cluster.KMeans(3, tol=0.5).get_params().items()))


def _names(cls: Any) -> Any:
    return fitted(cls).get_feature_names_out()


def _duplicates(cls: Any) -> Results:
    x = np.repeat(X[:5], 4, 0)
    model, counts = warned(lambda: cls(8, init=x[:8]).fit(x))
    return len(set(model.labels_)), model.inertia_, counts


def _with_warnings(cls: Any, **options: Any) -> Results:
    model, counts = warned(lambda: cls(**({"n_clusters": 8, "init": START} | options)).fit(X))
    return (*state(model), counts)


def _weighted_start(cls: Any, init: str) -> Results:
    """With one sample of each cluster counting, these are the centres."""
    weight = np.zeros(len(APART))
    weight[[int(LABELS.tolist().index(k)) for k in range(3)]] = 1
    model = cls(3, init=init, n_init=1, max_iter=1, random_state=0).fit(APART, sample_weight=weight)
    return sorted_state(model)[0], model.inertia_


LABELS = sklearn.cluster.KMeans(3, random_state=0).fit(APART).labels_


def _line(cls: Any, start: list, weight: Any = None) -> Any:
    """One step from centres of which the second is empty."""
    x = np.array([[0.0], [1], [2], [3], [100]])
    return warned(lambda: cls(len(start), init=start, max_iter=1).fit(x, sample_weight=weight))[0]


def _in_place(cls: Any) -> Results:
    x = X.copy()
    return (*state(cls(8, init=START, copy_x=False).fit(x)), x)


def comparisons() -> list[Comparison]:
    """For `benchmarks.peers`."""
    cases = [
        Case(
            name,
            lambda call=call: call(fgfast.KMeans),
            lambda call=call: call(sklearn.cluster.KMeans),
            argument=name.split(":")[0],
            rtol=1e-5 if "float32" in name or "far from 0" in name else 1e-9,
            difference=why,
            refused=refused,
        )
        for name, call, why, refused in (
            *((*case, case[2] in (SPARSE, NEGATIVE)) for case in (*constructor(), *methods())),
            *((*case, "", True) for case in refusals()),
        )
    ]
    return [Comparison("KMeans", "scikit-learn", cases)]
