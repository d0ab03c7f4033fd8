"""Part discovery of a run against the true parts of a set that has them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from fgfast.evaluate.discovery import nmi_ari
from fgfast.evaluate.protocols import Checkpoint, load_encoder_of
from fgfast.methods.parts import Clustering, cluster_keys, cluster_pyramid


def score_discovery(
    run: Path, data: Path, *, checkpoint: Checkpoint = "last", device: torch.device, n_images: int = 200
) -> dict[str, float]:
    """NMI and ARI of clustered pixels against true part masks, mean over pictures, true-part pixels only.

    Every picture is clustered alone: a CNN's hypercolumns by the run's own settings (the defaults for methods without
    parts; no cluster is taken for background), a ViT's keys into the run's number of parts.

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
                how = replace(getattr(config, "clustering", Clustering(n_parts)), border=0.0)
                labels = cluster_pyramid(encoder, whole, how, size=64, seed=config.seed)
            labels = torch.nn.functional.interpolate(labels[:, None].float(), size=(size, size)).long()[:, 0]
            found.append(labels.cpu())
            true.append(batch.whole_labels[batch.valid].cpu())
    finally:
        loader.close()
    return nmi_ari(torch.cat(found).numpy(), torch.cat(true).numpy())
