"""Networks: backbones from timm, heads, momentum copies, weights from files."""
