"""The options that several commands share: which network they use, and how they discover parts."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fgfast.config import Range, TrainConfig, check_range, check_ranges, parse_values, with_values
from fgfast.errors import UserError

if TYPE_CHECKING:
    from fgfast.methods.run_folder import Checkpoint
    from fgfast.models.backbone import Backbone
    from fgfast.parts.clusters import Clusters


class Network(NamedTuple):
    """A network in evaluation mode.

    Args:
        encoder: the network.
        config: the options of its run, or without a run the defaults with those that were given.
        name: the run, or the network with its weights and size, for messages and captions.
        checkpoint: the checkpoint of the run; "init" without a run.
    """

    encoder: "Backbone"
    config: TrainConfig
    name: str
    checkpoint: "Checkpoint"


@dataclass(kw_only=True)
class NetworkArgs:
    """A run, which each command names itself, or a network and weights without a run."""

    model: str | None = None
    """Without a run: name of a timm model."""
    model_args: str | None = None
    """Without a run: additional arguments of the timm model, such as "output_stride=16"."""
    init: str | None = None
    """Without a run: weights, as for pretrain: "timm" (downloaded), a file, a run folder, or "none" (random)."""
    size: int | None = None
    """Without a run: side of the images in pixels; by default that on which the weights were trained."""
    mean: str | None = None
    """Without a run: mean of each channel, as in "0.5,0.5,0.5"; by default that of the weights."""
    std: str | None = None
    """Without a run: standard deviation of each channel, like --mean."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Without a run: how images are resized; by default as for the weights."""
    checkpoint: Literal["init", "last"] | None = None
    """Weights of a run: before training (init) or after it (last); by default last."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto uses CUDA if available."""

    def check(self, run: Path | None) -> None:
        """Raise a UserError unless either a run or a network with weights is given."""
        given = self._given()
        if run is not None and given:
            option = next(iter(given)).replace("_", "-")
            raise UserError(f"--{option} is for a network without a run: leave it out, or the run {run}.")
        if run is None and self.checkpoint is not None:
            raise UserError("--checkpoint is one of a run: name the run, or leave it out.")
        if run is None and not self.model:
            raise UserError("There is no network: name a run, or give --model NAME and its weights by --init.")
        if run is None and not self.init:
            raise UserError(
                f"{self.model} has no weights: give --init timm (downloaded), a file or a run, or none for random ones."
            )

    def _given(self) -> dict[str, Any]:
        """The options of a network without a run that were given."""
        values = {f.name: getattr(self, f.name) for f in fields(NetworkArgs) if f.name not in ("checkpoint", "device")}
        return {name: value for name, value in values.items() if value is not None}

    def load(self, run: Path | None, settings: dict[str, str] | None = None) -> Network:
        """The network of a run, or that of ``model`` with the weights of ``init``.

        Args:
            run: run folder, or None.
            settings: further options by name, as text.

        Raises:
            UserError: both or neither are given, or the network cannot be loaded.
        """
        from fgfast.methods.run_folder import load_network, load_run_encoder, size_of_weights
        from fgfast.train.distributed import choose_device

        self.check(run)
        device, given = choose_device(self.device), self._given()
        if run is not None:
            checkpoint = self.checkpoint or "last"
            return Network(*load_run_encoder(run, checkpoint, device, settings), f"{run} ({checkpoint})", checkpoint)
        given.setdefault("size", size_of_weights(given["model"], given["init"]))
        config = TrainConfig(**given)
        config = with_values(config, parse_values(config, settings or {}, "--set"), "--set")
        check_ranges(config)
        name = ", ".join([given.pop("model"), *(f"{key} {value}" for key, value in given.items())])
        return Network(*load_network(config, device), name, "init")


@dataclass(kw_only=True)
class DiscoveryArgs:
    """How parts are discovered; what is not given is as in the run, or without one as ``PHOTOGRAPHS``."""

    n_parts: int | None = None
    """Clusters per image; by default the run's setting, without a run 15."""
    levels: int | None = None
    """Number of final feature maps in the hypercolumns (CNN); by default the run's setting, without a run 2."""
    metric: Literal["euclidean", "cosine"] | None = None
    """Distance between pixels (CNN); by default the run's setting, without a run euclidean."""
    border: float | None = None
    """A cluster with over border x sqrt(area) border pixels is background (CNN); by default the run's setting, without
    a run 1.4."""
    position: float | None = None
    """Variance of the appended pixel coordinates, relative to the features (CNN); by default the run's setting, without
    a run 0.3, or 0 with --metric cosine."""
    first_parts: int | None = None
    """Clusters of a first stage, whose foreground is then clustered (CNN); by default the run's setting, without a run
    8, or 0 with --border 0."""
    ids: Literal["image", "set"] | None = None
    """Ids of each image on their own, or the same in every image of the set; by default the run's, or image."""
    image_size: int = 0
    """Side to which the full image is resized, ignoring its aspect ratio; 0 is twice the training size, or that size
    for a ViT without a run."""
    map_size: int = 64
    """Side of the id maps in pixels."""

    def check_clustering(self) -> None:
        """Raise a UserError for an option outside its range."""
        from fgfast.methods.particle import PARTICLEConfig

        check_ranges(PARTICLEConfig(**self._of(PARTICLEConfig), map_size=self.map_size))
        check_range("--image-size", self.image_size, Range(0))

    def has_clustering(self) -> bool:
        """Whether any of the options is given."""
        return any(getattr(self, f.name) != f.default for f in fields(DiscoveryArgs))

    def _of(self, kind: type) -> dict[str, Any]:
        """The options that are given and that the dataclass ``kind`` has."""
        names = {f.name for f in fields(kind)} & {f.name for f in fields(DiscoveryArgs) if f.default is None}
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def source(self, network: Network, run: Path | None) -> "Clusters":
        """The source of parts of a network, which is that of ``run`` or of none."""
        from fgfast.parts.clustering import PHOTOGRAPHS, ClusteringConfig
        from fgfast.parts.clusters import Clusters
        from fgfast.parts.sources import DiscoveryConfig

        encoder, config = network.encoder, network.config
        given = self._of(ClusteringConfig)
        if run is None:
            defaults = asdict(PHOTOGRAPHS)
            if given.get("metric") == "cosine":
                defaults["position"] = 0.0  # which needs the Euclidean distance
            if given.get("border") == 0:
                defaults["first_parts"] = 0  # which needs a border
        else:
            defaults = {f.name: getattr(config, f.name) for f in fields(ClusteringConfig) if hasattr(config, f.name)}
        default_size = config.size if encoder.is_vit and run is None else 2 * config.size
        discovery = DiscoveryConfig(
            image_size=self.image_size or default_size, map_size=self.map_size,
            run=f"{run.name}, {network.checkpoint}" if run else network.name, threads=config.threads,
            network=f"{config.model} {config.model_args}",
        )  # fmt: skip
        shared = (self.ids or getattr(config, "ids", "image")) == "set"
        return Clusters(encoder, ClusteringConfig(**defaults | given), discovery, shared=shared)


def files_in(folder: Path) -> list[Path]:
    """The files in a folder, sorted, without claims and the partial files of killed processes."""
    from fgfast.claim import is_claim
    from fgfast.files import is_leftover

    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if not is_claim(file) and not is_leftover(file)]
