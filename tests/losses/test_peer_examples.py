"""What the documentation of the peers shows runs with our losses in the place of theirs, and gives the same losses."""

import doctest
import re
from importlib.metadata import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fgfast import losses
from tests.losses.peers import lightly, pml


def names_of_the_reader(width: int) -> dict[str, Any]:
    """What the documentation leaves to its reader: images, views of them, a network, an optimizer."""
    torch.manual_seed(0)
    images, labels, model = torch.randn(16, 12), torch.arange(16) // 4, nn.Linear(12, width)

    def view(images: Tensor) -> Tensor:
        return images + 0.1 * torch.randn_like(images)

    names = {"images": images, "dataloader": [(images, labels)] * 2, "optimizer": torch.optim.SGD(model.parameters())}
    names |= dict.fromkeys(("transform", "transforms", "your_augmentation"), view)
    return names | dict.fromkeys(("model", "your_model", "student", "teacher"), model)


@pytest.mark.parametrize("name", ["NTXentLoss", "DINOLoss"])
def test_examples_in_docstrings_of_lightly(name: str) -> None:
    found = []
    for library in (lightly, losses):
        names = names_of_the_reader(128) | {name: getattr(library, name)}
        examples = doctest.DocTestParser().get_examples(getattr(lightly, name).__doc__)
        exec("\n".join(example.source for example in examples), names)
        found.append(names["loss"])
    assert found[0] > 0
    torch.testing.assert_close(*found)


def test_training_loops_in_the_readme_of_pytorch_metric_learning() -> None:
    """With SupConLoss where they have TripletMarginLoss: alone, with a miner, customized, and self-supervised."""
    blocks = re.findall(r"```python\n(.*?)```", metadata("pytorch-metric-learning")["Description"], re.S)
    loops = [block for block in blocks if "backward" in block]
    assert len(loops) == 3
    found = []
    for library in (pml, losses):
        names = names_of_the_reader(8) | {"SupConLoss": library.SupConLoss}
        values = []
        for block in blocks:
            if "SelfSupervisedLoss" in block:
                names["dataloader"] = [names["images"]] * 2
            code = re.sub(r"(losses\.)?TripletMarginLoss\(", "SupConLoss(", block)
            exec(code if block in loops else code + loops[0], names)
            values.append(names["loss"].detach())
        found.append(torch.stack(values))
    assert (found[0] > 0).all()
    assert len(found[0].unique()) == len(blocks)
    torch.testing.assert_close(*found)
