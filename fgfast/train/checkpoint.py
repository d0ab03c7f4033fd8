"""What a checkpoint holds: the state that all ranks share and what each rank has of its own, in one dictionary.

Keys of last.pt:
    name, step, total, round   method, steps done, steps of the complete run, round of training
    method, optimizer          state dicts, with the buffers of the first rank
    loader                     position in the data, see Loader.state_dict
    rng, cuda_rng              random state of what is drawn for the images of all ranks at once (one process: of all)
    input                      input statistics of the encoder, as texts
    skipped, skipped_in_a_row  steps whose loss was not finite
    ranks                      of each of several ranks: its random states, its buffers that differ from the first's
    images_per_step            batch size x number of ranks
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgfast.methods.base import Method
from fgfast.ranks import Ranks


@dataclass
class RandomStates:
    """The random states of a process.

    Args:
        cpu: state of PyTorch's generator on the CPU.
        cuda: state of its generator on the CUDA device of the process, or None on the CPU.
        shared: state of the generator of all ranks, or None for one process, which uses PyTorch's.
    """

    cpu: Tensor
    cuda: Tensor | None = None
    shared: Tensor | None = None


class RandomSource:
    """The generators of a process.

    With several ranks each one draws its dropout from PyTorch's own generator, seeded by its rank. What belongs to
    images is drawn for those of all ranks at once, from a generator in the same state on every rank; it starts in the
    state that PyTorch's generator has in a run with one process.

    Args:
        ranks: the ranks.
        seed: seed of the run.
    """

    def __init__(self, ranks: Ranks, seed: int) -> None:
        self.ranks, self.seed = ranks, seed
        self.on_cuda = ranks.device.type == "cuda"
        self.shared: torch.Generator | None = None
        if ranks.world > 1:
            self.shared = torch.Generator(ranks.device)
            self.shared.set_state(torch.cuda.get_rng_state(ranks.device) if self.on_cuda else torch.get_rng_state())
            self._seed_rank(0)

    def _seed_rank(self, step: int) -> None:
        """Seed PyTorch's generators, differently on every rank."""
        torch.manual_seed(self._number(self.ranks.rank, step))

    def _number(self, whose: int | str, step: int) -> int:
        digest = hashlib.blake2b(f"{self.seed} {whose} {step}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def read(self) -> RandomStates:
        """The present states."""
        return RandomStates(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(self.ranks.device) if self.on_cuda else None,
            None if self.shared is None else self.shared.get_state(),
        )

    def write(self, states: RandomStates) -> None:
        """Set the states."""
        torch.set_rng_state(states.cpu)
        if states.cuda is not None:
            torch.cuda.set_rng_state(states.cuda, self.ranks.device)
        if states.shared is not None and self.shared is not None:
            self.shared.set_state(states.shared)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leave the states as they were before the block: what is drawn in it changes no later draw."""
        states = self.read()
        try:
            yield
        finally:
            self.write(states)

    def store(self, of_ranks: "list[RankState]") -> dict[str, Any]:
        """The entries of a checkpoint from the states of the ranks, the first one first."""
        first = of_ranks[0].random
        stored: dict[str, Any] = {"rng": first.cpu}
        if first.cuda is not None:
            stored["cuda_rng"] = first.cuda
        if first.shared is not None:
            stored["cuda_rng" if self.on_cuda else "rng"] = first.shared
            stored["ranks"] = [
                {"cpu": rank.random.cpu, "cuda": rank.random.cuda, "buffers": rank.buffers} for rank in of_ranks
            ]
        return stored

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the states of a checkpoint; after another number of ranks only the shared one goes on."""
        cuda = checkpoint.get("cuda_rng") if self.on_cuda else None
        if self.shared is None:
            self.write(RandomStates(checkpoint["rng"], cuda))
            return
        shared = cuda if self.on_cuda else checkpoint["rng"]
        if shared is None:  # written on CPUs, whose states a CUDA device does not take
            self.shared.manual_seed(self._number("shared", checkpoint["step"]))
        else:
            self.shared.set_state(shared)
        stored = checkpoint.get("ranks", [])
        if len(stored) == self.ranks.world:
            own = stored[self.ranks.rank]
            self.write(RandomStates(own["cpu"], own["cuda"] if self.on_cuda else None))
        else:
            self._seed_rank(checkpoint["step"])


def buffers_of(method: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module that are part of its state, by name."""
    state = method.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in method.named_buffers() if name in state}


@dataclass
class RankState:
    """What a rank has of its own, to be sent to the first one."""

    random: RandomStates
    failed: list[int]
    buffers: dict[str, Tensor]


def gather_ranks(method: Method, ranks: Ranks, random: RandomStates, failed: list[int]) -> list[RankState]:
    """The own states of all ranks on the first rank, an empty list on the others.

    Args:
        method: the method; only buffers that differ from those of the first rank are sent.
        ranks: the ranks.
        random: the random states of this rank.
        failed: images that this rank could not read.
    """
    if ranks.world == 1:
        return [RankState(random, failed, {})]
    digests = {name: _digest(buffer) for name, buffer in buffers_of(method).items()}
    of_first = [digests]
    dist.broadcast_object_list(of_first, src=0, device=ranks.device)
    differing = {n: b.detach().cpu() for n, b in buffers_of(method).items() if digests[n] != of_first[0][n]}
    gathered: list[Any] = [None] * ranks.world
    dist.gather_object(RankState(random, failed, differing), gathered if ranks.first else None)
    return gathered if ranks.first else []


def restore_buffers(method: Method, ranks: Ranks, checkpoint: dict[str, Any]) -> None:
    """Load the buffers of this rank, if the checkpoint is of the same number of ranks; else all have the first's."""
    stored = checkpoint.get("ranks", [])
    if len(stored) == ranks.world:
        buffers = buffers_of(method)
        for name, value in stored[ranks.rank]["buffers"].items():
            buffers[name].copy_(value)


@contextmanager
def first_buffers(method: Method, ranks: Ranks) -> Iterator[None]:
    """Give every rank the buffers of the first one, so that all have the same network, and then its own again."""
    if ranks.world == 1:
        yield
        return
    buffers = list(buffers_of(method).values())
    before = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        dist.broadcast(buffer, src=0)
    try:
        yield
    finally:
        for buffer, own in zip(buffers, before, strict=True):
            buffer.copy_(own)


def mean_over_ranks(terms: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """The means of logged values over all ranks."""
    if ranks.world == 1:
        return terms
    values = torch.tensor(list(terms.values()), dtype=torch.float64, device=ranks.device)
    dist.all_reduce(values)
    return dict(zip(terms, (values / ranks.world).tolist(), strict=True))


def _digest(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).digest()
