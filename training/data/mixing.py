"""Which examples make up which step: a pure function of (seed, step), so that a run can be resumed.

The weights of the directions are shares of *loss tokens*, not of examples: a caption has three
times as many loss tokens as an answer, and would otherwise weigh three times as much.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tokenizer_hf.errors import ConfigurationError

GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class Pick:
    """One example of a step.

    Attributes:
        direction: one of `training.recipes.DIRECTIONS`.
        item: which picture, text or chat of that direction, in [0, number of items).
        choice: a random number in [0, 2³¹) that chooses among the item's captions or questions.
        dropped: draw with the empty prompt.
    """

    direction: str
    item: int
    choice: int
    dropped: bool


class Mix:
    """Draws the examples of each step.

    Directions follow each other in a low-discrepancy order (multiples of the golden ratio), so
    every stretch of a run holds them in the wanted shares. The items of a direction come in random
    order, each once before any comes twice.

    Args:
        num_items: items of each direction; those without an item are left out.
        loss_tokens: mean number of loss tokens of an example of each direction.
        weights: wanted share of loss tokens of each direction; need not sum to 1.
        examples_per_step: over all micro-batches and devices.
        prompt_dropout: share of drawing examples with the empty prompt.
        seed: of everything random here.
        starting_weights: what the weights are at step 0; from there they move to ``weights`` in
            ``moving_steps`` equal steps. None: ``weights`` from the start.
        moving_steps: how long that takes.

    Attributes:
        example_shares: share of the examples of each direction once the weights stand still.

    Raises:
        ConfigurationError: no direction has both a weight and an item, at the start or later.
    """

    def __init__(
        self,
        num_items: Mapping[str, int],
        loss_tokens: Mapping[str, float],
        weights: Mapping[str, float],
        examples_per_step: int,
        prompt_dropout: float = 0.0,
        seed: int = 0,
        *,
        starting_weights: Mapping[str, float] | None = None,
        moving_steps: int = 0,
    ) -> None:
        starting_weights = weights if starting_weights is None else starting_weights
        for given in (starting_weights, weights):
            if not any(num_items[d] and given.get(d, 0) > 0 for d in num_items):
                raise ConfigurationError(
                    f"nothing to train on: the data hold {dict(num_items)} examples and the "
                    f"weights are {dict(given)}; give data.caches or data.text with a weight above "
                    "0"
                )
        self.directions = [
            d
            for d in num_items
            if num_items[d] and (weights.get(d, 0) or starting_weights.get(d, 0))
        ]
        self.num_items = {d: num_items[d] for d in self.directions}
        tokens = np.array([loss_tokens[d] for d in self.directions])
        first, last = (
            np.array([given.get(d, 0.0) for d in self.directions])
            for given in (starting_weights, weights)
        )
        self._moving_steps = moving_steps
        ways = np.arange(moving_steps)[:, None] / max(1, moving_steps)
        moving = (1 - ways) * first / first.sum() + ways * last / last.sum()
        rates = np.concatenate([moving, last[None]]) / tokens
        shares = rates / rates.sum(1, keepdims=True)
        self.example_shares = dict(zip(self.directions, shares[-1], strict=True))
        self._edges = np.cumsum(shares, axis=1)[:, :-1]
        self.examples_per_step = examples_per_step
        self.prompt_dropout = prompt_dropout
        self.seed = seed
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._seen = (0, np.zeros(len(self.directions), dtype=np.int64))

    def picks(self, step: int) -> list[Pick]:
        """Return the examples of optimizer step ``step``, counted from 0."""
        n = self.examples_per_step
        directions = self._directions(step, step + 1)
        seen = self._seen_before(step)
        rng = np.random.default_rng([self.seed, 1, step])
        choices = rng.integers(0, 2**31, n)
        dropped = rng.random(n) < self.prompt_dropout
        picks = []
        for direction, choice, drop in zip(directions, choices, dropped, strict=True):
            name = self.directions[direction]
            item = self._item(direction, int(seen[direction]))
            seen[direction] += 1
            picks.append(Pick(name, item, int(choice), bool(drop) and name == "draw"))
        self._seen = (step + 1, seen)
        return picks

    def _directions(self, start: int, stop: int) -> np.ndarray:
        """Return the directions of the examples of steps ``start`` to ``stop - 1``."""
        phase = np.random.default_rng([self.seed, 2]).random()
        n = self.examples_per_step
        points = (phase + np.arange(start * n, stop * n) * GOLDEN_RATIO) % 1.0
        moving = range(start, min(stop, self._moving_steps))
        still = n * len(moving)
        found = [
            np.searchsorted(self._edges[step], part, side="right")
            for step, part in zip(moving, points[:still].reshape(-1, n), strict=True)
        ]
        return np.concatenate([*found, np.searchsorted(self._edges[-1], points[still:], "right")])

    def _seen_before(self, step: int) -> np.ndarray:
        """Count the examples of each direction before ``step``; remembered when steps follow."""
        known, seen = self._seen
        if known > step:
            known, seen = 0, np.zeros(len(self.directions), dtype=np.int64)
        between = self._directions(known, step)
        return seen + np.bincount(between, minlength=len(self.directions))

    def _item(self, direction: int, rank: int) -> int:
        count = self.num_items[self.directions[direction]]
        epoch, position = divmod(rank, count)
        if (direction, epoch) not in self._orders:
            self._orders = {
                key: order for key, order in self._orders.items() if key[0] != direction
            }
            rng = np.random.default_rng([self.seed, 3, direction, epoch])
            self._orders[direction, epoch] = rng.permutation(count)
        return int(self._orders[direction, epoch][position])
