"""Command-line arguments to dataclasses; an argument that does not parse gives an error of one sentence."""

import contextlib
import inspect
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fgfast.config import TrainConfig, read_toml, with_values
from fgfast.errors import UserError

T = TypeVar("T")
CONFIG_HELP = (
    "--config FILE.toml reads options from a file; flags override it, and it overrides the defaults. --show-config "
    "prints all options as such a file, and does nothing else."
)


def parse(
    kind: Callable[..., T], argv: list[str], prog: str, description: str | None = None, default: T | None = None
) -> T:
    """Parse the arguments of a command into a dataclass.

    Args:
        kind: the dataclass; the docstrings of its fields are the help text, and say what None stands for.
        argv: the arguments after ``fgfast PROG``.
        prog: the command, for help and messages.
        description: what the command does, for its help text.
        default: an instance that holds the defaults, instead of those of the class.

    Raises:
        UserError: an argument is unknown or does not parse.
    """
    import tyro

    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is None:
            kind.__annotations__[name] = Annotated[parameter.annotation, tyro.conf.arg(help_behavior_hint="")]
    extra: dict[str, Any] = {} if default is None else {"default": default}
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            value, unknown = tyro.cli(
                kind, args=argv, prog=f"fgfast {prog}", description=description, return_unknown_args=True, **extra
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise UserError(f"{_first_sentence(stderr.getvalue())}: fgfast {prog} --help lists the flags.") from None
    if unknown:
        raise UserError(f"fgfast {prog} does not know {unknown[0]!r}: fgfast {prog} --help lists its flags.")
    return value


def _first_sentence(error: str) -> str:
    """The text between the title and the first rule of tyro's error message, in a UTF-8 box or plain, on one line."""
    lines = [line.strip("│ ") for line in error.splitlines() if line[:1] not in ("╭", "╰")]
    rules = [i for i, line in enumerate(lines) if line and not set(line) - set("─-")]
    if "╭" not in error and len(rules) > 1:  # plain: the title is above the first rule
        lines, rules = lines[2:], [i - 2 for i in rules[1:]]
    text = " ".join(lines[: rules[0]] if rules else lines).strip().rstrip(".") or "The arguments do not parse"
    optional = re.match(r"Error parsing (\S+): no type matching (?:\{None\}\|)?(\S+) could .* from \['(.*?)'\]", text)
    return "{0} got {2!r} and takes {1}".format(*optional.groups()) if optional else text


def parse_method(argv: list[str], command: str = "pretrain") -> tuple[str, TrainConfig]:
    """The name of a method and its configuration, from the arguments of ``fgfast pretrain``, or of another command.

    Flags override the --config file (or the config.toml of a resumed run), which overrides the preset or defaults.

    Raises:
        UserError: the method, the file or a flag does not exist, or the file belongs to another method.
    """
    from fgfast.methods.base import METHODS, method_class

    if argv[:1] in (["-h"], ["--help"]):
        print(
            f"usage: fgfast pretrain METHOD --data DIR --out RUN [--config FILE.toml] [--show-config] [options]\n\n"
            f"METHOD is one of {', '.join(METHODS)}; fgfast pretrain METHOD --help lists its options."
        )
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"fgfast {command} expects a method as its first argument: choose one of {', '.join(METHODS)}.")
    name, argv = argv[0], argv[1:]
    cls = method_class(name)
    file, argv = pop_flag(argv, "--config")
    out, _ = pop_flag(argv, "--out")
    run_config = Path(out or "") / "config.toml"
    if file is None and out and "--resume" in argv and run_config.is_file():
        run_method = str(read_toml(run_config).get("method"))
        if run_method in METHODS and run_method != name:
            raise UserError(
                f"{out} is a run of {run_method}, not of {name}: resume it as {run_method}, or give another --out."
            )
        file = str(run_config) if run_method == name else None
    table = read_toml(Path(file)) if file else {}
    if table.pop("method", name) != name:
        raise UserError(f"The config file {file} is for another method: name that method, or give another file.")
    preset, _ = pop_flag(argv, "--preset")
    default = cls.Config()
    if (preset or table.get("preset")) == "paper":
        model = pop_flag(argv, "--model")[0] or table.get("model")
        default = cls.paper(model if isinstance(model, str) else None)  # another type is refused below
    default = with_values(default, table, f"The config file {file}")
    summary = (cls.Config.__doc__ or "").splitlines()[0]
    return name, parse(cls.Config, argv, f"{command} {name}", f"{summary} {CONFIG_HELP}", default)


def pop_flag(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of ``flag``, None if absent, and the arguments without the flag and its value."""
    for i, argument in enumerate(argv):
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "="), argv[:i] + argv[i + 1 :]
        if argument == flag:
            if i + 1 == len(argv):
                raise UserError(f"{flag} has no value: give one after it.")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return None, argv


def parse_settings(texts: list[str]) -> dict[str, str]:
    """The values of a repeated --set as a dictionary: ["lr=0.1"] becomes {"lr": "0.1"}."""
    for text in texts:
        if "=" not in text:
            raise UserError(f"--set got {text!r}: give name=value.")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}
