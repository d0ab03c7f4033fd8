"""Jigsaw puzzles: predict the permutation of the tiles of an image."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fgfast.config import Count, Fraction, Natural, Range, TrainConfig
from fgfast.data.tiles import brighten, cut_tiles, draw_puzzles, join_tiles
from fgfast.errors import UserError
from fgfast.losses.over_ranks import count_valid, mean_valid, rank_and_world
from fgfast.methods.base import Method, Progress, build_encoder
from fgfast.methods.permutations import permutation_set
from fgfast.models.probe import SizeError, evaluating

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec

log = logging.getLogger("fgfast")

CROP_FRACTION = 64 / 75  # of the side of a tile: the release crops 64 of 75 pixels


@dataclass
class JigsawConfig(TrainConfig):
    """Options of the jigsaw."""

    grid: Count = 3
    """Tiles per side of the puzzle."""
    n_permutations: Annotated[int, Range(2)] = 100
    """Number of permutations, the classes to predict."""
    permutation_rule: Literal["greedy", "pairs"] = "greedy"
    """Choice of permutations: all far from each other (greedy), or far from each other in pairs (as released)."""
    tile: Natural = 0
    """Side of the random crop of a tile in pixels; 0 takes 64/75 of the tile (ViT: the whole patches in that)."""
    brightness: Fraction = 0.5
    """Strength s of the brightness jitter of each tile, a factor from 1 - s to 1 + s."""
    cells: Natural = 0
    """Cells per side to which the feature map of a tile is averaged; 0 takes 2 if it has them, and 1 for a ViT."""
    dropout: Fraction = 0.5
    """Dropout before the classifier."""
    centre: Fraction = 0.0
    """Side of a fixed centre square as a fraction of the short side; 0 takes random crops and flips instead."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings released by the authors."""


class Jigsaw(Method):
    """Permuted tiles of an image: a shared encoder sees each tile separately, a classifier predicts the permutation.

    loss = CE( W dropout([f(t_1), ..., f(t_T)]), index of the permutation ),   t_p = the tile at position p,

    T = grid^2, f = the encoder, shared by all tiles. Each tile is cropped and changed in brightness independently;
    otherwise edges that continue in a neighbour, or a common brightness, would reveal the order. A step costs
    T (tile / size)^2 passes per image, as tiles count by their area. In evaluation the encoder sees full images of
    ``size``; a ViT is built for those, and its position embeddings are resized to the patches of a tile in training.
    Puzzles are drawn from (seed, step) for the images of all ranks, and for held-out images from the seed and the
    position of the image in the set. "accuracy" is the fraction of permutations predicted correctly, in the step and,
    as held_out_accuracy (without dropout), on held-out images.

    Different defaults here: random crops and flips of the image, not its centre; normalised values, not [0, 1];
    permutations drawn uniformly, where the release goes through ten at a time in ten passes that it calls an epoch
    (hence 150 epochs in ``--preset paper``, not 15); all permutations are far from each other, which the release
    requires only of pairs (``--permutation-rule pairs``). Not reproduced from the release: dropout that stays active in
    evaluation, a mistake; images resized to a square before the centre is taken (the preset takes a square of the same
    fraction of the short side); a learning rate that falls on plateaus (here as half a cosine).

    Source: Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", ECCV 2016;
    settings of the release of Al Breiki, Ridzuan, Grandhe, "Self-Supervised Learning for Fine-Grained Image
    Classification", 2021.
    """

    name = "jigsaw"
    adds_up = True
    Config = JigsawConfig
    config: JigsawConfig
    held_out = ("accuracy",)
    permutations: Tensor

    def __init__(self, config: JigsawConfig) -> None:
        super().__init__()
        self.config = config
        if config.size < config.grid:
            raise UserError(f"Images of {config.size} pixels have no {config.grid} tiles per side: lower --grid.")
        places = config.grid**2
        rule = config.permutation_rule
        permutations = permutation_set(config.n_permutations, places, rule=rule, seed=config.seed)
        self.register_buffer("permutations", torch.from_numpy(permutations))
        self.encoder = build_encoder(config)
        self.side = self._crop_side()
        self.passes_per_image = places * (self.side / config.size) ** 2
        self.cells = config.cells
        width = self._try_tile().shape[1]
        self.head = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(places * width, config.n_permutations))
        self.step = 0

    @classmethod
    def paper(cls, model: str | None) -> JigsawConfig:
        """The released settings: ResNet-18 from scratch, 225 pixels, 75-pixel tiles cropped to 64."""
        return JigsawConfig(
            model=model or "resnet18", preset="paper", size=225, tile=64, grid=3, n_permutations=100,
            permutation_rule="pairs", brightness=0.5, dropout=0.5, centre=225 / 256, optimizer="sgd", lr=1e-2,
            weight_decay=5e-4, warmup=0.0, batch_size=32, epochs=150, clip=4.0, amp="off",
        )  # fmt: skip

    def _crop_side(self) -> int:
        """Side of the crops of tiles; whole patches for a ViT."""
        c = self.config
        tile = c.size // c.grid
        patch = self.encoder.patch
        side = c.tile or max(1, round(CROP_FRACTION * tile)) // patch * patch or patch
        if side > tile or side % patch:
            patches = f"in whole patches of {patch} pixels " if patch > 1 else ""
            raise UserError(
                f"--tile {side} does not fit tiles of {tile} pixels {patches}({c.size} pixels, {c.grid} per side): "
                "lower --grid or --tile, or raise --size."
            )
        return side

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> None:
        """Warn if the last stage starts from a single cell, for which bfloat16 on a CPU gives wrong gradients."""
        net, on_cpu = self.encoder.net, next(self.parameters()).device.type == "cpu"
        reduction = 1 if self.encoder.is_vit else net.feature_info[-1]["reduction"]
        if on_cpu and self.config.amp == "bf16" and 2 * self.side <= reduction and rank_and_world(self.group)[0] == 0:
            log.warning(
                "Tiles of %d pixels leave the last stage a map of 1 x 1, for which PyTorch was seen to give wrong "
                "bfloat16 gradients on a CPU: give --amp off, or larger tiles.",
                self.side,
            )

    def _try_tile(self) -> Tensor:
        """Features of a blank tile, after ``cells`` is set; raises a UserError if the network does not take tiles."""
        blank = torch.zeros(1, 3, self.side, self.side)
        try:
            with evaluating(self.encoder):
                features = self.encoder.features(blank)
                # A ViT takes its CLS token: with patch tokens only, the CLS that is evaluated would get no gradient.
                most = 1 if self.encoder.is_vit else self.encoder.to_map(features, (self.side, self.side)).shape[-1]
                self.cells = self.cells or min(2, most)
                if self.cells > most:
                    raise UserError(
                        f"--cells is {self.cells}: {self.config.model} has {most} cells per side, lower it."
                    )
                return self.tile_features(blank)
        except SizeError as error:
            raise UserError(
                f"{self.config.model} does not take tiles of {self.side} pixels ({error.reason}): "
                "raise --size, lower --grid, or choose another --model."
            ) from error

    def tile_features(self, tiles: Tensor) -> Tensor:
        """Features [N, F] of tiles [N, 3, side, side]."""
        features = self.encoder.features(tiles)
        if self.cells == 1:
            return self.encoder.pool(features)
        return nn.functional.adaptive_avg_pool2d(features, self.cells).flatten(1)

    def get_extra_state(self) -> dict[str, int]:
        """The step, from which puzzles are drawn; stored in checkpoints."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the step from a checkpoint."""
        self.step = state["step"]

    def after_step(self, progress: Progress) -> None:
        """Count the step, from which puzzles are drawn."""
        self.step = progress.step

    def views(self) -> "ViewSpec":
        """One crop with flip, or the centre; no colour changes."""
        from fgfast.data.views import Crop, ViewSpec

        c = self.config
        if c.centre:
            return ViewSpec(whole=c.size, center=c.centre)
        return ViewSpec(crops=(Crop(size=c.size, scale=(c.crop_scale, 1.0), jitter_p=0.0),))

    def uncut_images(self, batch: "Batch") -> Tensor:
        """The images before they are cut into tiles, [B, 3, S, S]."""
        if batch.views:
            return batch.views[0]
        assert batch.whole is not None  # views() asks for one of the two
        return batch.whole

    def _draw(self, n: int, *key: int) -> tuple[np.ndarray, ...]:
        """Random numbers of the puzzles of ``n`` images."""
        c = self.config
        return draw_puzzles(
            len(self.permutations), c.grid**2, n, c.size // c.grid - self.side, (1 - c.brightness, 1 + c.brightness),
            np.random.default_rng([c.seed, *key, 1]),
        )  # fmt: skip

    @torch.no_grad()
    def puzzles(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Permuted tiles [B * T, 3, side, side] and the index of the permutation of each image [B]."""
        c, device = self.config, self.permutations.device
        if self.training:
            rank, world = rank_and_world(self.group)
            draws = tuple(x[rank::world] for x in self._draw(len(batch) * world, self.step, self.part, 0))
        else:
            of_images = [self._draw(1, i, 0, 1) for i in batch.index.tolist()]
            draws = tuple(map(np.concatenate, zip(*of_images, strict=True)))
        label, corner, factor = (torch.from_numpy(x).to(device, non_blocking=True) for x in draws)
        tiles = cut_tiles(self.uncut_images(batch), c.grid, self.side, self.permutations[label], corner)
        return brighten(tiles, factor.flatten(), self.encoder.stats.mean, self.encoder.stats.std), label

    def logits(self, tiles: Tensor) -> Tensor:
        """Logits [B, n_permutations] of puzzles [B * T, 3, side, side]."""
        return self.head(self.tile_features(tiles).unflatten(0, (-1, self.config.grid**2)).flatten(1)).float()

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Cross-entropy and accuracy over the valid images."""
        tiles, label = self.puzzles(batch)
        logits = self.logits(tiles)
        losses = nn.functional.cross_entropy(logits, label, reduction="none")
        count = count_valid(batch.valid, self.group)
        correct = (logits.argmax(1) == label).float()
        return {
            "loss": mean_valid(losses, batch.valid, count=count),
            "accuracy": mean_valid(correct, batch.valid, count=count),
        }

    @torch.no_grad()
    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """Images, their tiles as the network sees them, and the tiles in the predicted order."""
        from fgfast.data.panels import Panel, to_uint8

        with evaluating(self):
            tiles, label = self.puzzles(batch)
            predicted = self.permutations[self.logits(tiles).argmax(1)]
        grid, places, stats = self.config.grid, self.config.grid**2, self.encoder.stats
        as_seen = torch.arange(places, device=predicted.device).expand(len(predicted), -1)
        shuffled = join_tiles(tiles, grid, as_seen)
        solved = join_tiles(tiles, grid, predicted.argsort(1))  # position p shows the tile predicted to come from p
        correct = (predicted == self.permutations[label]).sum(1).tolist()
        rows = [
            [
                Panel(to_uint8(image, stats), "image"),
                Panel(to_uint8(shuffled[i], stats), "as the network sees it"),
                Panel(to_uint8(solved[i], stats), f"predicted order: {correct[i]} of {places} right"),
            ]
            for i, image in enumerate(self.uncut_images(batch)[:8])
        ]
        return {"puzzles": rows}
