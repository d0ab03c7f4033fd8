"""Curves at Weights & Biases, beside those of TensorBoard: ``--log wandb``."""

import logging
import os
import secrets
from pathlib import Path
from typing import Any

from fgfast.config import TrainConfig
from fgfast.errors import UserError
from fgfast.files import write_atomic

log = logging.getLogger("fgfast")

ID = "fgfast-id"  # file in RUN/wandb with the id of the wandb run


class WandbRun:
    """A run at Weights & Biases with the rows of metrics.jsonl; a resumed run goes on in the same one.

    Its id is kept in RUN/wandb/fgfast-id. What wandb itself takes from the environment holds: WANDB_MODE=offline
    (`wandb sync` uploads later), WANDB_PROJECT (default: fgfast), WANDB_NAME (default: the name of the run folder),
    WANDB_ENTITY, ...

    Args:
        method: the method, for the configuration.
        config: options of the run; ``out`` is its folder.
        start: steps done before; 0 begins a new run at Weights & Biases.

    Raises:
        UserError: wandb cannot start, for instance because there is no key.
    """

    def __init__(self, method: str, config: TrainConfig, start: int) -> None:
        import wandb

        run = Path(config.out)
        file = run / "wandb" / ID
        stored = file.read_text(encoding="utf-8").strip() if start and file.is_file() else ""
        run_id = stored or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        write_atomic(file, lambda p: p.write_text(run_id + "\n", encoding="utf-8"))
        try:
            self.run = wandb.init(
                id=run_id, resume="allow", dir=str(run), project=os.environ.get("WANDB_PROJECT", "fgfast"),
                name=os.environ.get("WANDB_NAME", run.resolve().name), config={"method": method, **vars(config)},
                settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except (wandb.Error, ValueError, OSError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"Weights & Biases cannot start ({reason}): run wandb login, set WANDB_MODE=offline or leave out "
                "--log wandb, and give --resume."
            ) from error
        upload = f"wandb sync {run / 'wandb' / 'offline-run-*'} uploads them"
        self.where = f"curves at Weights & Biases: {upload if self.run.offline else self.run.url}"

    def write(self, row: dict[str, Any]) -> None:
        """Log the finite values of a row."""
        self.run.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    def close(self, failed: bool) -> None:
        """Wait until all rows are handed over."""
        self.run.finish(exit_code=int(failed))


def open_online(method: str, config: TrainConfig, start: int) -> WandbRun | None:
    """The run at Weights & Biases if ``config.log`` asks for one.

    A resumed run, which may be one that nobody watches, goes on without it and says so if it cannot start.

    Raises:
        UserError: it cannot start, and the run is new.
    """
    if config.log != "wandb":
        return None
    try:
        return WandbRun(method, config, start)
    except UserError as error:
        if not start:
            raise
        log.warning("training goes on without Weights & Biases: %s", error)
        return None
