"""Encoders of runs for other programs: ONNX, torch.export, and folders of timm and transformers, with a model card."""

from fgfast.export.card import Format
from fgfast.export.formats import export_run

__all__ = ["Format", "export_run"]
