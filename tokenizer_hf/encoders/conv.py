"""Convolutional encoders: a picture to a grid of latents."""

from torch import Tensor, nn

from tokenizer_hf.encoders.blocks import ConvBlock, PatchBlock, cut_into_patches, map_to_rows


class ConvEncoder(nn.Module):
    """Pictures (B, 3, H, W) -> latents (B, R·S, C). Each level halves the size, then refines it.

    Args:
        num_channels: channels of a picture.
        widths: channels of each level; H and W are halved once per level.
        num_res_blocks: residual blocks per level.
    """

    def __init__(self, num_channels: int, widths: list[int], num_res_blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip([num_channels, *widths], widths, strict=False):
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            layers.extend(ConvBlock(width) for _ in range(num_res_blocks))
        self.layers = nn.Sequential(*layers)
        self.output_dim = widths[-1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        return map_to_rows(self.layers(pixel_values))


class PatchEncoder(nn.Module):
    """Pictures (B, 3, H, W) -> latents (B, R·S, C); each latent sees its own patch only.

    Args:
        num_channels: channels of a picture.
        side: side of a patch, pixels.
        width: C.
        num_blocks: residual blocks, each a two-layer perceptron on one patch.
    """

    def __init__(self, num_channels: int, side: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.side = side
        self.embed = nn.Linear(side * side * num_channels, width)
        self.blocks = nn.Sequential(*(PatchBlock(width) for _ in range(num_blocks)))
        self.output_dim = width

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.blocks(self.embed(cut_into_patches(pixel_values, self.side)))
