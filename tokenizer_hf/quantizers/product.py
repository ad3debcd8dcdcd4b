"""Product quantization: a latent is cut into parts, and each part has a codebook of its own."""

import math

import torch
from torch import Tensor, nn

from tokenizer_hf.quantizers.output import QuantizerOutput
from tokenizer_hf.quantizers.vq import VectorQuantizer


class ProductQuantizer(nn.Module):
    """Latents (B, N, D) <-> codes (B, N), with D = sum(dims) and prod(sizes) codes.

    A code is the mixed-radix number of the parts' own codes, part 0 first (fastest), so one code
    stands for one combination, and a combination that training never saw has a code too. See
    :attr:`ImageTokenizerConfig.code_radices` for the way back to the parts.

    Args:
        sizes: codes of each part.
        dims: width of each part.
        **settings: of each part's :class:`VectorQuantizer`.

    Source: Jégou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search" (2011), §2.
        The codebooks are those of :class:`VectorQuantizer`, with its updates and revivals.
    """

    def __init__(self, sizes: list[int], dims: list[int], **settings: object) -> None:
        super().__init__()
        self.sizes, self.dims = list(sizes), list(dims)
        self.codebook_size, self.codebook_dim = math.prod(sizes), sum(dims)
        self.parts = nn.ModuleList(
            VectorQuantizer(size, dim, **settings)  # type: ignore[arg-type]
            for size, dim in zip(sizes, dims, strict=True)
        )

    def reset(self) -> None:
        """New codebooks, as :meth:`VectorQuantizer.reset`."""
        for part in self.parts:
            part.reset()  # type: ignore[operator]

    def forward(self, latents_BND: Tensor) -> QuantizerOutput:
        """Quantize latents of any float dtype, in float32 whatever autocast says."""
        cut = latents_BND.split(self.dims, -1)
        found = [part(piece) for part, piece in zip(self.parts, cut, strict=True)]
        codes = torch.zeros_like(found[0].codes)
        for size, one in zip(reversed(self.sizes), reversed(found), strict=True):
            codes = codes * size + one.codes
        names = {name for one in found for name in one.losses}
        losses = {
            name: torch.stack([one.losses[name] for one in found]).sum() for name in sorted(names)
        }
        return QuantizerOutput(torch.cat([one.vectors for one in found], -1), codes, losses)

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors (..., D) float32 of codes (...) int64."""
        vectors = []
        for size, part in zip(self.sizes, self.parts, strict=True):
            vectors.append(part.lookup(codes % size))  # type: ignore[operator]
            codes = codes // size
        return torch.cat(vectors, -1)

    def code_vectors(self) -> Tensor:
        """All combinations, (codebook_size, D) float32, in the order of the codes."""
        device = self.parts[0].codebook.device  # type: ignore[union-attr]
        return self.lookup(torch.arange(self.codebook_size, device=device))  # type: ignore[arg-type]
