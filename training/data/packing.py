"""Packing: several examples in one row, instead of one padded row each.

No example sees another: each has positions from 0 on, and transformers makes block-diagonal causal
attention of positions that start anew. See `training.packed_attention` for the check of a model.
"""

import heapq
import sys
from collections.abc import Sequence

import numpy as np

ONE_ROW = sys.maxsize
"""Tokens of a row: as many as there are."""
STRETCH = 1.5
"""Tokens of a row without a given number, as a multiple of the longest example. Of the demo's
micro-batches of 32, padding fills 19 % at 1, 7 % at 1.5, 5 % at 2; attention grows with it."""
TRIED = 32
"""Numbers of rows that are tried, at most."""


def row_tokens(packing: bool | int, attention: str) -> int | None:
    """Turn a recipe's ``packing`` into the length of rows that `layout` wants.

    Args:
        packing: false, true or a number of tokens.
        attention: the resolved implementation. flash_attention_2 as transformers calls it takes
            packed examples only where the batch is a single row, and costs nothing between them.

    Returns:
        None: no packing. Else tokens; 0 means `STRETCH` times the longest example.
    """
    if packing is False:
        return None
    if attention == "flash_attention_2":
        return ONE_ROW
    return 0 if packing is True else packing


def layout(lengths: Sequence[int], row_tokens: int | None) -> list[list[int]]:
    """Distribute examples over rows with little padding.

    For a number of rows, each example goes into the row that is shortest so far, the longest
    example first (Graham 1969, "longest processing time first"). Of the numbers of rows, the one
    that needs the fewest tokens with padding is taken; of equal ones the largest, for attention
    costs grow with the length of a row.

    Args:
        lengths: tokens of each example.
        row_tokens: of a row, at most; a longer example makes all rows as long as itself. 0:
            `STRETCH` times the longest. None: a row for every example, in their order.

    Returns:
        the numbers of the examples of each row, in the order in which they stand there.
    """
    if row_tokens is None:
        return [[number] for number in range(len(lengths))]
    if row_tokens == ONE_ROW:
        return [list(range(len(lengths)))]
    longest = max(lengths)
    limit = max(row_tokens or int(STRETCH * longest), longest)
    fewest = -(-sum(lengths) // limit)
    tried = np.unique(np.linspace(fewest, len(lengths), TRIED).astype(int)).tolist()
    found = []
    for count in tried:
        rows = _spread(lengths, count)
        width = max(sum(lengths[number] for number in row) for row in rows)
        if width <= limit:
            found.append((count * width, -count, rows))
    return min(found)[2]


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, row) for row in range(count)]
    for number in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length, row = shortest[0]
        rows[row].append(number)
        heapq.heapreplace(shortest, (length + lengths[number], row))
    return rows
