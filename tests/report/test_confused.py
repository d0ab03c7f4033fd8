"""The classes that an evaluation confuses most: what is stored, and its figure."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fgfast.data.layouts import open_images
from fgfast.evaluate.confusion import confused_pairs
from fgfast.report.confused import draw_confused


def test_the_most_confused_pair_is_first_and_drawn_with_its_mistakes(drawn: Path, tmp_path: Path) -> None:
    test = open_images(drawn).test_set()
    truth = test.targets
    predicted = truth.copy()
    a, b = (np.flatnonzero(truth == c) for c in (0, 1))
    predicted[a[:2]], predicted[b[0]], predicted[np.flatnonzero(truth == 2)[0]] = 1, 0, 0
    first, second = confused_pairs(predicted, truth, test)
    assert (first["mistakes"], second["mistakes"]) == ([2, 1], [0, 1])
    assert first["of"] == [len(a), len(b)]
    assert first["images"][0][:2] == [test.paths[i] for i in a[:2]]
    row = {"protocol": "knn", "checkpoint": "init", "options": "", "confused": [first, second]}
    path = draw_confused(tmp_path, drawn, row)
    assert path == tmp_path / "pictures" / "confused-knn-init.png"
    with Image.open(path) as image:
        image.load()
        captions = [[box[4] for box in line] for line in json.loads(image.info["Boxes"])]
    assert [caption[0] for caption in captions[0]] == ["✗", "✗", "✓", "✗", "✓", "✓"]
    assert captions[0][0].endswith(f"\n2 of {len(a)} mistaken")


def test_without_mistakes_or_images_there_is_no_figure(drawn: Path, tmp_path: Path) -> None:
    test = open_images(drawn).test_set()
    assert confused_pairs(test.targets, test.targets, test) == []
    short = confused_pairs(test.targets[:1] + 1, test.targets[:1], test)
    assert short[0]["images"] == [[], []]
    old = tmp_path / "pictures" / "confused-knn.png"
    old.parent.mkdir()
    old.touch()
    assert draw_confused(tmp_path, drawn, {"protocol": "knn", "checkpoint": "last", "confused": short}) is None
    assert not old.exists()
