"""SupConLoss beside pytorch-metric-learning's: arguments, combinations of references and labels, and what wraps it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import Comparison
from fgfast import losses
from tests.losses.peers import Cases, pml, randint, randn

distances = pytest.importorskip("pytorch_metric_learning.distances")
miners = pytest.importorskip("pytorch_metric_learning.miners")
reducers = pytest.importorskip("pytorch_metric_learning.reducers")
regularizers = pytest.importorskip("pytorch_metric_learning.regularizers")

HALF = "Half precision is computed and returned in float32."
TEMPERATURE = "A temperature of 0 or less is refused."
NAN = "NaN in a vector makes the loss NaN; there its row is left out."
LABELS = "`ref_labels` without `ref_emb`, and `ref_emb` of another length without `ref_labels`, are refused."

X, Z, REF = randn(0, 24, 8), randn(1, 24, 8), randn(2, 31, 8)
Y, Y_REF = randint(3, 5, 24), randint(4, 5, 31)
Call = Callable[..., Tensor]


def with_labels(labels: Tensor, ref_labels: Tensor | None = None) -> Call:
    """The loss of vectors, or of vectors and references, with these labels."""

    def call(loss: nn.Module, x: Tensor, ref: Tensor | None = None) -> Tensor:
        return loss(x, labels, ref_emb=ref, ref_labels=ref_labels)

    return call


plain = with_labels(Y)


def references(cases: Cases) -> None:
    """Every combination of references and labels."""
    labels = {"the labels": Y, "a clone": Y.clone(), "a view": Y.view(-1), "others": Y.flip(0), "none": None}
    for name, ref_labels in labels.items():
        cases.add(f"ref_labels {name}", with_labels(Y, ref_labels), X, Z)
        if ref_labels is not None:
            itself = lambda loss, x, ref=ref_labels: loss(x, Y, ref_emb=x, ref_labels=ref)  # noqa: E731
            cases.add(f"ref_labels {name}, ref_emb the embeddings", itself, X)
    cases.add("ref_emb of another length", with_labels(Y, Y_REF), X, REF)
    cases.add(
        "ref_emb longer than tiles",
        with_labels(randint(0, 9, 600), randint(1, 9, 700)),
        randn(3, 600, 4),
        randn(4, 700, 4),
    )
    cases.add("ref_emb without ref_labels, too long", with_labels(Y), X, REF, difference=LABELS, refused=True)
    cases.add("ref_labels without ref_emb", with_labels(Y, Y_REF[:24]), X, difference=LABELS, refused=True)
    cases.add("ref_labels of another length", with_labels(Y, Y_REF), X, Z, refused=True)
    for rows in ((0,), (0, 0), (0, 1), (0, 0, 1)):
        for columns in ((0,), (0, 1), (1, 1), (0, 1, 1)):
            few = with_labels(torch.tensor(rows), torch.tensor(columns))
            cases.add(f"ref_labels {columns} for labels {rows}", few, X[: len(rows)], Z[: len(columns)])


def labels(cases: Cases) -> None:
    """Kinds of labels, and labels without pairs."""
    kinds = {
        "int32": Y.int(), "uint8": Y.byte(), "negative": Y - 3, "bool": Y > 2, "float32": Y / 3, "float16": Y.half(),
        "float with NaN": torch.where(Y == 1, torch.nan, Y.double()),
        "float with both zeros": Y.float() * -0.0 + Y // 2,
        "large": Y * 2**40, "one class": torch.zeros_like(Y), "all different": torch.arange(24),
        "one pair": torch.arange(24).clamp(max=22),
    }  # fmt: skip
    for name, kind in kinds.items():
        cases.add(f"labels {name}", with_labels(kind), X)
    cases.add("labels float against integers", with_labels(Y.float(), Y_REF), X, REF)
    cases.add("labels bool against integers", with_labels(Y > 2, Y_REF - 1), X, REF)
    for n in (0, 1, 2, 3):
        cases.add(f"labels of {n} vectors", with_labels(Y[:n] * 0), X[:n])
    cases.add("labels missing", lambda loss, x: loss(x), X, refused=True)
    cases.add("labels of two dimensions", with_labels(Y.view(12, 2)), X, refused=True)


def miner(cases: Cases) -> None:
    """Pairs and triplets of miners."""
    found = {
        "MultiSimilarityMiner": miners.MultiSimilarityMiner(), "BatchHardMiner": miners.BatchHardMiner(),
        "TripletMarginMiner": miners.TripletMarginMiner(0.3), "PairMarginMiner": miners.PairMarginMiner(0.2, 0.8),
    }  # fmt: skip
    for name, miner in found.items():
        indices, of_ref = miner(X, Y), miner(X, Y, REF, Y_REF)
        cases.add(f"indices_tuple of {name}", lambda loss, x, i=indices: loss(x, Y, i), X)
        cases.add(f"indices_tuple of {name}, no labels", lambda loss, x, i=indices: loss(x, indices_tuple=i), X)
        cases.add(f"indices_tuple of {name}, references", lambda loss, x, r, i=of_ref: loss(x, Y, i, r, Y_REF), X, REF)
    i = torch.tensor
    for name, tuples in {
        "none": (i([]).long(),) * 4, "one triplet": (i([0]), i([1]), i([2])),
        "no negatives": (i([0, 1]), i([1, 0]), i([]).long(), i([]).long()),
        "repeated": (i([0, 0]), i([1, 1]), i([2, 3])),
        "a row without positives": (i([0, 0]), i([1, 2]), i([3, 3]), i([4, 5])),
    }.items():  # fmt: skip
        cases.add(f"indices_tuple {name}", lambda loss, x, t=tuples: loss(x, Y, t), X)
    both = (i([0, 1]), i([1, 2]), i([1, 3]))
    cases.add("indices_tuple positive and negative", lambda loss, x: loss(x, Y, both), X, refused=True)


def distance(cases: Cases) -> None:
    """Distances, with and without references and miners."""
    pairs = miners.MultiSimilarityMiner()(X, Y)
    for name, made in {
        "CosineSimilarity": distances.CosineSimilarity,
        "DotProductSimilarity": partial(distances.DotProductSimilarity, normalize_embeddings=False),
        "DotProductSimilarity, normalised": distances.DotProductSimilarity,
        "CosineSimilarity to a power": partial(distances.CosineSimilarity, power=3),
        "DotProductSimilarity, 1-norm": partial(distances.DotProductSimilarity, p=1),
        "LpDistance": distances.LpDistance,
        "LpDistance squared, not normalised": partial(distances.LpDistance, normalize_embeddings=False, power=2),
        "LpDistance, p 1": partial(distances.LpDistance, p=1),
        "SNRDistance": distances.SNRDistance,
        "CosineSimilarity with statistics": partial(distances.CosineSimilarity, collect_stats=True),
    }.items():
        cases.add(f"distance {name}", plain, X, distance=made)
        cases.add(f"distance {name}, references", with_labels(Y, Y_REF), X, REF, distance=made)
        cases.add(f"distance {name}, miner", lambda loss, x: loss(x, Y, pairs), X, distance=made)
    of_one = with_labels(torch.zeros(5))
    cases.add("distance LpDistance without negatives", of_one, X[:5], distance=distances.LpDistance)
    cases.add("distance of a subclass", plain, X, distance=Doubled)
    cases.add("distance that is a string", plain, X, distance=lambda: "cosine", refused=True)


class Doubled(distances.DotProductSimilarity):  # type: ignore[misc]
    """A similarity of a user."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return 2 * super().compute_mat(query_emb, ref_emb)


def reducer(cases: Cases) -> None:
    """Reducers, also without pairs, and the regularizer."""

    def losses_of(labels: Tensor) -> Call:
        def call(loss: nn.Module, x: Tensor) -> Tensor:
            found = loss(x, labels)["loss"]
            return torch.as_tensor(found["losses"] * x.sum().sign()).sum() + x.sum() * 0

        return call

    made = {
        "MeanReducer": reducers.MeanReducer, "SumReducer": reducers.SumReducer,
        "AvgNonZeroReducer": reducers.AvgNonZeroReducer,
        "ThresholdReducer": partial(reducers.ThresholdReducer, 1.9, 2.5),
        "ClassWeightedReducer": partial(reducers.ClassWeightedReducer, torch.arange(5.0)),
        "PerAnchorReducer": reducers.PerAnchorReducer,
        "MultipleReducers": partial(reducers.MultipleReducers, {"loss": reducers.SumReducer()}),
    }  # fmt: skip
    regularizer = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3}
    for name, one in made.items():
        cases.add(f"reducer {name}", plain, X, reducer=one)
        cases.add(f"reducer {name}, one class", with_labels(Y * 0), X, reducer=one)
        cases.add(f"reducer {name}, regularizer", plain, X, reducer=one, **regularizer)
    cases.add("reducer DoNothingReducer", losses_of(Y), X, reducer=reducers.DoNothingReducer)
    cases.add("reducer DoNothingReducer, one class", losses_of(Y * 0), X, reducer=reducers.DoNothingReducer)
    cases.add("embedding_regularizer LpRegularizer", plain, X, embedding_regularizer=regularizers.LpRegularizer())
    cases.add("embedding_reg_weight 0.3", plain, X, **regularizer)
    cases.add("collect_stats", plain, X, collect_stats=True)


def wrappers(cases: Cases) -> None:
    """What pytorch-metric-learning wraps around the loss."""

    def memory(loss: nn.Module, *x: Tensor, miner: nn.Module | None = None) -> Tensor:
        wrapped = pml.CrossBatchMemory(loss, 8, memory_size=50, miner=miner)
        return sum(wrapped(batch, Y) for batch in x)

    batches = [randn(i, 24, 8) for i in range(5)]
    cases.add("embeddings in CrossBatchMemory", memory, *batches)
    mined = partial(memory, miner=miners.MultiSimilarityMiner())
    cases.add("embeddings in CrossBatchMemory with a miner", mined, *batches)
    cases.add("embeddings in SelfSupervisedLoss", lambda loss, x, z: pml.SelfSupervisedLoss(loss)(x, z), X, Z)
    several = lambda loss, x: pml.MultipleLosses([loss, loss], weights=[1, 2])(x, Y)  # noqa: E731
    cases.add("embeddings in MultipleLosses", several, X)


def comparisons() -> list[Comparison]:
    """SupConLoss."""
    cases = Cases(losses.SupConLoss, pml.SupConLoss)
    cases.add("embeddings and the defaults", plain, X)
    cases.add("embeddings longer than tiles", with_labels(randint(0, 40, 700)), randn(5, 700, 8))
    cases.add("embeddings of three dimensions", lambda loss, x: loss(x[None], Y), X, refused=True)
    cases.add("embeddings in float16", plain, X.half(), difference=HALF)
    cases.add("embeddings with NaN", plain, X.index_fill(0, torch.tensor([3]), torch.nan), difference=NAN)
    for t in (0.05, 1.0, 20.0):
        cases.add(f"temperature {t}", plain, X, temperature=t)
    cases.add("temperature below 0", plain, X, temperature=-0.5, difference=TEMPERATURE, refused=True)
    for add in (references, labels, miner, distance, reducer, wrappers):
        add(cases)
    return [Comparison("SupConLoss", "pytorch-metric-learning", cases.all)]
