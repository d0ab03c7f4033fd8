"""Words of the command line into dataclasses; what does not parse is one sentence."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fgfast.config import TrainConfig, read_toml, with_values
from fgfast.errors import UserError

T = TypeVar("T")
CONFIG_HELP = "--config FILE.toml takes options from a file; flags win over it, it wins over the defaults."


def parse(kind: Callable[..., T], words: list[str], prog: str, default: T | None = None, note: str = "") -> T:
    """Parse words into a dataclass; what does not parse is one sentence instead of a page."""
    import tyro

    extra: dict[str, Any] = {} if default is None else {"default": default}
    if note:
        extra["description"] = f"{(kind.__doc__ or '').splitlines()[0]} {note}"
    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page):
            value, unknown = tyro.cli(kind, args=words, prog=f"fgfast {prog}", return_unknown_args=True, **extra)
    except SystemExit as error:
        if not error.code:
            raise
        raise UserError(f"{_first_words(page.getvalue())}: fgfast {prog} --help lists the flags.") from None
    if unknown:
        raise UserError(f"fgfast {prog} does not know {unknown[0]!r}: fgfast {prog} --help lists its flags.")
    return value


def _first_words(page: str) -> str:
    """What a page of the parser says between its title and the first rule, in a box (UTF-8) or plain, on one line."""
    lines = [line.strip("│ ") for line in page.splitlines() if line[:1] not in ("╭", "╰")]
    rules = [i for i, line in enumerate(lines) if line and not set(line) - set("─-")]
    if "╭" not in page and len(rules) > 1:  # plain: a title stands over the first rule
        lines, rules = lines[2:], [i - 2 for i in rules[1:]]
    return " ".join(lines[: rules[0]] if rules else lines).strip().rstrip(".") or "The flags do not parse"


def parse_method(words: list[str]) -> tuple[str, TrainConfig]:
    """A method's name and its configuration: flags over --config file (or a resumed run's own) over preset, defaults.

    Raises:
        UserError: the method, the file or a flag does not exist.
    """
    from fgfast.methods.base import METHODS, method_class

    if words[:1] in (["-h"], ["--help"]):
        print(
            f"usage: fgfast pretrain METHOD --data DIR --out RUN [--config FILE.toml] [options]\n\n"
            f"METHOD is one of {', '.join(METHODS)}; fgfast pretrain METHOD --help lists its options."
        )
        raise SystemExit(0)
    if not words or words[0].startswith("-"):
        raise UserError(f"fgfast pretrain needs a method first: choose one of {', '.join(METHODS)}.")
    name, words = words[0], words[1:]
    cls = method_class(name)
    file, words = _take(words, "--config")
    out, _ = _take(words, "--out")
    own = Path(out or "") / "config.toml"
    if file is None and out and "--resume" in words and own.is_file():
        began = read_toml(own).get("method")
        if began in METHODS and began != name:
            raise UserError(f"{out} is a run of {began}, not of {name}: resume it as {began}, or give another --out.")
        file = str(own) if began == name else None  # an unfinished run knows its own options
    table = read_toml(Path(file)) if file else {}
    if table.pop("method", name) != name:
        raise UserError(f"The config file {file} is of another method: give that method, or another file.")
    preset, _ = _take(words, "--preset")
    chosen = preset or table.get("preset")
    default = cls.Config()
    if chosen == "paper":
        model, _ = _take(words, "--model")
        default = cls.paper(model or table.get("model"))
    default = with_values(default, table, f"The config file {file}")
    return name, parse(cls.Config, words, f"pretrain {name}", default, CONFIG_HELP)


def _take(words: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of ``flag`` in ``words``, and the words without both."""
    for i, word in enumerate(words):
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "="), words[:i] + words[i + 1 :]
        if word == flag:
            if i + 1 == len(words):
                raise UserError(f"{flag} needs a value after it.")
            return words[i + 1], words[:i] + words[i + 2 :]
    return None, words


def pairs(texts: list[str]) -> dict[str, str]:
    """The settings of a --set that may be repeated."""
    for text in texts:
        if "=" not in text:
            raise UserError(f"--set {text!r} is not of the form name=value.")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}
