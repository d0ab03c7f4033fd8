"""What a data pipeline must deliver: the crops of one image, a batch of them, and id maps that follow their crop."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD
from fgfast.tensors import values_checked


@dataclass(frozen=True)
class Crop:
    """One random view of an image: a window, a flip, pixels that move or go, and changes of colour.

    The order is fixed: window, border and flip, swap, blocks, holes, paste, gamma, brightness, contrast, saturation,
    hue, grey, blur, solarise, normalise. The resize is bilinear with antialiasing (torchvision v2's default; the
    PARTICLE release used bicubic). Lengths are shares of the view's side, rounded to pixels, so that a setting given
    for 512 pixels works at any size. An id map moves with its view and is -1 in holes and around a pasted region;
    the box of a view whose pixels move is NaN, as no window describes it.

    Args:
        size: side of the square view in pixels, >= 1.
        scale: range of the share of the image's area that the window covers, in (0, 1]; None takes the whole
            image, squashed to the square.
        ratio: range of the window's width / height, drawn uniformly in the logarithm.
        flip: probability of a left-right flip.
        jitter: strengths (brightness, contrast, saturation, hue); the first three draw a factor from
            [max(0, 1 - s), 1 + s], hue turns the colour circle by a share in [-s, s], s <= 0.5.
        jitter_p: probability that the four colour changes happen at all.
        grayscale: probability of dropping the colour.
        blur: probability of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels of the view.
        solarize: probability of inverting every value from 128 up.
        border: share of the window that is cut off at each of its sides, in [0, 0.5).
        gamma: range of the exponent g of x^g, x in [0, 1], drawn uniformly; None leaves it out.
        holes: range of the number of square holes, drawn uniformly; they are black and may overlap.
        hole_size: range of their sides as shares of the view, in (0, 1]: uniform over whole pixels, at least one.
        swap: side, as a share in [0, 0.5], of two patches that change places, one of the upper and one of the lower
            half; 0 leaves it out.
        grid: blocks a side that change places; where it does not divide the size, blocks differ by a pixel and are
            stretched by nearest neighbour. 0 leaves it out.
        reach: the farthest that a block moves along each axis, in places: first the blocks of each row, then those of
            each column are sorted by i + u, u uniform in +-(reach + 1) / 2 (DCL, whose k is half of reach + 1).
            0: every order of all blocks is as likely as any other.
        paste: range of the sides, as shares in (0, 1], of a region that is pasted at the centre of a white view: its
            height and width are uniform over whole pixels, its own centre is that of the image's edges (the mean
            place of the steps between neighbouring pixels, weighted by their heights). None leaves it out.

    Raises:
        ValueError: a probability outside [0, 1] or an empty range; the message names the field.

    Example:
        >>> Crop(size=32, blur=1.0).size
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
    border: float = 0.0
    gamma: tuple[float, float] | None = None
    holes: tuple[int, int] = (0, 0)
    hole_size: tuple[float, float] = (10 / 512, 25 / 512)
    swap: float = 0.0
    grid: int = 0
    reach: int = 0
    paste: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no view can have."""
        if self.size < 1:
            raise ValueError(f"Crop.size is {self.size}: give a side of at least 1 pixel.")
        for name in ("flip", "jitter_p", "grayscale", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Crop.{name} is {getattr(self, name)}: give a probability in [0, 1].")
        inf = float("inf")
        tops = {"scale": 1, "ratio": inf, "blur_sigma": inf, "gamma": inf, "hole_size": 1, "paste": 1}
        for name, top in tops.items():
            low, high = getattr(self, name) or (1, 1)
            if not 0 < low <= high <= top:
                raise ValueError(f"Crop.{name} is ({low}, {high}): give a range with 0 < low <= high <= {top:g}.")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"Crop.jitter is {self.jitter}: give four strengths >= 0, the last (hue) at most 0.5.")
        if not 0 <= self.border < 0.5:
            raise ValueError(f"Crop.border is {self.border}: give a share in [0, 0.5).")
        if not 0 <= self.holes[0] <= self.holes[1]:
            raise ValueError(f"Crop.holes is {self.holes}: give a range with 0 <= low <= high.")
        if self.swap and not 1 <= self.pixels(self.swap) <= self.size // 2:
            raise ValueError(
                f"Crop.swap is {self.swap} on a view of {self.size} pixels: "
                f"give a share for 1 to {self.size // 2} pixels, so that each half holds a patch."
            )
        if not 0 <= self.grid <= self.size:
            raise ValueError(
                f"Crop.grid is {self.grid} on a view of {self.size} pixels: give 0 to {self.size} blocks a side."
            )
        if not 0 <= self.reach < max(1, self.grid):
            raise ValueError(
                f"Crop.reach is {self.reach} with {self.grid} blocks a side: give less than these, or 0 for all orders."
            )

    def pixels(self, share: float) -> int:
        """A share of the view's side in whole pixels."""
        return round(share * self.size)

    @property
    def moves(self) -> bool:
        """Whether pixels change places within the view, so that no box describes it."""
        return bool(self.swap or self.grid or self.paste)


@dataclass(frozen=True)
class Patch:
    """A square window of an image's own pixels, never resized, with a reduced copy of it.

    The window lies anywhere in the image with equal chance. The copy is made of the window alone: bicubic (a = -1/2)
    with antialiasing, rounded to 8 bits.

    Args:
        size: side of the window in pixels, a multiple of ``reduce``.
        reduce: factor by which the copy is smaller, >= 1.

    Raises:
        ValueError: the sizes do not fit together.

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
    """Everything that one batch must hold; a method's ``views()`` returns one.

    Args:
        crops: the random views, each drawn independently.
        masks: id maps of a maps folder travel with each crop (same window, flip and moves, nearest).
        whole: side of an unaugmented view of the whole image, squashed to a square; None for none.
        whole_masks: the id map of the whole image too, at that side.
        center: the whole view is a centred square of this share of the short side instead; None squashes.
        mean: mean of each channel for values in [0, 1].
        std: standard deviation of each channel for values in [0, 1].
        patch: a window of the image's own pixels and its reduced copy; None for none.

    Raises:
        ValueError: nothing to deliver, or ``whole_masks`` or ``center`` without ``whole``.

    Example:
        >>> ViewSpec(crops=(Crop(), Crop(solarize=0.2)), masks=True).needs_maps
        True
    """

    crops: tuple[Crop, ...] = ()
    masks: bool = False
    whole: int | None = None
    whole_masks: bool = False
    center: float | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    patch: Patch | None = None

    def __post_init__(self) -> None:
        """Refuse a specification that delivers nothing or contradicts itself."""
        if not self.crops and self.whole is None and self.patch is None:
            raise ValueError("ViewSpec delivers nothing: give at least one crop, a side for whole, or a patch.")
        if self.whole is None and (self.whole_masks or self.center is not None):
            raise ValueError("ViewSpec.whole_masks and ViewSpec.center describe the whole view: give whole a side.")
        if self.whole is not None and self.whole < 1:
            raise ValueError(f"ViewSpec.whole is {self.whole}: give a side of at least 1 pixel.")
        if self.center is not None and not 0 < self.center <= 1:
            raise ValueError(f"ViewSpec.center is {self.center}: give a share in (0, 1].")
        if self.masks and not self.crops:
            raise ValueError("ViewSpec.masks asks for id maps of crops: give at least one crop.")

    @property
    def moved(self) -> list[int]:
        """The numbers of the crops whose pixels change places."""
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
        whole: the unaugmented image, float32 [B, 3, W, W], or None.
        whole_labels: its id map, int64 [B, W, W], or None.
        target: class, int64 [B].
        index: record number in the image set, int64 [B].
        valid: bool [B]; False marks padding, which no loss and no score may count.
        patch: windows of the images' own pixels, float32 [B, 3, P, P] in [0, 1], not normalised, or None.
        reduced: their reduced copies, float32 [B, 3, P / reduce, P / reduce] in [0, 1], or None.

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
        """The batch on ``device``; tensors that are there already are not copied."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            return [move(item) for item in value] if isinstance(value, list) else value

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


def warp_labels(labels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut the window of a view out of the id map of the whole image, by nearest neighbour.

    Output cell (i, j) takes the map at row floor((y0 + (i + 0.5) / size * h) * H) and column
    floor((x0 + (j' + 0.5) / size * w) * W), j' = size - 1 - j where the view is flipped. Nothing is interpolated, and
    nothing waits for the device.

    Args:
        labels: id map of the whole image, [B, H, W], any integer type; the result has the same.
        boxes: windows, float [B, 5] as in ``Batch.boxes[:, v]``.
        size: side of the view, >= 1.

    Returns:
        [B, size, size].

    Raises:
        ValueError: shapes that do not belong together, or boxes with NaN, of views whose pixels change places: take
            ``Batch.labels`` for those (on a GPU, where looking would wait, the result is -1 there).

    Example:
        >>> ids = torch.arange(16).reshape(1, 4, 4)
        >>> warp_labels(ids, torch.tensor([[0.0, 0.5, 0.5, 0.5, 1.0]]), 2).tolist()
        [[[3, 2], [7, 6]]]
    """
    if labels.ndim != 3 or boxes.shape != (labels.shape[0], 5):
        raise ValueError(
            f"warp_labels got labels {tuple(labels.shape)} and boxes {tuple(boxes.shape)}: give [B, H, W] and [B, 5]."
        )
    if values_checked(boxes) and bool(boxes.isnan().any()):
        raise ValueError(
            "warp_labels got a box of a view whose pixels change places: no window describes it, take Batch.labels."
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
