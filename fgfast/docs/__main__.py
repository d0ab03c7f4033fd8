"""Writes the API pages beside it from the source: ``make docs``, or ``python -m fgfast.docs``.

Signatures and docstrings are taken from the text of the modules, so the pages do not depend on versions of libraries.
"""

import ast
import importlib
import os
import re
import sys
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent

DOCS = Path(__file__).parent
# What Markdown would take for markup: stars, tags, and underscores that are not inside a word.
MARKUP = r"[*<]|(?<![^\W_])_|_(?![^\W_])"
SECTION = r"(?m)^((?:Args|Attributes|Raises|Warns|Returns|Example|Source):|\.\. math::.*)\n((?: .*\n|\n(?= ))*)"
FOR_TOOLS = r"\s+# (fmt|type|noqa): .*"

# Page: title, introduction, and the names as they are imported.
AREAS = {
    "operations": (
        "Operations",
        "Functions of tensors. B images, N pixels (or H, W), D channels, K clusters or parts, M queries, T keys.",
        """fgfast.contrastive_loss fgfast.Ids fgfast.global_ids fgfast.kmeans fgfast.KMeansResult fgfast.kmeans_step
        fgfast.KMeansStep fgfast.part_pool fgfast.PartPool fgfast.labels_to_grid fgfast.assign_and_pool
        fgfast.pivotal_mask fgfast.PivotalMask fgfast.mask_images fgfast.perturb fgfast.Perturbed fgfast.use_backend""",
    ),
    "losses": (
        "Losses",
        "Modules for any training loop; each is also in `fgfast.losses`.",
        """fgfast.NTXentLoss fgfast.DetConBLoss fgfast.DetConSLoss fgfast.SupConLoss fgfast.InfoNCELoss fgfast.DINOLoss
        fgfast.KoLeoLoss fgfast.CLIPLoss fgfast.SigLIPLoss fgfast.PartContrastiveLoss fgfast.cached_contrast""",
    ),
    "kmeans": ("KMeans", "The estimator; as a function of tensors: [kmeans](operations.md#kmeans).", "fgfast.KMeans"),
    "data": (
        "Data",
        "Sets of images, views and loaders. Formats and commands: [fgfast/data/README.md](../data/README.md).",
        """fgfast.data.layouts.open_images fgfast.data.imageset.ImageSet fgfast.data.loader.make_loader
        fgfast.data.views.ViewSpec fgfast.data.views.Crop fgfast.data.views.Patch fgfast.data.views.Batch
        fgfast.data.transforms.TrimBorder fgfast.data.transforms.Gamma fgfast.data.transforms.PatchSwap
        fgfast.data.transforms.BlockShuffle fgfast.data.transforms.Holes fgfast.data.transforms.PasteOnWhite
        fgfast.data.normalise.InputStats""",
    ),
    "training": (
        "Training",
        "What a method is written with: [fgfast/methods/README.md](../methods/README.md) has an example.",
        """fgfast.train.loop.pretrain fgfast.config.TrainConfig fgfast.methods.base.Method fgfast.methods.base.Progress
        fgfast.methods.base.build_encoder fgfast.models.backbone.Backbone fgfast.losses.over_ranks.mean_valid
        fgfast.losses.over_ranks.sample_images fgfast.losses.over_ranks.draw_joined fgfast.losses.over_ranks.join_rows
        fgfast.methods.run_folder.load_run_encoder fgfast.errors.UserError""",
    ),
    "evaluation": (
        "Evaluation",
        "The protocols of `fgfast eval`, and scores of features: [fgfast/evaluate/README.md](../evaluate/README.md).",
        """fgfast.evaluate.protocols.evaluate fgfast.evaluate.protocols.Score fgfast.evaluate.features.extract
        fgfast.evaluate.knn.knn_predict fgfast.evaluate.linear.linear_probe fgfast.evaluate.retrieval.retrieve
        fgfast.evaluate.retrieval.Retrieval fgfast.evaluate.bootstrap.accuracy_interval
        fgfast.evaluate.bootstrap.paired_interval fgfast.evaluate.part_discovery.nmi_ari
        fgfast.evaluate.health.effective_rank fgfast.evaluate.health.uniformity fgfast.evaluate.health.alignment""",
    ),
}
INDEX = """# The API

These pages are made from the docstrings by `make docs`. Names that are imported from `fgfast` itself are public as
[CONTRIBUTING.md](../../CONTRIBUTING.md) defines it; those of its modules may change with a minor version.
"""


def find(name: str) -> tuple[Path, ast.FunctionDef | ast.ClassDef]:
    """The file and the syntax tree of the definition of a name."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    path = Path(str(sys.modules[value.__module__].__file__))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return path, [node for node in definitions if node.name == value.__name__][-1]  # the last is no overload


def prose(text: str) -> str:
    """Text of a docstring: roles become code or math, and what Markdown would take for markup is escaped."""
    text = re.sub(r":math:`([^`]+)`", r"$`\1`$", text)
    text = re.sub(r":[a-z]+:`([^`]+)`", r"`\1`", text)
    words, *spans = re.split(r"(``[^`]+``|`[^`]+`)", text)
    escaped = [re.sub(MARKUP, r"\\\g<0>", words) for words in (words, *spans[1::2])]
    return "".join(part for pair in zip(escaped, [*spans[::2], ""], strict=True) for part in pair)


def section(head: str, body: str) -> str:
    """A section of a docstring."""
    if head.startswith(".. math::"):
        formula = [line.strip() for line in (head.removeprefix(".. math::") + "\n" + body).splitlines()]
        return "\n".join(["```math", *filter(None, formula), "```"])
    body = dedent(body).strip()
    if head in ("Args:", "Attributes:", "Raises:", "Warns:"):
        entries = [item.partition(":") for item in re.split(r"\n(?=\S)", body)]
        body = "\n".join(f"- `{name}`:{prose(text)}" for name, _, text in entries)
    elif head == "Example:":
        body = "```pycon\n" + re.sub(r"  # doctest: .*", "", body) + "\n```"
    elif head == "Source:":
        return f"Source: {prose(body)}"
    else:
        body = prose(body)
    return f"**{'Arguments' if head == 'Args:' else head[:-1]}**\n\n{body}"


def markdown(docstring: str) -> str:
    """A docstring as Markdown."""
    pieces = re.split(SECTION, docstring + "\n")  # text, then head, body, text of each section
    out = [prose(pieces[0])]
    for head, body, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        out += [section(head, body), prose(text)]
    return "\n\n".join(part.strip() for part in out if part.strip())


def code(lines: list[str], node: ast.FunctionDef | ast.ClassDef) -> str:
    """The source of a definition up to its first statement: decorators and signature."""
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = [line for line in lines[start - 1 : node.body[0].lineno - 1] if line.lstrip()[:1] not in ("", "#")]
    return re.sub(FOR_TOOLS, "", "\n".join(kept)).rstrip(":")


def fence(signature: str) -> str:
    """A block of Python code."""
    return f"```python\n{dedent(signature)}\n```"


def entry(name: str) -> str:
    """The section of a page on one name: signature, fields, docstring and methods."""
    path, node = find(name)
    lines = path.read_text(encoding="utf-8").splitlines()
    docstring = ast.get_docstring(node) or ""
    head, fields, methods = [code(lines, node)], [], []
    body = node.body if isinstance(node, ast.ClassDef) else []
    functions = [item for item in body if isinstance(item, ast.FunctionDef)]
    made = [code(lines, item) for item in functions if item.name == "__init__"]
    for item, after in zip_longest(body, body[1:]):
        if isinstance(item, ast.AnnAssign):
            field = re.sub(FOR_TOOLS, "", "\n".join(lines[item.lineno - 1 : item.end_lineno]))
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                fields.append(f"- `{field.strip()}`: {prose(' '.join(str(after.value.value).split()))}")
            elif f"\n    {ast.unparse(item.target)}: " in docstring or not (made or "ClassVar" in field):
                head.append(field)  # others only tell type checkers what is set elsewhere
    for item in functions:
        text = ast.get_docstring(item) or ""
        if item.name[0] != "_" and (text or item.name == "forward"):
            methods += [f"### {node.name}.{item.name}", fence(code(lines, item)), markdown(text)]
    import_line = f"`from {name.rpartition('.')[0]} import {node.name}`, [source]({os.path.relpath(path, DOCS)})"
    parts = [f"## {node.name}", import_line, fence("\n".join([*head, *made])), markdown(docstring), "\n".join(fields)]
    return "\n\n".join(part for part in [*parts, *methods] if part)


def pages() -> dict[str, str]:
    """The text of every page by its file name."""
    made, index = {}, INDEX
    for page, (title, introduction, names) in AREAS.items():
        made[f"{page}.md"] = "\n\n".join([f"# {title}", introduction, *map(entry, names.split())]) + "\n"
        index += f"\n## [{title}]({page}.md)\n\n| name | what it is |\n|---|---|\n"
        for name in names.split():
            _, node = find(name)
            first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()).replace("|", "\\|")
            index += f"| [`{name}`]({page}.md#{node.name.lower()}) | {prose(first)} |\n"
    return {"README.md": index, **made}


if __name__ == "__main__":
    for file, text in pages().items():
        (DOCS / file).write_text(text, encoding="utf-8")
