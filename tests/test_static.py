"""The model of the machine code: parsing, counting, trips, the rule of overlap; and structure of the goals' kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("triton")

from benchmarks.static import __main__ as command
from benchmarks.static import cases, disassembly, plot, table, tiles, units
from benchmarks.static.capture import check_arch, pretend
from benchmarks.static.disassembly import Missing, parse
from benchmarks.static.machine import Machine, Moved, Piece
from benchmarks.static.rates import RATES

H200 = RATES["sm_90"]
BLOCK, D, TILES = 128, 64, 40


def listing(*code: str) -> disassembly.Function:
    """A function of these lines, each an instruction or a label, as nvdisasm writes them."""
    lines, address = ['	.section	.text.toy,"ax",@progbits'], 0
    for line in code:
        if line.endswith(":"):
            lines.append(line)
        else:
            lines.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return parse("\n".join(lines))["toy"]


RECORDED = """
	.section	.text.step,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P3 BRA `(.L_x_1) ;
.L_x_2:
        /*0020*/                   DEPBAR.LE SB0, 0x1 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R119+UR8], desc[UR14][R2.64] ;
        /*0070*/                   LDGDEPBAR ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   MUFU.EX2 R24, R24 ;
        /*00a0*/              @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*00b0*/               @P0 EXIT ;
        /*00c0*/                   STG.E desc[UR14][R2.64], R24 ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_3);
"""


def test_loops_are_found_in_a_recorded_disassembly() -> None:
    (function,) = parse(RECORDED).values()
    (loop,) = function.loops  # the branch to itself at the end is not one
    assert (function.name, loop.depth) == ("step", 1)
    counts = units.count(function.own(loop))
    assert counts == {"barrier": 4, "tensor": 2, "async": 1, "exp2": 1, "control": 1}
    assert [i.opcode for i in function.own(None)][-3:] == ["STG.E", "EXIT", "BRA"]


def test_a_skeleton_shows_what_stands_between_issue_and_wait() -> None:
    (function,) = parse(RECORDED).values()
    steps = [event for event, _ in units.skeleton(function.own(function.loops[0])) if event != "."]
    assert steps == [
        "wait async 0x1", "barrier", "issue HGMMA.64x128x16", "LDGSTS", "commit async", "wait tensor 0x0", "EX2",
    ]  # fmt: skip


def test_loops_nest() -> None:
    inner = [".L_x_1:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_1)"]
    function = listing(".L_x_0:", "IADD3 R0, R0, 0x1, RZ", *inner, "@P1 BRA `(.L_x_0)", "EXIT")
    outer, inner = sorted(function.loops, key=lambda loop: loop.depth)
    assert inner.blocks < outer.blocks
    assert [i.name for i in function.own(outer)] == ["IADD3", "BRA"]


@pytest.mark.parametrize(
    ("opcode", "warps", "flops"),
    [
        ("HGMMA.64x256x16.F32.BF16", 8, 2 * 2 * 64 * 256 * 16),
        ("HGMMA.64x16x8.F32.TF32", 4, 2 * 64 * 16 * 8),
        ("HMMA.16816.F32.BF16", 8, 8 * 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 4, 4 * 2 * 16 * 8 * 8),
    ],
)
def test_flops_of_tensor_instructions(opcode: str, warps: int, flops: int) -> None:
    assert units.flops(disassembly.Instruction(0, "", opcode, ""), warps) == flops


def run(function: disassembly.Function, trips: int = 1, moved: Moved | None = None, warps: int = 8) -> Machine:
    headers = [loop.header for loop in function.loops]
    machine = Machine(
        function, warps, H200, dict.fromkeys(headers, trips), dict.fromkeys([-1, *headers], moved or Moved()), "bf16"
    )
    machine.run()
    return machine


ONE = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24"
PRODUCT = [*[ONE] * 7, f"{ONE}, gsb0"]
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXPONENTIALS = [f"MUFU.EX2 R{i}, R{i}" for i in range(180, 220)]


def test_units_overlap_only_between_issue_and_wait() -> None:
    under = run(listing(*PRODUCT, *EXPONENTIALS, WAIT, "EXIT")).state.clock
    after = run(listing(*PRODUCT, WAIT, *EXPONENTIALS, "EXIT")).state.clock
    tensor, exponentials = 8 * 2 * 2 * 64 * 256 * 16 / 4096, 40 * 32 * 8 / 16
    assert under == pytest.approx(tensor, rel=0.1)
    assert after == pytest.approx(tensor + exponentials, rel=0.1)


def test_a_wait_leaves_as_many_copies_under_way_as_it_says() -> None:
    copies = Moved({"copy": [Piece(64_000.0)] * 3})  # 1,000 clocks each
    code = ["LDGSTS.E.128 [R1+UR8], desc[UR14][R2.64]", "LDGDEPBAR"] * 3
    passed = {}
    for n in (0, 1, 2):
        machine = Machine(listing(*code, f"DEPBAR.LE SB0, {n:#x}"), 8, H200, {}, {-1: copies}, "bf16")
        machine.body(None)
        passed[n] = machine.state.clock
    assert passed[0] - passed[1] == pytest.approx(1000)
    assert passed[1] - passed[2] == pytest.approx(1000)


def test_a_load_is_waited_for_where_its_register_is_used() -> None:
    load, work = "LDG.E R9, desc[UR14][R2.64]", [f"FADD R{i}, R{i}, R1" for i in range(20, 50)]
    moved = Moved({"load": [Piece(1024.0)]})
    late = run(listing(load, *work, "FADD R4, R4, R9"), moved=moved).state.clock
    early = run(listing(load, "FADD R4, R4, R9", *work), moved=moved).state.clock
    assert early - late == pytest.approx(2 * len(work), abs=5)


def test_an_iteration_counts_as_often_as_the_loop_runs() -> None:
    function = listing(".L_x_0:", *["FADD R1, R1, R2"] * 99, "@P0 BRA `(.L_x_0)", "EXIT")
    assert run(function, 1000).state.busy["issue"] == pytest.approx(1000 * 100 * 2, rel=0.001)


def checked(part: str) -> Any:
    """A part of :mod:`tests.static_check`, in a process that compiles."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = [sys.executable, "-W", "ignore", "-m", "tests.static_check", part]
    made = subprocess.run(code, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1])
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return checked("small")


def test_a_known_kernel_has_the_instructions_of_its_tile(small) -> None:
    found = small["product"]
    assert found["n_exp2"] == BLOCK * BLOCK // (8 * 32)
    assert found["tile_flops"] == 2 * BLOCK * BLOCK * D
    assert found["clocks_tensor"] == 2 * BLOCK * BLOCK * D // 4096
    assert found["tile_l2_bytes"] == BLOCK * D * 2
    assert (found["product"], found["spilled"]) == ("HGMMA", 0)


def test_trips_and_bytes_are_those_of_the_launch(small) -> None:
    assert small["trips"] == [TILES]
    assert small["flops"] == 2 * BLOCK * BLOCK * D
    assert small["copy_trips"] == [4, 3]  # 1,024 tiles of the first and the last of 264 programs
    assert ["load", 4096, "x_ptr"] in small["copy_reads"]


def test_a_copy_takes_at_least_the_time_of_its_bytes(small) -> None:
    assert small["copy"]["clocks"] > 2 * 4 * (1 << 20) / H200.memory / H200.processors
    assert small["copy"]["tile_memory_bytes"] == pytest.approx(4096, rel=0.05)


DIALECT = """
  tt.func public @toy(%n: i32, %x: !tt.ptr<f32>) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    %data = tt.load %x : !tt.ptr<i32> loc(#loc1)
    %half = arith.divsi %n, %c64_i32 : i32 loc(#loc1)
    %more = arith.cmpi sgt, %half, %c0_i32 : i32 loc(#loc1)
    scf.if %more {
      scf.for %i = %c0_i32 to %half step %c64_i32  : i32 {
      } loc(#loc1)
    } else {
      scf.for %i = %c0_i32 to %data step %c64_i32  : i32 {
      } loc(#loc1)
    } loc(#loc1)
  }
"""


@pytest.mark.parametrize(("n", "taken", "trips"), [(64 * 130, (1, 0), 3), (0, (0, 1), 0)])
def test_branches_and_bounds_are_computed_from_arguments(n: int, taken: tuple[int, int], trips: int) -> None:
    then, other = tiles.read(DIALECT, {"n": n}).inner
    assert (then.trips, other.trips) == taken
    assert then.inner[0].trips == trips
    assert other.inner[0].trips is None  # depends on data


def test_rows_of_another_architecture_and_triton_are_kept(tmp_path) -> None:
    head = {
        "kernel": "k",
        "shape": "N=1",
        "dtype": "bf16",
        "launch": table.WHOLE,
        "goal": 0.5,
        "predicted_share": "0.4",
    }
    path = tmp_path / "static.csv"
    table.write([head | {"arch": "sm_90", "triton": "3.8.0"}], path)
    table.write([head | {"arch": "sm_90", "triton": "3.6.0"}, head | {"arch": "sm_100", "triton": "3.8.0"}], path)
    table.write([head | {"arch": "sm_90", "triton": "3.8.0", "predicted_share": "0.6"}], path)
    found = {(row["arch"], row["triton"]): row["predicted_share"] for row in table.read(path)}
    assert found == {("sm_90", "3.8.0"): "0.6", ("sm_90", "3.6.0"): "0.4", ("sm_100", "3.8.0"): "0.4"}
    assert plot.draw(table.read(path), path).read_text().startswith("<?xml")


def test_measured_times_are_filled_in_beside_the_predicted_ones(tmp_path) -> None:
    head = {"kernel": "k", "shape": "N=1", "dtype": "bf16", "arch": "sm_90", "triton": "3.8.0", "goal": 0.5}
    path = tmp_path / "static.csv"
    rows = [
        head | {"launch": "forward"},
        head | {"launch": table.WHOLE},
        head | {"launch": table.WHOLE, "arch": "sm_100"},
    ]
    table.write(rows, path)
    goal = cases.Goal("k", "N=1", "bf16", lambda: lambda: None, 0.5)
    table.fill(path, "sm_90", "3.8.0", table.measure([goal], lambda call: 0.25))
    assert [row["measured_ms"] for row in table.read(path)] == ["", "0.25", ""]


def test_a_second_wait_for_the_same_barrier_is_a_retry() -> None:
    """What follows a failed wait: it waits in a loop of its own, and jumps back."""
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8+0x100], R4"
    copy = ["SYNCS.ARRIVE.TRANS64 RZ, [UR8+0x100], R4", "UTMALDG.2D [UR8], [UR26]"]
    retry = [".L_x_2:", wait, "@!P1 BRA `(.L_x_2)", "BRA `(.L_x_3)"]
    function = listing(*copy, *copy, wait, "@!P1 BRA `(.L_x_2)", ".L_x_3:", "FADD R1, R1, R2", "EXIT", *retry)
    machine = Machine(function, 8, H200, {}, {-1: Moved({"tma": [Piece(64_000.0)] * 2})}, "bf16")
    machine.body(None)
    assert len(machine.state.phases) == 1


def test_each_architecture_has_its_own_rows_and_code_in_one_process() -> None:
    from triton.runtime import driver

    from fgfast.kernels import configs

    numbers = set()
    for arch in ("sm_90", "sm_120", "sm_90"):
        with pretend(arch, 132, configs.SHARED[arch]):
            row = configs.config("contrast forward", torch.device("cuda"), "half", channels=256)
            numbers.add(driver.active.get_current_device())
        assert row in configs.ROWS["contrast forward", arch]
    assert len(numbers) == 2


def test_an_unknown_architecture_is_one_sentence(capsys, monkeypatch) -> None:
    assert command.main(["--arch", "sm_75"]) == 2
    assert "no rates of the architecture 'sm_75'" in capsys.readouterr().err
    monkeypatch.setitem(RATES, "sm_999", H200)
    with pytest.raises(Missing, match="does not know the architecture 'sm_999'"):
        check_arch("sm_999")


def test_a_missing_disassembler_is_one_sentence(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("triton.__path__", [str(tmp_path)])
    assert command.main([]) == 2
    assert "There is no nvdisasm at" in capsys.readouterr().err


def test_a_file_that_is_no_machine_code_is_one_sentence(capsys, tmp_path) -> None:
    (tmp_path / "x.cubin").write_bytes(b"not machine code")
    assert command.main(["--cubin", str(tmp_path / "x.cubin")]) == 2
    assert "nvdisasm cannot read" in capsys.readouterr().err
    assert command.main(["--cubin", str(tmp_path / "none")]) == 2
    assert command.main(["--only", "no such operation"]) == 2


# ---------------------------------------------------------------- the kernels of the goals


@pytest.fixture(scope="module")
def launches() -> list[dict[str, Any]]:
    return checked("goals")


def test_kernels_of_the_goals_do_not_spill(launches) -> None:
    assert len(launches) > 60
    assert [(row["arch"], row["launch"]) for row in launches if int(row["spilled"])] == []


@pytest.mark.parametrize(("arch", "product", "fewest"), [("sm_90", "HGMMA", 0), ("sm_100", "UTCHMMA", 1)])
def test_logits_are_products_of_many_warps_with_copies_beside_them(
    launches, arch: str, product: str, fewest: int
) -> None:
    """``fewest``: copies that an asynchronous wait leaves under way."""
    rows = [row for row in launches if row["kernel"].startswith("contrast") and row["launch"] in cases.PRODUCTS]
    rows = [row for row in rows if row["arch"] == arch]
    assert {row["product"] for row in rows} == {product}
    assert all(int(row["n_async"]) > 0 for row in rows)
    assert all(int(row["depth"]) >= fewest for row in rows)


def test_instructions_of_a_tile_are_as_few_as_recorded(launches) -> None:
    over = [row for row in launches if row["most"] and table.instructions(row) > 1.05 * row["most"]]
    assert [(row["arch"], row["kernel"], row["shape"], row["launch"]) for row in over] == []
