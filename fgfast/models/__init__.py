"""Networks: timm backbones, heads, momentum copies, decoders, and loading of weights in any library's layout."""
