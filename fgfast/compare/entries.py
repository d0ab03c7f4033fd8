"""The methods of a comparison, parsed from text, and the configuration of each of their runs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fgfast.config import TrainConfig, parse_values, with_values
from fgfast.errors import UserError
from fgfast.methods.base import METHODS, method_class
from fgfast.methods.run_folder import Checkpoint

RESERVED = ("data", "out", "seed", "resume")  # options that the comparison sets for each run
UNTRAINED = ("random", "start")  # evaluated without training: random weights; the weights that --init names


@dataclass(frozen=True)
class Entry:
    """A method with its settings, parsed from "name:key=value,key=value"."""

    label: str
    name: str
    values: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read an entry; a comma before a text without "=" belongs to the value before it, as in mean=0.5,0.5,0.5.

        Raises:
            UserError: the text is not of the form, or the method does not exist.

        Example:
            >>> Entry.parse("particle:parts=truth").values
            {'parts': 'truth'}
        """
        name, _, rest = text.partition(":")
        pieces: list[str] = []
        for piece in filter(None, rest.split(",")):
            if "=" in piece or not pieces:
                pieces.append(piece)
            else:
                pieces[-1] += f",{piece}"
        pairs = [p.partition("=") for p in pieces]
        if any(not sign for _, sign, _ in pairs):
            raise UserError(f"--methods got {text!r}: give name:setting=value,setting=value.")
        if name not in UNTRAINED:
            method_class(name)
        return cls(text, name, {key: value for key, _, value in pairs})

    @property
    def trained(self) -> bool:
        """False for "random" and "start"."""
        return self.name not in UNTRAINED

    @property
    def method(self) -> str:
        """The method that makes the run; for an untrained entry any method whose encoder is the bare network."""
        return self.name if self.trained else "simclr"

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that is scored."""
        return "last" if self.trained else "init"


def run_config(entry: Entry, shared: dict[str, Any], data: Path, runs: Path, seed: int) -> TrainConfig:
    """The configuration of one run; shared settings that only other methods have are left out.

    Settings override those of preset=paper, and these the defaults.

    Args:
        entry: the method and its settings, which override the shared ones.
        shared: settings of all runs; "{seed}" in a text becomes the seed.
        data: data set.
        runs: folder of all runs.
        seed: random seed.

    Raises:
        UserError: a setting is unknown, reserved, or of the wrong type.
    """
    kind = method_class(entry.method)
    config = kind.Config()
    preset, model = (entry.values.get(name, shared.get(name)) for name in ("preset", "model"))
    if preset == "paper" and "preset" in vars(config):
        config = kind.paper(model)
    known = vars(config).keys() - (set() if config.takes_unlabelled else {"unlabelled"})
    values = {k: v.replace("{seed}", str(seed)) if isinstance(v, str) else v for k, v in shared.items()}
    texts = {k: v for k, v in values.items() if isinstance(v, str) and k.replace("-", "_") in known}
    plain = {k: v for k, v in values.items() if not isinstance(v, str) and k.replace("-", "_") in known}
    if reserved := [k for k in (*shared, *entry.values) if k in RESERVED]:
        raise UserError(f"The comparison itself sets {reserved[0]}: remove it from the settings.")
    unknown = [k for k in values if not any(k.replace("-", "_") in vars(method_class(m).Config()) for m in METHODS)]
    if unknown:
        raise UserError(f"No method has the setting {unknown[0]!r}: remove it.")
    config = with_values(config, plain | parse_values(config, texts, "--set"), "The shared settings")
    own = {k: v.replace("{seed}", str(seed)) for k, v in entry.values.items()}
    config = with_values(config, parse_values(config, own, entry.label), f"The method {entry.label!r}")
    if entry.name == "random":
        config = replace(config, init="none")
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in entry.label)
    return replace(config, data=str(data), out=str(runs / data.name / slug / f"seed{seed}"), seed=seed, resume=True)
