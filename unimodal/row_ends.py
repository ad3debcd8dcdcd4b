"""How many ends of row stand between the rows of codes, so that a column is an angle.

Rotary positions turn queries and keys by position times a frequency. A frequency whose period is
the length of a row (codes and ends of row) comes back to the same angle in each row: with it, one
attention head tells columns, and "the code above" looks the same from everywhere. Small models have
few frequencies, and where none fits, left and right are hardly ever learnt (docs/learning.md).

Source of rotary positions: J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position
Embedding" (2021), section 3.2. The fit is ours.
"""

import math
from typing import Any

from tokenizer_hf.errors import ConfigurationError

MOST = 3
"""Ends of row that are tried for narrow pictures; for wide ones, a quarter of the width."""


def fit_row_ends(language_model: Any, image_tokenizer: Any) -> int:
    """Return how many ends of row bring a row closest to a period of the rotary positions.

    Args:
        language_model: config of a causal LM.
        image_tokenizer: config of an image tokenizer with a grid of codes.

    Returns:
        1 to MOST, or to a quarter of the grid's width: the number for which some frequency turns by
        the nearest to one whole turn a row.

    Raises:
        ConfigurationError: codes without a grid, or positions that are not rotary.
    """
    if image_tokenizer.grid is None:
        raise ConfigurationError(
            f"row ends were asked for, but codes of the layout {image_tokenizer.token_layout!r} "
            'have no rows; expected an image tokenizer of the layout "2d"'
        )
    width = image_tokenizer.grid[1] * image_tokenizer.num_codebooks
    frequencies = rotary_frequencies(language_model)

    def drift(row_ends: int) -> float:
        turns = ((width + row_ends) * frequency for frequency in frequencies)
        return min(abs(turn - 2 * math.pi) for turn in turns)

    return min(range(1, max(MOST, image_tokenizer.grid[1] // 4) + 1), key=drift)


def rotary_frequencies(language_model: Any) -> list[float]:
    """Return the angles by which rotary positions turn from one id to the next, in radians.

    Raises:
        ConfigurationError: the config has no rotary positions.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = language_model.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:  # several kinds of layers, each with its own, or none
        nested = [one for one in parameters.values() if isinstance(one, dict)]
        parameters = next((one for one in nested if "rope_theta" in one), {})
    if "rope_theta" not in parameters:
        raise ConfigurationError(
            f"row_ends is auto, but {config.model_type} has no rotary positions; give a number, "
            "such as 1"
        )
    kind = parameters.get("rope_type", "default")
    if kind in ROPE_INIT_FUNCTIONS and parameters is config.rope_parameters:
        return ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].tolist()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = int(width * parameters.get("partial_rotary_factor", 1.0))
    return [parameters["rope_theta"] ** (-i / width) for i in range(0, width, 2)]
