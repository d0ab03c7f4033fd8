"""The id maps of a run, RUN/parts_N: made at the start of each round, and made again exactly if they are lost."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fgfast.data.imageset import ImageSet
from fgfast.data.maps import map_path, read_maps_info
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.weights import load_encoder
from fgfast.parts.discover import write_maps
from fgfast.parts.folder import holds_earlier, is_complete, is_whole, read_centroids, weights_digest
from fgfast.parts.sources import DiscoveryConfig, Source
from fgfast.ranks import on_all, on_first, ranks_of, share_first
from fgfast.run import INIT, save_encoder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

log = logging.getLogger("fgfast")

WEIGHTS = "encoder.safetensors"  # beside the maps of all rounds but the first, whose weights are in init.pt


@dataclass
class Rounds:
    """The round whose maps a run trains on, and the weights that made them; stored in its checkpoints.

    Args:
        make: makes the source of the maps from a network and the settings of a folder.
        config: sizes, seed and loader.
        build: builds the encoder, with any weights.
        round: the round that was prepared last, -1 before the first; None if a checkpoint of version 0.1 was loaded.
        start: :func:`weights_digest` of the encoder at the start of the round; empty if it is not known.
    """

    make: Callable[[Backbone, DiscoveryConfig], Source]
    config: DiscoveryConfig
    build: Callable[[], Backbone]
    round: int | None = -1
    start: str = ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores; the digest as a tensor uint8 [32], or [0]."""
        return {"round": self.round, "start": torch.tensor(list(bytes.fromhex(self.start)), dtype=torch.uint8)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self.round, self.start = state.get("round"), bytes(state.get("start", [])).hex()

    def prepare(
        self, encoder: Backbone, images: ImageSet, run: Path, round_: int, group: "ProcessGroup | None" = None
    ) -> Path:
        """The folder with the maps of a round, all made by the encoder as it was at the start of the round.

        Args:
            encoder: the encoder of now; that of the start of the round if the round begins.
            images: the images with which the run began.
            run: run folder.
            round_: the round.
            group: processes that call this at the same time; or None.

        Raises:
            UserError: maps are lost, and so are the weights that made them.
        """
        source = self.make(encoder, self.config._replace(run=run.name))
        if source.encoder is None:  # the maps of the first round serve all
            return write_maps(source, images, run / "parts_0", group=group, own=True)
        device = next(encoder.parameters()).device
        ranks, out = ranks_of(group, device), run / f"parts_{round_}"
        config = self.config._replace(run=f"{run.name}, round {round_}")
        if self.round is None:
            self.round = round_
        elif self.round != round_:
            self.round, self.start = round_, weights_digest(encoder.net)
            if round_:
                on_first(ranks, lambda: save_encoder(out / WEIGHTS, encoder.net, encoder.name, stats=encoder.stats))
        origin = self.make(encoder, config).origin(images, self.start)
        if share_first(ranks, lambda: bool(self.start) and is_complete(out, images, origin)):
            return out
        if share_first(ranks, lambda: not self.start and holds_earlier(out, images)):
            if ranks.first:
                log.warning("%s is of an earlier version of fgfast, which kept no weights: it is used as it is.", out)
            return out
        first = on_all(ranks, lambda: self._encoder_of_start(encoder, run, device))
        return write_maps(self.make(first, config), images, out, group=group, own=True)

    def _encoder_of_start(self, encoder: Backbone, run: Path, device: torch.device) -> Backbone:
        if self.start and weights_digest(encoder.net) == self.start:
            return encoder
        kept = run / f"parts_{self.round}" / WEIGHTS if self.round else run / INIT
        first = self.build()
        first.stats = encoder.stats
        try:
            load_encoder(first.net, kept)
        except UserError as error:
            reason = str(error).rstrip(".")
        else:
            reason, found = f"{kept} holds others", weights_digest(first.net)
            if self.start in ("", found):
                self.start = found
                return first.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        raise UserError(
            f"The parts of round {self.round} are lost, and so are the weights that made them ({reason}): restore "
            f"{run / f'parts_{self.round}'}, or train again in another folder."
        )

    def for_figures(self, encoder: Backbone, images: ImageSet, run: Path, scratch: Path) -> Path:
        """A folder with the maps of a few images, without writing to the run: those of its round, or else new ones.

        Args:
            encoder: the encoder of a checkpoint.
            images: the images.
            run: run folder.
            scratch: folder for new maps.
        """
        start = weights_digest(encoder.net) if self.round == -1 else self.start
        source = self.make(encoder, self.config)
        made_by = source.describe() if source.encoder is None else f"weights {start[:12]}"
        if self.round is None:  # the newest of an earlier version
            folders = sorted(run.glob("parts_[0-9]*"), key=lambda path: (len(path.name), path.name), reverse=True)
        else:
            folders = [run / f"parts_{max(0, self.round)}"]
        for out in folders:
            with contextlib.suppress(UserError):  # a folder that is not complete
                info = read_maps_info(out)
                whole = (is_whole(map_path(out, rel), info["size"][0]) for rel in images.paths)
                if made_by in info["run"] and all(whole):
                    return out
        log.warning("%s has no parts of these weights for the figures: they are found for the images shown.", run)
        return write_maps(source, images, scratch)

    def source(self, encoder: Backbone, run: Path) -> Source:
        """The source of the round as it labelled the images of the run, with the centroids of its shared ids.

        Args:
            encoder: the encoder of a checkpoint.
            run: run folder.

        Raises:
            UserError: the weights of the start of the round, the maps or the centroids are lost.
        """
        device = next(encoder.parameters()).device
        out = run / f"parts_{max(0, self.round or 0)}"
        source = self.make(self._encoder_of_start(encoder, run, device) if self.start else encoder, self.config)
        if source.shared:
            source.centroids = read_centroids(out, read_maps_info(out).get("digest", ""))
            if source.centroids is None:
                raise UserError(f"{out} has lost the centroids of its shared ids: train again in another folder.")
        return source
