"""Finite scalar quantization: every dimension is rounded to a few levels; nothing is learned."""

import math

import torch
from torch import Tensor, nn

from tokenizer_hf.quantizers.output import QuantizerOutput


class FiniteScalarQuantizer(nn.Module):
    """Latents (B, N, D) <-> codes (B, N), with D = len(levels) and prod(levels) codes.

    Dimension i is squashed with tanh to an interval that holds ``levels[i]`` integers and rounded.
    Where the number of levels is even, the interval is shifted by half a step, so the integers run
    from -levels/2 to levels/2 - 1. A code is the mixed-radix number of the levels, dimension 0
    first (fastest). A code vector is the integers divided by ``levels // 2``, so it lies in [-1,
    1].

    It has no parameters and no state, and is the same in training and in eval mode.

    Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (2023), §3 and
        appendix A.
    The same, but for ``losses``, which are always empty.
    """

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        self.levels = list(levels)
        self.codebook_size = math.prod(levels)
        self.codebook_dim = len(levels)

    def forward(self, latents_BND: Tensor) -> QuantizerOutput:
        """Round latents of any float dtype, in float32 whatever autocast says."""
        with torch.autocast(latents_BND.device.type, enabled=False):
            bounded = self._bound(latents_BND.float())
            rounded = bounded + (bounded.round() - bounded).detach()
            half = self._halves(bounded)
            digits = (bounded.detach().round() + half).long()
            codes = (digits * self._basis(digits)).sum(-1)
            return QuantizerOutput(rounded / half, codes, {})

    def lookup(self, codes_BN: Tensor) -> Tensor:
        """Code vectors (..., D) float32 of codes (...) int64."""
        levels = torch.tensor(self.levels, device=codes_BN.device)
        digits = codes_BN.unsqueeze(-1) // self._basis(codes_BN) % levels
        half = self._halves(codes_BN)
        return (digits - half) / half

    def code_vectors(self) -> Tensor:
        """All grid points, (codebook_size, D) float32, in the order of the codes."""
        return self.lookup(torch.arange(self.codebook_size))

    def _bound(self, latents: Tensor) -> Tensor:
        reach = [(count - 1) * (1 - 1e-3) / 2 for count in self.levels]
        offset = [0.5 if count % 2 == 0 else 0.0 for count in self.levels]
        shift = [math.atanh(o / r) if o else 0.0 for o, r in zip(offset, reach, strict=True)]
        return torch.tanh(latents + latents.new_tensor(shift)) * latents.new_tensor(
            reach
        ) - latents.new_tensor(offset)

    def _halves(self, like: Tensor) -> Tensor:
        return torch.tensor([count // 2 for count in self.levels], device=like.device).float()

    def _basis(self, like: Tensor) -> Tensor:
        radix = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        return torch.tensor(radix, device=like.device)
