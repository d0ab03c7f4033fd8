"""What a network knows of the true parts of a set that has them: its clusters against them, its features in them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from fgfast.evaluate.discovery import nmi_ari
from fgfast.evaluate.protocols import Checkpoint, load_encoder_of
from fgfast.methods.parts import cluster_keys, cluster_pyramid
from fgfast.models.backbone import Backbone
from fgfast.ops.part_pool import labels_to_grid, part_pool


class PartFeatures(nn.Module):
    """The last map of an encoder averaged over each part, side by side; zeros where a part is absent.

    Args:
        encoder: the network.
        n_parts: K; ids are 0..K-1, -1 is no part.

    Example:
        >>> features = PartFeatures(Backbone("resnet18", size=64), 5)
        >>> features(torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64)).shape
        torch.Size([2, 2560])
    """

    def __init__(self, encoder: Backbone, n_parts: int) -> None:
        super().__init__()
        self.encoder, self.n_parts = encoder, n_parts

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Features [B, K D] of pictures [B, 3, S, S] with id maps [B, S, S]."""
        size = (images.shape[-2], images.shape[-1])
        features = self.encoder.to_map(self.encoder.features(images), size)
        grid = labels_to_grid(labels, (features.shape[-2], features.shape[-1]), self.n_parts)
        return part_pool(features, grid, self.n_parts).pooled.flatten(1)


def score_discovery(
    run: Path, data: Path, *, checkpoint: Checkpoint = "last", device: torch.device, n_images: int = 200
) -> dict[str, float]:
    """NMI and ARI of clustered pixels against true part masks, mean over pictures, true-part pixels only.

    Every picture is clustered alone: a CNN's hypercolumns, a ViT's keys, with the run's own numbers of parts and levels
    (15 and 4 for runs of methods without parts).

    Args:
        run: run folder.
        data: a set with part masks.
        checkpoint: "init" or "last".
        device: where the encoder runs.
        n_images: test pictures that are scored, drawn with a fixed seed.

    Returns:
        {"nmi": ..., "ari": ..., ...} as :func:`fgfast.evaluate.discovery.nmi_ari` gives them.

    Raises:
        UserError: the set has no part masks.
    """
    encoder, config = load_encoder_of(run, checkpoint, device)
    images = open_images(data)
    if images.masks is None:
        raise UserError(f"{data} has no true part masks to score against: use a synthetic set.")
    test = images.test_set()
    test = test.subset(np.sort(np.random.default_rng(0).permutation(len(test))[:n_images]))
    size, n_parts = 2 * config.size, getattr(config, "n_parts", 15)
    loader = make_loader(
        test, ViewSpec(whole=size, whole_masks=True), 32, shuffle=False, maps=images.masks, device=device,
        threads=config.threads, backend=config.loader,
    )  # fmt: skip
    found, true = [], []
    try:
        for batch in loader:
            assert batch.whole is not None  # the specification asks for both
            assert batch.whole_labels is not None
            whole = batch.whole[batch.valid]
            if encoder.is_vit:
                labels = cluster_keys(encoder, whole, n_parts=n_parts, seed=config.seed)
            else:
                labels = cluster_pyramid(
                    encoder, whole, n_parts=n_parts, size=64, levels=getattr(config, "levels", 4), seed=config.seed
                )
            labels = torch.nn.functional.interpolate(labels[:, None].float(), size=(size, size)).long()[:, 0]
            found.append(labels.cpu())
            true.append(batch.whole_labels[batch.valid].cpu())
    finally:
        loader.close()
    return nmi_ari(torch.cat(found).numpy(), torch.cat(true).numpy())
