"""The palette decoder: two colours, mixed by a mask. The inverse of the palette encoder."""

import torch
from torch import Tensor, nn

from tokenizer_hf.encoders.blocks import join_patches


class PaletteDecoder(nn.Module):
    """Vectors (B, N, side·side + 6) -> pictures: background + mask · (foreground - background).

    Args:
        num_channels: channels of a picture.
        side: side of a patch, pixels.
        grid: (R, S).
    """

    def __init__(self, num_channels: int, side: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.num_channels, self.side, self.grid = num_channels, side, grid
        self.input_dim = side * side + 2 * num_channels

    def forward(self, rows_BNC: Tensor) -> Tensor:
        pixels = self.side * self.side
        mask, figure, ground = rows_BNC.split([pixels, self.num_channels, self.num_channels], -1)
        patches = torch.lerp(ground.unsqueeze(-2), figure.unsqueeze(-2), mask.unsqueeze(-1))
        return join_patches(patches.flatten(-2), self.grid, self.side, self.num_channels)
