"""Rows of the image vocabulary that share what their codes share.

A code of FSQ or of a product quantizer is a combination of factors: a mask, a colour, a ground.
Trained freely, the row of a combination that training never shows learns nothing but that it
never comes. Here the row of a code is the sum of its factors' rows, which start as the
least-squares fit to the codes' rows. So whatever is learnt of "red" and of "star" holds for a red
star too.

A sum makes the factors independent given the model's state. So where either the empty background
or a red star may come, it would mix the two. What fills much of all pictures, such as the
background, has a part of its own, which mends that and teaches nothing of rare combinations.
(docs/learning.md has it measured: no such parts, all, and these.)

Nor does a code count against a prediction only because training happens not to show it: a softmax
would learn of an uncoloured "star" that it is anything but cyan. `unseen_combinations` finds the
codes that the loss leaves out.

What is saved is an ordinary PEFT adapter: everything is folded into the codes' rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
"""A code that fills more than this share of the training pictures has a part of its own."""
MEETS_SHARE = 0.5
"""Two factors' values that never meet could meet if each meets this share of the other factor's."""
STATE_FILE = "factored_rows.safetensors"
"""Beside a checkpoint's adapter: the parts that are folded there, apart."""


@dataclass(eq=False)
class CompactRows:
    """The head's rows without those that are only sums: what `training.factored_head` sums up.

    Attributes:
        own_ids: int64 (P,): ids with a row of their own: text, control ids, common codes, padding.
        factors: int64 (K, number of factors), as `share_rows` takes them.
        sizes: how many values each factor has.
        first_code: the id of code 0.
        num_rows: of the whole head.
        on: whether the head computes with (own rows, factors' rows) now.
    """

    own_ids: Tensor
    factors: np.ndarray
    sizes: list[int]
    first_code: int
    num_rows: int
    on: bool = False

    def __len__(self) -> int:
        """P + F: how many rows the head computes with in short form."""
        return len(self.own_ids) + sum(self.sizes)


def share_rows(model: nn.Module, factors: np.ndarray, shares: np.ndarray) -> CompactRows | None:
    """Let the rows of an adapter share their factors' rows, in place.

    Args:
        model: a PEFT model that trains the rows of the control ids and all codes, in this order.
        factors: int64 (K, number of factors): which shared rows each code sums up.
        shares: float (K,): how much of the training pictures each code fills, in [0, 1].

    Returns:
        the head's rows in short form; None where the codes do not fill the grid of their factors.
    """
    columns = torch.from_numpy(factors)
    has_own = torch.from_numpy(shares > OWN_ROW_SHARE)
    for layer in _layers(model):
        owner = layer.tied_adapter or layer
        if owner is layer:
            for own in layer.trainable_tokens_delta.values():
                controls = len(own) - len(factors)
                mask = torch.cat([torch.ones(controls), has_own.float()]).unsqueeze(1)
                weights = torch.from_numpy(shares).float().to(own.device)
                shared = _fit(
                    own.detach()[controls:], columns.to(own.device), weights, factors.max() + 1
                )
                layer.register_parameter(FACTOR_ROWS, nn.Parameter(shared))
                with torch.no_grad():
                    own -= _sums(shared, columns, len(own))
                    own *= mask.to(own.device)
                own.register_hook(partial(_only_own, mask.to(own.device)))
        layer.factor_columns = columns
        layer.get_merged_weights = partial(_merged_weights, layer, owner)
    return _compact_head(model, factors, shares > OWN_ROW_SHARE)


def _compact_head(model: Any, factors: np.ndarray, has_own: np.ndarray) -> CompactRows | None:
    """Give the head a short form of its weight, where there is one."""
    sizes = [len(np.unique(values)) for values in factors.T]
    head = getattr(model.get_output_embeddings(), "token_adapter", None)
    if len(sizes) < 2 or np.prod(sizes) != len(factors) or head is None:
        return None
    [ids] = head.token_indices.values()
    controls = len(ids) - len(factors)
    first = ids[controls]
    num_rows = head.base_layer.weight.shape[0]
    is_sum = np.zeros(num_rows, dtype=bool)
    is_sum[first : first + len(factors)] = ~has_own
    own = np.flatnonzero(~is_sum)
    common = np.flatnonzero(has_own)
    trained = np.concatenate(
        [np.arange(controls), controls + common]
    )  # among the rows that the adapter has
    own_ids, places, kept, columns = map(
        torch.from_numpy,
        (own, np.searchsorted(own, np.asarray(ids)[trained]), trained, factors[common]),
    )
    rows = CompactRows(own_ids, factors, sizes, first, num_rows)
    whole, owner = head.get_merged_weights, head.tied_adapter or head

    def merged(active_adapters: Any) -> Tensor:
        if not rows.on:
            return whole(active_adapters)
        shared = getattr(owner, FACTOR_ROWS)
        weight = head.base_layer.weight[own_ids.to(shared.device)]
        for name in active_adapters:
            own = owner.trainable_tokens_delta[name][kept.to(shared.device)]
            own = own + _sums(shared, columns, len(own))
            weight = weight.index_copy(0, places.to(shared.device), own.to(weight))
        return torch.cat([weight, shared.to(weight)])

    head.get_merged_weights = merged
    return rows


def _fit(rows: Tensor, columns: Tensor, shares: Tensor, num_values: int) -> Tensor:
    """(F, D): the factors' rows whose sums come closest to the codes' rows (K, D).

    Codes count by how often they come, and a thousandth of the mean more, so that those that never
    come count too.
    """
    design = rows.new_zeros(len(columns), num_values).scatter(1, columns, 1.0).double()
    weights = (shares + 1e-3 * shares.mean() + 1e-9).double()[:, None]
    gram = design.T @ (weights * design)
    # Rows may move from one factor to another and their sums stay: the ridge settles it.
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    return torch.linalg.solve(gram, design.T @ (weights * rows.double())).to(rows)


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
            for own in layer.trainable_tokens_delta.values():
                kept.append((own, own.clone()))
                own += _sums(getattr(layer, FACTOR_ROWS), layer.factor_columns, len(own))
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


def _sums(shared: Tensor, columns: Tensor, num_rows: int) -> Tensor:
    """(num_rows, D): zero for the control ids before the codes, for each code the sum of its
    factors' rows."""
    codes = nn.functional.embedding(columns.to(shared.device), shared).sum(1)
    return nn.functional.pad(codes, (0, 0, num_rows - len(codes), 0))


def _only_own(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask


def _merged_weights(layer: Any, owner: Any, active_adapters: Any) -> Tensor:
    """PEFT's ``TrainableTokensLayer.get_merged_weights``, with the factors' rows added."""
    weight = layer.base_layer.weight
    for name in active_adapters:
        own = layer.trainable_tokens_delta[name]
        rows = own + _sums(getattr(owner, FACTOR_ROWS), layer.factor_columns, len(own))
        index = torch.tensor(layer.token_indices[name], device=weight.device)
        weight = weight.index_copy(0, index, rows.to(weight))
    return weight
