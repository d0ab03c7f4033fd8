"""The training loop, from a configuration to a run folder."""

import inspect
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgfast.claim import Claim
from fgfast.config import TrainConfig, validate
from fgfast.data.splits import pretext_splits
from fgfast.errors import UserError
from fgfast.info import require
from fgfast.methods.base import Method, Progress, method_class
from fgfast.run import save_checkpoint, save_encoder
from fgfast.train.compiling import check_compiler, compile_backbones
from fgfast.train.distributed import Ranks, barrier, on_first, start
from fgfast.train.length import Length, rounds_of
from fgfast.train.log import RunLog, peak_memory_mb
from fgfast.train.optim import FiniteGuard, make_optimizer
from fgfast.train.resume import Resumed, claim_run, open_run, record_resumption
from fgfast.train.signals import collect_stop_signals

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.loader import Loader
    from fgfast.data.views import Batch

log = logging.getLogger("fgfast")


def pretrain(method: str | type[Method], config: TrainConfig, *, train: bool = True) -> Path:
    """Train a method and write its run folder.

    The folder holds config.toml, init.pt (the weights of step 0), last.pt (everything that ``resume`` needs),
    encoder.safetensors, metrics.jsonl, log.txt, tensorboard/ and, for methods that discover parts, parts_0/, ...

    Args:
        method: the name or the class of a method.
        config: its configuration, an instance of the method's Config.
        train: False stops after init.pt, for scores before training.

    Returns:
        The run folder.

    Raises:
        UserError: a setting, the data or the run folder cannot be used.
        KeyboardInterrupt: interrupted; last.pt was written before if a step was done (SIGTERM: in training only).
    """
    validate(config)
    require("PIL", "numpy", "rich", "safetensors", "timm")
    ranks = start(config.device)
    if config.compile and train:
        check_compiler(ranks.device)
    splits = pretext_splits(config)
    images, description = splits.pretext(), splits.describe()
    torch.manual_seed(config.seed)
    built = (method_class(method) if isinstance(method, str) else method)(config)
    built.to(ranks.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    built.check_training_set(images)
    length = _length(built, images, ranks) if train else None
    with claim_run(Path(config.out), ranks) as claim:
        resumed = open_run(built, ranks, length, description)
        if length is None:
            return Path(config.out)
        if resumed is not None and resumed.step == length.total:
            if ranks.first:
                log.warning("%s is finished: all %d steps are done.", config.out, resumed.step)
            return Path(config.out)
        if ranks.first:
            print(description, file=sys.stderr, flush=True)  # before the parts are discovered, which takes time
        _Trainer(built, images, description, ranks, length, claim).train(resumed)
    return Path(config.out)


def _length(method: Method, images: "ImageSet", ranks: Ranks) -> Length:
    """The length of the run.

    Raises:
        UserError: the budget of passes allows no step, or too many images are broken.
    """
    from fgfast.data.manifest import check_images

    usable = check_images(images, threads=method.config.threads, quiet=True)
    length = Length(method, len(images), -(-len(usable) // (method.config.batch_size * ranks.world)), ranks.world)
    length.of(method.config)
    return length


class _Trainer:
    """One run: its parts, and the loop over rounds, epochs and steps."""

    def __init__(
        self, method: Method, images: "ImageSet", description: str, ranks: Ranks, length: Length, claim: Claim | None
    ) -> None:
        self.method, self.images, self.description = method, images, description
        self.ranks, self.length, self.claim = ranks, length, claim
        self.config = method.config
        self.run = Path(self.config.out)
        self.rounds = rounds_of(self.config)
        self.optimizer = make_optimizer(method, self.config)
        self.guard = FiniteGuard(method, self.optimizer)
        self.step = 0
        self.notes: list[str] = []  # for the log, once it is open
        if self.config.compile:
            compile_backbones(method)
        self.model = _distribute(method, ranks) if ranks.world > 1 else method

    def train(self, resumed: Resumed | None) -> None:
        """Run every round; on a stop signal save and raise KeyboardInterrupt."""
        if resumed is not None:
            self._restore(resumed.checkpoint)
        first_round = 0 if resumed is None else resumed.checkpoint["round"]
        for round_ in range(first_round, self.rounds):
            loader = self._make_loader(self._prepare(round_))
            try:
                if resumed is not None and round_ == first_round:
                    loader.load_state_dict(resumed.checkpoint["loader"])
                    on_first(self.ranks, lambda: record_resumption(self.method, resumed, self.description))
                    self.notes += resumed.describe_schedule(self.config, self.length.total)
                else:
                    loader.epoch = -(-self.step // len(loader))  # a later round draws other crops than the first
                with collect_stop_signals() as caught:
                    self._train_round(round_, loader, caught, first=round_ == first_round)
            finally:
                loader.close()

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        try:
            self.method.load_state_dict(checkpoint["method"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.run / 'last.pt'} does not fit these options: give those of {self.run / 'config.toml'} again."
            ) from error
        self.guard = FiniteGuard(self.method, self.optimizer)  # a new one, which copies the buffers just loaded
        self.guard.skipped = checkpoint.get("skipped", 0)
        self.step = checkpoint["step"]
        torch.set_rng_state(checkpoint["rng"])
        if "cuda_rng" in checkpoint and self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.ranks.device)

    def _prepare(self, round_: int) -> Path | None:
        """Let the first rank prepare the round; the other ranks then read what it wrote."""
        maps = on_first(self.ranks, lambda: self.method.prepare(self.images, self.run, round_))
        return maps if self.ranks.first else self.method.prepare(self.images, self.run, round_)

    def _make_loader(self, maps: Path | None) -> "Loader":
        from fgfast.data.loader import make_loader

        c = self.config
        return make_loader(
            self.images, self.method.views(), c.batch_size, shuffle=True, seed=c.seed, maps=maps,
            device=self.ranks.device, threads=c.threads, rank=self.ranks.rank, world=self.ranks.world, backend=c.loader,
        )  # fmt: skip

    def _train_round(self, round_: int, loader: "Loader", caught: list[int], *, first: bool) -> None:
        per_epoch, total = len(loader), self.length.total
        end = total * (round_ + 1) // self.rounds
        if self.step >= end:
            return  # resumed after the end of this round
        with RunLog(self.run, total, self.step, self.ranks.first) as log:
            if first:
                log.record(self.description)
            while self.notes:
                log.print(self.notes.pop(0))
            for path, reason in loader.skipped:
                log.print(f"skipped {path}: {reason}")
            clock = _Clock()
            while self.step < end:
                batches = iter(loader)
                while self.step < end and (batch := clock.wait_for(batches)) is not None:
                    terms = self._train_step(batch, total, stop=bool(caught))
                    clock.images += len(batch) * self.ranks.world
                    log.advance(self.step)
                    self._report_skipped(log, wait=self.step == end)
                    if self.step % self.config.log_every == 0 or self.step == end:
                        log.write(self._metrics(terms, clock, per_epoch))
                    if self.guard.stop or (caught and self.ranks.world == 1):  # all ranks stop at the same step
                        self._save(round_, loader)
                        log.print(f"stopped at step {self.step} of {total}; --resume continues from here")
                        raise KeyboardInterrupt
                    epoch, step_of_epoch = divmod(self.step, per_epoch)
                    if step_of_epoch == 0:
                        with clock.paused():
                            self._end_epoch(epoch, total, round_, loader, log)
            self._save(round_, loader)
            if self.step == total and self.config.knn_every:
                self._evaluate(log, per_epoch)

    def _train_step(self, batch: "Batch", total: int, *, stop: bool) -> dict[str, float | Tensor]:
        """One step; returns the learning rate, the gradient norm before clipping and the terms of the method."""
        lr = self.config.learning_rate(self.step, total)
        self.method.before_step(Progress(self.step, total))
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
            terms = self.model(batch)
        grad_norm = self._update(terms["loss"], lr, batch.index, stop=stop)
        self.step += 1
        self.method.after_step(Progress(self.step, total))
        return {"lr": lr, "grad_norm": grad_norm, **terms}

    def _update(self, loss: Tensor, lr: float, index: Tensor, *, stop: bool) -> Tensor:
        """Backward, clip, guarded optimiser step; returns the gradient norm before clipping."""
        loss.backward()
        params = [p for p in self.method.parameters() if p.grad is not None]
        grad_norm = nn.utils.clip_grad_norm_(params, self.config.clip or float("inf"), foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.guard.step(loss, grad_norm, index, self.step, stop=stop)
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _report_skipped(self, log: RunLog, *, wait: bool) -> None:
        """Log the updates that were skipped; ``wait`` for those of the newest steps too."""
        for step, index in self.guard.verdicts(wait=wait):
            names = ", ".join(self.images.paths[i] for i in index[:4])
            log.print(f"step {step}: the loss was not finite, update skipped (batch of {len(index)}: {names}, ...)")

    def _metrics(self, terms: dict[str, float | Tensor], clock: "_Clock", per_epoch: int) -> dict[str, float]:
        row = {"step": self.step, "epoch": self.step / per_epoch}
        row |= {name: float(v.detach()) if isinstance(v, Tensor) else v for name, v in terms.items()}
        row |= clock.read(self.method.passes_per_image)
        return row | {"memory_mb": peak_memory_mb(self.ranks.device), "skipped": self.guard.skipped}

    def _end_epoch(self, epoch: int, total: int, round_: int, loader: "Loader", log: RunLog) -> None:
        c = self.config
        if epoch % c.save_every == 0:
            self._save(round_, loader)
        if c.knn_every and epoch % c.knn_every == 0 and self.step < total:
            self._evaluate(log, self.step // epoch)

    def _evaluate(self, log: RunLog, per_epoch: int) -> None:
        """Log online kNN top-1 on the test split (with --holdout: the held-out images) and the method's own scores.

        They are only logged: no checkpoint or setting is chosen by them.
        """
        from fgfast.evaluate.protocols import online_knn

        if self.ranks.first:
            knn = online_knn(self.method.encoder, self.config, self.ranks.device)
            scores = self.method.scores(self.ranks.device) | ({} if knn is None else {"knn": knn})
            if scores:
                log.write({"step": self.step, "epoch": self.step / per_epoch, **scores})
        barrier(self.ranks)

    def _save(self, round_: int, loader: "Loader") -> None:
        on_first(self.ranks, lambda: self._write_checkpoint(round_, loader))

    def _write_checkpoint(self, round_: int, loader: "Loader") -> None:
        if self.claim is not None:
            self.claim.confirm(self.run)
        state = {
            "name": self.method.name, "step": self.step, "total": self.length.total, "round": round_,
            "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
            "loader": loader.state_dict(), "rng": torch.get_rng_state(), "skipped": self.guard.skipped,
        }  # fmt: skip
        if self.ranks.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.ranks.device)
        save_encoder(self.run / "encoder.safetensors", self.method.encoder.net, self.config.model)
        save_checkpoint(self.run / "last.pt", state)  # written last: all files of the step it records are complete


def _distribute(method: Method, ranks: Ranks) -> nn.Module:
    method.set_group(torch.distributed.group.WORLD)
    ddp = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # torch 2.15 warns about the older name
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    if ranks.device.type == "cuda":
        options["device_ids"] = [ranks.device.index]
    return ddp(method, find_unused_parameters=method.idle_parameters, **options)


class _Clock:
    """Images, seconds and seconds of waiting for data since the last reading."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def wait_for(self, batches: "Iterator[Batch]") -> "Batch | None":
        """The next batch, or None at the end of the epoch."""
        start = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - start
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: evaluation is not training."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def read(self, passes_per_image: float) -> dict[str, float]:
        """The rates since the last reading."""
        seconds = time.perf_counter() - self.start
        rate, waiting = self.images / seconds, self.waited / seconds
        self._reset()
        return {"images_per_s": rate, "passes_per_s": rate * passes_per_image, "data_wait": waiting}
