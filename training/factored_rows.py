"""Rows of the image vocabulary that share what their codes share.

A code of FSQ or of a product quantizer is a combination of factors: a mask, a colour, a ground.
Trained freely, the row of a combination that training never shows learns nothing but that it
never comes. Here the row of a code is what it started as, plus the sum of its factors' rows. So
whatever is learnt of "red" and of "star" holds for a red star too.

A sum makes the factors independent given the model's state. So where either the empty background
or a red star may come, it would mix the two. What fills much of all pictures, such as the
background, has a deviation of its own, which mends that and teaches nothing of rare combinations.
(docs/learning.md has it measured: no deviations, all, and these.)

Nor does a code count against a prediction only because training happens not to show it: a softmax
would learn of an uncoloured "star" that it is anything but cyan. `unseen_combinations` finds the
codes that the loss leaves out.

What is saved is an ordinary PEFT adapter: everything is folded into the codes' rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FACTOR_ROWS = "factor_rows"
"""Name of the parameter, (number of factors' values, D), that holds the shared rows."""
OWN_ROW_SHARE = 0.01
"""A code that fills more than this share of the training pictures has a deviation of its own."""
MEETS_SHARE = 0.5
"""Two factors' values that never meet could meet if each meets this share of the other factor's."""
STATE_FILE = "factored_rows.safetensors"
"""Beside a checkpoint's adapter: the parts that are folded there, apart."""


def share_rows(model: nn.Module, factors: np.ndarray, shares: np.ndarray) -> None:
    """Let the rows of an adapter share their factors' rows, in place.

    Args:
        model: a PEFT model that trains the rows of start, end and all codes, in this order.
        factors: int64 (K, number of factors): which shared rows each code sums up.
        shares: float (K,): how much of the training pictures each code fills, in [0, 1].
    """
    columns = torch.from_numpy(factors)
    has_own = torch.from_numpy(shares > OWN_ROW_SHARE)
    mask = torch.cat([torch.ones(2), has_own.float()]).unsqueeze(1)
    for layer in _layers(model):
        owner = layer.tied_adapter or layer
        if owner is layer:
            for own in layer.trainable_tokens_delta.values():
                shared = own.new_zeros(int(factors.max()) + 1, own.shape[1])
                layer.register_parameter(FACTOR_ROWS, nn.Parameter(shared))
                own.register_hook(partial(_only_own, mask.to(own.device)))
        layer.get_merged_weights = partial(_merged_weights, layer, owner, columns)


def unseen_combinations(factors: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Find the codes that training never shows, although their factors' values could meet.

    A star could be cyan where most other colours come as stars and most other shapes in cyan. A
    star in a colour that only the background has could not, and such a code goes on to count
    against the others: if it were left out of the loss too, nonsense would come for free.

    Args:
        factors: int64 (K, number of factors), as in :func:`share_rows`.
        shares: float (K,), likewise.

    Returns:
        bool (K,).
    """
    if factors.shape[1] < 2:  # opaque codes: nothing tells which could be
        return np.zeros(len(factors), dtype=bool)
    values = factors - factors.min(0)
    seen = shares > 0
    possible = ~seen
    for a, b in combinations(range(values.shape[1]), 2):
        met = np.zeros((values[:, a].max() + 1, values[:, b].max() + 1), dtype=bool)
        met[values[seen, a], values[seen, b]] = True
        often_a, often_b = (met.mean(axis) >= MEETS_SHARE for axis in (1, 0))
        could_meet = met | (often_a[:, None] & often_b[None])
        possible &= could_meet[values[:, a], values[:, b]]
    return possible


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Hold the factors' rows inside the codes' own while the block runs: what PEFT saves then is
    the whole function."""
    kept = []
    with torch.no_grad():
        for layer in _sharing(model):
            columns = layer.get_merged_weights.args[2]
            for own in layer.trainable_tokens_delta.values():
                kept.append((own, own.clone()))
                own += _sums(getattr(layer, FACTOR_ROWS), columns)
    try:
        yield
    finally:
        with torch.no_grad():
            for own, before in kept:
                own.copy_(before)


def save_parts(model: nn.Module, folder: str | Path) -> None:
    """Write the codes' own rows and the factors' rows apart, where there are any, to go on from."""
    parts = {name: p.detach().contiguous() for name, p in _parts(model).items()}
    if parts:
        save_file(parts, Path(folder) / STATE_FILE)


def load_parts(model: nn.Module, folder: str | Path) -> None:
    """The inverse of :func:`save_parts`."""
    parts = _parts(model)
    if parts:
        saved = load_file(Path(folder) / STATE_FILE)
        with torch.no_grad():
            for name, parameter in parts.items():
                parameter.copy_(saved[name])


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]


def _sharing(model: nn.Module) -> list[Any]:
    return [layer for layer in _layers(model) if hasattr(layer, FACTOR_ROWS)]


def _parts(model: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for number, layer in enumerate(_sharing(model)):
        found[f"{number}.{FACTOR_ROWS}"] = getattr(layer, FACTOR_ROWS)
        for name, own in layer.trainable_tokens_delta.items():
            found[f"{number}.own.{name}"] = own
    return found


def _sums(shared: Tensor, columns: Tensor) -> Tensor:
    """(2 + K, D): zero for start and end, the sum of its factors' rows for each code."""
    codes = nn.functional.embedding(columns.to(shared.device), shared).sum(1)
    return nn.functional.pad(codes, (0, 0, 2, 0))


def _only_own(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask


def _merged_weights(layer: Any, owner: Any, columns: Tensor, active_adapters: Any) -> Tensor:
    """PEFT's ``TrainableTokensLayer.get_merged_weights``, with the factors' rows added."""
    weight = layer.base_layer.weight
    for name in active_adapters:
        rows = layer.trainable_tokens_delta[name] + _sums(getattr(owner, FACTOR_ROWS), columns)
        index = torch.tensor(layer.token_indices[name], device=weight.device)
        weight = weight.index_copy(0, index, rows.to(weight))
    return weight
