"""Examples → batches: the steps of a run as a data set, packing and padding.

Padding stands on the right and no attention mask is made: attention is causal, so no real token
ever sees the padding behind it, and nothing is learnt on padding.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from tokenizer_hf.errors import DataError
from training.data.examples import Example
from training.data.mixing import Mix, Pick
from training.data.packing import layout
from training.recipes import DIRECTIONS
from unimodal.messages import IGNORED

logger = logging.getLogger(__name__)


class ExampleSource(Protocol):
    """What `Steps` draws from: `Examples` or `TextExamples`."""

    left_out: int

    def build(self, picks: Sequence[Pick]) -> list[Example]: ...


class Steps(Dataset):
    """A whole run as a map-style data set of slots: slot // batch_size is the micro-batch.

    The examples of one optimizer step are built together, sorted by length and cut into the step's
    micro-batches; each micro-batch is then packed or padded by itself. Items must be asked for by
    whole micro-batches, in any order, as ``DataLoader(batch_size=batch_size, shuffle=False)`` does.

    Args:
        num_steps: optimizer steps of the run.
        batch_size: examples a micro-batch.
        batches_per_step: micro-batches a step.
    """

    def __init__(
        self,
        examples: ExampleSource,
        mix: Mix,
        num_steps: int,
        batch_size: int,
        batches_per_step: int,
    ) -> None:
        self.examples, self.mix = examples, mix
        self.num_steps, self.batch_size = num_steps, batch_size
        self.batches_per_step = batches_per_step
        self._step = -1
        self._batches: list[list[Example]] = []
        self._reported = 0

    def __len__(self) -> int:
        return self.num_steps * self.batches_per_step * self.batch_size

    def __getitems__(self, slots: Sequence[int]) -> list[Example]:
        """Return the micro-batch that the slots stand for (fewer, where examples were too long)."""
        return self.batch(slots[0] // self.batch_size)

    def batch(self, number: int) -> list[Example]:
        """Return micro-batch ``number`` of the run."""
        step, part = divmod(number, self.batches_per_step)
        if step != self._step:
            built = self.examples.build(self.mix.picks(step))
            if len(built) < self.batches_per_step:
                raise DataError(
                    f"step {step}: only {len(built)} of {self.mix.examples_per_step} examples fit "
                    "into data.max_length tokens; set it higher"
                )
            if self.examples.left_out > self._reported:
                logger.warning("%d examples so far are too long, left out", self.examples.left_out)
                self._reported = 2 * self.examples.left_out
            built.sort(key=lambda example: len(example.input_ids))
            edges = np.linspace(0, len(built), self.batches_per_step + 1).round().astype(int)
            self._batches = [built[a:b] for a, b in itertools.pairwise(edges)]
            self._step = step
        return self._batches[part]


def collate(
    examples: Sequence[Example], pad_token_id: int = 0, row_tokens: int | None = None
) -> dict[str, Any]:
    """Pad a micro-batch, or pack it into fewer rows and pad these.

    Args:
        row_tokens: as `training.data.packing.layout` takes it. None: a row for every example.

    Returns:
        input_ids: int64 (B, T), padded on the right with ``pad_token_id``.
        labels: int64 (B, T), -100 where nothing is learnt; not shifted. The first token of an
            example has none: nothing before it predicts it.
        segments: int64 (B, T), the number of the example that a token is of; 0 for padding.
        position_ids: int64 (B, T), from 0 on in every example; only with ``row_tokens``.
        directions: int64 (number of examples,), positions in `recipes.DIRECTIONS`.
        lengths: int64 (number of examples,), tokens without padding.
    """
    lengths = [len(example.input_ids) for example in examples]
    rows = layout(lengths, row_tokens)
    shape = len(rows), max(sum(lengths[number] for number in row) for row in rows)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            stop = start + lengths[number]
            input_ids[row, start:stop] = examples[number].input_ids
            labels[row, start + 1 : stop] = examples[number].labels[1:]
            segments[row, start:stop] = number
            position_ids[row, start:stop] = np.arange(lengths[number])
            start = stop
    batch = {"input_ids": input_ids, "labels": labels, "segments": segments}
    if row_tokens is not None:
        batch["position_ids"] = position_ids
    directions = [DIRECTIONS.index(example.direction) for example in examples]
    return {
        **{name: torch.from_numpy(values) for name, values in batch.items()},
        "directions": torch.tensor(directions),
        "lengths": torch.tensor(lengths),
    }
