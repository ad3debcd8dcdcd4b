"""Classifier-free guidance: conditional and unconditional rows in one batch, mixed over image ids.

``g = u + s (c - u)`` (Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6, in the
form that autoregressive image models use on logits, with s = 1 + w). We mix raw logits of the ids
that are legal at this place of the span (the codes of one codebook and, where it may stand,
``<|image_end|>``). Mixing log-probabilities normalised over the same ids would differ by one
constant per row, which no softmax sees. transformers' ``UnbatchedClassifierFreeGuidance``
normalises over the whole vocabulary, which is again a constant per row on these ids; it mixes text
too and runs a second forward a step.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenizer_hf.errors import ConfigurationError
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.generation.logits_processor import clean

if TYPE_CHECKING:
    from unimodal.generation.sampling import SamplingSettings


def mix_logits(conditional_BK: Tensor, unconditional_BK: Tensor, guidance: float) -> Tensor:
    """Return ``u + guidance * (c - u)``; the conditional logit where one of the two is not finite.

    Args:
        conditional_BK, unconditional_BK: logits of the same legal ids, any float dtype.
        guidance: 1 is the conditional model, 0 the unconditional one, above 1 guided.
    """
    mixed_BK = (conditional_BK - unconditional_BK).mul_(guidance).add_(unconditional_BK)
    if mixed_BK.device.type == "cpu":  # as in clean: a look costs less than the work, on a CPU
        least, largest = mixed_BK.aminmax()
        if bool(least > -torch.inf) and bool(largest <= torch.finfo(mixed_BK.dtype).max / 16):
            return mixed_BK  # so both were finite
    both = conditional_BK.isfinite() & unconditional_BK.isfinite()
    return clean(torch.where(both, mixed_BK, conditional_BK))


def guided_generate(
    model: Any,
    input_ids: Tensor,
    *,
    negative_input_ids: Tensor | None = None,
    negative_attention_mask: Tensor | None = None,
    grammar: ImageSpanGrammar,
    settings: "SamplingSettings",
    seeds: Sequence[int] | None = None,
    generation_config: Any = None,
    **options: Any,
) -> Tensor:
    """Draw with guidance: ``model.generate(..., custom_generate=guided_generate, grammar=...)``.

    Args:
        model: a decoder-only Hugging Face model.
        input_ids: (B, T), left padded.
        negative_input_ids, negative_attention_mask: the unconditional prompts, (B, T') or (1, T')
            for all rows, left padded; not needed where ``settings.guidance`` is 1.
        grammar: what is legal.
        settings: temperatures, top-k, guidance, seed. ``max_new_tokens`` and the stop ids come from
            ``generate``'s own arguments.
        seeds: one per row; None counts up from ``settings.seed``.
        generation_config: filled in by ``generate``.
        options: what else ``generate`` hands over. ``attention_mask`` (B, T) is used; temperature,
            top-k, processors and streamers of transformers are not.

    Returns:
        int64 (B, T + new): the prompts and what was generated, padded on the right.

    Raises:
        ConfigurationError: negative prompts that are missing or of another number of rows, beam
            search, or a ``generate`` call without this function's arguments.
    """
    # Imported here because sampling, which holds the loop, stands on this file.
    from unimodal.generation.sampling import sample_tokens

    if generation_config is None:
        raise ConfigurationError(
            "guided_generate was called by itself; call model.generate(..., "
            "custom_generate=guided_generate), or unimodal.generation.sampling.generate"
        )
    if (generation_config.num_beams or 1) > 1:
        raise ConfigurationError(
            f"num_beams is {generation_config.num_beams}, but guided drawing knows no beams; use 1"
        )
    prompts = _unpad(input_ids, options.get("attention_mask"))
    negatives = None
    if negative_input_ids is not None:
        negatives = _unpad(negative_input_ids, negative_attention_mask)
        if len(prompts) % len(negatives):
            raise ConfigurationError(
                f"{len(negatives)} negative prompts came for {len(prompts)} rows; "
                "give one for all or one for each"
            )
        each = len(prompts) // len(negatives)  # num_return_sequences repeats rows in place
        negatives = [negative for negative in negatives for _ in range(each)]
    stop = generation_config.eos_token_id
    stop_token_ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    replies = sample_tokens(
        model,
        grammar,
        prompts,
        settings,
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        negative_prompts=negatives,
        seeds=seeds,
        stop_token_ids=stop_token_ids,
    )
    pad = generation_config.pad_token_id
    pad = pad if pad is not None else (stop_token_ids or [0])[0]
    width = max(map(len, replies))
    rows = [reply + [pad] * (width - len(reply)) for reply in replies]
    return torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], dim=1)


def _unpad(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        return input_ids.tolist()
    keep = attention_mask.bool()
    return [ids[row].tolist() for ids, row in zip(input_ids, keep, strict=True)]
