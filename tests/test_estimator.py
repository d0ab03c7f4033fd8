"""`fgfast.KMeans`: scikit-learn's checks, cases beside its class, tensors, and life without scikit-learn."""

import importlib.util
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import sklearn.base
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans as Peer
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import fgfast
import fgfast.estimator
from benchmarks.peers import Case
from tests.estimator_cases import START, WEIGHT, X, comparisons
from tests.examples import examples

CASES = comparisons()[0].cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_scikit_learn_where_nothing_else_is_said(case: Case) -> None:
    """The same results, or both refuse; a difference that is documented is one."""
    assert case.agrees() == (not case.difference)


@examples(25)
@given(seed=st.integers(0, 10**6), weighted=st.booleans(), tol=st.sampled_from([0, 1e-4, 1e-1]))
def test_equals_scikit_learn_for_any_size(seed: int, weighted: bool, tol: float) -> None:
    """Labels, inertia and iterations from samples as centres."""
    g = np.random.default_rng(seed)
    x = g.normal(size=(g.integers(3, 60), g.integers(1, 5)))
    start = g.permutation(x)[: g.integers(1, min(len(x), 9))]
    weight = g.uniform(0.1, 2, len(x)) if weighted else None
    ours, theirs = (c(len(start), init=start, tol=tol).fit(x, sample_weight=weight) for c in (fgfast.KMeans, Peer))
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-9, abs=1e-12)
    assert ours.n_iter_ == theirs.n_iter_


def test_every_argument_has_a_case() -> None:
    """Of the class, and of each method that scikit-learn documents for it."""
    arguments = set(inspect.signature(Peer).parameters)
    methods = {"fit", "fit_predict", "fit_transform", "predict", "score", "transform", "get_feature_names_out"}
    assert arguments | methods | {"get_params", "set_params"} <= {case.argument for case in CASES}
    for method in methods - {"get_feature_names_out"}:
        ours, theirs = (inspect.signature(getattr(cls, method)) for cls in (fgfast.KMeans, Peer))
        assert list(ours.parameters) == list(theirs.parameters), method


def test_scikit_learns_checks_pass() -> None:
    """All of check_estimator; what is skipped needs a package or an option."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(fgfast.KMeans(n_clusters=2, n_init=2, max_iter=5), on_fail=None, on_skip=None)
    assert not [(r["check_name"], r["exception"]) for r in results if r["status"] not in ("passed", "skipped")]
    assert sum(r["status"] == "passed" for r in results) > 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_give_the_numbers_of_arrays_as_tensors(dtype: torch.dtype) -> None:
    """Every attribute and method; labels are int64."""
    x, start, weight = (torch.from_numpy(a).to(dtype) for a in (X, START, WEIGHT))
    ours = fgfast.KMeans(8, init=start).fit(x, sample_weight=weight)
    arrays = fgfast.KMeans(8, init=start.numpy()).fit(x.numpy(), sample_weight=weight.numpy())
    for tensor, array in (
        (ours.cluster_centers_, arrays.cluster_centers_),
        (ours.labels_, arrays.labels_),
        (ours.predict(x), arrays.predict(x.numpy())),
        (ours.transform(x), arrays.transform(x.numpy())),
        (ours.fit_transform(x), arrays.fit_transform(x.numpy())),
        (ours.fit_predict(x), arrays.fit_predict(x.numpy())),
    ):
        assert isinstance(tensor, torch.Tensor)
        assert isinstance(array, np.ndarray)
        assert tensor.dtype == (torch.int64 if array.dtype == np.int32 else dtype)
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert (ours.inertia_, ours.n_iter_, ours.score(x)) == (arrays.inertia_, arrays.n_iter_, arrays.score(x.numpy()))


def test_a_fit_on_tensors_serves_arrays_and_the_other_way_round() -> None:
    """Results are of the kind of their X."""
    x = torch.from_numpy(X)
    on_tensor, on_array = fgfast.KMeans(8, init=START).fit(x), fgfast.KMeans(8, init=START).fit(X)
    np.testing.assert_array_equal(on_tensor.predict(X), on_array.predict(X))
    assert torch.equal(on_array.transform(x), on_tensor.transform(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_short_dtypes_give_float32(dtype: torch.dtype) -> None:
    """Centres and distances; the values are those of the samples in float32."""
    x = (20 * torch.from_numpy(X).abs()).to(dtype)
    ours = fgfast.KMeans(8, init=x[:8].float()).fit(x)
    wide = fgfast.KMeans(8, init=x[:8].float()).fit(x.float())
    assert ours.cluster_centers_.dtype == ours.transform(x).dtype == torch.float32
    assert torch.equal(ours.labels_, wide.labels_)
    assert ours.inertia_ == pytest.approx(wide.inertia_)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(9), ValueError, r"X: expected shape \[N, D\]"),
        (torch.zeros(0, 3), ValueError, r"X: expected shape \[N, D\]"),
        (torch.full((9, 3), torch.nan), ValueError, "X holds NaN"),
        (torch.zeros(9, 3).to_sparse(), TypeError, "X is sparse"),
        (torch.zeros(9, 3, dtype=torch.complex64), TypeError, "X has dtype"),
        (torch.zeros(2, 3), ValueError, "n_clusters is 8 but X has n_samples=2"),
    ],
)
def test_tensors_that_do_not_fit_are_named(x: torch.Tensor, error: type[Exception], message: str) -> None:
    """As arrays are, which scikit-learn checks."""
    with pytest.raises(error, match=message):
        fgfast.KMeans().fit(x)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.zeros(len(X)), "sample_weight is zero for every sample"),
        (WEIGHT - 0.1, "sample_weight holds a negative"),
        (WEIGHT[:5], r"sample_weight: expected shape \[120\]"),
    ],
    ids=["all zero", "negative", "too few"],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_weights_that_do_not_fit_are_named(kind: Callable, weight: np.ndarray, message: str) -> None:
    """For arrays and tensors."""
    with pytest.raises(ValueError, match=message):
        fgfast.KMeans(8, init=START).fit(kind(X), sample_weight=kind(weight))


def test_other_features_than_fitted_are_named() -> None:
    """The number; names of columns are forgotten by a fit on a tensor."""
    model = fgfast.KMeans(8, init=START).fit(X)
    model.feature_names_in_ = np.array(list("abcd"), dtype=object)
    assert not hasattr(model.fit(torch.from_numpy(X)), "feature_names_in_")
    with pytest.raises(ValueError, match="X has 3 features but fit saw 4"):
        model.predict(torch.from_numpy(X)[:, :3])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_clusters", 0),
        ("init", 3),
        ("n_init", "many"),
        ("max_iter", 1.5),
        ("tol", -1),
        ("tol", float("inf")),
        ("n_clusters", True),
        ("verbose", -1),
        ("random_state", 2**32),
        ("copy_x", "no"),
        ("algorithm", "full"),
    ],
)
@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_a_wrong_parameter_is_named(name: str, value: object, error: type[Exception]) -> None:
    """By an error of both classes, as scikit-learn's is."""
    with pytest.raises(error, match=f"^{name} is {value!r}: give "):
        fgfast.KMeans(**{name: value}).fit(X)


@pytest.mark.parametrize("name", ["n_clusters", "n_init", "max_iter", "tol", "verbose", "copy_x", "algorithm"])
@pytest.mark.parametrize("value", [np.array([1, 2]), np.array(["lloyd", "auto"]), torch.tensor([1, 0])], ids=str)
def test_an_array_as_a_parameter_is_named(name: str, value: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(TypeError, match=f"^{name} is (array|tensor).*: give "):
        fgfast.KMeans(**{name: value}).fit(X)


def test_parameters_may_be_numpy_numbers() -> None:
    """As a search over numpy.arange gives them."""
    whole = {"n_clusters": 8, "n_init": 2, "max_iter": 5, "random_state": 1}
    ours = fgfast.KMeans(**{name: np.int64(value) for name, value in whole.items()}, tol=np.float32(0)).fit(X)
    assert ours.inertia_ == fgfast.KMeans(**whole, tol=0).fit(X).inertia_


def test_labels_are_those_that_predict_gives_on_ties() -> None:
    """Samples half-way between centres."""
    x = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0)), -1).reshape(-1, 2) + 1 / 3
    for seed in range(5):
        model = fgfast.KMeans(9, random_state=seed, max_iter=3).fit(x.astype(np.float32))
        np.testing.assert_array_equal(model.labels_, model.predict(x.astype(np.float32)))


def test_inertia_has_the_digits_of_float64() -> None:
    """`fgfast.kmeans` returns float32."""
    model = fgfast.KMeans(8, init=START).fit(X + 1e3, sample_weight=WEIGHT)
    direct = (WEIGHT * np.square(X + 1e3 - model.cluster_centers_[model.labels_]).sum(1)).sum()
    assert model.inertia_ == pytest.approx(direct, rel=1e-14)


@pytest.mark.parametrize("x", [X, torch.from_numpy(X)], ids=["array", "tensor"])
def test_pickles(x: np.ndarray | torch.Tensor) -> None:
    """With what it has learnt."""
    model = pickle.loads(pickle.dumps(fgfast.KMeans(8, init=START).fit(x)))
    assert bool((model.predict(x) == model.labels_).all())


def test_works_in_a_pipeline_and_a_search() -> None:
    """Parameters are set through both."""
    search = GridSearchCV(
        make_pipeline(StandardScaler(), fgfast.KMeans(random_state=0)), {"kmeans__n_clusters": [2, 8]}
    )
    best = search.fit(X).best_estimator_
    assert best["kmeans"].n_clusters == 8
    assert best.predict(X).shape == (len(X),)


def test_random_state_none_follows_the_global_generators() -> None:
    """NumPy's for arrays, torch's for tensors."""
    for x, seed in ((X, np.random.seed), (torch.from_numpy(X), torch.manual_seed)):
        centres = []
        for number in (1, 1, 2):
            seed(number)
            centres.append(fgfast.KMeans(8, max_iter=1).fit(x).cluster_centers_)
        assert (centres[0] == centres[1]).all()
        assert not (centres[0] == centres[2]).all()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is loaded where scikit-learn is not installed."""
    for name in ("sklearn", "sklearn.base", "sklearn.exceptions", "sklearn.utils.validation"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("fgfast_estimator_alone", fgfast.estimator.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("x", [X, torch.from_numpy(X)], ids=["array", "tensor"])
def test_needs_no_scikit_learn(alone: ModuleType, x: np.ndarray | torch.Tensor) -> None:
    """The same numbers, parameters by name, errors and warnings of Python's classes."""
    model, peer = alone.KMeans(8, init=START), fgfast.KMeans(8, init=START)
    assert not isinstance(model, sklearn.base.BaseEstimator)
    assert model.fit(x).inertia_ == peer.fit(x).inertia_
    assert (model.predict(x) == peer.predict(x)).all()
    assert model.set_params(tol=0.5).get_params() == peer.set_params(tol=0.5).get_params()
    with pytest.raises(ValueError, match="n_centres is no parameter"):
        model.set_params(n_centres=3)
    with pytest.raises(ValueError, match="call fit first"):
        alone.KMeans().predict(x)
    with pytest.warns(UserWarning, match="only 1 distinct clusters"):
        alone.KMeans(2, random_state=0).fit(x[:1].repeat(3, 0) if isinstance(x, np.ndarray) else x[:1].expand(3, -1))


def test_warns_of_clusters_that_were_not_found() -> None:
    """With scikit-learn's class of warning."""
    with pytest.warns(ConvergenceWarning, match="only 1 distinct clusters"):
        fgfast.KMeans(2, random_state=0).fit(torch.ones(5, 2))
