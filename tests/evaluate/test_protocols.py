"""Protocols on the command line and in comparisons: scores, options and files."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fgfast.cli import main
from fgfast.compare import Comparison
from fgfast.data import splits
from fgfast.data.layouts import open_images
from fgfast.errors import UserError
from fgfast.evaluate import protocols
from fgfast.evaluate.mlp import MLPOptions
from fgfast.evaluate.options import parse_options, parse_protocols
from fgfast.evaluate.protocols import evaluate, score_predictions
from fgfast.evaluate.sweep import SweepOptions
from fgfast.methods.simclr import SimCLRConfig
from fgfast.train.loop import pretrain
from tests.conftest import TINY

CPU = torch.device("cpu")
SHARED = {
    "model": TINY, "size": 32, "batch_size": 6, "device": "cpu", "threads": 1, "amp": "off", "hidden": 16,
    "projection": 8, "passes": 24, "knn_every": 0, "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run before its first step."""
    config = SimCLRConfig(data=str(drawn), out=str(tmp_path_factory.mktemp("protocols") / "run"), **SHARED)  # type: ignore[arg-type]
    return pretrain("simclr", config, train=False)


def test_f1_of_hand_made_predictions() -> None:
    """F1 of class 0 is 2 * 2 / (2 + 4), of class 1 2 * 1 / (2 + 1), of class 2 zero; the weights are 2, 2, 1."""
    truth, predicted = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 0])
    score = score_predictions("knn", "last", predicted, truth, 5, "", {})
    f0, f1 = 2 * 2 / (2 + 4), 2 * 1 / (2 + 1)
    assert score.macro_f1 == pytest.approx((f0 + f1) / 3)
    assert score.weighted_f1 == pytest.approx((2 * f0 + 2 * f1) / 5)
    assert score.top1 == 0.6


@pytest.mark.parametrize(
    ("protocol", "flags"),
    [
        ("knn", []), ("linear", []), ("parts", []), ("retrieval", []),
        ("linear", ["--recipe", "sweep", "--standardise", "yes", "--val", "0.3"]),
        ("linear", ["--recipe", "lcr", "--epochs", "2", "--batch-size", "9", "--augment", "no"]),
        ("linear", ["--recipe", "lodisc", "--epochs", "2", "--batch-size", "9", "--report", "best"]),
        ("mlp", ["--epochs", "2", "--class-weights", "inverse"]),
        ("finetune", ["--epochs", "1", "--stages", "2", "--class-weights", "frequency", "--seed", "3"]),
    ],
)  # fmt: skip
def test_every_protocol_prints_and_stores_its_scores(
    run: Path, drawn: Path, protocol: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", protocol, str(run), "--data", str(drawn), "--checkpoint", "init", "--device", "cpu", *flags]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    assert f"data: CUB-200-2011 in {drawn}: 3 classes (" in printed.err
    row = json.loads(printed.out.splitlines()[-1])
    assert 0 <= row["low"] <= row["top1"] <= row["high"] <= 1
    assert 0 <= row["macro_f1"] <= 1
    assert 0 <= row["weighted_f1"] <= 1
    assert (row["n"], row["n_train"]) == (18, 0 if protocol == "retrieval" else 18)
    assert row["options"] == {
        "mlp": "epochs=2,class_weights=inverse",
        "finetune": "stages=2,epochs=1,class_weights=frequency,seed=3",
        "sweep": "recipe=sweep,val=0.3,standardise=True",
        "lcr": "recipe=lcr,epochs=2,batch_size=9,augment=False",
        "lodisc": "recipe=lodisc,epochs=2,batch_size=9,report=best",
    }.get(flags[1] if protocol == "linear" and flags else protocol, "")
    if "sweep" in flags:
        assert 1e-6 <= row["l2"] <= 1e5
        assert 0 <= row["val_top1"] <= 1
    elif protocol == "linear" and flags:
        assert row["top5"] == 1  # of three classes
        assert 1 <= row["epoch"] <= 2
    else:
        assert not {"l2", "top5", "epoch"} & row.keys()
    if protocol == "retrieval":
        assert row["top1"] <= row["rank5"] <= 1
        assert 0 < row["map"] <= 1

    def stored() -> list[dict[str, object]]:
        rows = json.loads((run / "eval.json").read_text())
        return [r for r in rows if (r["protocol"], r["options"]) == (protocol, row["options"])]

    assert len(stored()) == 1
    assert row.items() <= stored()[0].items()
    assert main(words) == 0
    assert "macro-F1" in capsys.readouterr().out
    assert len(stored()) == 1
    assert not [*run.glob("finetune-*.pt"), *run.glob("linear-*.pt")]


def test_parts_need_masks(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / split / name / "0.png")
    with pytest.raises(UserError, match="no part masks"):
        evaluate(run, "parts", tmp_path, checkpoint="init", device=CPU)


def test_a_run_without_its_last_checkpoint_is_fine_tuned_from_the_previous_one(
    run: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(run / "config.toml", tmp_path)
    shutil.copy(run / "init.pt", tmp_path / "previous.pt")
    monkeypatch.setattr(protocols, "finetune", lambda *_, **__: (torch.tensor([0, 1]), torch.tensor([0, 1])))
    assert evaluate(tmp_path, "finetune", drawn, device=CPU).row()["top1"] == 1


def test_the_state_of_fine_tuning_stays_until_its_score_is_stored(
    run: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(*_: object, state_file: Path, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        state_file.write_bytes(b"state")
        return torch.tensor([0, 1]), torch.tensor([0, 1])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(protocols, "finetune", fake)
    with monkeypatch.context() as patch:
        patch.setattr(protocols, "store_score", full)
        with pytest.raises(OSError, match="No space"):
            evaluate(run, "finetune", drawn, checkpoint="init", device=CPU)
    assert len(list(run.glob("finetune-*.pt"))) == 1
    evaluate(run, "finetune", drawn, checkpoint="init", device=CPU)
    assert not list(run.glob("finetune-*.pt"))


def test_the_data_set_is_read_once(run: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(splits, "open_images", lambda path: read.append(path) or open_images(path))  # type: ignore[func-returns-value]
    evaluate(run, "knn", drawn, checkpoint="init", device=CPU)
    assert read == [drawn]


def test_scores_with_other_options_are_stored_too(run: Path, drawn: Path) -> None:
    for epochs in (1, 2, 1):
        evaluate(run, "mlp", drawn, checkpoint="init", device=CPU, options=MLPOptions(epochs=epochs))
    rows = json.loads((run / "eval.json").read_text())
    options = [r["options"] for r in rows if r["protocol"] == "mlp" and "inverse" not in r["options"]]
    assert sorted(options) == ["epochs=1", "epochs=2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune", "--stages", "9"], "test_resnet has 4 stages"),
        (["finetune", "--stages", "many"], "stages = 'many'"),
        (["finetune", "--epochs", "0"], "epochs of fgfast eval finetune is 0: give at least 1"),
        (["finetune", "--lr", "0"], "lr of fgfast eval finetune is 0.0: give more than 0"),
        (["mlp", "--stages", "1"], "'stages', which MLPOptions does not have"),
        (["knn", "--epochs", "1"], "knn has no option 'epochs'"),
        (["mlp", "--class-weights", "odd"], "odd"),
        (["linear", "--recipe", "odd"], "recipe = 'odd': choose one of logistic, sweep, lcr, lodisc"),
        (["linear", "--lr", "3"], "'lr', which recipe=logistic does not have: choose another recipe"),
        (["linear", "--recipe", "sweep", "--lr", "3"], "'lr', which SweepOptions does not have"),
        (["linear", "--recipe", "lcr", "--val", "0.2"], "'val', which LCROptions does not have"),
        (["linear", "--recipe", "sweep", "--val", "0"], "val of fgfast eval linear is 0.0: give more than 0"),
        (["linear", "--recipe", "lodisc", "--report", "first"], "report = 'first': choose one of last, best"),
        (["linear", "--recipe", "lodisc", "--augment", "maybe"], "augment = 'maybe': give a value of type bool"),
        (["linear", "--stages", "1"], "'stages', which recipe=logistic does not have"),
        (["mlp", "--recipe", "sweep"], "'recipe', which MLPOptions does not have"),
    ],
)
def test_wrong_arguments_give_one_sentence_and_exit_status_2(
    run: Path, drawn: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "eval.json").read_bytes() if (run / "eval.json").exists() else None
    assert main(["eval", words[0], str(run), "--data", str(drawn), "--checkpoint", "init", *words[1:]]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert before == ((run / "eval.json").read_bytes() if (run / "eval.json").exists() else None)


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["linear,knn,finetune"], ["linear", "knn", "finetune"]),
        (["finetune:stages=all,epochs=5,knn"], ["finetune:stages=all,epochs=5", "knn"]),
        (["finetune:stages=1", "mlp"], ["finetune", "mlp"]),
        (["linear:recipe=sweep,linear:recipe=logistic"], ["linear:recipe=sweep", "linear"]),
        (["linear:recipe=lcr,lr=30,report=best,knn"], ["linear:recipe=lcr,report=best", "knn"]),
    ],
)
def test_protocols_are_parsed(texts: list[str], labels: list[str]) -> None:
    assert list(parse_protocols(texts)) == labels


@pytest.mark.parametrize(
    "text", ["nosuch", "epochs=5", "mlp:epochs", "mlp:epochs=many", "knn:k=3", "linear:lr=1", "linear:recipe=no", ""]
)
def test_bad_protocols_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_protocols([text])


@pytest.mark.slow
def test_compare_completes_rows_of_an_earlier_table(drawn: Path, tmp_path: Path) -> None:
    """Rows with only linear and kNN get the new protocols, and no stored score is computed again."""

    def comparison(*names: str) -> Comparison:
        return Comparison(tmp_path, [drawn], ["random", "simclr"], [0], SHARED, baseline="random", protocols=[*names])

    comparison("linear", "knn").run()
    before = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert list(before[0])[-4:] == ["linear", "knn", "nmi", "ari"]
    runs = [tmp_path / "runs" / drawn.name / name / "seed0" for name in ("random", "simclr")]
    full = comparison("linear,knn,mlp:epochs=2", "retrieval", "finetune:epochs=1", "linear:recipe=sweep,val=0.3")
    full.run()
    for run in runs:  # a score that is computed again moves to the end
        protocols = [row["protocol"] for row in json.loads((run / "eval.json").read_text())]
        assert protocols == ["linear", "knn", "mlp", "retrieval", "finetune", "linear"]
    after = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert [{k: r[k] for k in before[0]} for r in after] == before
    added = ("mlp:epochs=2", "retrieval", "finetune:epochs=1", "linear:recipe=sweep,val=0.3")
    assert all(0 <= float(r[label]) <= 1 for r in after for label in added)
    arrays = np.load(runs[1] / "correct.npz")
    assert set(arrays) == {"linear", "knn", *added}
    head = next(line for line in full.table().splitlines() if line.startswith("| method"))
    columns = [c.strip() for c in head.strip("|").split("|")]
    assert columns[2:10] == ["linear", "gain on baseline", "kNN", "mlp:epochs=2", "gain on baseline", "retrieval",
                             "gain on baseline", "finetune:epochs=1"]  # fmt: skip
    rows = [line for line in full.table().splitlines() if line.startswith("| `")]
    assert all(len(line.strip("|").split("|")) == len(columns) for line in rows)
    written = [(run / "eval.json").stat().st_mtime_ns for run in runs]
    full.run()
    assert [(run / "eval.json").stat().st_mtime_ns for run in runs] == written
    assert "linear | gain on baseline | kNN | NMI" in comparison("linear", "knn").table()


def test_a_sweep_needs_a_class_with_two_training_images(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 1), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40)).save(tmp_path / split / name / f"{i}.png")
    with pytest.raises(UserError, match="has two training images, one to choose L2 on"):
        evaluate(run, "linear", tmp_path, checkpoint="init", device=CPU, options=SweepOptions())


def test_the_default_recipe_has_the_row_of_earlier_versions_and_the_confused_classes(run: Path, drawn: Path) -> None:
    keys = {
        "protocol", "checkpoint", "top1", "low", "high", "macro_f1", "weighted_f1", "n", "n_train", "options",
        "confused",
    }  # fmt: skip
    options = parse_options("linear", {"recipe": "logistic"}, "a test")
    assert options is None
    assert evaluate(run, "linear", drawn, checkpoint="init", device=CPU, options=options).row().keys() == keys
