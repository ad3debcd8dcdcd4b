"""Rows of ids that a model reads together: left padding, positions, one KV cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


def left_pad(rows: Sequence[Sequence[int]], device: Any, room: int = 0) -> tuple[Tensor, Tensor]:
    """Pad rows on the left to the longest.

    Args:
        rows: at least one id each.
        device: where the tensors shall lie.
        room: how many ids may follow.

    Returns:
        ids, int64 (rows, L), 0 where padded; the position of each column, int64 (rows, L + room),
        below 0 where padded.
    """
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    padded = [[0] * pad + list(row) for pad, row in zip(padding, rows, strict=True)]
    columns = torch.arange(longest + room, device=device)
    positions = columns[None] - torch.tensor(padding, device=device)[:, None]
    return torch.tensor(padded, device=device), positions


def last_logits(model: Any, count: int) -> dict[str, Any]:
    """The argument of ``forward`` with which logits are computed for the last ids only; none where
    the model takes none, and then it returns those of all."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": count} if base._supports_logits_to_keep() else {}


class RowBatch:
    """Rows that are decoded together: left padded, one KV cache, positions from the mask.

    Ids wait in ``pending`` until logits are asked for, so ids that the grammar forces cost no
    forward of their own. Prompts that are equal are read once: several drawings of one prompt, and
    the unconditional rows, which mostly share theirs.

    Args:
        model: a decoder-only Hugging Face model.
        prompts: at least one id per row.
        room: how many ids may follow a prompt.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], room: int) -> None:
        self.model = model
        self.pending, positions = left_pad(prompts, model.device, room)
        padded = len(set(map(len, prompts))) > 1
        self.mask = (positions >= 0).long() if padded else None
        self.positions = positions.clamp(min=0)
        self.seen = 0
        self.cache = DynamicCache(config=model.config)
        self.options = {"use_cache": True, "past_key_values": self.cache, **last_logits(model, 1)}

    def append(self, token_ids: Tensor) -> None:
        """Add one id per row, int64 (rows,)."""
        self.pending = torch.cat([self.pending, token_ids[:, None]], dim=1)

    def logits(self) -> Tensor:
        """Run the pending ids and return the logits behind the last of them, (rows, V)."""
        if self.seen:
            return self._forward()
        starts = (self.positions == 0).sum(-1).tolist()  # equal ids may be padded differently
        rows = [(start, *ids) for start, ids in zip(starts, self.pending.tolist(), strict=True)]
        distinct = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        if len(distinct) == len(rows):
            return self._forward()
        self.keep([rows.index(row) for row in distinct])
        logits_RV = self._forward()
        copies = [distinct[row] for row in rows]
        self.keep(copies)
        return logits_RV[copies]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; a row may be named several times."""
        index = torch.tensor(rows, device=self.pending.device)
        self.pending = self.pending[index]
        self.positions = self.positions[index]
        self.mask = None if self.mask is None else self.mask[index]
        if self.seen:
            self.cache.batch_select_indices(index)

    def _forward(self) -> Tensor:
        stop = self.seen + self.pending.shape[1]
        output = self.model(
            input_ids=self.pending,
            attention_mask=None if self.mask is None else self.mask[:, :stop],
            position_ids=self.positions[:, self.seen : stop],
            **self.options,
        )
        self.seen = stop
        self.pending = self.pending[:, :0]
        return output.logits[:, -1]
