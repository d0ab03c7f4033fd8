"""Small data sets on disk in their official layouts; each function writes one and returns its folder."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

HASHES = (
    "0000139e-21dc-4d0c-bfe1-4cae3c85c829",
    "0000d9fc-4e02-4c06-a0af-a55cfb16b12b",
    "00019306-9d83-4334-b255-a447742edce3",
)


def write_images(root: Path, rels: Iterable[str], size: tuple[int, int] = (32, 24)) -> None:
    for i, rel in enumerate(rels):
        (root / rel).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (40 * i % 256, 90, 200)).save(root / rel)


def lists(root: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = root / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def touch(root: Path, rels: Iterable[str]) -> Path:
    """Empty files, for readers that only list them."""
    for rel in rels:
        (root / rel).parent.mkdir(parents=True, exist_ok=True)
        (root / rel).touch()
    return root


def cub(root: Path) -> Path:
    """Four images of two classes."""
    names = ["001.A/x 1.jpg", "001.A/x2.jpg", "002.B/y1.jpg", "002.B/y2.jpg"]
    write_images(root / "images", names, (8, 6))
    lists(
        root, images="".join(f"{i} {name}\n" for i, name in enumerate(names, 1)),
        image_class_labels="1 1\n2 1\n3 2\n4 2\n", classes="1 001.A\n2 002.B\n",
        train_test_split="1 1\n2 0\n3 1\n4 0\n", bounding_boxes="".join(f"{i} 1.5 2 3 4\n" for i in range(1, 5)),
        parts__parts="1 beak\n2 left eye\n",
        parts__part_locs="".join(f"{i} {p} {i}.25 {p} 1\n" for i in range(1, 5) for p in (1, 2)),
    )  # fmt: skip
    return root


def cassava(root: Path) -> Path:
    write_images(root, [f"train/{c}/train-{c}-{i}.jpg" for c in ("cbb", "healthy") for i in range(5)])
    write_images(root, [f"extraimages/extra-image-{i}.jpg" for i in range(3)] + ["test/0/test-img-0.jpg"])
    return root


def aircraft(root: Path) -> Path:
    write_images(root, [f"data/images/{i:07d}.jpg" for i in range(1, 7)], (64, 60))
    variants = {1: "707-320", 2: "F/A-18", 3: "707-320", 4: "F/A-18", 5: "707-320", 6: "F/A-18"}
    families = {i: "Boeing 707" if name == "707-320" else "F/A-18" for i, name in variants.items()}
    for level, table in (("variant", variants), ("family", families)):
        splits = {"train": (1, 2), "val": (3, 4), "trainval": (1, 2, 3, 4), "test": (5, 6)}
        for split, ids in splits.items():
            lists(root / "data", **{f"images_{level}_{split}": "".join(f"{i:07d} {table[i]}\n" for i in ids)})
    boxes = "".join(f"{i:07d} 3 1 {10 + i} 40\n" for i in range(1, 7))
    lists(root / "data", variants="707-320\nF/A-18\n", families="Boeing 707\nF/A-18\n", images_box=boxes)
    return root


def cars(root: Path, labels_in_devkit: bool = False) -> Path:
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    kind = [(name, object) for name in fields]
    train = np.array([(1, 2, 10, 12, 2, "00001.jpg"), (3, 4, 30, 20, 1, "00002.jpg")], kind)
    test = np.array([(5, 6, 15, 16, 1, "00001.jpg")], kind)
    write_images(root, ["cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg"])
    unlabelled = np.array([(5, 6, 15, 16, "00001.jpg")], [f for f in kind if f[0] != "class"])
    kit = root / "devkit"
    kit.mkdir()
    savemat(
        kit / "cars_meta.mat", {"class_names": np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], object)}
    )
    savemat(kit / "cars_train_annos.mat", {"annotations": train})
    savemat(kit / "cars_test_annos.mat", {"annotations": unlabelled})
    savemat((kit if labels_in_devkit else root) / "cars_test_annos_withlabels.mat", {"annotations": test})
    return root


def flowers(root: Path) -> Path:
    write_images(root, [f"jpg/image_{i:05d}.jpg" for i in range(1, 7)])
    savemat(root / "imagelabels.mat", {"labels": np.array([[2, 1, 3, 1, 2, 3]], np.uint8)})
    ids = {"trnid": [[6, 2]], "valid": [[1]], "tstid": [[3, 4, 5]]}
    savemat(root / "setid.mat", {name: np.array(values, np.uint16) for name, values in ids.items()})
    return root


def pets(root: Path) -> Path:
    """Two breeds; the trimap of every image has a pet on the left, a border, background on the right."""
    rows = {
        "trainval": ["Abyssinian_1 1 1 1", "great_pyrenees_2 16 2 10"],
        "test": ["great_pyrenees_1 16 2 10", "Abyssinian_9 1 1 1"],
    }
    header = "#Image CLASS-ID SPECIES BREED ID\n"
    for split, lines in rows.items():
        lists(root, **{f"annotations__{split}": "\n".join(lines) + "\n"})
    lists(root, annotations__list=header + "\n".join([*rows["trainval"], *rows["test"]]) + "\n")
    names = [line.split()[0] for lines in rows.values() for line in lines]
    write_images(root, [f"images/{name}.jpg" for name in names])
    trimap = np.full((24, 32), 2, np.uint8)
    trimap[:, :10], trimap[:, 10:12] = 1, 3
    (root / "annotations" / "trimaps").mkdir()
    for name in names:
        Image.fromarray(trimap).save(root / "annotations" / "trimaps" / f"{name}.png")
    return root


def inaturalist(root: Path, year: str = "2018", **more: object) -> Path:
    folder = {"": "{split}", "2017": "train_val_images"}.get(year, f"train_val{year}")
    root.mkdir(exist_ok=True)
    categories = [
        {"id": 4, "name": "Anas crecca", "supercategory": "Aves"},
        {"id": 2, "name": "Bufo bufo", "supercategory": "Amphibia"},
        {"id": 9, "name": "Never seen", "supercategory": "Aves"},
    ]  # fmt: skip
    for split, rows in {"train": [(11, 4), (12, 2), (13, 4)], "val": [(21, 2), (22, 4)]}.items():
        names = {i: f"{folder.format(split=split)}/{'Aves' if c == 4 else 'Amphibia'}/{c}/{i:04x}.jpg" for i, c in rows}
        images = [{"id": i, "width": 32, "height": 24, "file_name": name} for i, name in names.items()]
        notes = [{"id": i, "image_id": i, "category_id": c} for i, c in rows]
        table = {"info": {}, "images": images, "categories": categories, "annotations": notes, "licenses": [], **more}
        (root / f"{split}{year}.json").write_text(json.dumps(table))
        write_images(root, names.values())
    return root


def nabirds(root: Path) -> Path:
    files = [f"{label:04d}/{name.replace('-', '')}.jpg" for label, name in zip((817, 860, 817), HASHES, strict=True)]
    write_images(root / "images", files)

    def each(*values: object) -> str:
        return "".join(f"{name} {value}\n" for name, value in zip(HASHES, values, strict=True))

    lists(
        root, images=each(*files), image_class_labels=each(817, 860, 817), train_test_split=each(1, 1, 0),
        classes="0 Birds\n1 Ducks, Geese, and Swans\n817 Oak Titmouse\n860 Bald Eagle (Adult, subadult)\n",
        hierarchy="1 0\n817 1\n860 0\n", sizes=each("32 24", "32 24", "32 24"),
        bounding_boxes=each("1 2 3 4", "0 0 5 6", "7 8 9 1"),
        parts__parts="0 bill\n1 crown\n", parts__part_locs=each("0 5 6 1", "1 -1 -1 0", "1 9 9 1"),
    )  # fmt: skip
    return root
