"""How well discovered parts agree with true ones, picture by picture."""

import numpy as np
from torch import Tensor


def nmi_ari(labels: Tensor | np.ndarray, truth: Tensor | np.ndarray, ignore: int = -1) -> dict[str, float]:
    """Agreement of two part maps; ids need not match, neither between the maps nor between pictures.

    Each score is computed in each picture and averaged. Over the pixels that carry a true part: normalised mutual
    information (arithmetic mean of the entropies), adjusted Rand index, purity (share of pixels whose cluster's
    commonest true part is theirs) and coverage (share of pixels that carry any discovered part). Over all pixels, what
    has no part counting as one more cluster: ``nmi_all`` and ``ari_all``.

    Args:
        labels: discovered ids, integer [H, W] or [B, H, W].
        truth: true ids, the same shape.
        ignore: the id that means "no part" in both.

    Returns:
        nmi, ari, purity, coverage, nmi_all, ari_all (NaN when no picture counts), and images and skipped: how many
        pictures counted, and how many have no true part and did not.

    Raises:
        ValueError: shapes that differ or are not [H, W] or [B, H, W].

    Example:
        >>> truth = np.array([[0, 0, 1], [0, 1, -1]])
        >>> round(nmi_ari(5 - truth, truth)["ari"], 6)
        1.0

    Source: scikit-learn's normalized_mutual_info_score and adjusted_rand_score.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found, true = _pixels(labels), _pixels(truth)
    if found.shape != true.shape:
        raise ValueError(f"labels are {list(labels.shape)}, truth {list(truth.shape)}: give the same shape.")
    names = ("nmi", "ari", "purity", "coverage", "nmi_all", "ari_all")
    rows = []
    for all_found, all_true in zip(found, true, strict=True):
        part = all_true != ignore
        if not part.any():
            continue
        a, b = all_found[part], all_true[part]
        rows.append(
            (
                normalized_mutual_info_score(b, a),
                adjusted_rand_score(b, a),
                _purity(a, b),
                (a != ignore).mean(),
                normalized_mutual_info_score(all_true, all_found),
                adjusted_rand_score(all_true, all_found),
            )
        )
    means = np.mean(rows, axis=0) if rows else np.full(len(names), np.nan)
    scores = {name: float(value) for name, value in zip(names, means, strict=True)}
    return {**scores, "images": len(rows), "skipped": len(true) - len(rows)}


def _pixels(ids: Tensor | np.ndarray) -> np.ndarray:
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"A part map is {array.dtype} {list(array.shape)}: give integers [H, W] or [B, H, W].")
    return array.reshape(len(array) if array.ndim == 3 else 1, -1).astype(np.int64)


def _purity(found: np.ndarray, true: np.ndarray) -> float:
    _, a = np.unique(found, return_inverse=True)
    _, b = np.unique(true, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    return float(table.max(axis=1).sum() / len(a))
