"""Rows of the image vocabulary that share what their codes share.

A code of FSQ or of a product quantizer is a combination of factors: a mask, a colour, a ground.
Trained freely, the row of a combination that training never shows learns nothing but that it never
comes. Here the row of a code is its own row plus the sum of its factors' rows, and a code that the
training data do not hold gets only the sum. So whatever is learnt of "red" and of "star" holds for
a red star too. What is saved is an ordinary PEFT adapter: the sums are folded into the codes' rows.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

FACTOR_ROWS = "factor_rows"
"""Name of the parameter, (number of factors' values, D), that holds the shared rows."""


def share_rows(model: nn.Module, factors: np.ndarray, seen: np.ndarray) -> None:
    """Let the rows of an adapter share their factors' rows, in place.

    Args:
        model: a PEFT model that trains the rows of start, end and all codes, in this order.
        factors: int64 (K, number of factors): which shared rows each code sums up.
        seen: bool (K,): the codes that training shows. The others' own rows stay as they are.
    """
    columns = torch.from_numpy(factors)
    mask = torch.cat([torch.ones(2), torch.from_numpy(seen).float()]).unsqueeze(1)
    for layer in _layers(model):
        owner = layer.tied_adapter or layer
        if owner is layer:
            for own in layer.trainable_tokens_delta.values():
                shared = own.new_zeros(int(factors.max()) + 1, own.shape[1])
                layer.register_parameter(FACTOR_ROWS, nn.Parameter(shared))
                own.register_hook(partial(_only_seen, mask.to(own.device)))
        layer.get_merged_weights = partial(_merged_weights, layer, owner, columns)


def fold_shared_rows(model: nn.Module) -> None:
    """Add the factors' rows to the codes' own and set them to zero: the same function."""
    for layer in _layers(model):
        shared = getattr(layer, FACTOR_ROWS, None)
        if shared is not None:
            columns = layer.get_merged_weights.args[2]
            with torch.no_grad():
                for own in layer.trainable_tokens_delta.values():
                    own += _sums(shared, columns)
                shared.zero_()


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]


def _sums(shared: Tensor, columns: Tensor) -> Tensor:
    """(2 + K, D): zero for start and end, the sum of its factors' rows for each code."""
    codes = nn.functional.embedding(columns.to(shared.device), shared).sum(1)
    return nn.functional.pad(codes, (0, 0, 2, 0))


def _only_seen(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask


def _merged_weights(layer: Any, owner: Any, columns: Tensor, active_adapters: Any) -> Tensor:
    """PEFT's ``TrainableTokensLayer.get_merged_weights``, with the factors' rows added."""
    weight = layer.base_layer.weight
    for name in active_adapters:
        rows = layer.trainable_tokens_delta[name] + _sums(getattr(owner, FACTOR_ROWS), columns)
        index = torch.tensor(layer.token_indices[name], device=weight.device)
        weight = weight.index_copy(0, index, rows.to(weight))
    return weight
