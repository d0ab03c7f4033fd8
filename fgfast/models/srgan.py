"""SRGAN's generator and discriminator, and an encoder from either of them."""

from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fgfast.data.normalise import IMAGENET, InputStats, denormalise
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.probe import FeatureLayout

FIXED = (81, 96)  # range of sides that are 6 after four halvings


class ResidualBlock(nn.Module):
    """x + BN(conv(PReLU(BN(conv(x))))), 3 x 3, of constant size and width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(width, width), nn.BatchNorm2d(width), nn.PReLU(), _conv(width, width), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, width, H, W] to the same shape."""
        return x + self.body(x)


def _conv(inside: int, outside: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, 1, bias=bias)


class Generator(nn.Module):
    """Super-resolution by 4: 9 x 9 conv, residual blocks with a skip around them, two pixel shuffles, 9 x 9 conv.

    Args:
        width: channels, 64 in the paper.
        blocks: residual blocks, 16 in the paper.

    Example:
        >>> import torch
        >>> Generator(width=4, blocks=1)(torch.zeros(1, 3, 5, 7)).shape
        torch.Size([1, 3, 20, 28])
    """

    def __init__(self, width: int = 64, blocks: int = 16) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, width, 9, 1, 4), nn.PReLU())
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.neck = nn.Sequential(_conv(width, width), nn.BatchNorm2d(width))
        self.up = nn.Sequential(
            *(m for _ in range(2) for m in (_conv(width, 4 * width, bias=True), nn.PixelShuffle(2), nn.PReLU()))
        )
        self.tail = nn.Conv2d(width, 3, 9, 1, 4)

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of the residual blocks in memory, and compute the rest again in the backward pass."""
        for block in list(self.blocks):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @property
    def reach(self) -> int:
        """Radius of the receptive field in pixels of the small image (an upper bound)."""
        return 4 + 2 * len(self.blocks) + 1 + 1 + 1 + 1  # 9 x 9; blocks; neck; two shuffles; 9 x 9 at four times

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to [B, 3, 4 H, 4 W]; values of about [0, 1] in both."""
        x = self.head(x)
        return self.tail(self.up(x + self.neck(self.blocks(x))))


class Discriminator(nn.Module):
    """Logit that an image is real: eight 3 x 3 convolutions, every second one of stride 2, then two linear layers.

    The final feature map is averaged into 6 x 6 cells. For sides of 81 to 96 pixels it is 6 x 6 already, and the
    network is the paper's; other sizes use the same weights.

    Args:
        width: channels of the first block, 64 in the paper; the last has eight times as many.
        fixed: refuse images whose final feature map is not 6 x 6, like the flatten layer of the paper.

    Example:
        >>> import torch
        >>> Discriminator(width=2)(torch.zeros(2, 3, 40, 56)).shape
        torch.Size([2, 1])
    """

    def __init__(self, width: int = 64, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        self.blocks = nn.Sequential()
        for i, (inside, outside) in enumerate(zip([3, *widths], widths, strict=False)):
            norm = [nn.BatchNorm2d(outside)] if i else []  # the first has none and therefore a bias
            act = nn.LeakyReLU(0.2, inplace=True)
            self.blocks.append(nn.Sequential(_conv(inside, outside, 1 + i % 2, bias=i == 0), *norm, act))
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(8 * width * 36, 16 * width),
            nn.LeakyReLU(0.2, inplace=True), nn.Linear(16 * width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W], values of about [0, 1], to logits [B, 1].

        Raises:
            UserError: ``fixed``, and a side outside 81 to 96.
        """
        if self.fixed:
            check_fixed(*x.shape[-2:])
        return self.head(self.blocks(x))


def check_fixed(*sides: int) -> None:
    """Refuse sides that the fixed flatten layer cannot take."""
    if not all(FIXED[0] <= side <= FIXED[1] for side in sides):
        raise UserError(
            f"The fixed flatten takes images of {FIXED[0]} to {FIXED[1]} pixels, not {' x '.join(map(str, sides))}: "
            "give --size 96, or --no-fixed-flatten."
        )


class Trunk(nn.Module):
    """The first blocks of a generator or discriminator, with the methods of timm's networks that an encoder needs.

    It shares the modules of the network, and takes images as the loaders normalise them.

    Args:
        network: a generator or a discriminator.
        drop: number of its last blocks to leave out; the layers after the blocks are always left out.
        stats: the statistics that images are normalised with, which the networks themselves do without.

    Raises:
        UserError: no block would be left.
    """

    def __init__(self, network: Generator | Discriminator, drop: int = 0, stats: InputStats = IMAGENET) -> None:
        super().__init__()
        self.stats = stats
        kept = len(network.blocks) - drop
        kind = type(network).__name__.lower()
        # For errors about weights: what the network is called, and the options that choose it
        self.pretrained_cfg = {"architecture": f"srgan's {kind}"}
        self.chosen_by = "--width, --blocks, --features and --drop"
        if not 0 <= drop < len(network.blocks):
            raise UserError(
                f"--drop is {drop}: the {kind} has {len(network.blocks)} blocks, give 0 to {len(network.blocks) - 1}."
            )
        head = [network.head] if isinstance(network, Generator) else []
        self.layers = nn.Sequential(*head, *network.blocks[:kept])
        self.num_features = next(m for m in list(self.layers.modules())[::-1] if isinstance(m, nn.Conv2d)).out_channels

    def forward_intermediates(
        self, x: Tensor, intermediates_only: Literal[True] = True, norm: bool = False
    ) -> list[Tensor]:
        """The feature map after every layer, first to last."""
        x, maps = denormalise(x, self.stats), []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The final feature map [B, D, h, w]."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = True) -> Tensor:
        """The mean of a feature map, [B, D]."""
        return x.mean((2, 3))


class SRGANEncoder(Backbone):
    """A trunk as an encoder, for evaluation, part discovery and figures.

    Args:
        network: a generator or a discriminator, whose modules it shares.
        drop: number of its last blocks to leave out.
        stats: the statistics that images are normalised with.

    Example:
        >>> import torch
        >>> encoder = SRGANEncoder(Discriminator(width=2), drop=3)
        >>> encoder(torch.zeros(1, 3, 50, 40)).shape == (1, encoder.dim)
        True
    """

    def __init__(self, network: Generator | Discriminator, drop: int = 0, stats: InputStats = IMAGENET) -> None:
        nn.Module.__init__(self)  # that of Backbone builds a timm network
        trunk = Trunk(network, drop, stats)
        self._adopt("srgan", trunk, FeatureLayout("map", trunk.num_features, trunk.num_features, 0, 1), size=0)
        self.grey, self.stats = False, stats
