"""Checks of a run of a comparison before any run starts: its options, its network, its images and its protocols."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fgfast.compare.entries import Entry
from fgfast.config import TrainConfig, validate
from fgfast.errors import UserError
from fgfast.evaluate.options import Options, Protocol


def check_run(entry: Entry, config: TrainConfig, protocols: Sequence[tuple[str, Options | None]]) -> None:
    """Build the method of a run and check that it can train and that every protocol can score it.

    Args:
        entry: the method.
        config: configuration of the run.
        protocols: names and options of the protocols.

    Raises:
        UserError: the run cannot be trained or scored; the message begins with the entry.
    """
    from fgfast.data.splits import pretext_images
    from fgfast.evaluate.protocols import check_protocol
    from fgfast.methods.base import method_class
    from fgfast.train.distributed import choose_device
    from fgfast.train.length import Length

    try:
        validate(config)
        choose_device(config.device)
        images = pretext_images(config)
        method = method_class(entry.method)(config)
        if entry.trained:
            method.check_training_set(images)
            Length(method, len(images), 1).of(config)
        for name, options in protocols:
            splits = check_protocol(cast(Protocol, name), method.encoder, config, Path(config.data), options)
            if name == "parts" and splits.images.masks is None:
                raise UserError("parts gives no top-1 without part masks: run fgfast eval parts on each run.")
    except UserError as error:
        raise UserError(f"{entry.label} on {config.data}: {error}") from error
