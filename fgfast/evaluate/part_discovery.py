"""Scores of discovered parts against the true part masks of a data set."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from fgfast.methods.run_folder import Checkpoint, load_run_encoder
from fgfast.parts.clustering import ClusteringConfig, cluster_keys, cluster_pyramid


def score_discovery(
    run: Path, data: Path, *, checkpoint: Checkpoint = "last", device: torch.device, n_images: int = 200
) -> dict[str, float]:
    """NMI, ARI and other scores of clustered pixels against true part masks, means over images.

    Every image is clustered separately: a CNN's hypercolumns with the settings of the run (the defaults for methods
    without parts) and without background removal, a ViT's keys into the number of parts of the run.

    Args:
        run: run folder.
        data: a set with part masks.
        checkpoint: "init" or "last".
        device: device of the encoder.
        n_images: number of test images to score, drawn with a fixed seed.

    Returns:
        {"nmi": ..., "ari": ..., ...}, see :func:`nmi_ari`.

    Raises:
        UserError: the set has no part masks.
    """
    encoder, config = load_run_encoder(run, checkpoint, device)
    images = open_images(data)
    if images.masks is None:
        raise UserError(f"{data} has no part masks to score against: use a synthetic set.")
    test = images.test_set().sample(n_images)
    size, n_parts = 2 * config.size, getattr(config, "n_parts", 15)
    loader = make_loader(
        test, ViewSpec(whole=size, whole_masks=True).with_stats(encoder.stats), 32, shuffle=False, maps=images.masks,
        device=device, threads=config.threads, backend=config.loader,
    )  # fmt: skip
    found, true = [], []  # id maps
    try:
        for batch in loader:
            assert batch.whole is not None  # the specification asks for both
            assert batch.whole_labels is not None
            whole = batch.whole[batch.valid]
            if encoder.is_vit:
                labels = cluster_keys(encoder, whole, n_parts=n_parts, seed=config.seed)
            else:
                clustering = getattr(config, "clustering", ClusteringConfig(n_parts))
                clustering = replace(clustering, border=0.0, first_parts=0)
                labels = cluster_pyramid(encoder, whole, clustering, size=64, seed=config.seed)
            labels = torch.nn.functional.interpolate(labels[:, None].float(), size=(size, size)).long()[:, 0]
            found.append(labels.cpu())
            true.append(batch.whole_labels[batch.valid].cpu())
    finally:
        loader.close()
    return nmi_ari(torch.cat(found).numpy(), torch.cat(true).numpy())


def nmi_ari(labels: Tensor | np.ndarray, truth: Tensor | np.ndarray, ignore: int = -1) -> dict[str, float]:
    """Agreement of two id maps; ids need not match, neither between the maps nor between images.

    Each score is computed for each image and averaged. Over the pixels with a true part: normalised mutual information
    (arithmetic mean of the entropies), adjusted Rand index, purity (fraction of pixels whose true part is the most
    common one of their cluster) and coverage (fraction of pixels with a discovered part). Over all pixels, with "no
    part" as one more cluster: ``nmi_all`` and ``ari_all``.

    Args:
        labels: discovered ids, integer [H, W] or [B, H, W].
        truth: true ids, the same shape.
        ignore: the id that means "no part" in both.

    Returns:
        nmi, ari, purity, coverage, nmi_all, ari_all (NaN if no image has a true part), images (number of images with a
        true part) and skipped (number of images without).

    Raises:
        ValueError: the maps have different shapes, or are not integers [H, W] or [B, H, W].

    Example:
        >>> truth = np.array([[0, 0, 1], [0, 1, -1]])
        >>> round(nmi_ari(5 - truth, truth)["ari"], 6)
        1.0

    Source: scikit-learn's normalized_mutual_info_score and adjusted_rand_score.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found, true = _pixels(labels), _pixels(truth)
    if found.shape != true.shape:
        raise ValueError(f"labels and truth: expected one shape, got {list(labels.shape)} and {list(truth.shape)}.")
    names = ("nmi", "ari", "purity", "coverage", "nmi_all", "ari_all")
    rows = []
    for all_found, all_true in zip(found, true, strict=True):
        on_part = all_true != ignore
        if not on_part.any():
            continue
        a, b = all_found[on_part], all_true[on_part]
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
        raise ValueError(f"An id map is {array.dtype} {list(array.shape)}: give integers [H, W] or [B, H, W].")
    return array.reshape(len(array) if array.ndim == 3 else 1, -1).astype(np.int64)


def _purity(found: np.ndarray, true: np.ndarray) -> float:
    _, a = np.unique(found, return_inverse=True)
    _, b = np.unique(true, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    return float(table.max(axis=1).sum() / len(a))
