"""Transformer decoders: code vectors, all or a prefix of them, to a picture."""

import torch
from torch import Tensor, nn

from tokenizer_hf.encoders.blocks import join_patches
from tokenizer_hf.encoders.vit import TransformerBlock


class VitDecoder(nn.Module):
    """Rows (B, L, C) -> pictures (B, 3, H, W).

    Args:
        num_channels: channels of a picture.
        patch_size: side of a patch, pixels.
        grid: (rows, columns) of the patches.
        num_tokens: 0 = the rows are the patches; else up to ``num_tokens`` rows are read by one
            learned query per patch. A shorter prefix is simply a shorter sequence.
        width, num_layers, num_heads, mlp_ratio: the transformer.

    Source: TiTok (Yu et al. 2024), §3, where the queries are one mask token plus positions; here
        they
    are positions only, which is the same function. Prefixes as in Miwa et al., "One-D-Piece"
    (2025), §3.
    """

    def __init__(
        self,
        num_channels: int,
        patch_size: int,
        grid: tuple[int, int],
        num_tokens: int,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.grid = grid
        num_patches = grid[0] * grid[1]
        self.patch_positions = nn.Parameter(torch.empty(num_patches, width))
        self.token_positions = nn.Parameter(torch.empty(num_tokens, width)) if num_tokens else None
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, num_heads, mlp_ratio) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.paint = nn.Linear(width, patch_size * patch_size * num_channels)
        self.input_dim = width

    def forward(self, rows_BLC: Tensor) -> Tensor:
        if self.token_positions is not None:
            tokens = rows_BLC + self.token_positions[: rows_BLC.shape[1]]
            queries = self.patch_positions.expand(len(tokens), -1, -1)
            rows = torch.cat([queries, tokens], dim=1)
        else:
            rows = rows_BLC + self.patch_positions
        rows = self.blocks(rows)[:, : self.patch_positions.shape[0]]
        patches = self.paint(self.norm(rows))
        return join_patches(patches, self.grid, self.patch_size, self.num_channels)
