"""``fgfast export``: its arguments."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from fgfast.cli.parse import parse, parse_settings


def export_encoder(argv: list[str]) -> None:
    """Write the encoder of a run for ONNX, torch.export, timm or transformers, with a model card."""
    import tyro

    from fgfast.export import Format, export_run

    @dataclass
    class Args:
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""
        to: Format
        """Format; onnx needs the extra [export]."""
        out: Path
        """Output folder, which must not exist."""
        checkpoint: Literal["init", "last"] = "last"
        """Weights to use: before training (init) or after it (last)."""
        set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
        """Override a setting of the run: name=value, such as drop=3 for srgan; may be repeated."""

    args = parse(Args, argv, "export", export_encoder.__doc__)
    print(export_run(args.run, args.to, args.out, checkpoint=args.checkpoint, settings=parse_settings(args.set)))
