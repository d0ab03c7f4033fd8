"""Options: files, flags, presets, and errors."""

import datetime
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fgfast.cli import main
from fgfast.cli.parse import parse_method
from fgfast.config import TrainConfig, parse_values, read_toml, validate, with_values
from fgfast.config_text import to_toml
from fgfast.errors import UserError
from fgfast.methods.lodisc import LoDiscConfig
from fgfast.methods.particle import PARTICLEConfig
from fgfast.methods.run_folder import read_run
from fgfast.methods.simclr import SimCLRConfig
from fgfast.methods.srgan import SRGANConfig
from fgfast.run import read_options
from tests.examples import examples


def test_flags_override_file_and_file_overrides_defaults(tmp_path: Path) -> None:
    """The order of precedence is flags, file, defaults."""
    file = tmp_path / "f.toml"
    file.write_text('lr = 0.5\nepochs = 7\nparts = "grid"\n')
    words = ["particle", "--config", str(file), "--epochs", "9", "--data", "d", "--out", "o"]
    name, config = parse_method(words)
    assert name == "particle"
    assert (config.lr, config.epochs, config.parts, config.batch_size) == (0.5, 9, "grid", TrainConfig.batch_size)


def test_file_and_flags_override_the_preset(tmp_path: Path) -> None:
    """--preset paper changes the defaults; a file and a flag override it."""
    file = tmp_path / "f.toml"
    file.write_text("epochs = 7\n")
    _, config = parse_method(["particle", "--preset", "paper", "--config", str(file), "--lr", "0.25"])
    assert (config.model, config.size, config.batch_size, config.epochs, config.lr) == ("resnet50", 224, 320, 7, 0.25)
    _, vit = parse_method(["particle", "--preset=paper", "--model", "vit_small_patch8_224"])
    assert (config.discover_size, config.amp, vit.amp) == (224, "off", "off")  # full images at 224, no autocast
    assert (vit.n_parts, vit.optimizer, vit.clip) == (5, "adamw", 3.0)


def test_resumed_run_takes_its_own_options(tmp_path: Path) -> None:
    """--out RUN --resume reads RUN/config.toml, and flags override it; without --resume it is not read."""
    (tmp_path / "config.toml").write_text(
        to_toml(PARTICLEConfig(data="d", out=str(tmp_path), lr=0.5, epochs=7), "particle")
    )
    words = ["particle", "--out", str(tmp_path), "--epochs", "9"]
    _, resumed = parse_method([*words, "--resume"])
    assert (resumed.lr, resumed.epochs, resumed.data, resumed.resume) == (0.5, 9, "d", True)
    assert parse_method(words)[1].lr == TrainConfig.lr


@pytest.mark.parametrize(
    "flags",
    [["simclr"], ["particle", "--preset", "paper", "--out", 'a "b" \\ é', "--lr", "1e-5", "--no-resume"],
     ["lodisc", "--model", "vit_small_patch8_224", "--sync-bn", "--save-every", "500s", "--model-args", "a=(1,2)"]],
)  # fmt: skip
def test_what_show_config_prints_is_read_back(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same options, those that were given first; nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *flags, "--show-config"]) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    (tmp_path / "f.toml").write_text(printed, encoding="utf-8")
    assert parse_method([flags[0], "--config", "f.toml"]) == parse_method(flags)
    changed = printed.partition("# the defaults")[0]
    assert ("lr = 1e-05" in changed) == ("1e-5" in flags)
    assert "weight_decay = 0.0001" not in changed


def test_show_config_refuses_what_training_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "simclr", "--show-config", "--lr", "-1"]) == 2
    assert main(["pretrain", "simclr", "--show-config", "--accumulate", "500"]) == 2
    assert capsys.readouterr().out == ""


@given(
    st.text().filter(lambda text: "\0" not in text), st.floats(0, allow_infinity=False),
    st.dictionaries(st.text(), st.text() | st.booleans() | st.integers()),
)  # fmt: skip
@example('a "quoted" \\ path\n\r\t\x01\x7f\x85\u2028', 1e-5, {"torch \n": "2"})
@examples(15)
def test_configuration_round_trips_through_its_file(text: str, number: float, before: dict[str, object]) -> None:
    """config.toml is read as the same configuration and the same record of resumptions, whatever the texts are."""
    config = PARTICLEConfig(data=text, lr=number, resume=True, parts="online")
    resumed = [{"step": 3, "before": {"environment": before}}, {"step": 4}]
    values = tomllib.loads(to_toml(config, "particle", resumed=resumed))
    assert values.pop("method") == "particle"
    assert values["environment"]["fgfast"]
    assert values["environment"]["resumed"] == resumed
    assert with_values(PARTICLEConfig(), values, "file") == config


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_files_of_windows_are_read(tmp_path: Path, start: str, newline: str) -> None:
    """A byte order mark and other ends of lines change nothing, in --config files and in run folders."""
    text = f'{start}method = "simclr"\nmodel = "r\u00e9seau"\n'.replace("\n", newline)
    (tmp_path / "config.toml").write_bytes(text.encode())
    assert read_toml(tmp_path / "config.toml") == {"method": "simclr", "model": "r\u00e9seau"}
    assert read_options(tmp_path) == ("simclr", {"model": "r\u00e9seau"})


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_refused_by_name(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "config.toml").write_bytes('\ufeffmethod = "simclr"'.encode(encoding))
    with pytest.raises(UserError, match=r"\(it is UTF-16 and must be UTF-8\): give a TOML file in UTF-8"):
        read_toml(tmp_path / "config.toml")
    with pytest.raises(UserError, match=r"cannot be read \(it is UTF-16 and must be UTF-8\): restore it"):
        read_options(tmp_path)


@pytest.mark.parametrize("name", ["run\udcff", "run\0"])
def test_texts_that_no_toml_file_can_hold_are_refused(name: str) -> None:
    """The message is one line and shows the byte."""
    with pytest.raises(UserError, match=r"--out is 'run\\(udcff|x00)', which is not valid UTF-8"):
        validate(TrainConfig(data="d", out=name))


def test_errors_are_one_line() -> None:
    assert str(UserError("There is no a\nb\x7f\udcff \u00e9.")) == "There is no a\\nb\\x7f\\udcff \u00e9."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nomethod"], "no method 'nomethod'"),
        ([], "expects a method"),
        (["simclr", "--parts", "grid"], "does not know '--parts'"),
        (["simclr", "--config", "missing.toml"], "missing.toml is missing"),
        (["simclr", "--config"], "has no value"),
        (["color", "--preset", "paper"], "no --preset paper"),
        (["simclr", "--encoder-rate", "x"], r"--encoder-rate got 'x' and takes FLOAT\|{auto}: "),
        (["simclr", "--freeze-bn"], "--freeze-bn"),
    ],
)
def test_wrong_arguments_are_refused(words: list[str], message: str) -> None:
    """The message names an unknown method, flag or file."""
    with pytest.raises(UserError, match=message):
        parse_method(words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nosuch = 1", "'nosuch'"),
        ('lr = "fast"', "type float"),
        ("epochs = true", "type int"),
        ('amp = "fp8"', "choose one of bf16, off"),
        ("lr = ", "Invalid value"),
        ("lr = -1", r"The config file .* sets lr, which is -1\.0: give at least 0"),
        ("lr = inf", "give a finite number"),
        ("epochs = 9223372036854775808", "give a finite number of at least 1"),
        ("epochs = 0x" + "f" * 400, "beyond 64 bits"),
        ('out = "a\\u0000b"', "not valid UTF-8"),
        ("method = [1]", "another method"),
        ('method = "particle"', "another method"),
        ('preset = "paper"\nmodel = []', "type str"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """A config file with an unknown name, a wrong type or invalid TOML is refused."""
    file = tmp_path / "f.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        parse_method(["simclr", "--config", str(file)])
    with pytest.raises(UserError, match="cannot be read"):
        parse_method(["simclr", "--config", str(tmp_path)])


@pytest.mark.parametrize(
    "bad",
    [{"data": ""}, {"out": ""}, {"epochs": 0}, {"batch_size": 1}, {"lr": -1.0}, {"lr": float("nan")}, {"holdout": 1.0}],
)
def test_unusable_values_are_refused(bad: dict[str, object]) -> None:
    """A missing or out-of-range value raises."""
    with pytest.raises(UserError):
        validate(with_values(TrainConfig(data="d", out="o"), bad, "test"))


def test_text_values_take_the_type_of_their_field() -> None:
    """Values of name=value lists become numbers, switches and text."""
    values = parse_values(TrainConfig(), {"lr": "1e-3", "epochs": "5", "resume": "true", "model": "x"}, "test")
    assert values == {"lr": 1e-3, "epochs": 5, "resume": True, "model": "x"}
    with pytest.raises(UserError, match="type int"):
        parse_values(TrainConfig(), {"epochs": "many"}, "test")


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_takes_its_usual_words_and_no_other(value: bool) -> None:
    words = ("true", "Yes", "1", "ON") if value else ("false", "No", "0", "OFF")
    assert all(parse_values(TrainConfig(), {"resume": word}, "test") == {"resume": value} for word in words)
    for word in ("ture", "", "2"):
        with pytest.raises(UserError, match=rf"test sets resume = '{word}': give a value of type bool"):
            parse_values(TrainConfig(), {"resume": word}, "test")


def test_dates_and_lists_of_an_edited_record_round_trip(tmp_path: Path) -> None:
    table = {"date": datetime.datetime(2026, 1, 2, 3, 4), "day": datetime.date(2026, 1, 2), "list": [True, "a'\"", []]}
    (tmp_path / "c.toml").write_text(to_toml(TrainConfig(), "simclr", [table]))
    assert read_toml(tmp_path / "c.toml")["environment"]["resumed"] == [table]


def test_ranges_belong_to_the_method() -> None:
    """An option has the range of its own method, even if another method has an option of the same name."""
    with pytest.raises(UserError, match="--blocks is 0: give at least 1"):
        validate(SRGANConfig(data="d", out="o", blocks=0))
    validate(SimCLRConfig(data="d", out="o", blocks=0))
    with pytest.raises(UserError, match=r"--keep is 0\.0: give more than 0 and at most 1"):
        validate(LoDiscConfig(data="d", out="o", keep=0.0))


def test_an_interval_of_checkpoints_may_be_an_integer(tmp_path: Path) -> None:
    """Earlier versions wrote ``save_every = 10``: a run of one reads as 10 epochs."""
    (tmp_path / "config.toml").write_text('method = "simclr"\nsave_every = 10\n')
    assert read_run(tmp_path)[1].save_every == "10"


@pytest.mark.parametrize("digits", [25, 400])
def test_integers_that_no_float_can_hold_are_out_of_range(digits: int) -> None:
    with pytest.raises(UserError, match=r"--epochs is 99999.*: give a finite number of at least 1"):
        validate(TrainConfig(data="d", out="o", epochs=int("9" * digits)))


@pytest.mark.parametrize(("line", "reason"), [("lr = -1.0", "give at least 0"), ("seed = true", "type int")])
def test_options_are_checked_when_a_run_is_read(tmp_path: Path, line: str, reason: str) -> None:
    """Whatever reads a run, not only training."""
    (tmp_path / "config.toml").write_text(f'method = "simclr"\n{line}\n')
    with pytest.raises(UserError, match=reason):
        read_run(tmp_path)
