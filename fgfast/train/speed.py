"""How many images per second a method trains on, apart from its data: steps on one batch that is in memory."""

import time

import torch

from fgfast.config import with_values
from fgfast.data.loader import make_loader
from fgfast.data.manifest import Records
from fgfast.methods.base import Method, Progress, method_class
from fgfast.ranks import Ranks
from fgfast.train.step import Step


def new_method(name: str, device: torch.device, **options: object) -> Method:
    """A method with random weights and default options but for those given.

    Raises:
        UserError: an option is out of range, or there is no such model.
    """
    kind = method_class(name)
    return kind(with_values(kind.Config(), options, "The command line")).to(device)


def step_rate(method: Method, records: Records, *, backend: str = "auto", seconds: float = 5.0) -> float:
    """Images per second of the steps of a method: forward, backward and optimiser, on one batch again and again.

    Args:
        method: the method, on its device.
        records: usable images of which the batch is made.
        backend: "dali" or "torchvision".
        seconds: time of the measurement, after a first step; at least two steps are timed.
    """
    config = method.config
    device = next(method.parameters()).device
    few = records.images.subset(records.index[: config.batch_size])
    loader = make_loader(few, method.normalised_views(), len(few), threads=1, backend=backend, device=device)
    batch = next(iter(loader))
    loader.close()
    method.train()
    step = Step(method, Ranks(device=device))
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        step(batch)
        optimizer.step()
        method.after_step(Progress(0, 1000))

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    run()
    start, n = wait(), 0
    while n < 2 or time.perf_counter() - start < seconds:
        run()
        n += 1
    return n * len(batch) / (wait() - start)
