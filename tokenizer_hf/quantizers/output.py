"""What every quantizer returns."""

from typing import NamedTuple

from torch import Tensor


class QuantizerOutput(NamedTuple):
    """The result of quantizing latents (B, N, D)."""

    vectors: Tensor
    """(B, N, D) float32: the chosen code vectors; gradients pass straight to the latents."""
    codes: Tensor
    """(B, N) int64, values in [0, codebook_size)."""
    losses: dict[str, Tensor]
    """Named scalar loss terms, already weighted; empty in eval mode and for FSQ."""
