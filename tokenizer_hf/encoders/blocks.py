"""The light residual blocks of the convolutional bodies, and pictures cut into patches."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ZeroConv2d(nn.Conv2d):
    """A convolution whose weights start at zero: the end of a residual branch."""


class ZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero: the end of a residual branch."""


class ConvBlock(nn.Module):
    """x + conv1x1(silu(conv3x3(silu(x)))), at first x. No normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = ZeroConv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.mix(functional.silu(self.spread(functional.silu(x_BCHW))))


class PatchBlock(nn.Module):
    """x + W2(silu(W1(norm(x)))) on each patch by itself, at first x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = ZeroLinear(2 * width, width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return x_BNC + self.narrow(functional.silu(self.widen(self.norm(x_BNC))))


def cut_into_patches(pixel_values: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, R·S, side·side·C): the patches in raster order."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // side, width // side
    patches = pixel_values.reshape(batch, channels, rows, side, columns, side)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, side * side * channels)


def join_patches(patches: Tensor, grid: tuple[int, int], side: int, channels: int) -> Tensor:
    """The inverse of :func:`cut_into_patches`."""
    batch = patches.shape[0]
    rows, columns = grid
    cut = patches.reshape(batch, rows, columns, side, side, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * side, columns * side)


def map_to_rows(x_BCHW: Tensor) -> Tensor:
    """(B, C, R, S) -> (B, R·S, C)."""
    return x_BCHW.flatten(2).transpose(1, 2)


def rows_to_map(x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, R·S, C) -> (B, C, R, S), laid out in memory as channels_last."""
    return (
        x_BNC.unflatten(1, grid).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    )
