"""Vector quantization: each latent becomes the nearest vector of a learned codebook."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenizer_hf.quantizers.output import QuantizerOutput

ROWS_PER_BLOCK = 256
MAX_REVIVALS_PER_STEP = 64


class VectorQuantizer(nn.Module):
    """Latents (B, N, D) <-> codes (B, N) through a codebook (K, D).

    Everything is float32 inside, whatever the dtype of the latents or autocast says. The nearest
    code is searched in blocks of a fixed number of rows, so that the matrix product has the same
    shape for every batch and a vector gets the same code alone and among others. Only a training
    step that records gradients changes state; ``eval()`` or ``no_grad`` never does.

    Args:
        codebook_size: K.
        codebook_dim: D.
        distance: ``"l2"``, or ``"cosine"``: latents and codes are scaled to unit length.
        codebook_update: ``"ema"``: a code is the running mean of the vectors that chose it;
            ``"gradient"``: a codebook loss pulls it.
        ema_decay: what one step keeps of the running mean.
        commitment_cost: weight of the commitment loss.
        revive_after: training steps without use after which a code is dead and is moved to a
            current latent; 0 = never. A new codebook starts dead, so its first steps place it on
            the data.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), §3.2 and
        appendix A.1
    (EMA), without Laplace smoothing: a code that was not used keeps its place. Cosine distance: Yu
    et al., "Vector-quantized Image Modeling with Improved VQGAN" (2021), §3.2. Revival is ours:
    the seeding rule of k-means++ (Arthur and Vassilvitskii 2007), applied to the latents of the
    current batch.
    """

    cluster_size: Tensor
    steps_unused: Tensor

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        distance: str = "l2",
        codebook_update: str = "ema",
        ema_decay: float = 0.99,
        commitment_cost: float = 0.25,
        revive_after: int = 100,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.cosine = distance == "cosine"
        self.update_by_ema = codebook_update == "ema"
        self.ema_decay = ema_decay
        self.commitment_cost = commitment_cost
        self.revive_after = revive_after
        self.codebook = nn.Parameter(
            torch.empty(codebook_size, codebook_dim), requires_grad=not self.update_by_ema
        )
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("steps_unused", torch.zeros(codebook_size, dtype=torch.int64))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """A new codebook: random unit vectors that no latent has chosen yet."""
        self.codebook.copy_(functional.normalize(torch.randn_like(self.codebook), dim=-1))
        self.cluster_size.zero_()
        self.steps_unused.fill_(self.revive_after)

    def forward(self, latents_BND: Tensor) -> QuantizerOutput:
        """Quantize latents of any float dtype."""
        with torch.autocast(latents_BND.device.type, enabled=False):
            latents = self._scaled(latents_BND.float())
            flat_ND = latents.flatten(0, -2)
            learning = self.training and torch.is_grad_enabled()
            if learning and self.revive_after:
                self._revive(flat_ND.detach())
            codes = self._nearest(flat_ND.detach())
            chosen = self.lookup(codes).view_as(latents)
            if not learning:
                return QuantizerOutput(chosen, codes.view(latents.shape[:-1]), {})
            losses = {
                "commitment": self.commitment_cost * functional.mse_loss(latents, chosen.detach())
            }
            if self.update_by_ema:
                self._follow(flat_ND.detach(), codes)
            else:
                losses["codebook"] = functional.mse_loss(chosen, latents.detach())
            self._count(codes)
            passed = latents + (chosen - latents).detach()
            return QuantizerOutput(passed, codes.view(latents.shape[:-1]), losses)

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors (..., D) float32 of codes (...) int64."""
        return self._scaled(functional.embedding(codes, self.codebook).float())

    def code_vectors(self) -> Tensor:
        """The codebook, (codebook_size, D) float32; unit length where the distance is cosine."""
        return self._scaled(self.codebook.detach().float())

    def _scaled(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=-1) if self.cosine else vectors

    @torch.no_grad()
    def _nearest(self, flat_ND: Tensor) -> Tensor:
        """Codes (N,) of the nearest code vectors: the largest z·e - |e|²/2."""
        codebook = self.code_vectors()
        bias = -codebook.square().sum(-1) / 2
        columns = codebook.t().contiguous()
        rows = flat_ND.shape[0]
        padded = functional.pad(flat_ND, (0, 0, 0, -rows % ROWS_PER_BLOCK))
        blocks = [
            torch.addmm(bias, block, columns).argmax(-1) for block in padded.split(ROWS_PER_BLOCK)
        ]
        return torch.cat(blocks)[:rows]

    @torch.no_grad()
    def _follow(self, flat_ND: Tensor, codes: Tensor) -> None:
        """Move every chosen code towards the mean of the vectors that chose it.

        With n vectors of mean m now and a running size s, the running mean moves by
        (1 - decay)·n / s' · (m - e), s' = decay·s + (1 - decay)·n. A code with s = 0 jumps to m.
        """
        count = torch.bincount(codes, minlength=self.codebook_size).float()
        total = torch.zeros_like(self.codebook).index_add_(0, codes, flat_ND)
        self.cluster_size.mul_(self.ema_decay).add_(count, alpha=1 - self.ema_decay)
        used = count.nonzero().squeeze(-1)
        mean = total[used] / count[used].unsqueeze(-1)
        pull = (1 - self.ema_decay) * count[used] / self.cluster_size[used]
        moved = self.codebook[used].lerp(mean, pull.unsqueeze(-1))
        self.codebook[used] = self._scaled(moved)

    @torch.no_grad()
    def _count(self, codes: Tensor) -> None:
        self.steps_unused.add_(1)
        self.steps_unused[codes] = 0

    @torch.no_grad()
    def _revive(self, flat_ND: Tensor) -> None:
        """Move dead codes to latents of this batch, one after the other.

        Each latent is drawn with a probability proportional to the squared distance to its nearest
        living code, and counts as living itself from then on. Latents that a code already sits on
        (squared distance below 0.1 % of the variance) are left alone.
        """
        dead = (self.steps_unused >= self.revive_after).nonzero().squeeze(-1)
        if dead.numel() == 0:
            return
        gap_N = self._gap_to_living(flat_ND)
        floor = 1e-3 * flat_ND.var(0, correction=0).sum()
        limit = flat_ND.shape[0] if dead.numel() == self.codebook_size else MAX_REVIVALS_PER_STEP
        for code in dead[:limit]:
            weight = torch.where(gap_N > floor, gap_N, 0.0)
            if not weight.any():
                return
            vector = flat_ND[torch.multinomial(weight, 1).squeeze()]
            self.codebook[code] = vector
            self.cluster_size[code] = 0.0
            self.steps_unused[code] = 0
            gap_N = torch.minimum(gap_N, (flat_ND - vector).square().sum(-1))

    def _gap_to_living(self, flat_ND: Tensor) -> Tensor:
        living = self.code_vectors()[self.steps_unused < self.revive_after]
        if living.shape[0] == 0:
            return (flat_ND - flat_ND.mean(0)).square().sum(-1)
        score = torch.addmm(-living.square().sum(-1) / 2, flat_ND, living.t())
        return (flat_ND - living[score.argmax(-1)]).square().sum(-1)
