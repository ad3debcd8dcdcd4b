"""The softmax over product codes, from the logits of their factors: exact, and nearly free.

Where a code's row is the sum of its factors' rows (`training.factored_rows`), so is its logit, and
the softmax's normaliser over all K = n1·n2·... codes needs the logits of n1 + n2 + ... rows only:

    sum_k exp(l_k) = sum_ab C_ab exp(f_a) exp(g_b)

with C_ab 1 where the code counts. Codes with a row of their own have C = 0 and a logit of their
own, as text has. A head of 24,576 codes of 256 masks and 96 pairs of colours so costs 352 rows and
one product with C, a number for each code in place of a row. The value and the gradients are those
of the full softmax.

Letters: N positions, V vocabulary rows, P rows with a logit of their own, F factors' values.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.factored_rows import CompactRows

logger = logging.getLogger(__name__)

_PROBE = 60.0
"""Logits of the probe: as large as any, so that a soft cap shows."""


class FactoredHead:
    """Computes next-token losses from the factors' logits.

    Args:
        rows: which rows of a head have a logit of their own, as `factored_rows.share_rows` returned
            it.
        uncounted: bool (V,): codes that stay out of the softmax where a code is to be predicted.
    """

    def __init__(self, rows: CompactRows, uncounted: Tensor | None = None) -> None:
        self.rows = rows
        self.sizes = rows.sizes
        self.columns = torch.full((rows.num_rows,), -1)
        self.columns[rows.own_ids] = torch.arange(len(rows.own_ids))
        first, K = rows.first_code, len(rows.factors)
        summed = self.columns[first : first + K] < 0
        counted = summed.clone()
        if uncounted is not None:
            counted &= ~uncounted[first : first + K]
        place = torch.from_numpy(_places(rows.factors, self.sizes))
        self.grids = torch.zeros(2, K)
        self.grids[:, place] = torch.stack([summed, counted]).float()
        """(2, K), in the order of the grid of factors: for text to be predicted, for codes."""
        self.factors = torch.from_numpy(rows.factors)

    @contextlib.contextmanager
    def compact(self) -> Iterator[None]:
        """Let the head compute the logits (.., P + F) that `losses` takes, while the block runs."""
        self.rows.on = True
        try:
            yield
        finally:
            self.rows.on = False

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return -log p(label), float32 (N,).

        Args:
            logits: float32 (N, P + F), computed inside `compact`.
            labels: int64 (N,), ids of the vocabulary.
        """
        self._move(logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            own, *parts = logits.split([logits.shape[1] - sum(self.sizes), *self.sizes], dim=1)
            tops = [part.detach().amax(1, keepdim=True) for part in parts]
            masses = [(part - top).exp() for part, top in zip(parts, tops, strict=True)]
            first, K = self.rows.first_code, len(self.factors)
            is_code = (labels >= first) & (labels < first + K)
            text, code = self._mass(masses, self.grids[0]), self._mass(masses, self.grids[1])
            mass = torch.where(is_code, code, text).clamp_min(torch.finfo(code.dtype).tiny)
            codes = mass.log() + torch.cat(tops, dim=1).sum(1)
            together = torch.logaddexp(own.logsumexp(1), codes)

            column = self.columns[labels]
            has_own = column >= 0
            of_own = own.gather(1, column.clamp_min(0)[:, None])[:, 0]
            values = self.factors[(labels - first).clamp(0, K - 1)]
            of_sum = logits.gather(1, own.shape[1] + values).sum(1)
            return together - torch.where(has_own, of_own, of_sum)

    def _mass(self, masses: list[Tensor], grid: Tensor) -> Tensor:
        """(N,): the sum over the grid of the products of the factors' masses."""
        total = masses[0] @ grid.view(self.sizes[0], -1)
        for mass in masses[1:]:
            total = torch.einsum("na,nar->nr", mass, total.view(*mass.shape, -1))
        return total[:, 0]

    def _move(self, device: torch.device) -> None:
        if self.grids.device != device:
            self.grids = self.grids.to(device)
            self.columns, self.factors = self.columns.to(device), self.factors.to(device)


def _places(factors: np.ndarray, sizes: list[int]) -> np.ndarray:
    """(K,): where each code stands in the grid of factors, the last of which runs fastest."""
    return np.ravel_multi_index(tuple((factors - factors.min(0)).T), sizes)


def factored_head(
    model: Any, rows: CompactRows | None, uncounted: Tensor | None = None
) -> FactoredHead | None:
    """Return the factored head of a model, or None where it would not be exact: no factors, codes
    that do not fill the grid of their factors, or a model that bends its logits (soft caps).

    Args:
        model: a PEFT model after `training.factored_rows.share_rows`, which returned ``rows``.
        uncounted: as for `FactoredHead`.
    """
    if rows is None or not _logits_are_plain(model):
        return None
    return FactoredHead(rows, uncounted)


def _logits_are_plain(model: nn.Module) -> bool:
    """Tell whether a model's logits are its head's, or these times a constant."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    parameter = next(model.parameters())
    wanted = torch.linspace(-_PROBE, _PROBE, 32, device=parameter.device)
    handle = head.register_forward_hook(lambda *_: wanted.to(parameter.dtype).expand(1, 1, 32))
    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 1, dtype=torch.int64, device=parameter.device)
            came = model(input_ids=tokens, use_cache=False).logits[0, 0].float()
    finally:
        handle.remove()
    plain = torch.allclose(came, wanted * (came[-1] / wanted[-1]), rtol=0.02, atol=0.02)
    if not plain:
        logger.info("this model bends its logits: its loss sums over every code")
    return plain
