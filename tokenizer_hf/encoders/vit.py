"""Transformer encoders: a picture to a grid of latents, or to queries that read all of it."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenizer_hf.encoders.blocks import ZeroLinear, cut_into_patches


class TransformerBlock(nn.Module):
    """Pre-norm attention over all rows, then a perceptron; at first the identity."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = ZeroLinear(width, width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, int(width * mlp_ratio))
        self.narrow = ZeroLinear(int(width * mlp_ratio), width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        x_BNC = x_BNC + self.attention_out(self._attend(self.attention_norm(x_BNC)))
        return x_BNC + self.narrow(functional.gelu(self.widen(self.norm(x_BNC))))

    def _attend(self, x_BNC: Tensor) -> Tensor:
        batch, rows, width = x_BNC.shape
        split = self.query_key_value(x_BNC).view(batch, rows, 3, self.num_heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(batch, rows, width)


class VitEncoder(nn.Module):
    """Pictures (B, 3, H, W) -> latents (B, L, C).

    Args:
        num_channels: channels of a picture.
        patch_size: side of a patch, pixels.
        num_patches: patches per picture.
        num_queries: 0 = one latent per patch (L = num_patches); else L latent queries are put
            behind the patches, every block mixes both, and only the queries come out.
        width, num_layers, num_heads, mlp_ratio: the transformer.

    Source of the latent queries: Yu et al., "An Image is Worth 32 Tokens for Reconstruction and
    Generation" (TiTok, 2024), §3. Ours has no class token and draws pixels directly (one stage).
    """

    def __init__(
        self,
        num_channels: int,
        patch_size: int,
        num_patches: int,
        num_queries: int,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_queries = num_queries
        self.embed = nn.Linear(patch_size * patch_size * num_channels, width)
        self.positions = nn.Parameter(torch.empty(num_patches + num_queries, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, num_heads, mlp_ratio) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.output_dim = width

    def forward(self, pixel_values: Tensor) -> Tensor:
        rows = self.embed(cut_into_patches(pixel_values, self.patch_size))
        rows = functional.pad(rows, (0, 0, 0, self.num_queries)) + self.positions
        return self.norm(
            self.blocks(rows)[:, -self.num_queries :]
        )  # all rows where there are no queries
