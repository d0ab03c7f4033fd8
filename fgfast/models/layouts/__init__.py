"""Layouts of checkpoints: for each library a table from the tensors of a timm network to those of the library's file.

A table names the timm networks whose computation equals the library's: timm has many architectures twice, with another
padding or epsilon, and the same tensors.
"""

from fgfast.models.layouts.convnets import CONVNETS
from fgfast.models.layouts.mobile import MOBILE
from fgfast.models.layouts.rules import TIMM, Layout, Way, count_blocks, describe_names
from fgfast.models.layouts.vits import VITS

LAYOUTS: tuple[Layout, ...] = (TIMM, *CONVNETS, *MOBILE, *VITS)

__all__ = ["LAYOUTS", "TIMM", "Layout", "Way", "count_blocks", "describe_names"]
