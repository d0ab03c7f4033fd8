"""k-means with scikit-learn's estimator interface, for NumPy arrays and for tensors on any device.

Where scikit-learn is installed this module loads it, for its base classes and its checks of arrays; without it the
class takes tensors and NumPy arrays all the same. `fgfast.kmeans` clusters.
"""

import inspect
import math
import warnings
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fgfast.ops.kmeans import kmeans, kmeans_step
from fgfast.ops.kmeans.checks import as_floats
from fgfast.tensors import TILE_ELEMENTS, accumulation, shape_error

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning, NotFittedError
    from sklearn.utils.validation import validate_data

    class _Base(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
        pass

except ModuleNotFoundError:
    validate_data = None
    ConvergenceWarning = UserWarning

    class NotFittedError(ValueError, AttributeError):  # type: ignore[no-redef]
        """A method was called before fit."""

    class _Base:  # type: ignore[no-redef]
        """What scikit-learn's BaseEstimator gives that does not need scikit-learn."""

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            """The arguments of the constructor."""
            return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

        def set_params(self, **params: Any) -> Any:
            """Change arguments of the constructor."""
            for name, value in params.items():
                if name not in self.get_params():
                    raise ValueError(f"{name} is no parameter: choose among {', '.join(self.get_params())}.")
                setattr(self, name, value)
            return self


class _ParameterError(ValueError, TypeError):
    """A parameter of the wrong type or value; both classes, as scikit-learn's error is."""


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _is_word(value: object, *words: str) -> bool:
    return isinstance(value, str) and value in words


def _is_flag(value: object) -> bool:
    if isinstance(value, bool):
        return True
    import numpy as np

    return isinstance(value, np.bool_)


def _is_random_state(value: object) -> bool:
    import numpy as np

    return isinstance(value, np.random.RandomState)


class KMeans(_Base):
    r"""`fgfast.kmeans` as an estimator that takes the place of ``sklearn.cluster.KMeans``.

    .. math:: \min_{c, labels} \sum_n w_n |x_n - c_{labels_n}|^2

    Parameters, methods, attributes and warnings are those of scikit-learn's class; from the same initial centres it
    finds the same labels. It differs in this: the random numbers are those of `fgfast.kmeans`, so that an int
    ``random_state`` draws other initial centres than scikit-learn does; sparse matrices and negative weights are
    refused; an empty cluster takes no sample of weight 0, and a cluster that loses its only sample to it stays where
    it was; and X may be a tensor, which is clustered on its device and gives tensors.

    Args:
        n_clusters: K, from 1 to the number of samples.
        init: "k-means++" (greedy, among all samples), "random", centres [K, D], or a function
            ``init(X, n_clusters, random_state=...)`` that returns centres; it is given X minus the mean of the samples,
            and the mean is added to what it returns.
        n_init: number of runs, of which the one of least inertia is kept; "auto" is 10 for "random" and functions,
            and 1 otherwise. Centres are used once.
        max_iter: largest number of iterations of a run, 1 or more.
        tol: a run stops when the squared movement of the centres is at most tol x the mean variance of the features.
        verbose: 1 prints one line for each fit.
        random_state: an int from 0 to 2^32 - 1 is the seed of `fgfast.kmeans`; a numpy.random.RandomState gives one
            for each fit; None draws it from NumPy's global generator, or from torch's if X is a tensor.
        copy_x: without effect: X is never changed.
        algorithm: "lloyd"; "elkan" gives the same result and is computed in the same way.

    Attributes:
        cluster_centers_: [K, D] in the dtype of X (float64 if that is neither float32 nor float64; for tensors float32
            if that is float16 or bfloat16).
        labels_: [N], int32 (tensors: int64).
        inertia_: sum of weight x squared distance of the samples from their centres, a float.
        n_iter_: number of iterations of the run that was kept.
        n_features_in_: D.
        feature_names_in_: names of the columns, if X was a DataFrame whose column names are all strings.

    Raises:
        ValueError, TypeError: a parameter or array does not fit.
        sklearn.exceptions.NotFittedError: predict, transform or score before fit.

    Warns:
        sklearn.exceptions.ConvergenceWarning: fewer clusters were found than asked for (a UserWarning where
            scikit-learn is not installed).
        RuntimeWarning: n_init is given beside centres, or "elkan" beside one cluster.

    Example:
        >>> import torch
        >>> from fgfast import KMeans
        >>> model = KMeans(2, random_state=0).fit(torch.tensor([[0.0], [1.0], [8.0], [9.0]]))
        >>> sorted(model.cluster_centers_.flatten().tolist()), model.inertia_
        ([0.5, 8.5], 1.0)

    Source: as `fgfast.kmeans`; the interface is scikit-learn's (Pedregosa et al., JMLR 2011).
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "KMeans":
        """Cluster X [N, D], an array or tensor; sample_weight [N] is not negative, y is ignored."""
        self._check_parameters()
        x = self._samples(X, reset=True)
        if len(x) < self.n_clusters:
            raise ValueError(f"n_clusters is {self.n_clusters} but X has n_samples={len(x)}: give at most that many.")
        weight = _weights(sample_weight, x)
        centres, n_iter = self._cluster(x, weight, isinstance(X, Tensor))
        labels = kmeans_step(x, centres).labels
        self.inertia_ = _inertia(x, centres, labels, weight)
        self.n_iter_ = n_iter
        self._n_features_out = self.n_clusters
        self.cluster_centers_ = centres if isinstance(X, Tensor) else centres.numpy()
        self.labels_ = labels if isinstance(X, Tensor) else labels.int().numpy()
        found = len(labels.unique())
        if found < self.n_clusters:
            warnings.warn(
                f"only {found} distinct clusters were found, n_clusters is {self.n_clusters}: X may hold duplicates.",
                ConvergenceWarning,
                stacklevel=2,
            )
        if self.verbose:
            print(f"KMeans: {n_iter} iterations, inertia {self.inertia_}")
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit`, and the labels of X."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit`, and `transform` of X."""
        return self.fit(X, sample_weight=sample_weight)._distances(X)

    def predict(self, X: Any) -> Any:
        """The nearest centre of each sample, int32 [N] (tensors: int64)."""
        x, centres = self._fitted(X)
        labels = kmeans_step(x, centres).labels
        return labels if isinstance(X, Tensor) else labels.int().numpy()

    def transform(self, X: Any) -> Any:
        """Distances [N, K] of the samples from the centres, in the dtype that ``cluster_centers_`` has for this X."""
        return self._distances(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """The inertia of X, with a minus sign."""
        x, centres = self._fitted(X)
        return -_inertia(x, centres, kmeans_step(x, centres).labels, _weights(sample_weight, x))

    def __sklearn_tags__(self) -> Any:
        """scikit-learn's description of the class."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _check_parameters(self) -> None:
        init, state = self.init, self.random_state
        is_array = not isinstance(init, str) and (hasattr(init, "__len__") or hasattr(init, "__array__"))
        rules = {
            "n_clusters": (_is_whole(self.n_clusters, 1) and self.n_clusters is not True, "a whole number from 1"),
            "init": (
                is_array or callable(init) or _is_word(init, "k-means++", "random"),
                "'k-means++', 'random', a function or an array",
            ),
            "n_init": (_is_whole(self.n_init, 1) or _is_word(self.n_init, "auto"), "a whole number from 1 or 'auto'"),
            "max_iter": (_is_whole(self.max_iter, 1), "a whole number from 1"),
            "tol": (isinstance(self.tol, Real) and 0 <= self.tol < math.inf, "a finite number from 0"),
            "verbose": (_is_whole(self.verbose, 0) or _is_flag(self.verbose), "a whole number from 0"),
            "random_state": (
                state is None or (_is_whole(state, 0) and state < 1 << 32) or _is_random_state(state),
                "a whole number from 0 to 2^32 - 1, a numpy.random.RandomState or None",
            ),
            "copy_x": (_is_flag(self.copy_x), "True or False"),
            "algorithm": (_is_word(self.algorithm, "lloyd", "elkan"), "'lloyd' or 'elkan'"),
        }
        for name, (good, wanted) in rules.items():
            if not good:
                raise _ParameterError(f"{name} is {getattr(self, name)!r}: give {wanted}.")
        if is_array and self.n_init not in ("auto", 1):
            warnings.warn(f"init holds centres: one run is made, not {self.n_init}.", RuntimeWarning, stacklevel=3)
        if self.algorithm == "elkan" and self.n_clusters == 1:
            warnings.warn("algorithm is 'elkan' for one cluster: 'lloyd' is run.", RuntimeWarning, stacklevel=3)

    def _samples(self, X: Any, reset: bool) -> Tensor:
        """X as a float tensor [N, D] of finite numbers, with as many features as before."""
        if validate_data is not None and not isinstance(X, Tensor):
            return as_floats("X", validate_data(self, X, dtype=["float64", "float32"], reset=reset))
        x = as_floats("X", X).detach()
        if x.dim() != 2 or 0 in x.shape:
            raise shape_error("X", "[N, D] with at least one sample and one feature", x)
        if not bool(x.isfinite().all()):
            raise ValueError("X holds NaN or infinity: leave out such samples.")
        if reset:
            self.n_features_in_ = x.shape[1]
            self.__dict__.pop("feature_names_in_", None)
        elif x.shape[1] != self.n_features_in_:
            raise ValueError(f"X has {x.shape[1]} features but fit saw {self.n_features_in_}: give the same ones.")
        return x

    def _fitted(self, X: Any) -> tuple[Tensor, Tensor]:
        """X and the centres as tensors on one device."""
        if not hasattr(self, "cluster_centers_"):
            raise NotFittedError("this KMeans has no centres yet: call fit first.")
        x = self._samples(X, reset=False)
        return x, as_floats("cluster_centers_", self.cluster_centers_).to(x.device)

    def _distances(self, X: Any) -> Any:
        x, centres = self._fitted(X)
        wide = accumulation(x.dtype)
        far = torch.cdist(x.to(wide), centres.to(wide), compute_mode="donot_use_mm_for_euclid_dist")
        return far if isinstance(X, Tensor) else far.numpy()

    def _seed(self, tensors: bool) -> int | None:
        if isinstance(self.random_state, Integral):
            return int(self.random_state)
        if self.random_state is None and tensors:
            return None
        import numpy as np

        source = np.random if self.random_state is None else self.random_state
        return int(source.randint(2**31 - 1))

    def _runs(self) -> int:
        if self.n_init == "auto":
            return 1 if self.init == "k-means++" else 10
        return int(self.n_init)

    def _cluster(self, x: Tensor, weight: Tensor | None, tensors: bool) -> tuple[Tensor, int]:
        """Centres and number of iterations of the best run."""
        tol = float(self.tol)
        if weight is not None and bool((weight == 0).any()):  # scikit-learn's variance is that of all samples
            every, counted = (v.double().var(0, correction=0).mean().item() for v in (x, x[weight > 0]))
            tol = tol * every / counted if counted else 0.0
        options: dict[str, Any] = {"n_iter": self.max_iter, "tol": tol, "weight": weight}
        if isinstance(self.init, str):
            options |= {"n_init": self._runs(), "init_samples": len(x), "seed": self._seed(tensors)}
            best = kmeans(x, self.n_clusters, init=self.init, **options)
        elif callable(self.init):
            starts = self._starts_of_function(x, tensors)
            results = (kmeans(x, self.n_clusters, init=start, **options) for start in starts)
            best = min(results, key=lambda result: result.inertia.item())
        else:
            best = kmeans(x, self.n_clusters, init=self._start(self.init, x), **options)
        return best.centroids, int(best.n_iter)

    def _starts_of_function(self, x: Tensor, tensors: bool) -> Any:
        import numpy as np

        given = self.random_state
        state = given if _is_random_state(given) else np.random.RandomState(self._seed(False))
        wide = x.to(accumulation(x.dtype))
        mean = wide.mean(0)
        centred = wide - mean if tensors else (wide - mean).numpy()
        for _ in range(self._runs()):
            yield self._start(self.init(centred, self.n_clusters, random_state=state), x) + mean

    def _start(self, init: Any, x: Tensor) -> Tensor:
        """Initial centres [K, D] on the device of x."""
        if not isinstance(init, Tensor):
            import numpy as np

            init = np.asarray(init)
        centres = as_floats("init", init).to(x.device, accumulation(x.dtype))
        if tuple(centres.shape) != (self.n_clusters, x.shape[1]):
            raise shape_error("init", f"[n_clusters, D] = [{self.n_clusters}, {x.shape[1]}]", centres)
        return centres


def _weights(sample_weight: Any, x: Tensor) -> Tensor | None:
    """Weights [N] on the device of x; a number is the weight of every sample."""
    if sample_weight is None:
        return None
    if isinstance(sample_weight, Real):
        sample_weight = torch.full((len(x),), float(sample_weight), dtype=accumulation(x.dtype))
    elif not isinstance(sample_weight, Tensor):
        import numpy as np

        sample_weight = np.asarray(sample_weight)
    weight = as_floats("sample_weight", sample_weight).to(x.device)
    if weight.shape != x.shape[:1]:
        raise shape_error("sample_weight", f"[{len(x)}], one number a sample", weight)
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError("sample_weight holds a negative or non-finite number: use 0 to leave a sample out.")
    if not bool((weight > 0).any()):
        raise ValueError("sample_weight is zero for every sample: give a positive weight to at least one.")
    return weight


def _inertia(x: Tensor, centres: Tensor, labels: Tensor, weight: Tensor | None) -> float:
    """Sum of weight x squared distance from the centre, in float64: what `kmeans` returns has 24 bits."""
    rows = max(1, TILE_ELEMENTS // x.shape[1])
    parts = []
    for n in (slice(start, start + rows) for start in range(0, len(x), rows)):
        squares = (x[n].double() - centres.double()[labels[n]]).square().sum(1)
        parts.append((squares if weight is None else squares * weight[n]).sum())
    return float(torch.stack(parts).sum())
