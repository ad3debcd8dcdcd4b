"""Convolutional decoders: a grid of code vectors to a picture. They mirror the encoders."""

from torch import Tensor, nn

from tokenizer_hf.encoders.blocks import ConvBlock, PatchBlock, join_patches, rows_to_map


class ConvDecoder(nn.Module):
    """Rows (B, R·S, C) -> pictures (B, 3, H, W). Each level refines the map, then doubles its size.

    Args:
        num_channels: channels of a picture.
        widths: channels of each level, finest first, as in the encoder; C = widths[-1].
        num_res_blocks: residual blocks per level.
        grid: (R, S).
    """

    def __init__(
        self, num_channels: int, widths: list[int], num_res_blocks: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, after in zip(
            reversed(widths), [*reversed(widths[:-1]), num_channels], strict=True
        ):
            layers.extend(ConvBlock(width) for _ in range(num_res_blocks))
            layers.append(nn.Conv2d(width, 4 * after, 3, padding=1))
            layers.append(nn.PixelShuffle(2))
        self.layers = nn.Sequential(*layers)
        self.grid = grid
        self.input_dim = widths[-1]

    def forward(self, rows_BNC: Tensor) -> Tensor:
        return self.layers(rows_to_map(rows_BNC, self.grid))


class PatchDecoder(nn.Module):
    """Rows (B, R·S, C) -> pictures (B, 3, H, W); each row paints its own patch and nothing else.

    Args:
        num_channels: channels of a picture.
        side: side of a patch, pixels.
        width: C.
        num_blocks: residual blocks, each a two-layer perceptron on one patch.
        grid: (R, S).
    """

    def __init__(
        self, num_channels: int, side: int, width: int, num_blocks: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(PatchBlock(width) for _ in range(num_blocks)))
        self.paint = nn.Linear(width, side * side * num_channels)
        self.num_channels = num_channels
        self.side = side
        self.grid = grid
        self.input_dim = width

    def forward(self, rows_BNC: Tensor) -> Tensor:
        patches = self.paint(self.blocks(rows_BNC))
        return join_patches(patches, self.grid, self.side, self.num_channels)
