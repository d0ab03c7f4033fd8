"""The training of a run: the loop over rounds, epochs and steps, its checkpoints and scores."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgfast.claim import Claim
from fgfast.config import Interval
from fgfast.errors import UserError
from fgfast.methods.base import Method, Progress
from fgfast.models.sync_bn import synchronise_batch_norm
from fgfast.ranks import Ranks, gather, on_any, on_first, share_first
from fgfast.train.average import WeightAverage, take_clean_statistics
from fgfast.train.checkpoint import (
    RandomSource,
    RankState,
    first_buffers,
    gather_ranks,
    mean_over_ranks,
    restore_buffers,
)
from fgfast.train.clock import Clock
from fgfast.train.compiling import compile_backbones
from fgfast.train.distributed import is_of_another_rank
from fgfast.train.groups import set_rates
from fgfast.train.heartbeat import holding, progress
from fgfast.train.length import Length, rounds_of
from fgfast.train.log import RunLog, has_scores, peak_memory_mb
from fgfast.train.online import open_online
from fgfast.train.optim import FiniteGuard
from fgfast.train.resume import Resumed, record_resumption
from fgfast.train.saving import CheckpointWriter
from fgfast.train.signals import StopSignals, collect_stop_signals
from fgfast.train.step import Step

if TYPE_CHECKING:
    from fgfast.data.kept import Kept
    from fgfast.data.loader import Loader
    from fgfast.data.views import Batch

log = logging.getLogger("fgfast")


class Trainer:
    """One run: its parts, and the loop over rounds, epochs and steps."""

    def __init__(
        self, method: Method, kept: "Kept", description: str, ranks: Ranks, length: Length, claim: Claim | None
    ) -> None:
        self.method, self.kept, self.description = method, kept, description
        self.ranks, self.length = ranks, length
        self.config = method.config
        self.run = Path(self.config.out)
        self.rounds = rounds_of(self.config)
        self.random = RandomSource(ranks, self.config.seed)
        method.set_rng(self.random.shared)
        if ranks.world > 1:
            method.set_group(torch.distributed.group.WORLD)
            if self.config.sync_bn:
                synchronise_batch_norm(method, torch.distributed.group.WORLD)
        if self.config.compile:
            compile_backbones(method)
        self.gradients = Step(method, ranks)
        self.optimizer = self.gradients.make_optimizer()
        self.guard = FiniteGuard(method, self.optimizer)
        self.average = WeightAverage(method.encoder.net, self.config.average) if self.config.average else None
        self.interval = Interval.parse(self.config.save_every)
        self.step = self.saved_step = 0  # a new run has init.pt
        self.saved_at = time.monotonic()
        self.complete = False  # whether the tensors are those after a complete step
        self.notes: list[str] = []  # for the log, once it is open
        self.caught = StopSignals()
        self.writer = CheckpointWriter(self.run, lambda: None if claim is None else claim.confirm(self.run))

    def train(self, resumed: Resumed | None) -> None:
        """Run every round; on a stop signal save and raise KeyboardInterrupt."""
        with collect_stop_signals() as self.caught, self.writer:
            self._train(resumed)

    def _train(self, resumed: Resumed | None) -> None:
        first_round, description = 0, self.description
        if resumed is not None:
            self._restore(resumed.checkpoint)
            first_round = resumed.checkpoint["round"]
            self.notes += resumed.notes
        if self.step == self.length.total:
            self._finish()
            return
        for round_ in range(first_round, self.rounds):
            end = self.length.total * (round_ + 1) // self.rounds
            if self.step >= end:
                continue  # resumed after the end of this round
            loader = self._make_loader(self._prepare(round_))
            try:
                if resumed is not None and round_ == first_round:
                    loader.load_state_dict(resumed.checkpoint["loader"])
                else:
                    loader.epoch = -(-self.step // len(loader))  # a later round draws other crops than the first
                if resumed is not None:
                    now, resumed = resumed, None
                    on_first(self.ranks, partial(record_resumption, self.method, now, description))
                    self.notes += now.describe_schedule(self.config, self.length.total)
                with self._open_log() as run_log:
                    self._train_round(round_, end, loader, run_log)
            finally:
                loader.close()

    def _finish(self) -> None:
        """Make up for the scores of a run that was killed after its last step; without any say that it is done."""
        if not self._lacks_scores():
            if self.ranks.first:
                log.warning("%s is finished: all %d steps are done.", self.run, self.step)
            return
        with self._open_log() as run_log:
            self._evaluate(run_log)

    def _open_log(self) -> RunLog:
        online = on_first(self.ranks, partial(open_online, self.method.name, self.config, self.step))
        run_log = RunLog(self.run, self.length.total, self.step, self.ranks.first, online)
        if self.description:
            run_log.record(self.description)
            self.description = ""  # once a process
        while self.notes:
            run_log.print(self.notes.pop(0))
        return run_log

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        try:
            self.gradients.load(checkpoint, self.optimizer)
            restore_buffers(self.method, self.ranks, checkpoint)
            if self.average is not None:
                self.average.load(checkpoint["average"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.run / 'last.pt'} does not fit these options: give those of {self.run / 'config.toml'} again."
            ) from error
        self.guard = FiniteGuard(self.method, self.optimizer)  # a new one, which copies the buffers just loaded
        self.guard.skipped = checkpoint.get("skipped", 0)
        self.guard.skipped_in_a_row = checkpoint.get("skipped_in_a_row", 0)
        self.step = self.saved_step = checkpoint["step"]
        self.random.restore(checkpoint)

    def _prepare(self, round_: int) -> Path | None:
        """Prepare the round on all ranks, with the same network; the random states stay as they were.

        A signal ends this at once: what is done is on the disk.
        """
        progress(self.step, "preparing a round")
        with (
            first_buffers(self.method, self.ranks), self.gradients.whole_networks(), self.random.kept(),
            self.caught.raised(True),
        ):  # fmt: skip
            return self.method.prepare(self.kept.images, self.run, round_)

    def _make_loader(self, maps: Path | None) -> "Loader":
        from fgfast.data.loader import make_loader

        c = self.config
        return make_loader(
            self.kept.images, self.method.normalised_views(), c.batch_size, records=self.kept.records, shuffle=True,
            seed=c.seed, maps=maps, device=self.ranks.device, threads=c.threads, rank=self.ranks.rank,
            world=self.ranks.world, backend=c.loader,
        )  # fmt: skip

    def _train_round(self, round_: int, end: int, loader: "Loader", run_log: RunLog) -> None:
        for path, reason in loader.skipped[: len(loader.skipped) - len(loader.lost)]:  # notes name the lost ones
            run_log.print(f"skipped {path}: {reason}")
        named = len(loader.skipped), len(loader.recovered)
        self._mark(loader)
        clock, total = Clock(), self.length.total
        try:
            if self._lacks_scores():  # a kill lost them
                self._evaluate(run_log)
                self._stop_or_save(round_, loader, run_log)
            while self.step < end:
                batches = iter(loader)
                while self.step < end and (batch := clock.wait_for(batches)) is not None:
                    terms = self._train_step(batch, total, stop=bool(self.caught) or loader.too_many is not None)
                    self._mark(loader)
                    clock.images += len(batch) * self.ranks.world
                    run_log.advance(self.step)
                    self._report_skipped(run_log, wait=self.step == end)
                    if self.step % self.config.log_every == 0 or self.step == end:
                        run_log.write(self._metrics(terms, clock, loader))
                    named = _name_lost(loader, run_log, named)
                    with clock.paused():
                        self._stop_or_save(round_, loader, run_log)
                        if self.step < end and self._scores_are_due():
                            self._evaluate(run_log)
                            self._stop_or_save(round_, loader, run_log)
                for failed in gather(self.ranks, loader.failed):
                    loader.exclude(failed)
                named = _name_lost(loader, run_log, named)
        except Exception as error:
            self._save_after(error, round_)
            raise
        self._save(round_, run_log)
        if self._scores_are_due():
            self._evaluate(run_log)
        if on_any(self.ranks, bool(self.caught)):  # such as in the scores
            self._stop(run_log)

    def _train_step(self, batch: "Batch", total: int, *, stop: bool) -> dict[str, float | Tensor]:
        """One step; returns the learning rate, the gradient norm before clipping and the terms of the method."""
        progress(self.step)
        lr = set_rates(self.optimizer, self.config, self.step, total)
        self.method.before_step(Progress(self.step, total))
        terms = self.gradients(batch)
        grad_norm = self._update(terms["loss"], batch.index, stop=stop)
        self.step += 1
        if self.average is not None:
            self.average.update()
        if self.step == total and self.config.clean_stats:
            progress(self.step, "computing BatchNorm statistics")
            with self._evaluated_weights(), self.gradients.whole_networks(), self.random.kept():
                take_clean_statistics(self.method.encoder, self.kept.images, self.config, self.ranks)
        self.method.after_step(Progress(self.step, total))
        progress(self.step, "loading images")
        return {"lr": lr, "grad_norm": grad_norm, **terms}

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        """The encoder with the weights that are evaluated."""
        return nullcontext() if self.average is None else self.average.in_use()

    def _update(self, loss: Tensor, index: Tensor, *, stop: bool) -> Tensor:
        """Clip, guarded optimiser step; returns the gradient norm before clipping."""
        grad_norm = self.gradients.clip()
        self.complete = False
        self.guard.step(loss, grad_norm, index, self.step, stop=stop, save=self._is_time())
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _mark(self, loader: "Loader") -> None:
        """Remember the state beside the tensors after a complete step: a checkpoint after an error needs it."""
        self.guard.mark()
        self.marked = self.random.read(), loader.state_dict()
        self.complete = True

    def _is_time(self) -> bool:
        """Whether the minutes between checkpoints have passed on the first rank."""
        interval = self.interval
        return (
            self.ranks.first and interval.unit == "minutes" and time.monotonic() >= self.saved_at + 60 * interval.amount
        )

    def _stop_or_save(self, round_: int, loader: "Loader", run_log: RunLog) -> None:
        """Save if it is time or the run stops.

        All ranks come to the same decision at the same step: what one of them knows alone has gone through the guard.

        Raises:
            KeyboardInterrupt: a signal asked a rank to stop.
            UserError: a rank has lost too many images.
        """
        self.writer.check()
        alone, (epoch, step_of_epoch) = self.ranks.world == 1, divmod(self.step, self.length.per_epoch)
        stop = self.guard.stop or (alone and (bool(self.caught) or loader.too_many is not None))
        amount, unit = self.interval.amount, self.interval.unit
        due = {
            "minutes": self.guard.save or (alone and self._is_time()),
            "steps": self.step % amount == 0,
            "epochs": step_of_epoch == 0 and epoch % amount == 0,
        }[unit]
        if not (stop or due):
            return
        self._report_skipped(run_log, wait=True)
        self._save(round_, run_log)
        if not stop:
            return
        self._stop(run_log, next(filter(None, gather(self.ranks, loader.too_many)), ""))

    def _stop(self, run_log: RunLog, reason: str = "") -> None:
        """Stop for a reason, or because of a signal, once the checkpoint is written: an error of its writing is one."""
        on_first(self.ranks, self.writer.wait)
        run_log.print(f"stopped at step {self.step} of {self.length.total}; --resume continues from here")
        raise UserError(reason) if reason else KeyboardInterrupt

    def _report_skipped(self, run_log: RunLog, *, wait: bool) -> None:
        """Log the updates that were skipped; ``wait`` for those of the newest steps too."""
        for step, index in self.guard.verdicts(wait=wait):
            names = ", ".join(self.kept.images.paths[i] for i in index[:4])
            run_log.print(f"step {step}: the loss was not finite, update skipped (batch of {len(index)}: {names}, ...)")

    def _metrics(self, terms: dict[str, float | Tensor], clock: Clock, loader: "Loader") -> dict[str, float]:
        row = {"step": self.step, "epoch": self.step / self.length.per_epoch}
        values = {name: float(v.detach()) if isinstance(v, Tensor) else v for name, v in terms.items()}
        row |= mean_over_ranks(values, self.ranks)
        row |= clock.read(self.method.passes_per_image)
        row |= {"memory_mb": peak_memory_mb(self.ranks.device), "skipped": self.guard.skipped}
        return row | ({"lost": len(loader.lost)} if loader.lost else {})

    def _scores_are_due(self) -> bool:
        """Whether scores are logged after this step."""
        every, (epoch, rest) = self.config.knn_every, divmod(self.step, self.length.per_epoch)
        return bool(every and self.step) and (self.step == self.length.total or (not rest and epoch % every == 0))

    def _lacks_scores(self) -> bool:
        """Whether scores are due after this step and not in metrics.jsonl."""
        file = self.run / "metrics.jsonl"
        return self._scores_are_due() and not share_first(self.ranks, lambda: has_scores(file, self.step))

    def _evaluate(self, run_log: RunLog) -> None:
        """Log online kNN top-1 on the test split (with --holdout: the held-out images), health and the method's scores.

        They are only logged: no checkpoint or setting is chosen by them. A signal to stop ends them at once in a run
        with one process, and they are made up for when it is resumed.
        """
        from fgfast.evaluate.health import online_health
        from fgfast.evaluate.protocols import online_knn

        progress(self.step, "computing scores")
        try:
            with (
                self._evaluated_weights(), first_buffers(self.method, self.ranks), self.gradients.whole_networks(),
                self.random.kept(), self.caught.raised(self.ranks.world == 1),
            ):  # fmt: skip
                knn = online_knn(self.method.encoder, self.config, self.ranks.device, self.method.group)
                health = online_health(self.method.encoder, self.config, self.ranks.device, self.method.group)
                scores = self.method.scores(self.ranks.device) | health | ({} if knn is None else {"knn": knn})
        except KeyboardInterrupt:
            if not self.caught or self.ranks.world > 1:  # the others would wait in the scores
                raise
            return
        if scores:
            run_log.write({"step": self.step, "epoch": self.step / self.length.per_epoch, **scores})

    def _save(self, round_: int, run_log: RunLog) -> None:
        """Save a checkpoint on all ranks together, unless there is one of this step."""
        if self.saved_step == self.step:
            return
        random, position = self.marked
        of_ranks = gather_ranks(self.method, self.ranks, random, position["failed"])
        state = self.gradients.state(self.optimizer)

        def write() -> None:
            run_log.sync()
            self._write(round_, of_ranks, state)

        on_first(self.ranks, write)
        self.saved_step, self.saved_at, self.guard.save = self.step, time.monotonic(), False

    def _save_after(self, error: Exception, round_: int) -> None:
        """Save the last complete step after an error, on the first rank alone: others may not answer any more.

        Not if another rank is lost, or has a part of the weights: without its random state and buffers the run would go
        on in another way than from the checkpoint before.
        """
        lost = self.ranks.world > 1 and (is_of_another_rank(error) or self.gradients.sharded is not None)
        if not self.ranks.first or not self.complete or self.saved_step == self.step or lost:
            return
        random, position = self.marked
        try:
            with holding():
                self.guard.restore()
                self._write(round_, [RankState(random, position["failed"], {})], self.gradients.state(self.optimizer))
                self.writer.wait()
        except Exception as failed:
            log.warning("step %d could not be saved: %s", self.step, failed)
        else:
            log.warning("stopped by an error at step %d, which is saved; --resume continues from there", self.step)

    def _write(self, round_: int, of_ranks: list[RankState], networks: dict[str, Any]) -> None:
        """Hand the checkpoint to the writer, with the states of the method and the optimiser."""
        encoder = self.method.encoder
        state = {
            "name": self.method.name, "step": self.step, "total": self.length.total, "round": round_,
            "images_per_step": self.config.batch_size * self.ranks.world,
            **networks,
            "loader": {**self.marked[1], "failed": sorted({row for rank in of_ranks for row in rank.failed})},
            "skipped": self.guard.skipped, "skipped_in_a_row": self.guard.skipped_in_a_row,
            "input": encoder.stats.texts(), **self.random.store(of_ranks),
        }  # fmt: skip
        exported = {} if self.average is None else self.average.values
        state |= {"average": exported} if exported else {}
        if self.gradients.sharded is not None:  # the encoder itself has only a part of its weights
            prefix = "encoder.net."
            exported = {k.removeprefix(prefix): v for k, v in networks["method"].items() if k.startswith(prefix)}
        self.writer.save(state, encoder.net, self.config.model, encoder.stats, exported)


def _name_lost(loader: "Loader", run_log: RunLog, named: tuple[int, int]) -> tuple[int, int]:
    """Log images that were lost or recovered since the counts that are given; returns the new ones."""
    skipped, recovered = named
    for path, reason in loader.skipped[skipped:]:
        run_log.record(f"skipped {path}, which can no longer be read: {reason}")
    for path in loader.recovered[recovered:]:
        run_log.record(f"{path} can be read again and is used")
    return len(loader.skipped), len(loader.recovered)
