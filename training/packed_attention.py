"""Does a model keep packed examples apart? Asked of the model itself, whatever its family.

Not every one does, and none says so: transformers 5.19 does not hand the positions to the masks of
gpt_oss and OPT, BLOOM and MPT take none, and a recurrent layer (Mamba, Jamba) has no mask.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer_hf.errors import ConfigurationError
from training.data.collate import collate
from training.data.examples import Example

LENGTHS = (9, 4, 5)
"""Of the examples that are tried: the two short ones make a row as long as the first."""
SAME = 1e-5
"""Difference of logits, as a share of the largest, where other examples of the row have changed.
Masked tokens weigh exactly 0, so it is 0 in any format; 3e-4 to 1 where examples see each other."""
ALONE = {torch.float32: 1e-3}
"""The same between packed and alone; 0.05 in shorter formats. Measured: at most 1e-6 in float32."""


def require_packed_attention(model: Any, row_tokens: int, bf16: bool) -> None:
    """Look at the logits of packed examples: the others must not matter, nor that there are others.

    Args:
        model: a causal LM, or a PEFT model around one, where it is trained.
        row_tokens: as `training.data.packing.layout` takes it.
        bf16: under bfloat16 autocast.

    Raises:
        ConfigurationError: the model takes no positions, or the logits differ.
    """
    weight = model.get_input_embeddings().weight
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, weight.shape[0], length) for length in LENGTHS]
    changed = [(ids + 1) % weight.shape[0] for ids in texts]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, torch.bfloat16, enabled=bf16):
            packed = _logits(model, texts, row_tokens)
            for i, ids in enumerate(texts):
                others = [*changed[:i], ids, *changed[i + 1 :]]
                _require_equal(packed[i], _logits(model, others, row_tokens)[i], SAME)
                [alone] = _logits(model, [ids], None)
                _require_equal(packed[i], alone, ALONE.get(alone.dtype, 0.05))
    except (TypeError, ValueError) as error:  # ours, or a forward without position_ids
        config = model.config
        raise ConfigurationError(
            f"packing: {config.model_type} with attention {config._attn_implementation} does not "
            f"keep packed examples apart ({error}); set packing to false"
        ) from error
    finally:
        model.train(training)


def _logits(model: Any, texts: list[np.ndarray], row_tokens: int | None) -> list[Tensor]:
    """Return the logits (T, V) of each text, without ``row_tokens`` at the model's positions."""
    batch = collate([Example(ids, ids, "text") for ids in texts], row_tokens=row_tokens)
    device = model.get_input_embeddings().weight.device
    tokens = {n: batch[n].to(device) for n in ("input_ids", "position_ids") if n in batch}
    logits = model(**tokens, use_cache=False).logits
    found = [logits[batch["segments"] == number] for number in range(len(texts))]
    return [one[: len(ids)] for one, ids in zip(found, texts, strict=True)]  # less the padding


def _require_equal(one: Tensor, other: Tensor, share: float) -> None:
    difference = float((one - other).abs().max() / other.abs().max())
    if not difference <= share:
        raise ValueError(f"logits differ by {difference:.1g} of the largest")
