"""The views of an image that a data loader delivers, batches of them, and id maps cropped like their view."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD, InputStats, Triple
from fgfast.data.transforms import Transform
from fgfast.tensors import shape_error, values_checked

T = TypeVar("T", bound=Transform)


@dataclass(frozen=True)
class Crop:
    """One random view of an image: a window, resized and perhaps flipped, and random changes of its pixels.

    The order is fixed: window, ``TrimBorder``, flip, ``PatchSwap``, ``BlockShuffle``, ``Holes``, ``PasteOnWhite``,
    ``Gamma``, brightness, contrast, saturation, hue, grey, blur, solarise, normalise. The resize is antialiased; its
    interpolation and the normalisation are those of the ``ViewSpec``. An id map undergoes the same window, flip and
    moves as its view.

    Args:
        size: side of the square view in pixels, >= 1.
        scale: range of the fraction of the image's area that the window covers, in (0, 1]; None takes the full image,
            resized to the square without keeping its aspect ratio.
        ratio: range of the window's width / height, drawn uniformly in the logarithm.
        flip: probability of a left-right flip.
        jitter: strengths (brightness, contrast, saturation, hue); the first three draw a factor from
            [max(0, 1 - s), 1 + s], hue turns the colour circle by a fraction in [-s, s], s <= 0.5.
        jitter_p: probability that the four colour changes happen at all.
        grayscale: probability of dropping the colour.
        blur: probability of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels of the view.
        solarize: probability of inverting every value from 128 up.
        transforms: further changes from ``fgfast.data.transforms``, at most one of each class; their order has no
            effect.

    Raises:
        ValueError: a probability outside [0, 1], an empty range, or a transform that does not fit the size; the
            message names the field.

    Example:
        >>> from fgfast.data.transforms import Holes, PatchSwap
        >>> Crop(size=32, blur=1.0, transforms=(PatchSwap(0.2), Holes((5, 20)))).size
        32
    """

    size: int = 64
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that no view can have."""
        if self.size < 1:
            raise ValueError(f"Crop.size is {self.size}: give a side of at least 1 pixel.")
        for name in ("flip", "jitter_p", "grayscale", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Crop.{name} is {getattr(self, name)}: give a probability in [0, 1].")
        for name, top in {"scale": 1, "ratio": float("inf"), "blur_sigma": float("inf")}.items():
            low, high = getattr(self, name) or (1, 1)
            if not 0 < low <= high <= top:
                raise ValueError(f"Crop.{name} is ({low}, {high}): give a range with 0 < low <= high <= {top:g}.")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"Crop.jitter is {self.jitter}: give four strengths >= 0, the last (hue) at most 0.5.")
        for transform in self.transforms:
            transform.check(self.size)
        if len({type(transform) for transform in self.transforms}) < len(self.transforms):
            raise ValueError("Crop.transforms holds two of one class: give at most one of each.")

    def find(self, kind: type[T]) -> T | None:
        """The transform of a class, if the crop has it."""
        return next((transform for transform in self.transforms if isinstance(transform, kind)), None)

    def with_color(self, strength: float) -> Crop:
        """The same view with weaker colour changes: see :meth:`ViewSpec.with_color`."""
        brightness, contrast, saturation, hue = (strength * s for s in self.jitter)
        return replace(
            self, jitter=(brightness, contrast, saturation, hue), grayscale=strength * self.grayscale,
            solarize=strength * self.solarize,
        )  # fmt: skip

    @property
    def moves(self) -> bool:
        """Whether pixels change places within the view, so that no box describes it."""
        return any(transform.moves for transform in self.transforms)


@dataclass(frozen=True)
class Patch:
    """A square window of an image at its original resolution, with a downscaled copy of it.

    All positions inside the image are equally likely. The copy is computed from the window only: bicubic (a = -1/2)
    with antialiasing, rounded to 8 bits.

    Args:
        size: side of the window in pixels, a multiple of ``reduce``.
        reduce: factor by which the copy is smaller, >= 1.

    Raises:
        ValueError: ``size`` is not a multiple of ``reduce``.

    Example:
        >>> Patch(size=96, reduce=4).size
        96
    """

    size: int = 96
    reduce: int = 4

    def __post_init__(self) -> None:
        """Refuse a window that cannot be reduced."""
        if self.reduce < 1 or self.size < self.reduce or self.size % self.reduce:
            raise ValueError(f"Patch.size is {self.size}: give a multiple of Patch.reduce, {self.reduce}.")


@dataclass(frozen=True)
class ViewSpec:
    """The content of the batches of a loader; a method's ``views()`` returns one.

    Args:
        crops: the random views, each drawn independently.
        masks: deliver the id map of each crop, from a folder of maps (same window, flip and moves, nearest neighbour).
        whole: side of an unaugmented view of the full image, resized to a square without keeping its aspect ratio;
            None for none.
        whole_masks: deliver the id map of the full image too, at that side.
        center: take a centred square of this fraction of the short side as the unaugmented view instead; None takes
            the full image.
        mean: mean of each channel for values in [0, 1].
        std: standard deviation of each channel for values in [0, 1].
        patch: a window at the original resolution and its downscaled copy; None for none.
        interpolation: how the crops and the unaugmented view are resized, "bilinear" or "bicubic".

    Raises:
        ValueError: nothing to deliver, ``whole_masks`` or ``center`` without ``whole``, or statistics that
            :meth:`InputStats.check` refuses.

    Example:
        >>> ViewSpec(crops=(Crop(), Crop(solarize=0.2)), masks=True).needs_maps
        True
    """

    crops: tuple[Crop, ...] = ()
    masks: bool = False
    whole: int | None = None
    whole_masks: bool = False
    center: float | None = None
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    patch: Patch | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Refuse a specification that delivers nothing or contradicts itself."""
        if not self.crops and self.whole is None and self.patch is None:
            raise ValueError("ViewSpec delivers nothing: give at least one crop, a side for whole, or a patch.")
        if self.whole is None and (self.whole_masks or self.center is not None):
            raise ValueError(
                "ViewSpec.whole_masks and ViewSpec.center describe the unaugmented view: set whole to its side."
            )
        if self.whole is not None and self.whole < 1:
            raise ValueError(f"ViewSpec.whole is {self.whole}: give a side of at least 1 pixel.")
        if self.center is not None and not 0 < self.center <= 1:
            raise ValueError(f"ViewSpec.center is {self.center}: give a fraction in (0, 1].")
        if self.masks and not self.crops:
            raise ValueError("ViewSpec.masks asks for id maps of crops: give at least one crop.")
        try:
            InputStats(self.mean, self.std, self.interpolation).check()
        except ValueError as error:
            raise ValueError(f"ViewSpec.{error}") from None

    def with_color(self, strength: float) -> ViewSpec:
        """The same views with weaker colour changes.

        Args:
            strength: factor in [0, 1] of the strengths of jitter and of the probabilities of grey and of solarise.

        Example:
            >>> ViewSpec(crops=(Crop(jitter=(0.4, 0.4, 0.2, 0.1), grayscale=0.2),)).with_color(0.5).crops[0].jitter
            (0.2, 0.2, 0.1, 0.05)
        """
        if strength == 1:
            return self
        return replace(self, crops=tuple(crop.with_color(strength) for crop in self.crops))

    def with_stats(self, stats: InputStats) -> ViewSpec:
        """The same views, resized and normalised for a network with these statistics.

        Example:
            >>> ViewSpec(whole=8).with_stats(InputStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")).mean
            (0.5, 0.5, 0.5)
        """
        return replace(self, **stats._asdict())

    @property
    def without_box(self) -> list[int]:
        """Indices of the crops whose pixels change places, so that no box describes them."""
        return [v for v, crop in enumerate(self.crops) if crop.moves]

    @property
    def needs_maps(self) -> bool:
        """Whether a maps folder must be given."""
        return self.masks or self.whole_masks


@dataclass
class Batch:
    """One batch of B images in V views.

    Args:
        views: V tensors [B, 3, S, S], float32, normalised, channels_last in memory.
        boxes: float32 [B, V, 5]: window (y0, x0, h, w) in [0, 1] of the upright image, then 1 where flipped; NaN
            for a view whose pixels change places (``Crop.moves``).
        labels: V id maps int64 [B, S, S], -1 = absent; empty without maps.
        whole: the unaugmented view, float32 [B, 3, W, W], or None.
        whole_labels: its id map, int64 [B, W, W], or None.
        target: class, int64 [B].
        index: position in the image set, int64 [B].
        valid: bool [B]; False marks padding, which losses and scores leave out.
        patch: windows at the original resolution, float32 [B, 3, P, P] in [0, 1], not normalised, or None.
        reduced: their downscaled copies, float32 [B, 3, P / reduce, P / reduce] in [0, 1], or None.

    Example:
        >>> batch = Batch(target=torch.zeros(2, dtype=torch.int64))
        >>> len(batch), len(batch.to("cpu"))
        (2, 2)
    """

    views: list[Tensor] = field(default_factory=list)
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 5))
    labels: list[Tensor] = field(default_factory=list)
    whole: Tensor | None = None
    whole_labels: Tensor | None = None
    target: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    valid: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    patch: Tensor | None = None
    reduced: Tensor | None = None

    def __len__(self) -> int:
        """B, padding included."""
        return len(self.target)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch on ``device``; tensors already there are not copied."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            return [move(item) for item in value] if isinstance(value, list) else value

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


def warp_labels(labels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop the id map of the full image to the window of a view, by nearest neighbour.

    Output cell (i, j) takes the map at row floor((y0 + (i + 0.5) / size * h) * H) and column
    floor((x0 + (j' + 0.5) / size * w) * W), j' = size - 1 - j where the view is flipped. There is no interpolation and
    no device sync.

    Args:
        labels: id map of the full image, [B, H, W], any integer type; the result has the same.
        boxes: windows, float [B, 5] as in ``Batch.boxes[:, v]``.
        size: side of the view, >= 1.

    Returns:
        [B, size, size].

    Raises:
        ValueError: wrong shapes, or boxes with NaN, of views whose pixels change places: take ``Batch.labels`` for
            those. On a GPU, where the check would be a device sync, the result is -1 there.

    Example:
        >>> ids = torch.arange(16).reshape(1, 4, 4)
        >>> warp_labels(ids, torch.tensor([[0.0, 0.5, 0.5, 0.5, 1.0]]), 2).tolist()
        [[[3, 2], [7, 6]]]
    """
    if labels.ndim != 3:
        raise shape_error("labels", "[B, H, W]", labels)
    if boxes.shape != (labels.shape[0], 5):
        raise shape_error("boxes", f"[{labels.shape[0]}, 5]", boxes)
    if values_checked(boxes) and bool(boxes.isnan().any()):
        raise ValueError(
            "boxes holds NaN, of a view whose pixels change places: no window describes it, take Batch.labels."
        )
    batch, height, width = labels.shape
    step = (torch.arange(size, device=labels.device, dtype=torch.float32) + 0.5) / size  # [S]
    box = boxes.to(device=labels.device, dtype=torch.float32)
    across = torch.where(box[:, 4:] > 0.5, 1 - step, step)  # [B, S]
    rows = ((box[:, 0:1] + step * box[:, 2:3]) * height).long().clamp_(0, height - 1)  # [B, S]
    columns = ((box[:, 1:2] + across * box[:, 3:4]) * width).long().clamp_(0, width - 1)  # [B, S]
    flat = rows[:, :, None] * width + columns[:, None, :]  # [B, S, S]
    warped = labels.flatten(1).gather(1, flat.flatten(1)).reshape(batch, size, size)
    absent = torch.full((), -1, device=labels.device).to(labels.dtype)
    return torch.where(box[:, :1, None].isnan(), absent, warped)
