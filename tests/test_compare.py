"""Comparisons: one row per finished run, resumable, learning rates tuned on held-out images, paired intervals."""

import csv
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fgfast.compare import Comparison, Entry
from fgfast.compare.entries import run_config
from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.errors import UserError
from fgfast.methods.refining import PLAIN
from fgfast.methods.simclr import SimCLR, SimCLRConfig
from fgfast.models.backbone import Backbone
from fgfast.run import save_encoder
from tests.conftest import TINY

pytestmark = pytest.mark.slow

SHARED = {
    "model": TINY, "size": 32, "batch_size": 6, "device": "cpu", "threads": 1, "amp": "off", "hidden": 16,
    "projection": 8, "passes": 60, "knn_every": 0, "log_every": 1, "n_parts": 3, "map_size": 8,
}  # fmt: skip


def comparison(drawn: Path, out: Path, **values: object) -> Comparison:
    options: dict[str, object] = {
        "methods": ["random", "simclr", "particle:parts=grid"],
        "seeds": [0, 1],
        "shared": SHARED,
        "data": [drawn],
    }
    return Comparison(out=out, **(options | {"baseline": "simclr"} | values))  # type: ignore[arg-type]


def test_finished_runs_are_stored_and_not_repeated(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison that is interrupted resumes with the missing runs; every run has the passes asked for."""
    from fgfast.train import loop

    real, started = loop.pretrain, []

    def interrupt_at_fourth(name: str, config: object, **kw: object) -> Path:
        if len(started) == 3:
            raise KeyboardInterrupt
        started.append(name)
        return real(name, config, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "pretrain", interrupt_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        comparison(drawn, tmp_path).run()
    rows = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert [(r["method"], r["seed"]) for r in rows] == [("random", "0"), ("simclr", "0"), ("particle:parts=grid", "0")]
    started.clear()
    monkeypatch.setattr(loop, "pretrain", lambda n, c, **kw: (started.append(n), real(n, c, **kw))[1])
    full = comparison(drawn, tmp_path)
    full.run()
    assert len(started) == 3
    rows = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert len(rows) == 6
    assert {r["passes"] for r in rows if r["method"] != "random"} <= {"60", "48"}
    assert all(0 <= float(r["nmi"]) <= 1 for r in rows)
    table = full.table()
    assert "`particle:parts=grid` | 2 |" in table
    assert (tmp_path / "compare.md").read_text() == table


def test_rows_with_other_settings_are_refused(drawn: Path, tmp_path: Path) -> None:
    """Another temperature in the same folder is an error that names it; log_every changes no result and may change."""
    comparison(drawn, tmp_path, methods=["simclr"], seeds=[0]).run()
    comparison(drawn, tmp_path, methods=["simclr"], seeds=[0], shared=SHARED | {"log_every": 2}).run()
    with pytest.raises(UserError, match="--temperature"):
        comparison(drawn, tmp_path, methods=["simclr"], seeds=[0], shared=SHARED | {"temperature": 0.5}).run()
    with pytest.raises(UserError, match="--passes"):
        comparison(drawn, tmp_path, methods=["simclr"], seeds=[0], shared=SHARED | {"passes": 72}).run()


def test_rows_of_other_input_statistics_are_refused(drawn: Path, tmp_path: Path) -> None:
    """Those of earlier versions, which used ImageNet's for any weights, cannot stand beside new runs."""
    half = InputStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    save_encoder(tmp_path / "w.safetensors", Backbone(TINY, size=32).net, TINY, stats=half)
    options: dict[str, Any] = {"methods": ["start"], "baseline": "", "protocols": ["knn"]}
    options["shared"] = SHARED | {"init": str(tmp_path / "w.safetensors")}
    comparison(drawn, tmp_path / "out", seeds=[0], **options).run()
    (file,) = (tmp_path / "out").glob("runs/*/start/seed0/config.toml")
    kept = [line for line in file.read_text().splitlines() if line.partition(" ")[0] not in InputStats._fields]
    file.write_text("\n".join(kept))
    comparison(drawn, tmp_path / "out", seeds=[0], **options).run()  # no new run
    with pytest.raises(UserError, match=r"was started with --mean 0\.485,0\.456,0\.406, not 0\.5,0\.5,0\.5"):
        comparison(drawn, tmp_path / "out", seeds=[0, 1], **options).run()
    as_before = {**options, "shared": options["shared"] | IMAGENET.texts()}
    comparison(drawn, tmp_path / "out", seeds=[0, 1], **as_before).run()


def test_rows_of_runs_that_were_not_refined_are_refused(drawn: Path, tmp_path: Path) -> None:
    """Earlier versions refined pretrained weights only if asked: such rows cannot stand beside refined ones."""
    save_encoder(tmp_path / "w.safetensors", Backbone(TINY, size=32).net, TINY)
    options: dict[str, Any] = {"methods": ["start"], "baseline": "", "protocols": ["knn"]}
    options["shared"] = SHARED | {"init": str(tmp_path / "w.safetensors")}
    comparison(drawn, tmp_path / "out", seeds=[0], **options).run()
    (file,) = (tmp_path / "out").glob("runs/*/start/seed0/config.toml")
    file.write_text(re.sub(rf"(?m)^({'|'.join(PLAIN._fields)}) = .*\n", "", file.read_text()))
    comparison(drawn, tmp_path / "out", seeds=[0], **options).run()  # no new run
    with pytest.raises(UserError, match=r"was started with --head-warmup 0\.0, not 0\.3"):
        comparison(drawn, tmp_path / "out", seeds=[0, 1], **options).run()
    as_before = {**options, "shared": options["shared"] | PLAIN._asdict() | {"freeze_bn": False}}
    comparison(drawn, tmp_path / "out", seeds=[0, 1], **as_before).run()


def test_an_entry_may_have_the_settings_of_a_paper(tmp_path: Path) -> None:
    shared = {"model": TINY, "size": 32}
    entries = [Entry.parse(text) for text in ("simclr:preset=paper,hidden=64", "color", "simclr")]
    paper, color, small = (run_config(entry, shared, Path("set"), tmp_path, 0) for entry in entries)
    assert paper == replace(SimCLR.paper(TINY), size=32, hidden=64, data="set", out=paper.out, seed=0, resume=True)
    assert (color.model, small.hidden) == (TINY, SimCLRConfig().hidden)
    assert run_config(entries[2], {"preset": "paper"}, Path("set"), tmp_path, 0).hidden == SimCLR.paper(None).hidden
    assert run_config(entries[1], {"preset": "paper"}, Path("set"), tmp_path, 0).model == "resnet18"


def test_rates_are_tuned_on_held_out_training_images(drawn: Path, tmp_path: Path) -> None:
    """Each rate is scored once, on a held-out part of the training split, and the runs use the best one."""
    c = comparison(drawn, tmp_path, methods=["simclr"], seeds=[0], lrs=[1e-4, 1e-2], tune_share=0.5)
    c.run()
    scores = json.loads((tmp_path / "tuned.json").read_text())[f"{drawn.name} simclr"]
    assert set(scores) == {"0.0001", "0.01"}
    row = next(csv.DictReader((tmp_path / "compare.csv").open()))
    assert scores[row["lr"]] == max(scores.values())


def test_a_setting_may_contain_the_seed(drawn: Path, tmp_path: Path) -> None:
    """{seed} is replaced by the seed."""
    c = comparison(drawn, tmp_path, methods=["simclr:init=base/seed{seed}"], baseline="")
    assert c.run_config(c.entries[0], drawn, 1).init == "base/seed1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ["simclr:nosuch=1"]}, "nosuch"),
        ({"shared": SHARED | {"nosuch": 1}}, "nosuch"),
        ({"baseline": "moco"}, "not among the methods"),
        ({"methods": ["particle:n_parts=many"], "baseline": ""}, "type int"),
        ({"methods": ["random:nosuch=1"], "baseline": ""}, "nosuch"),
        ({"methods": ["simclr:temperature=-1"], "baseline": ""}, "temperature"),
        ({"methods": ["simclr:seed=4"], "baseline": ""}, "itself sets seed"),
        ({"shared": SHARED | {"out": "o"}}, "itself sets out"),
        ({"tune_share": 3.0}, "--tune-share is 3"),
        ({"lrs": [0.1, float("inf")]}, "--lrs is inf: give a finite number of more than 0"),
        ({"data": [Path("/no/such")]}, "/no/such does not exist"),
    ],
)
def test_errors_are_found_before_the_first_run(
    drawn: Path, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    """Nothing is written when an entry or a setting cannot be used."""
    with pytest.raises(UserError, match=message):
        comparison(drawn, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"protocols": ["knn", "finetune:stages=99"]}, "random on .*--stages is 99: test_resnet has 4"),
        ({"methods": ["random", "simclr:model=nosuch"], "baseline": ""}, "simclr:model=nosuch on .*no model 'nosuch'"),
        ({"methods": ["random", "simclr:init=/no/such"], "baseline": ""}, "/no/such"),
        ({"methods": ["random", "jigsaw:grid=40"], "baseline": ""}, "jigsaw:grid=40 on .*lower --grid"),
        ({"methods": ["random", "simclr:device=cuda:77"], "baseline": ""}, "--device"),
        ({"methods": ["random", "simclr"], "shared": SHARED | {"passes": 1}}, "--passes 1 does not allow one step"),
        ({"methods": ["random", "simclr"], "lrs": [0.1], "tune_share": 0.01}, "--passes 1 does not allow"),
        ({"seeds": [0, -1]}, "--seeds is -1"),
    ],
)  # fmt: skip
def test_what_a_later_run_cannot_do_is_refused_before_the_first_one(
    drawn: Path, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    """Each network is built and each protocol checked, with nothing written."""
    with pytest.raises(UserError, match=message):
        comparison(drawn, tmp_path / "out", **values).run()
    assert not (tmp_path / "out").exists()


def test_a_run_may_start_from_weights_that_an_earlier_one_writes(drawn: Path, tmp_path: Path) -> None:
    """They are not there when the comparison is checked; weights from elsewhere must be."""
    for folder, refused in ((tmp_path / "out", False), (tmp_path / "elsewhere", True)):
        later = f"simclr:init={folder}/runs/{drawn.name}/simclr/seed0"
        c = comparison(drawn, tmp_path / "out", methods=["simclr", later], baseline="", protocols=["knn"])
        with pytest.raises(UserError, match="do not exist") if refused else nullcontext():
            c._check_runs([(entry, drawn, 0) for entry in c.entries])


def test_parts_that_cannot_be_scored_leave_the_row(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fgfast.evaluate import part_discovery

    def fail(*_: object, **__: object) -> None:
        raise UserError("no keys and CLS attention")

    monkeypatch.setattr(part_discovery, "score_discovery", fail)
    c = comparison(drawn, tmp_path, methods=["random"], seeds=[0], baseline="", protocols=["knn"])
    c.run()
    assert "| - |" in c.table()


def test_the_label_of_an_entry_is_its_text() -> None:
    """Two variants of a method have different labels."""
    assert Entry.parse("particle:parts=truth,lr=0.1").label == "particle:parts=truth,lr=0.1"
    assert Entry.parse("random").values == {}


def test_another_data_set_of_the_same_name_is_refused(drawn: Path, tmp_path: Path) -> None:
    """Data sets are told apart by their path, not only by the name of their folder."""
    comparison(drawn, tmp_path / "out", methods=["random"], baseline="").run()
    other = shutil.copytree(drawn, tmp_path / drawn.name)
    with pytest.raises(UserError, match="not on"):
        comparison(other, tmp_path / "out", methods=["random"], baseline="").run()


def test_the_table_has_only_the_seeds_asked_for(drawn: Path, tmp_path: Path) -> None:
    both = comparison(drawn, tmp_path, methods=["random"], baseline="")
    both.run()
    assert "| `random` | 2 |" in both.table()
    assert "| `random` | 1 |" in comparison(drawn, tmp_path, methods=["random"], baseline="", seeds=[1]).table()


@pytest.mark.parametrize("name", ["data", "methods", "seeds"])
def test_empty_lists_are_refused(drawn: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is empty"):
        comparison(drawn, tmp_path, baseline="", **{name: []})
