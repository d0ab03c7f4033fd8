"""Scores of id maps against annotated key points and boxes, for sets without part masks."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import check_images
from fgfast.data.maps import ABSENT, read_map, read_maps_info
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.parts.clustering import ClusteringConfig
from fgfast.parts.discover import DiscoveryConfig, discover


@dataclass(frozen=True)
class KeypointOptions:
    """Options of ``parts`` on a set with key points and no part masks."""

    maps: str = ""
    """Folder of id maps of the training and test images, with the same ids in every image; by default those that the
    clustering of the run gives with shared ids."""
    background: int = -1
    """Id in --maps that is the background, such as 0 in maps of a ViT; beside pixels without an id."""


class Located(NamedTuple):
    """What the id maps of N images say at P key points and of K parts; coordinates in pixels of the upright images.

    Args:
        ids: part under each key point, int64 [N, P]; -1 where there is none.
        visible: visible key points, bool [N, P].
        points: (x, y) of the key points, float64 [N, P, 2].
        centres: mean (x, y) of the pixels of each part, float64 [N, K, 2]; NaN for a part that the image lacks.
        boxes: (x, y, w, h), float64 [N, 4]; NaN for an image without a box.
        overlap: number of map pixels with a part inside the box, and with a part or in the box, float64 [N, 2]; NaN
            without a box.
    """

    ids: np.ndarray
    visible: np.ndarray
    points: np.ndarray
    centres: np.ndarray
    boxes: np.ndarray
    overlap: np.ndarray


def locate(images: ImageSet, maps: Path, background: int = -1) -> Located:
    """Read the id maps of a set at its key points.

    A map shows the full image without its banner, resized to the map's height and width; key points and boxes are
    scaled alike. Images that cannot be read are left out.

    Args:
        images: a set with key points.
        maps: folder of id maps.
        background: id that counts as no part.

    Raises:
        UserError: an image has no map.
    """
    assert images.keypoints is not None  # checked before
    n_parts = int(read_maps_info(maps)["n_parts"])
    records = check_images(images, full=False)
    found = []
    for row, size in zip(records.index, records.sizes, strict=True):
        ids = read_map(maps, images.paths[row]).astype(np.int64)
        ids[(ids == ABSENT) | (ids == background)] = -1
        box = np.full(4, np.nan) if images.boxes is None else images.boxes[row].astype(np.float64)
        points = images.keypoints[row, :, :2].astype(np.float64)
        found.append((_under(ids, points, size), points, *_shape(ids, n_parts, box, size), box))
    ids, points, centres, overlap, boxes = (np.stack(values) for values in zip(*found, strict=True))
    return Located(ids, images.keypoints[records.index, :, 2] > 0, points, centres, boxes, overlap)


def _under(ids: np.ndarray, points: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The ids int64 [P] of a map [h, w] at (x, y) [P, 2] of an image of size (H, W); of the border for outer ones."""
    (height, width), (h, w) = size, ids.shape
    columns = np.floor(points[:, 0] / width * w).clip(0, w - 1).astype(np.int64)
    rows = np.floor(points[:, 1] / height * h).clip(0, h - 1).astype(np.int64)
    return ids[rows, columns]


def _shape(ids: np.ndarray, n_parts: int, box: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The centre of each part [K, 2] and the overlap with the box [2] of one map, as in ``Located``."""
    (height, width), (h, w) = size, ids.shape
    x, y = np.broadcast_arrays((np.arange(w) + 0.5) * width / w, ((np.arange(h) + 0.5) * height / h)[:, None])
    part = ids >= 0
    area, *sums = (np.bincount(ids[part], v[part], minlength=n_parts) for v in (np.ones_like(x), x, y))
    centres = np.stack(sums, 1) / np.where(area > 0, area, np.nan)[:, None]
    left, top, box_width, box_height = box
    inside = (x >= left) & (x < left + box_width) & (y >= top) & (y < top + box_height)
    overlap = np.array([(part & inside).sum(), (part | inside).sum()], np.float64)
    return centres, np.where(np.isnan(box).any(), np.nan, overlap)


def nmi_ari_under(located: Located) -> tuple[float, float]:
    """NMI and ARI between key points and the parts under them, over every visible key point of the set at once.

    Each visible key point is one sample: its number against the id under it, "no part" being one more id.

    Args:
        located: at least one key point is visible.

    Returns:
        Normalised mutual information (arithmetic mean of the entropies) and adjusted Rand index.

    Source: van der Klis et al., "PDiscoNet", ICCV 2023, and Aniraj et al., "PDiscoFormer", ECCV 2024, in whose release
    (engine/eval_interpretability_nmi_ari_keypoint.py) the id is the largest of the upsampled part maps; here it is that
    of the map's pixel.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    truth = np.nonzero(located.visible)[1]
    found = located.ids[located.visible]
    return float(normalized_mutual_info_score(truth, found)), float(adjusted_rand_score(truth, found))


def regression_error(fit: Located, test: Located) -> float | None:
    """Mean distance between key points and their linear regression from the centres of the parts, in units of the box.

    Coordinates are (x - left) / width and (y - top) / height of the box. For each key point, least squares of its
    position on the 2K coordinates of the centres, standardised, over the images of ``fit`` that show it; a part that an
    image lacks stands at its mean. The distances of all visible key points of ``test`` are averaged.

    Args:
        fit: training images.
        test: test images.

    Returns:
        The mean distance; None if no visible key point of ``test`` lies in an image with a box and is visible in one of
        ``fit`` with a box.

    Source: Huang and Li, "Interpretable and Accurate Fine-grained Recognition via Region Grouping", CVPR 2020
    (eval_interp.py of its release), as in PDiscoFormer's, which reports per cent. There soft maps give every part a
    centre.
    """
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y, shown), (test_x, test_y, test_shown) = (_in_box(located) for located in (fit, test))
    distances = []
    for k in range(shown.shape[1]):
        rows, scored = shown[:, k], test_shown[:, k]
        if not rows.any() or not scored.any():
            continue
        model = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler(), LinearRegression())
        predicted = model.fit(x[rows], y[rows, k]).predict(test_x[scored])
        distances.append(np.linalg.norm(predicted - test_y[scored, k], axis=1))
    return float(np.concatenate(distances).mean()) if distances else None


def _in_box(located: Located) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres [N, 2 K] and key points [N, P, 2] in units of the box, and which of the points are visible in a box."""
    corner, size = located.boxes[:, None, :2], located.boxes[:, None, 2:]
    boxed = np.all(located.boxes[:, 2:] > 0, axis=1)  # False for NaN
    size = np.where(size > 0, size, np.nan)
    centres, points = ((v - corner) / size for v in (located.centres, located.points))
    return centres.reshape(len(centres), -1), points, located.visible & boxed[:, None]


def box_iou(located: Located) -> float | None:
    """Intersection over union of all parts together with the box, summed over the images with a box; None without any.

    Where every pixel belongs to a part it is the fraction of the pixels in boxes, so give maps with a background.

    Source: the foreground IoU of PDiscoFormer's release (engine/eval_fg_bg.py), which has masks in place of boxes.
    """
    boxed = ~np.isnan(located.overlap[:, 0])
    inside, union = located.overlap[boxed].sum(0)
    return float(inside / union) if union else None


def discover_shared(encoder: Backbone, config: TrainConfig, images: ImageSet, out: Path) -> Path:
    """Id maps of a set with shared ids, by the clustering of a run, or the default one of a method without parts.

    The full image is resized to a square, as in training: to ``discover_size`` of the run or twice its training size.

    Args:
        encoder: the network.
        config: options of the run.
        images: the images.
        out: folder of maps; a call that is interrupted continues there.
    """
    clustering = getattr(config, "clustering", ClusteringConfig(getattr(config, "n_parts", 15)))
    discovery = DiscoveryConfig(
        image_size=getattr(config, "discover_size", 0) or 2 * config.size, map_size=getattr(config, "map_size", 64),
        run="an evaluation", seed=config.seed, threads=config.threads, loader=config.loader,
        network=f"{config.model} {config.model_args}",
    )  # fmt: skip
    return discover(encoder, images, out, clustering, discovery, shared=True, own=True)


def score_keypoints(fit: ImageSet, test: ImageSet, maps: Path, background: int = -1) -> dict[str, float | int | None]:
    """Scores of the parts of id maps over all test images.

    Args:
        fit: training images, for the regression.
        test: images to score.
        maps: folder with an id map of each.
        background: id that counts as no part.

    Returns:
        nmi and ari (:func:`nmi_ari_under`), keypoint_error (:func:`regression_error`), box_iou (:func:`box_iou`),
        points (number of visible key points) and n (number of images that show one).

    Raises:
        UserError: an image has no map, or no key point of a test image that can be read is visible.
    """
    found = locate(test, maps, background)
    if not found.visible.any():
        raise UserError(f"No key point of the test images of {test.root} that can be read is visible: restore them.")
    nmi, ari = nmi_ari_under(found)
    return {
        "nmi": nmi, "ari": ari, "keypoint_error": regression_error(locate(fit, maps, background), found),
        "box_iou": box_iou(found), "points": int(found.visible.sum()), "n": int(found.visible.any(1).sum()),
    }  # fmt: skip


def check_keypoints(fit: ImageSet, test: ImageSet, data: Path, options: KeypointOptions) -> None:
    """Raise a UserError for sets that cannot be scored, or a folder of maps that cannot be used."""
    for images, name in ((fit, "training"), (test, "test")):
        if images.keypoints is None or not images.keypoints.shape[1]:
            raise UserError(f"{data} has no part masks and no key points: choose another protocol than parts.")
        if not (images.keypoints[..., 2] > 0).any():
            raise UserError(
                f"No key point of any {name} image of {data} is visible: restore the file with the key points, or "
                "choose another protocol than parts."
            )
    if options.maps:
        read_maps_info(Path(options.maps), remedy="give a folder that fgfast discover --ids set has written")
    elif options.background >= 0:
        raise UserError(f"background = {options.background} is an id of given maps: give maps too, or leave it out.")
