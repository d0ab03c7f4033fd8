"""Jigsaw puzzles: which permutation put the tiles of an image where they are?"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fgfast.config import Count, Fraction, Natural, Range, TrainConfig
from fgfast.data.tiles import brighten, cut_tiles, draw_puzzles, join_tiles
from fgfast.errors import UserError
from fgfast.methods.base import Method, Progress, build_encoder
from fgfast.methods.permutations import permutation_set

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec

log = logging.getLogger("fgfast")

CROP_SHARE = 64 / 75  # of a tile's side: the release crops 64 pixels out of 75


@dataclass
class JigsawConfig(TrainConfig):
    """Options of the jigsaw."""

    grid: Count = 3
    """Tiles a side of the puzzle."""
    n_permutations: Annotated[int, Range(2)] = 100
    """Permutations among which the right one is to be told."""
    permutation_rule: Literal["greedy", "pairs"] = "greedy"
    """Far from each other as a set (largest smallest distance), or in pairs as in the release."""
    tile: Natural = 0
    """Side of the random crop inside a tile, pixels; 0 takes 64/75 of the tile (a ViT: whole patches of it)."""
    brightness: Fraction = 0.5
    """Strength of the brightness jitter of each tile: a factor from 1 - s to 1 + s."""
    cells: Natural = 0
    """Cells a side to which the map of a tile is averaged; 0 is 2 where the map has them, and 1 for a ViT (its CLS)."""
    dropout: Fraction = 0.5
    """Dropout before the classifier."""
    centre: Fraction = 0.0
    """Share of the short side that a fixed centre square takes; 0 takes random crops and flips instead."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the released settings of the authors."""


class Jigsaw(Method):
    """The tiles of an image in a permuted order; a siamese encoder sees each alone, a classifier tells the order.

    loss = CE( W dropout([f(t_1), ..., f(t_T)]), number of the permutation ),   t_p = the tile on place p,

    T = grid^2, f = the encoder, shared by all tiles. Every tile is cropped at a random place and changed in brightness
    by itself, so that neither edges that go on in the neighbour nor a common light tell where it belongs. A step costs
    T (tile / size)^2 passes an image: tiles count by their area. In evaluation the encoder sees whole images of
    ``size``; a ViT is built for those, and its position embeddings are resized to the patches of a tile in training.
    Puzzles are drawn from (seed, step, rank), on held-out images from the seed and the image's number. "accuracy"
    is the share of permutations told right: of the step, and as held_out_accuracy (no dropout) beside the online kNN.

    Defaults that are ours: random crops and flips of the image instead of its centre; normalised values instead of
    [0, 1]; uniform draws among all permutations, where the release goes through ten at a time in ten passes that it
    calls an epoch (hence 150 epochs in ``--preset paper``, not 15); the permutations of the set are far from each
    other, the release asks this of drawn pairs alone (``--permutation-rule pairs``). Quirks of the release that are
    not reproduced: its dropout stays active in evaluation, a mistake; images are squashed before the centre is
    taken (the preset takes a square of the same share of the short side); the rate falls on plateaus (half a cosine).

    Source: Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", ECCV 2016;
    settings of the release of Al Breiki, Ridzuan, Grandhe, "Self-Supervised Learning for Fine-Grained Image
    Classification", 2021.
    """

    name = "jigsaw"
    Config = JigsawConfig
    held_out = ("accuracy",)
    permutations: Tensor

    def __init__(self, config: JigsawConfig) -> None:
        super().__init__()
        self.config = config
        if config.size < config.grid:
            raise UserError(f"Images of {config.size} pixels have no {config.grid} tiles a side: lower --grid.")
        places = config.grid**2
        rule = config.permutation_rule
        found = permutation_set(config.n_permutations, places, rule=rule, seed=config.seed)
        self.register_buffer("permutations", torch.from_numpy(found))
        self.encoder = build_encoder(config)
        self.side = self._crop_side()
        self.passes_per_image = places * (self.side / config.size) ** 2
        self.cells = config.cells
        width = self._probe().shape[1]
        self.head = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(places * width, config.n_permutations))
        self.step, self.rank = 0, 0

    @classmethod
    def paper(cls, model: str | None) -> JigsawConfig:
        """The released settings: ResNet-18 from scratch, 225 pixels, 75-pixel tiles cropped to 64."""
        return JigsawConfig(
            model=model or "resnet18", preset="paper", size=225, tile=64, grid=3, n_permutations=100,
            permutation_rule="pairs", brightness=0.5, dropout=0.5, centre=225 / 256, optimizer="sgd", lr=1e-2,
            weight_decay=5e-4, warmup=0.0, batch_size=32, epochs=150, clip=4.0, amp="off",
        )  # fmt: skip

    def _crop_side(self) -> int:
        """Side of the crops, fit for the network."""
        c = self.config
        tile = c.size // c.grid
        patch = self.encoder.patch
        side = c.tile or max(1, round(CROP_SHARE * tile)) // patch * patch or patch
        if side > tile or side % patch:
            what = f"in whole patches of {patch} pixels " if patch > 1 else ""
            raise UserError(
                f"--tile {side} does not fit tiles of {tile} pixels {what}({c.size} pixels, {c.grid} a side): "
                "lower --grid or --tile, or raise --size."
            )
        return side

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> None:
        """Warn of maps so small that the last stage starts from one cell, for which a CPU gives wrong gradients."""
        net, on_cpu = self.encoder.net, next(self.parameters()).device.type == "cpu"
        reduction = 1 if self.encoder.is_vit else net.feature_info[-1]["reduction"]
        if on_cpu and self.config.amp == "bf16" and 2 * self.side <= reduction:
            log.warning(
                "Tiles of %d pixels leave the last stage a map of 1 x 1, whose bfloat16 gradients PyTorch was seen to "
                "get wrong on a CPU: give --amp off, or larger tiles.",
                self.side,
            )

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """Features of an empty tile, which show whether the network takes tiles at all; settles ``cells``."""
        blank = torch.zeros(1, 3, self.side, self.side)
        self.encoder.eval()
        try:
            features = self.encoder.features(blank)
            # The patch tokens of a ViT alone would leave its CLS, which is evaluated, without a gradient.
            room = 1 if self.encoder.is_vit else min(features.shape[-2:])
            self.cells = self.cells or min(2, room)
            if self.cells > room:
                raise UserError(f"{self.config.model} gives {room} cells a side, not --cells {self.cells}: lower it.")
            return self.tile_features(blank)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"{self.config.model} takes no tiles of {self.side} pixels ({error}): "
                "raise --size, lower --grid, or choose another --model."
            ) from error
        finally:
            self.encoder.train()

    def tile_features(self, tiles: Tensor) -> Tensor:
        """Features [N, F] of tiles [N, 3, side, side]."""
        features = self.encoder.features(tiles)
        if self.cells == 1:
            return self.encoder.pool(features)
        return nn.functional.adaptive_avg_pool2d(features, self.cells).flatten(1)

    def get_extra_state(self) -> dict[str, int]:
        """The step, from which puzzles are drawn; kept in checkpoints."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take the step from a checkpoint."""
        self.step = state["step"]

    def set_group(self, group: "ProcessGroup | None") -> None:
        """Every rank draws puzzles of its own."""
        super().set_group(group)
        self.rank = 0 if group is None else torch.distributed.get_rank(group)

    def after_step(self, progress: Progress) -> None:
        """The next puzzles."""
        self.step = progress.step

    def views(self) -> "ViewSpec":
        """One crop with flip, or the centre; the colours stay."""
        from fgfast.data.views import Crop, ViewSpec

        c = self.config
        if c.centre:
            return ViewSpec(whole=c.size, center=c.centre)
        return ViewSpec(crops=(Crop(size=c.size, scale=(c.crop_scale, 1.0), jitter_p=0.0),))

    def photographs(self, batch: "Batch") -> Tensor:
        """The uncut images [B, 3, S, S]."""
        if batch.views:
            return batch.views[0]
        assert batch.whole is not None  # views() asks for one of the two
        return batch.whole

    @torch.no_grad()
    def puzzles(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Permuted tiles [B * T, 3, side, side] and the number of each image's permutation [B]."""
        from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD

        c, device = self.config, self.permutations.device
        key = (self.step, self.rank, 0) if self.training else (int(batch.index[0]), 0, 1)
        drawn: Any = draw_puzzles(
            len(self.permutations), c.grid**2, len(batch), c.size // c.grid - self.side,
            (1 - c.brightness, 1 + c.brightness), np.random.default_rng([c.seed, *key, 1]),
        )  # fmt: skip
        label, corner, factor = (torch.from_numpy(x).to(device, non_blocking=True) for x in drawn)
        tiles = cut_tiles(self.photographs(batch), c.grid, self.side, self.permutations[label], corner)
        return brighten(tiles, factor.flatten(), IMAGENET_MEAN, IMAGENET_STD), label

    def logits(self, tiles: Tensor) -> Tensor:
        """Logits [B, n_permutations] of puzzles [B * T, 3, side, side]."""
        return self.head(self.tile_features(tiles).unflatten(0, (-1, self.config.grid**2)).flatten(1)).float()

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Cross-entropy and accuracy over the valid images."""
        tiles, label = self.puzzles(batch)
        logits = self.logits(tiles)
        losses = nn.functional.cross_entropy(logits, label, reduction="none")
        count = batch.valid.sum().clamp(min=1)
        right = ((logits.argmax(1) == label) & batch.valid).sum()
        return {"loss": torch.where(batch.valid, losses, 0).sum() / count, "accuracy": right.detach() / count}

    @torch.no_grad()
    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """Photographs, their tiles as the network gets them, and how it puts them together."""
        from fgfast.data.panels import Panel, to_uint8

        was_training = self.training
        self.eval()
        try:
            tiles, label = self.puzzles(batch)
            found = self.permutations[self.logits(tiles).argmax(1)]
        finally:
            self.train(was_training)
        grid, places = self.config.grid, self.config.grid**2
        as_seen = torch.arange(places, device=found.device).expand(len(found), -1)
        shuffled = join_tiles(tiles, grid, as_seen)
        solved = join_tiles(tiles, grid, found.argsort(1))  # place p holds the tile that was told to come from p
        right = (found == self.permutations[label]).sum(1).tolist()
        rows = [
            [
                Panel(to_uint8(photograph), "photograph"),
                Panel(to_uint8(shuffled[i]), "as the network sees it"),
                Panel(to_uint8(solved[i]), f"put together: {right[i]} of {places} right"),
            ]
            for i, photograph in enumerate(self.photographs(batch)[:8])
        ]
        return {"puzzles": rows}
