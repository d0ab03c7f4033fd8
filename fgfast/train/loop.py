"""The training loop: reads top to bottom, from a configuration to a run folder."""

import inspect
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgfast.config import TrainConfig, read_toml, to_toml, validate
from fgfast.data.splits import pretext_images
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.methods.base import METHODS, Method, Progress, method_class
from fgfast.models.backbone import Backbone
from fgfast.run import load_checkpoint, save_checkpoint, save_encoder
from fgfast.train.distributed import Ranks, barrier, start
from fgfast.train.log import RunLog, peak_memory_mb
from fgfast.train.optim import FiniteGuard, learning_rate, make_optimizer

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.loader import Loader


def pretrain(name: str, config: TrainConfig, *, train: bool = True) -> Path:
    """Train a method and write its run folder.

    The folder holds config.toml, init.pt (the weights of step 0), last.pt (everything that ``resume`` needs),
    encoder.safetensors, metrics.jsonl, log.txt, tensorboard/ and, for methods that discover parts, parts_0/, ...

    Args:
        name: a method's name.
        config: its configuration, an instance of the method's Config.
        train: False stops after init.pt, for scores before training.

    Returns:
        The run folder.

    Raises:
        UserError: a setting, the data or the run folder cannot be used.
        KeyboardInterrupt: interrupted; last.pt was written before if a step was done (SIGTERM: in training only).
    """
    validate(config)
    ranks = start(config.device)
    run = Path(config.out)
    images = pretext_images(config)
    torch.manual_seed(config.seed)
    method = method_class(name)(config).to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.train()
    method.check_training_set(images)
    if config.passes:
        steps_of_passes(config, method, len(images), ranks.world)
    if train:
        from fgfast.data.manifest import check_images

        check_images(images, threads=config.threads, quiet=True)  # too many broken ones: before anything is written
    resumed = _open_run(run, name, config, ranks, method)
    if train:
        _Trainer(name, config, ranks, run, images, method).train(resumed)
    return run


def _open_run(run: Path, name: str, config: TrainConfig, ranks: Ranks, method: Method) -> dict[str, Any] | None:
    """Start the run folder, or read the checkpoint of the one to go on with."""
    last = run / "last.pt"
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file: give another --out.")
    if config.resume and last.is_file():
        state = load_checkpoint(last, name)
        check_options(run, config, (*ANY_TIME, *LENGTH))
        known = read_toml(run / "config.toml")
        if ranks.first and any(known.get(option) != getattr(config, option) for option in LENGTH):
            write_atomic(run / "config.toml", lambda p: p.write_text(to_toml(config, name)))
        return state
    if last.exists():
        raise UserError(f"{run} already holds a run: give --resume to go on with it, or another --out.")
    foreign = _is_foreign(run)
    barrier(ranks)  # every rank has looked before the first one writes
    if foreign:
        raise UserError(f"{run} holds other files: give another --out.")
    if ranks.first:
        run.mkdir(parents=True, exist_ok=True)
        for maps in run.glob("parts_*/maps.json"):
            maps.unlink()  # of a run that never saved, perhaps with other options: they are discovered again
        write_atomic(run / "config.toml", lambda p: p.write_text(to_toml(config, name)))
        save_checkpoint(run / "init.pt", {"name": name, "step": 0, "method": method.state_dict()})
    barrier(ranks)
    return None


def _is_foreign(run: Path) -> bool:
    """Whether a folder holds what no run has begun."""
    if not run.is_dir() or not any(run.iterdir()):
        return False
    try:
        return read_toml(run / "config.toml").get("method") not in METHODS
    except UserError:
        return True


ANY_TIME = ("data", "out", "device", "threads", "loader", "log_every", "knn_every", "save_every", "resume", "compile")
LENGTH = ("epochs", "passes")


def check_options(run: Path, config: TrainConfig, may_change: tuple[str, ...]) -> None:
    """Refuse other options than a run began with, but for those that may change.

    Raises:
        UserError: an option differs; the message names it and both values.
    """
    from fgfast.methods.stored import read_run

    _, before = read_run(run)
    for name, value in vars(config).items():
        if name not in may_change and getattr(before, name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{run} began with {flag} {getattr(before, name)}, not {value}: "
                f"give the options of {run / 'config.toml'}, or another --out."
            )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step; a second one stops at once.

    Outside the main thread nothing changes.
    """
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rounds(config: TrainConfig) -> int:
    return max(1, getattr(config, "rounds", 1))


def steps_of_passes(config: TrainConfig, method: Method, n_images: int, world: int) -> int:
    """Steps that ``config.passes`` encoder passes pay for, after what the rounds need before they start.

    Raises:
        UserError: they do not pay for one step.
    """
    preparation = _rounds(config) * method.passes_to_prepare * n_images
    steps = int((config.passes - preparation) / (method.passes_per_image * config.batch_size * world))
    if steps < 1:
        raise UserError(f"--passes {config.passes} does not pay for one step: give more.")
    return steps


class _Trainer:
    """One run: its parts, and the loop over rounds, epochs and steps."""

    def __init__(
        self, name: str, config: TrainConfig, ranks: Ranks, run: Path, images: "ImageSet", method: Method
    ) -> None:
        self.name, self.config, self.ranks, self.run, self.images = name, config, ranks, run, images
        self.method = method
        self.rounds = _rounds(config)
        self.optimizer = make_optimizer(method, config)
        self.guard = FiniteGuard(method, self.optimizer)
        self.step = 0
        if config.compile:
            for module in method.modules():
                if isinstance(module, Backbone):
                    module.net.forward_features = torch.compile(module.net.forward_features)
        self.model: nn.Module = method
        if ranks.world > 1:
            method.set_group(torch.distributed.group.WORLD)
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            ddp = nn.parallel.DistributedDataParallel
            newer = (
                "forward_sync_buffers" in inspect.signature(ddp).parameters
            )  # the name before torch 2.15 warns there
            buffers: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
            self.model = ddp(method, device_ids=ids, find_unused_parameters=method.idle_parameters, **buffers)

    def steps_in_all(self, per_epoch: int) -> int:
        """Steps of the whole run: epochs, or what a budget of encoder passes pays for."""
        if self.config.passes:
            return steps_of_passes(self.config, self.method, len(self.images), self.ranks.world)
        return self.config.epochs * per_epoch

    def train(self, resumed: dict[str, Any] | None) -> None:
        """Run every round; on a stop signal save and raise KeyboardInterrupt."""
        if resumed is not None:
            self._restore(resumed)
        first_round = resumed["round"] if resumed is not None else 0
        for round_ in range(first_round, self.rounds):
            maps = self._prepare(round_)
            loader = self._loader(maps)
            try:
                if resumed is not None:
                    loader.load_state_dict(resumed["loader"])
                    resumed = None
                else:
                    loader.epoch = -(-self.step // len(loader))  # a later round sees other crops than the first
                with _stop_signals() as caught:
                    self._round(round_, loader, caught)
            finally:
                loader.close()

    def _prepare(self, round_: int) -> Path | None:
        maps = None
        if self.ranks.first:
            maps = self.method.prepare(self.images, self.run, round_)
        barrier(self.ranks)
        return maps if self.ranks.first else self.method.prepare(self.images, self.run, round_)

    def _loader(self, maps: Path | None) -> "Loader":
        from fgfast.data.loader import make_loader

        c = self.config
        return make_loader(
            self.images, self.method.views(), c.batch_size, shuffle=True, seed=c.seed, maps=maps,
            device=self.ranks.device, threads=c.threads, rank=self.ranks.rank, world=self.ranks.world, backend=c.loader,
        )  # fmt: skip

    def _round(self, round_: int, loader: "Loader", caught: list[int]) -> None:
        c = self.config
        per_epoch = len(loader)
        total = self.steps_in_all(per_epoch)
        end = total * (round_ + 1) // self.rounds
        if self.step >= end:
            return  # resumed after its end
        autocast = torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=c.amp == "bf16")
        with RunLog(self.run, total, self.step, self.ranks.first) as log:
            for path, reason in loader.skipped:
                log.say(f"skipped {path}: {reason}")
            clock = _Clock()
            while self.step < end:
                batches = iter(loader)
                while self.step < end:
                    waited = time.perf_counter()
                    batch = next(batches, None)
                    clock.wait += time.perf_counter() - waited
                    if batch is None:
                        break
                    lr = learning_rate(self.step, total, c)
                    self.method.before_step(Progress(self.step, total))
                    with autocast:
                        out = self.model(batch)
                    grad_norm = self._update(out["loss"], lr, batch.index, stop=bool(caught))
                    self.step += 1
                    self.method.after_step(Progress(self.step, total))
                    clock.images += len(batch) * self.ranks.world
                    log.advance(self.step)
                    self._report_skipped(log, all_of_them=self.step == end)
                    if self.step % c.log_every == 0 or self.step == end:
                        row = {
                            "step": self.step,
                            "epoch": self.step / per_epoch,
                            "lr": lr,
                            "grad_norm": float(grad_norm),
                        }
                        row |= {k: float(v.detach()) for k, v in out.items()}
                        row |= clock.read(self.method.passes_per_image)
                        log.write(row | {"memory_mb": peak_memory_mb(self.ranks.device), "skipped": self.guard.skipped})
                    if self.guard.stop or (caught and self.ranks.world == 1):  # ranks agree on the step
                        self._save(round_, loader)
                        log.say(f"stopped at step {self.step} of {total}; --resume goes on from here")
                        raise KeyboardInterrupt
                    epoch, inside = divmod(self.step, per_epoch)
                    if inside == 0:
                        began = time.perf_counter()
                        self._end_of_epoch(epoch, total, round_, loader, log)
                        clock.began += time.perf_counter() - began  # evaluation is not training
            self._save(round_, loader)
            if self.step == total and c.knn_every:
                self._knn(log, per_epoch)

    def _update(self, loss: Tensor, lr: float, index: Tensor, *, stop: bool) -> Tensor:
        """Backward, clip, guarded optimiser step; returns the gradient norm before clipping."""
        c = self.config
        loss.backward()
        params = [p for p in self.method.parameters() if p.grad is not None]
        grad_norm = nn.utils.clip_grad_norm_(params, c.clip if c.clip else float("inf"), foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.guard.step(loss, grad_norm, index, self.step, stop=stop)
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _report_skipped(self, log: RunLog, all_of_them: bool) -> None:
        for step, index in self.guard.verdicts(all_of_them=all_of_them):
            names = ", ".join(self.images.paths[i] for i in index[:4])
            log.say(f"step {step}: the loss was not finite, update skipped (batch of {len(index)}: {names}, ...)")

    def _end_of_epoch(self, epoch: int, total: int, round_: int, loader: "Loader", log: RunLog) -> None:
        c = self.config
        if epoch % c.save_every == 0:
            self._save(round_, loader)
        if c.knn_every and epoch % c.knn_every == 0 and self.step < total:
            self._knn(log, self.step // epoch)

    def _knn(self, log: RunLog, per_epoch: int) -> None:
        """Online kNN top-1 on the test split (the held-out part under --holdout) and the method's own scores.

        Nothing is chosen by them.
        """
        from fgfast.evaluate.protocols import online_knn

        if self.ranks.first:
            score = online_knn(self.method.encoder, self.config, self.ranks.device)
            found = self.method.scores(self.ranks.device) | ({} if score is None else {"knn": score})
            if found:
                log.write({"step": self.step, "epoch": self.step / per_epoch, **found})
        barrier(self.ranks)

    def _save(self, round_: int, loader: "Loader") -> None:
        if not self.ranks.first:
            return
        state = {
            "name": self.name, "step": self.step, "round": round_, "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(), "loader": loader.state_dict(), "rng": torch.get_rng_state(),
            "skipped": self.guard.skipped,
        }  # fmt: skip
        if self.ranks.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.ranks.device)
        save_encoder(self.run / "encoder.safetensors", self.method.encoder.net, self.config.model)
        save_checkpoint(self.run / "last.pt", state)  # the last file: what it says is done is there

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.run / 'last.pt'} does not fit these options: give those of {self.run / 'config.toml'} again."
            ) from error
        self.guard = FiniteGuard(self.method, self.optimizer)  # its copies are of the buffers just loaded
        self.guard.skipped = state.get("skipped", 0)
        self.step = state["step"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.ranks.device)


class _Clock:
    """Images, seconds and seconds of waiting since it was read last."""

    def __init__(self) -> None:
        self.began, self.wait, self.images = time.perf_counter(), 0.0, 0

    def read(self, passes_per_image: float) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        rate, wait = self.images / seconds, self.wait / seconds
        self.began, self.wait, self.images = time.perf_counter(), 0.0, 0
        return {"images_per_s": rate, "passes_per_s": rate * passes_per_image, "data_wait": wait}
