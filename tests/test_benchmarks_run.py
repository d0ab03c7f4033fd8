"""The benchmark harness on a CPU, with tiny shapes and PyTorch's backend: judged, timed, tabulated, recorded, drawn."""

import argparse
import multiprocessing
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import ceilings, compiled, losses, peak, plots, record, run, table, traffic
from benchmarks.cases import OPERATIONS, contrast, find, planned, views
from benchmarks.endurance import blocks, images, kills, report
from benchmarks.endurance.__main__ import PARTS
from benchmarks.timing import Case, Clock, Unavailable, Variant, Verdict, faults, input_sets, measure

CPU = torch.device("cpu")
FOUND = ceilings.Ceilings(1e9, dict.fromkeys(ceilings.DTYPES, 1e9))
SLOW = ("torch.compile", "lightly", "DALI")  # left out: compiling and importing take longer than everything else


class Steps(Clock):
    """A clock by which every run takes one millisecond."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        self.now += 1
        return self.now

    def ms(self, start: int, end: int) -> float:
        return float(end - start)

    def peak(self, run):
        run()
        return 3 << 20


def toy(*variants: Variant, tolerance: float = 0.1, **options) -> Case:
    """Doubling a vector."""

    def judge(x):
        return lambda answer: Verdict(float((answer[0] - 2 * x).abs().max()))

    return Case(
        "double", "N=4", "fp32", lambda seed: torch.full((4,), float(seed)), variants, judge, tolerance, bytes=32,
        operations=4, input_bytes=16, **options,
    )  # fmt: skip


def right(x):
    return [2 * x]


def refuse():
    raise Unavailable("it is not installed")


def test_a_wrong_answer_has_no_time_and_a_missing_peer_has_a_reason():
    def fails(x):
        raise ValueError("shapes\nand more")

    case = toy(
        Variant("fgfast", lambda: right),
        Variant("wrong", lambda: lambda x: [2 * x + 1]),
        Variant("nan", lambda: lambda x: [x * torch.nan]),
        Variant("loose", lambda: lambda x: [2 * x + 0.15], slack=2.0),
        Variant("missing", refuse),
        Variant("fails", lambda: fails),
    )
    ours, wrong, nan, loose, missing, failed = measure(case, Steps())
    assert set(ours.times) == {1.0}
    assert ours.peak == 3 << 20
    assert not wrong.times
    assert not nan.times
    assert "wrong" in nan.skipped
    assert loose.times
    assert missing.skipped == "it is not installed"
    assert failed.skipped == "failed: ValueError: shapes"
    text = table.row([ours, wrong, missing]).summary()
    assert "wrong: an error of" in text
    assert "it is not installed" in text
    assert faults([ours, wrong, missing]) == []


def test_a_failure_or_too_much_memory_of_ours_is_a_fault_and_a_missing_package_is_none():
    def fails(x):
        raise ValueError("no")

    results = measure(toy(Variant("fgfast", lambda: fails), Variant("fgfast DALI", refuse)), Steps())
    assert [fault.partition(": ")[0] for fault in faults(results)] == ["fgfast"]
    (heavy,) = measure(toy(Variant("fgfast", lambda: right), most_memory=2 << 20), Steps())
    assert "peak of 3 MiB is over 2 MiB" in faults([heavy])[0]


def test_an_answer_that_changes_loses_its_time():
    runs = iter(range(1000))
    (drifting,) = measure(toy(Variant("fgfast", lambda: lambda x: [2 * x + next(runs)]), tolerance=2), Steps())
    assert not drifting.times
    assert "after timing" in drifting.skipped


def test_variants_take_turns_over_input_sets_that_outgrow_the_cache():
    seen = []
    variants = [
        Variant(name, lambda name=name: lambda x: seen.append((name, float(x[0]))) or right(x)) for name in "ab"
    ]
    case = toy(*variants)
    assert input_sets(case, cache=20) == 4
    assert input_sets(replace(case, input_bytes=1 << 30), cache=50 << 20) == 2
    assert input_sets(case, cache=0) == 1
    measure(case, Steps(), cache=20, budget_ms=1.0)
    timed = seen[-2 - 2 * 5 : -2]  # five rounds of two, and before the end one check of each
    assert [name for name, _ in timed] == list("abbaabbaab")
    assert [x for _, x in timed[::2]] == [0.0, 1.0, 2.0, 3.0, 0.0]


def test_without_a_least_number_of_rounds_a_slow_case_is_timed_by_its_warm_up():
    runs = []
    case = toy(Variant("fgfast", lambda: lambda x: runs.append(1) or right(x)))
    (slow,) = measure(case, Steps(), budget_ms=0.5, least=0)
    assert slow.times == [1.0]
    assert len(runs) == 4  # judged, weighed, timed, judged again


def test_the_table_has_a_line_per_case_with_times_faster_and_red_below_one():
    def row(ours, peer, other):
        results = measure(toy(*(Variant(name, lambda: right) for name in ("fgfast", "peer", "other"))), Steps())
        for result, ms in zip(results, (ours, peer, other), strict=True):
            result.times = [ms]
        return table.row([*results, *measure(toy(Variant("absent", refuse)), Steps())], FOUND)

    rows = [row(1.0, 20.0, 3.0), row(1.0, 0.5, 3.0)]
    assert [r.faster for r in rows] == [3.0, 0.5]
    text = table.as_text(rows, 200, colour=False)
    lines = [line for line in text.splitlines() if "double" in line]
    assert len(lines) == 2
    for piece in ("N=4", "peer 20 (20x)", "other 3 (3.00x)", "absent it is not installed", "3.00x", "peer 3"):
        assert piece in lines[0]
    assert "\x1b[31m" not in table.as_text(rows[:1], 200, colour=True)
    assert table.as_text(rows[1:], 200, colour=True).count("\x1b[31m") == 2  # the fastest contender, twice


def test_without_rich_the_table_is_plain_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    (line,) = (table.row(measure(toy(Variant("fgfast", lambda: right)), Steps())) for _ in range(1))
    assert "double N=4 fp32; 1; " in table.as_text([line], 80, colour=False)


def test_the_page_is_self_contained_and_has_a_bar_per_variant(tmp_path):
    results = measure(toy(*(Variant(name, lambda: right) for name in ("fgfast", "<peer>"))), Steps())
    results[1].times = [2.0]
    absent = measure(toy(Variant("absent", refuse)), Steps())
    path = table.write_page([table.row([*results, *absent])], "a device", tmp_path / "build" / "page.html")
    page = path.read_text()
    assert re.search(r"(src|href|url)\s*[=(]", page) is None
    assert page.count('class="fill"') == 2
    for piece in ("a device", "&lt;peer&gt;", "2.00x", "it is not installed", "peak 3 MiB"):
        assert piece in page


def test_the_peak_of_a_variant_is_measured_in_a_process_that_finds_the_case_by_name(monkeypatch):
    case = contrast.case("self", 512, 128, "fp32", CPU)
    assert find(CPU, case.name).shape == case.shape
    calls = []
    monkeypatch.setattr(peak, "peak_memory", lambda case, variant: calls.append(variant) or 5)
    ours, absent = measure(toy(Variant("fgfast", lambda: right), Variant("absent", refuse), weigh=True), Clock())
    peak.weigh([ours, absent])
    assert (calls, ours.peak, absent.peak) == (["fgfast"], 5, None)


def test_views_and_puzzles_are_measured_with_tiny_shapes():
    for case in views.cases(CPU, tiny=True):
        results = measure(case, Clock(), budget_ms=1.0, least=0, without=SLOW)
        assert all(r.times for r in results), [r.skipped for r in results]


def test_every_operation_is_measured_with_tiny_shapes(capsys, tmp_path):
    """Each reference, each judge and each variant that runs on a CPU; then the record and the plots of it."""
    kept = []
    wrong = run.measure_cases(
        planned(CPU, tiny=True), CPU, Clock(), FOUND, keep=kept.extend, budget_ms=1.0, without=SLOW
    )
    assert wrong == []
    ran = {(row["op"], row["variant"]) for row in kept if row["ms_50"]}
    assert {op for op, _ in ran} == set(OPERATIONS)
    assert len({variant for op, variant in ran if op == "contrast"}) >= 2
    assert all(float(row["error"]) < 0.05 for row in kept if row["ms_50"])
    assert "flash-kmeans needs a GPU" in capsys.readouterr().out
    here = record.setting(CPU)
    for _ in range(2):  # the second time appends
        record.append([*record.of_ceilings(FOUND), *kept], here, tmp_path / "results.csv")
    rows = record.read(tmp_path / "results.csv")
    assert len(rows) == 2 * (len(kept) + 5)
    assert tuple(rows[0]) == record.COLUMNS
    drawn = plots.draw(rows, here["device"], tmp_path)
    assert [path.name for path in drawn] == ["roofline.png"]  # no series of three sizes


def test_a_file_with_other_columns_is_not_appended_to(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="other columns"):
        record.append([], {}, path)


def test_series_of_three_sizes_are_drawn():
    rows = [
        {
            "device": "x", "op": "contrast", "variant": variant, "shape": f"pairs M={m} T={m} D=8", "dtype": "bf16",
            "ms_50": m, "bytes": m, "operations": m * m, "peak_mib": "" if variant == "eager" else m,
        }
        for variant in ("fgfast triton", "eager") for m in (4, 8, 16)
    ]  # fmt: skip
    assert list(plots.series(rows, "M")) == ["contrast pairs D=8 bf16"]
    assert plots.series(rows, "D") == {}
    figure = plots.scaling(rows)
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]


def test_the_cases_of_a_gpu_can_be_listed_without_one():
    """Making a case touches no device: shapes and floors of the table are as written."""
    cases = list(planned(torch.device("cuda"), quick=False, only="contrast"))
    goal = next(c for c in cases if c.shape == "pairs M=65536 T=65536 D=256" and c.dtype == "bf16")
    assert goal.quick
    assert goal.operations == 5 * 2 * 65536**2 * 256
    assert goal.bytes == 2 * 2 * 65536 * 256 * 2 + 3 * 8 * 2 * 65536
    (step,) = (c for c in planned(torch.device("cuda"), "kmeans_step", quick=True))
    assert step.shape == "B=128 N=3136 D=768 K=25"
    assert [v.name for v in step.variants][:2] == ["fgfast triton", "fgfast triton, atomics"]


def test_ceilings_of_this_machine_are_numbers():
    found = ceilings.measure(CPU, Clock(), small=True)
    assert found.bandwidth > 1e6
    assert set(found.rates) == {"bf16", "fp16", "tf32", "fp32"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU")
def test_traffic_of_a_kernel_is_counted():
    (grid,) = traffic.count_all("labels_to_grid")
    row = grid.row()
    assert row["launches"] == 1
    assert row["fewest"] <= row["bytes"] <= 1.1 * row["fewest"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU")
def test_traffic_of_a_step_on_a_pyramid_is_counted():
    (step,) = traffic.count_all("kmeans", quick=True)
    assert step.row()["launches"] == 2
    assert 2 <= step.row()["ratio"] <= 2.7  # counted: 2.67, of which 2 are the levels, as each is read twice


def test_without_a_gpu_the_command_reports_what_it_cannot_measure(monkeypatch, tmp_path, capsys):
    rows = [{"op": "part_pool", "shape": "B=1", "dtype": "bf16", "launches": 1, "ratio": 1.2, "goal": 1.1}]
    monkeypatch.setattr(traffic, "rows", lambda only, quick: rows)
    chosen = argparse.Namespace(only="", quick=True, record=True, results=tmp_path)
    assert run.without_device(chosen) == 0
    out = capsys.readouterr().out
    assert "No GPU was found" in out
    assert "over the goal" in out
    assert record.read(tmp_path / "traffic.csv")[0]["ratio"] == "1.2"


def test_reports_of_compilers_become_one_table(monkeypatch, tmp_path, capsys):
    """The worst of a kernel's cases counts, and a compiler without a case of it has zeros."""
    report = {"triton": "3.6.0", "kernel": "contrast join", "arch": "sm_80", "registers": 40, "spilled": 0}
    reports = [
        report,
        report | {"spilled": 8},
        report | {"triton": "3.9.0"},
        report | {"triton": "3.9.0", "arch": "sm_90"},
    ]
    record.overwrite(reports, tmp_path / "reports.csv")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert compiled.main([str(tmp_path / "reports.csv")]) == 0
    first, second = record.read(tmp_path / "compilers.csv")
    assert (first["3.6.0 cases"], first["3.6.0 spilled"], first["3.9.0 spilled"]) == ("2", "8", "0")
    assert (second["arch"], second["3.6.0 cases"], second["3.9.0 registers"]) == ("sm_90", "0", "40")
    assert "1 with spills" in capsys.readouterr().out
    for wrong in ([], [str(tmp_path / "nothing.csv")]):
        with pytest.raises(SystemExit, match="2"):
            compiled.main(wrong)
    assert "cannot be read" in capsys.readouterr().err


def test_the_figure_of_the_readme_is_drawn_from_stored_numbers(monkeypatch, tmp_path):
    rows = [
        {"batch": batch, "variant": variant, "ms": batch / 100, "peak_mib": 3, "note": ""}
        for variant in ("fgfast torch", "eager", "lightly") for batch in (256, 512)
    ]  # fmt: skip
    monkeypatch.setattr(plots, "BATCHES", tmp_path / "contrast-batch.csv")
    record.overwrite(rows, plots.BATCHES)
    plots.main(["--readme", "--redraw"])
    assert (tmp_path / "contrast-batch.svg").stat().st_size < 60_000


@pytest.mark.slow
def test_the_command_refuses_an_operation_that_it_does_not_have():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "benchmarks.run", "--only", "sort"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "contrast" in done.stderr


def test_small_losses_are_compared_with_the_plain_formula(capsys):
    threads = torch.get_num_threads()
    try:
        assert losses.main(["ntxent B=8 D=128", "--seconds", "0.01"]) == 0
    finally:
        torch.set_num_threads(threads)
    _, row = capsys.readouterr().out.splitlines()
    assert row.startswith("ntxent B=8 D=128")
    assert float(row.split()[4]) > 0


def test_the_results_of_a_part_of_the_endurance_replace_those_before(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text(report.RESULTS.read_text())
    for part in PARTS:
        report.write(part, f"first {part}", path)
        report.write(part, f"second {part}", path)
    assert all(path.read_text().count(f"\nsecond {part}\n") == 1 for part in PARTS)
    assert "first" not in path.read_text().partition("## Endurance")[2].partition("## Runs")[0]
    path.write_text("# Results\n")
    with pytest.raises(ValueError, match="add them"):
        report.write("kills", "", path)


def test_lost_and_repeated_images_are_counted():
    assert images.count(3, iter([[0, 1, 2], [2, 0, 2, 2]])) == (6, 1, 2)


def test_one_bit_makes_two_checkpoints_differ():
    zero, negative = torch.zeros(1), -torch.zeros(1)
    nan = torch.full((1,), torch.nan)
    assert kills.equal({"a": [nan, 1]}, {"a": [nan.clone(), 1]})
    assert not kills.equal({"a": [zero, 1]}, {"a": [negative, 1]})
    assert not kills.equal({"a": 1}, {"a": 1, "b": 2})


def _trial(number: int, folder: Path) -> str:
    from fgfast.errors import UserError

    def fail() -> None:
        if number == 1:
            raise UserError("One sentence.")
        if number == 2:
            raise KeyError("undocumented")
        if number == 3:
            signal.raise_signal(signal.SIGKILL)

    return blocks.outcome_of(fail)


def test_a_trial_that_crashes_is_an_outcome_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(blocks, "context", lambda: multiprocessing.get_context("fork"))
    outcomes = blocks.run_trials(_trial, 6, tmp_path, workers=2)
    assert [outcomes[i] for i in (0, 1, 4, 5)] == ["success", "documented", "success", "success"]
    assert "KeyError" in outcomes[2]
    assert "exit status -9" in outcomes[3]
