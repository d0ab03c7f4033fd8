"""The memory checker: exact traffic of a correct kernel, and one planted bug of each kind that must be caught."""

import os

import pytest
import torch

from fgfast.kernels.sanitizer import MemoryFault, checked, fewest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the checker needs Triton's interpreter", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
TensorDescriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor


@triton.jit
def scale(x, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < N), mask=at < N)


@triton.jit
def read_twice(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + tl.load(x + at))


@triton.jit
def copy_described(x, out):
    at = tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, x.load([0, 0]))


@triton.jit
def without_mask(x, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at), mask=at < N)


@triton.jit
def one_past_the_end(x, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < N), mask=at <= N)


@triton.jit
def overlapping(x, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < N), mask=at < N)


@triton.jit
def neighbour(out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 1.0, mask=at < N)
    other = (at + BLOCK) % N
    tl.store(out + at, tl.load(out + other), mask=at < N)


@triton.jit
def behind(out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 1.0, mask=at < N)
    before = at - BLOCK
    tl.store(out + at, tl.load(out + before, mask=before >= 0), mask=at < N)


@triton.jit
def total(x, out, N, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x + at, mask=at < N, other=0.0))
    if ATOMIC:
        tl.atomic_add(out, part, sem="relaxed")
    else:
        tl.store(out, tl.load(out) + part)


@triton.jit
def update_and_read(out):
    tl.atomic_add(out, 1.0, sem="relaxed")
    tl.store(out + 1 + tl.program_id(0), tl.load(out))


@triton.jit
def last_one_sums(x, parts, arrived, out, N, BLOCK: tl.constexpr, SEM: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(parts + tl.program_id(0), tl.sum(tl.load(x + at, mask=at < N, other=0.0)))
    if tl.atomic_add(arrived, 1, sem=SEM) == tl.num_programs(0) - 1:
        sums = tl.zeros([1], tl.float32)
        for i in range(tl.num_programs(0)):
            sums += tl.load(parts + i)
        tl.store(out + tl.arange(0, 1), sums)
        tl.store(arrived, 0)  # ready for the next launch


@triton.jit
def two_passes(x, out, N, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for _ in range(2):
        for i in range(0, N, BLOCK):
            sums += tl.load(x + i + lanes)
    tl.store(out + lanes, sums)


def test_bytes_of_a_correct_kernel_are_exact():
    x, out = torch.randn(96), torch.empty(96)
    with checked(x, out) as traffic:
        scale[(3,)](x, out, 96, BLOCK=32)
    assert torch.equal(out, 2 * x)
    assert (traffic.loads, traffic.stores, traffic.bytes) == (384, 384, 768)
    assert (traffic.launches, traffic.programs) == (1, 3)
    assert traffic.bytes == fewest(x, out)


def test_a_sector_counts_in_full_and_once_per_program():
    x, out = torch.randn(12), torch.empty(12)
    with checked() as traffic:
        scale[(3,)](x, out, 12, BLOCK=4)  # sectors of 8 numbers: 0, 0 and 1
    assert (traffic.loads, traffic.stores) == (96, 96)


@pytest.mark.parametrize(("kib", "passes"), [(64, 1), (127, 1), (160, 2)])
def test_a_second_read_is_free_while_its_tile_is_cached(kib, passes):
    x, out = torch.zeros(kib * 256), torch.empty(256)
    with checked(x, out) as traffic:
        two_passes[(1,)](x, out, len(x), BLOCK=256)
    assert traffic.loads == passes * x.nbytes
    assert traffic.stores == out.nbytes


@pytest.mark.parametrize("kernel", [without_mask, one_past_the_end])
def test_an_address_past_the_tensor_is_caught(kernel):
    whole = torch.zeros(2, 128)
    x, out = whole[0, :40], whole[1, :40]
    with pytest.raises(MemoryFault, match=f"{kernel.fn.__name__}: program"), checked(x, out):
        kernel[(2,)](x, out, 40, BLOCK=32)
    assert (whole == 0).all()


def test_the_gap_of_a_strided_tensor_is_outside():
    whole = torch.zeros(4, 16)
    with pytest.raises(MemoryFault, match="outside the elements of a tensor"), checked(whole[:, :8]):
        scale[(1,)](whole, torch.empty(64), 64, BLOCK=64)


def test_memory_outside_every_tensor_is_caught():
    x, out = torch.zeros(8), torch.zeros(8)
    with pytest.raises(MemoryFault), checked(x, out):
        scale[(1,)](x, out[1:], 1 << 20, BLOCK=32)


def test_two_programs_that_write_one_address_are_caught():
    x, out = torch.zeros(64), torch.empty(64)
    with pytest.raises(MemoryFault, match=r"program \(1, 0, 0\) stores .* that program \(0, 0, 0\) wrote"), checked():
        overlapping[(2,)](x, out, 63, BLOCK=32)


@pytest.mark.parametrize("kernel", [neighbour, behind])
def test_reading_what_another_program_writes_is_caught_in_either_order(kernel):
    with pytest.raises(MemoryFault, match="in the same launch"), checked():
        kernel[(2,)](torch.zeros(64), 64, BLOCK=32)


def test_atomics_may_meet_and_plain_updates_may_not():
    x, out = torch.ones(64), torch.zeros(1)
    with checked() as traffic:
        total[(2,)](x, out, 64, BLOCK=32, ATOMIC=True)
    assert out.item() == 64
    assert (traffic.loads, traffic.stores) == (x.nbytes + 64, 64)
    with pytest.raises(MemoryFault), checked():
        total[(2,)](x, out, 64, BLOCK=32, ATOMIC=False)


def test_a_plain_read_beside_atomics_is_caught():
    with pytest.raises(MemoryFault), checked():
        update_and_read[(2,)](torch.zeros(3))


def test_an_acquire_release_atomic_orders_programs_and_a_relaxed_one_does_not():
    x, parts, out = torch.ones(64), torch.empty(4), torch.empty(1)
    with checked():
        last_one_sums[(4,)](x, parts, torch.zeros(1, dtype=torch.int32), out, 64, BLOCK=16, SEM="acq_rel")
    assert out.item() == 64
    with pytest.raises(MemoryFault, match="no atomic orders"), checked():
        last_one_sums[(4,)](x, parts, torch.zeros(1, dtype=torch.int32), out, 64, BLOCK=16, SEM="relaxed")


def test_accesses_without_a_cache_are_counted():
    x, out = torch.zeros(64), torch.zeros(64)
    with checked(x, out) as traffic:
        read_twice[(1,)](x, out, BLOCK=64)
    assert traffic.bytes == 2 * 256
    assert traffic.requested == 3 * 256


def test_a_tensor_descriptor_is_counted_and_held_to_its_tensor():
    x, out = torch.zeros(4, 16), torch.zeros(8, 16)
    with checked() as traffic:
        copy_described[(1,)](TensorDescriptor(x[:3], [3, 16], [16, 1], [8, 16]), out)
    assert traffic.loads == 3 * 64
    with pytest.raises(MemoryFault, match="outside"), checked():
        copy_described[(1,)](TensorDescriptor(x[:3], [4, 16], [16, 1], [8, 16]), out)


def test_launches_do_not_race_with_each_other():
    out = torch.zeros(8)
    with checked() as traffic:
        for _ in range(2):
            scale[(1,)](out, out, 8, BLOCK=8)
    assert traffic.launches == 2


def test_hooks_are_removed():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = InterpreterBuilder.create_masked_load, GridExecutor.__call__
    with pytest.raises(ZeroDivisionError), checked():
        raise ZeroDivisionError
    assert (InterpreterBuilder.create_masked_load, GridExecutor.__call__) == before


def test_without_the_interpreter_an_error_is_raised(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), checked():
        pass
