"""Rates of the architectures, each with its source: what one processor does in a clock.

Two kinds of sources: [data] a vendor's data sheet or guide, divided by processors and clock; [measured] a published
measurement. What the model assumes beyond them is [assumed].

- CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions" [data]: float 128, integer 64,
  reciprocal and exponential 16, shuffle 32 results a clock for 9.0; 10.3 has twice the exponentials of 10.0
  (NVIDIA, Blackwell Ultra architecture, 2025).
- NVIDIA H100 white paper (2022) [data]: 989.4 TFLOP/s of dense bf16 on 132 processors at 1.83 GHz are 4,096 flop a
  clock and processor; tf32 half, fp8 twice. 228 KiB shared memory, 65,536 registers, 64 warps a processor.
- Luo et al., arXiv 2402.13499 and 2501.12084 [measured], H100: latencies of shared memory 29, L1 41, L2 263 and memory
  479 clocks, of ``mma.sync`` 33 (of the last product of a group too [assumed]); ``mma.sync`` reaches 63% of the rate of
  ``wgmma``.
- L2 of the H100 and H200: 5.5 to 7 TB/s in published copies that stay in it (Chips and Cheese, 2023, and others), 25 to
  31 bytes a clock and processor at 132 x 1.7 GHz; the model takes the middle [assumed]. That is what all processors get
  together; the port of one takes 64 bytes a clock (NVIDIA, Volta to Hopper) while others leave room.
- H200 data sheet [data]: 4.8 TB/s; a copy reaches 89% [assumed], 19 bytes a clock and processor. Boost clocks fall
  under load: 1.7 GHz [assumed].
- B200 data sheet (HGX B200) [data]: 2.25 PFLOP/s of dense bf16 on 148 processors at 1.85 GHz are 8,192; 8 TB/s. B300:
  the same but for twice the exponentials.
- RTX PRO 6000 Blackwell data sheet [data] for sm_120: 188 processors at 2.6 GHz, 504 TFLOP/s of dense bf16 with float32
  sums are 1,024 by ``mma.sync``; 1.79 TB/s; 100 KiB shared memory and 48 warps a processor.
- L2 and latencies of Blackwell: as on Hopper per processor, for want of a measurement [assumed].
"""

from typing import NamedTuple


class Rates(NamedTuple):
    """One architecture; rates are those of one processor in one clock."""

    device: str
    processors: int
    ghz: float
    tensor: dict[str, float]  # flop by kind of product: "bf16", "tf32", "fp8"
    synchronous: float  # fraction of it that mma.sync reaches
    exp2: int  # lanes, of reciprocals and the like too
    l2: float  # bytes between L2 and the processor, both ways
    memory: float  # bytes between memory and the device, as a copy reaches, over the processors
    product: float  # flop of a library's bf16 product
    shared_kib: int  # a processor
    warps: int  # that a processor holds
    shared_limit: int  # KiB that a program may have
    float32: int = 128
    integer: int = 64
    shuffle: int = 32
    shared: int = 128  # bytes
    port: int = 64  # bytes between L2 and a processor while others leave room
    registers: int = 65_536
    programs: int = 32  # that a processor holds
    shared_latency: int = 29
    cache_latency: int = 41
    l2_latency: int = 263
    memory_latency: int = 479
    mma_latency: int = 33  # of mma.sync, and of the last product of a group

    def limit(self, kind: str) -> float:
        """Flop a clock of a library's product: the limit that shares are of."""
        return self.product * self.tensor[kind] / self.tensor["bf16"]


HOPPER = {"bf16": 4096.0, "tf32": 2048.0, "fp8": 8192.0}
DATACENTER = {"bf16": 8192.0, "tf32": 4096.0, "fp8": 16384.0}
WORKSTATION = {"bf16": 1024.0, "tf32": 512.0, "fp8": 2048.0}
B200 = Rates("B200", 148, 1.75, DATACENTER, 0.25, 16, 28.0, 8e12 * 0.89 / 148 / 1.75e9, 8192 * 0.86, 228, 64, 227)
RATES = {
    # 790 TFLOP/s are what cuBLAS reaches on an H200 [measured, the goals' limit]: 86% of the peak at 1.7 GHz, which is
    # taken for the others too [assumed].
    "sm_90": Rates("H200", 132, 1.7, HOPPER, 0.63, 16, 28.0, 19.0, 790e12 / 132 / 1.7e9, 228, 64, 227),
    "sm_100": B200,
    "sm_103": B200._replace(device="B300", exp2=32),
    "sm_120": Rates(
        "RTX PRO 6000", 188, 2.3, WORKSTATION, 1.0, 16, 28.0, 1.79e12 * 0.89 / 188 / 2.3e9, 1024 * 0.86, 100, 48, 99
    ),
}  # fmt: skip
