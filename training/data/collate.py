"""Examples → batches: the steps of a run as a data set, and padding.

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
    micro-batches; each micro-batch is then padded by itself. Items must be asked for by whole
    micro-batches, in any order, as ``DataLoader(batch_size=batch_size, shuffle=False)`` does.

    Args:
        num_steps: optimizer steps of the run.
        batch_size: examples a micro-batch.
        batches_per_step: micro-batches a step, over all devices.
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


def collate(examples: Sequence[Example], pad_token_id: int = 0) -> dict[str, Any]:
    """Pad a micro-batch.

    Returns:
        input_ids: int64 (B, T), padded on the right with ``pad_token_id``.
        labels: int64 (B, T), -100 where nothing is learnt; not shifted.
        directions: int64 (B,), positions in `recipes.DIRECTIONS`.
        lengths: int64 (B,), tokens without padding.
    """
    longest = max(len(example.input_ids) for example in examples)
    input_ids = np.full((len(examples), longest), pad_token_id, dtype=np.int64)
    labels = np.full((len(examples), longest), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = example.labels
    directions = [DIRECTIONS.index(example.direction) for example in examples]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "directions": torch.tensor(directions),
        "lengths": torch.tensor([len(example.input_ids) for example in examples]),
    }
