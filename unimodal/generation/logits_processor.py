"""Logits under the image-span grammar: keep the legal ids, then temperature and top-k by kind.

Letters: B rows, V vocabulary rows, K legal ids.

:class:`ImageSpanLogitsProcessor` is for plain ``model.generate``; our own loop
(``unimodal/generation/sampling.py``) uses the functions and looks at the legal columns only, which
spares a 150,000-id vocabulary nearly all the work inside an image.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenizer_hf.errors import ConfigurationError
from unimodal.generation.grammar import Allowed, ImageSpanGrammar, SpanState

Ranges = tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def legal_ids(ranges: Ranges, device: torch.device) -> Tensor:
    """Return the ids of half-open ranges as one int64 vector (K,)."""
    return torch.cat([torch.arange(first, stop, device=device) for first, stop in ranges])


def legal_columns(logits_BV: Tensor, ranges: Ranges) -> Tensor:
    """Return the legal columns (B, K) in the order of :func:`legal_ids`, cleaned.

    NaN counts as -inf and +inf as a very large number. A row without a finite legal logit becomes
    all zeros, so that whatever is drawn from it is legal and nothing is ever all -inf.
    """
    columns_BK = torch.cat([logits_BV[:, first:stop] for first, stop in ranges], dim=-1)
    return clean(columns_BK)


def clean(logits_BK: Tensor) -> Tensor:
    """Make logits safe: NaN to -inf, +inf to a sixteenth of the largest float, no row all -inf.

    Returns the tensor itself where a look at its largest values (which a NaN would show in) tells
    that there is nothing to do. A GPU is not asked: the answer would have to be waited for.
    """
    large = torch.finfo(logits_BK.dtype).max / 16
    if logits_BK.device.type == "cpu":
        largest_B = logits_BK.amax(-1)
        if bool(((largest_B > -torch.inf) & (largest_B <= large)).all()):
            return logits_BK
    logits_BK = torch.nan_to_num(logits_BK, nan=-torch.inf, posinf=large, neginf=-torch.inf)
    logits_BK = logits_BK.clamp(max=large)
    hopeless_B1 = logits_BK.amax(-1, keepdim=True) == -torch.inf
    return logits_BK.masked_fill(hopeless_B1, 0.0)


def draw(logits_BK: Tensor, uniforms_B: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Draw one column per row by inverting the cumulative distribution.

    One uniform number per row and step is all the randomness, so a row's draw does not depend on
    the rows beside it.

    Args:
        logits_BK: cleaned logits of the legal ids.
        uniforms_B: float64 in [0, 1), one per row.
        temperature: 0 is greedy.
        top_k: how many of the likeliest ids to keep; None or 0 for all.

    Returns:
        int64 (B,), column numbers in [0, K).
    """
    if temperature == 0:
        return logits_BK.argmax(-1)
    order_BK = None
    if top_k and top_k < logits_BK.shape[-1]:
        logits_BK, order_BK = logits_BK.topk(top_k, dim=-1)
    largest_B1 = logits_BK.amax(-1, keepdim=True).double()
    # In place: fresh memory for every step costs more than the arithmetic.
    cumulative_BK = logits_BK.to(torch.float64, copy=True).sub_(largest_B1).div_(temperature)
    cumulative_BK = cumulative_BK.exp_().cumsum_(-1)
    target_B1 = uniforms_B[:, None] * cumulative_BK[:, -1:]
    column_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True)
    column_B1 = column_B1.clamp(max=logits_BK.shape[-1] - 1)
    return (column_B1 if order_BK is None else order_BK.gather(-1, column_B1))[:, 0]


def group_rows(allowed: Sequence[Allowed]) -> list[tuple[Allowed, list[int]]]:
    """Put rows that are allowed the same ids together."""
    groups: dict[int, tuple[Allowed, list[int]]] = {}
    for row, item in enumerate(allowed):
        groups.setdefault(id(item), (item, []))[1].append(row)
    return list(groups.values())


class ImageSpanLogitsProcessor(LogitsProcessor):
    """The grammar for plain ``model.generate(logits_processor=[ImageSpanLogitsProcessor(...)])``.

    Every row has its own state, worked out from its ids: incrementally while ``input_ids`` grows by
    one column, from the prompt's end on otherwise (so beam search, which swaps rows, is right too).
    Left padding, ``num_return_sequences`` and ``num_beams`` work. Build a new one for each prompt
    length. Leave transformers' own ``temperature`` at 1 and ``top_k`` at 0: they run after this
    processor and know no kinds.

    Args:
        grammar: what is legal.
        prompt_length: columns of ``input_ids`` when generation begins, padding included.
        max_new_tokens: as given to ``generate``; a span that does not fit is not started.
        text_temperature, image_temperature: 0 is greedy.
        text_top_k, image_top_k: None or 0 keeps all legal ids.

    Raises:
        ConfigurationError: a negative temperature or top-k.
    """

    def __init__(
        self,
        grammar: ImageSpanGrammar,
        prompt_length: int,
        max_new_tokens: int,
        *,
        text_temperature: float = 1.0,
        text_top_k: int | None = None,
        image_temperature: float = 1.0,
        image_top_k: int | None = None,
    ) -> None:
        self.grammar = grammar
        self.prompt_length = prompt_length
        self.length = prompt_length + max_new_tokens
        self.text = check_warp("text", text_temperature, text_top_k)
        self.image = check_warp("image", image_temperature, image_top_k)
        self._ids: Tensor | None = None
        self._states: list[SpanState] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) with -inf on every illegal id; never a row that is all -inf."""
        remaining = self.length - input_ids.shape[1]
        allowed = [self.grammar.allowed(state, remaining) for state in self._track(input_ids)]
        out_BV = torch.full_like(scores, -torch.inf)
        for item, rows in group_rows(allowed):
            whole = len(rows) == len(allowed)
            index = torch.tensor(rows, device=scores.device)
            some_BV = scores if whole else scores[index]
            columns_BK = warp(legal_columns(some_BV, item.ranges), *self._warp_of(item))
            column = 0
            for first, stop in item.ranges:
                part = columns_BK[:, column : column + stop - first]
                if whole:
                    out_BV[:, first:stop] = part
                else:
                    out_BV[index, first:stop] = part
                column += stop - first
        return out_BV

    def _warp_of(self, allowed: Allowed) -> tuple[float, int | None]:
        return self.image if allowed.image else self.text

    def _track(self, input_ids: Tensor) -> list[SpanState]:
        seen, self._ids = self._ids, input_ids
        if (
            seen is not None
            and input_ids.shape[1] == seen.shape[1] + 1 > self.prompt_length
            and torch.equal(input_ids[:, :-1], seen)
        ):
            last = input_ids[:, -1].tolist()
            self._states = [
                self.grammar.advance(state, token_id)
                for state, token_id in zip(self._states, last, strict=True)
            ]
            return self._states
        self._states = []
        for row in input_ids.tolist():
            state = self.grammar.initial(row[: self.prompt_length])
            for token_id in row[self.prompt_length :]:
                state = self.grammar.advance(state, token_id)
            self._states.append(state)
        return self._states


def warp(logits_BK: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Divide by the temperature, set all but the ``top_k`` largest to -inf; 0 keeps the largest."""
    top_k = 1 if temperature == 0 else top_k
    if top_k and top_k < logits_BK.shape[-1]:
        values, columns = logits_BK.topk(top_k, dim=-1)
        if temperature == 0:  # argmax takes the first of equals, topk does not say
            columns = logits_BK.argmax(-1, keepdim=True)
        logits_BK = torch.full_like(logits_BK, -torch.inf).scatter(-1, columns, values)
    if temperature in (0, 1):
        return logits_BK
    return (logits_BK - logits_BK.amax(-1, keepdim=True)) / temperature


def check_warp(kind: str, temperature: float, top_k: int | None) -> tuple[float, int | None]:
    """Return the pair, or raise ConfigurationError where one of them cannot be right."""
    if not 0 <= temperature < float("inf"):
        raise ConfigurationError(
            f"the {kind} temperature is {temperature}, expected 0 (greedy) or a positive number"
        )
    if top_k is not None and top_k < 0:
        raise ConfigurationError(
            f"the {kind} top-k is {top_k}, expected a positive number, or 0 to keep all ids"
        )
    return temperature, top_k
