"""A complete run in minutes: a synthetic data set, PARTICLE, scores before and after, a report."""

from pathlib import Path

import torch

from fgfast.config import Range, check_range

EPOCHS_PER_MINUTE = 10  # of 1,000 training images on 2 CPU cores


def demo(out: Path = Path("runs/demo"), minutes: float = 5.0, device: str = "auto") -> None:
    """Draw an easy data set, train PARTICLE from random weights, score before and after, draw figures, write a report.

    Args:
        out: output folder: data/ (reused) and particle/ (a finished run is reused, an unfinished one is resumed).
        minutes: approximate training time on 2 CPU cores; a GPU takes less.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: the folder cannot be used, or ``minutes`` is not positive.
    """
    from rich.console import Console
    from rich.table import Table

    from fgfast.data.layouts import open_images
    from fgfast.data.synthetic import generate
    from fgfast.evaluate.part_discovery import score_discovery
    from fgfast.evaluate.protocols import evaluate
    from fgfast.methods.particle import PARTICLEConfig
    from fgfast.report.confused import draw_confused
    from fgfast.report.draw import draw_run
    from fgfast.report.html import write_report
    from fgfast.train.distributed import choose_device
    from fgfast.train.loop import pretrain

    check_range("--minutes", minutes, Range(0, open=True))
    console = Console()
    torch_device = choose_device(device)
    data = generate(out / "data", difficulty=0.2, nuisance=0.5)
    console.print(f"synthetic set: {len(open_images(data))} images of 20 classes in {data}", soft_wrap=True)
    run = out / "particle"
    config = PARTICLEConfig(
        data=str(data), out=str(run), model="resnet18",
        model_args="channels=(16,32,64,128),layers=(1,1,1,1),output_stride=8", rounds=2, levels=2, position=1.0,
        target="self", image_weight=1.0, batch_size=64, lr=0.003, epochs=max(2, round(minutes * EPOCHS_PER_MINUTE)),
        device=device, resume=True,
    )  # fmt: skip
    pretrain("particle", config)

    table = Table(title="PARTICLE on the synthetic set: frozen features")
    for column in ("protocol", "before", "after"):
        table.add_column(column)
    for protocol in ("linear", "knn"):
        scores = [evaluate(run, protocol, data, checkpoint=c, device=torch_device) for c in ("init", "last")]
        for score in scores:
            draw_confused(run, data, score.row())
        table.add_row(f"{protocol} top-1", *(f"{s.top1:.1%} ({s.low:.1%} to {s.high:.1%})" for s in scores))
    for key in ("nmi", "ari"):
        agreement = [score_discovery(run, data, checkpoint=c, device=torch_device)[key] for c in ("init", "last")]
        table.add_row(f"agreement of parts with the true ones, {key.upper()}", *(f"{v:.3f}" for v in agreement))
    draw_run(run, data, checkpoint="init", device=torch_device)
    figures = draw_run(run, data, device=torch_device)
    report = write_report(run)
    console.print(table)
    for path in (path for path in figures if path.name == "parts.png"):
        console.print(f"parts found: {path}", soft_wrap=True)
    console.print(f"report:      {report}", soft_wrap=True)
    if not torch.cuda.is_available():
        console.print("(ran on the CPU: no GPU was found)")
