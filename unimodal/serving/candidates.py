"""The best of several drawings through vLLM's engine; see `unimodal.generation.candidates`."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from tokenizer_hf.errors import ConfigurationError
from unimodal.generation.candidates import Reading, best_of, candidate_seeds
from unimodal.serving.segments import DrawSettings, ImageSegments, OnIds, together

Judge = Callable[[Sequence[list[int]]], Awaitable[list[tuple[Reading, Reading]]]]
"""Takes spans and returns the `unimodal.generation.candidates.readings` of each."""


async def draw_best(
    segments: ImageSegments,
    prompt: Sequence[int],
    negative: Sequence[int],
    settings: DrawSettings,
    candidates: int,
    judge: Judge | None,
    *,
    on_codes: OnIds | None = None,
    **request: Any,
) -> list[int]:
    """Draw candidates side by side and return the span that is kept.

    Args:
        prompt, negative, settings, request: as :meth:`ImageSegments.draw`.
        candidates: how many; one alone is not judged, and without a judge the first is kept.
        on_codes: likewise; it is shown the first candidate.

    Raises:
        ConfigurationError: several candidates, and this engine cannot judge them.
        ConfigurationError, MessageError, ServingError: as :meth:`ImageSegments.draw`.
    """
    if candidates > 1 and segments.candidates_problem:
        raise ConfigurationError(segments.candidates_problem)
    spans = await together(
        segments.draw(
            prompt,
            negative,
            replace(settings, seed=seed),
            on_codes=None if index else on_codes,
            **request,
        )
        for index, seed in enumerate(candidate_seeds(settings.seed, candidates))
    )
    if candidates == 1 or judge is None:
        return spans[0]
    pairs = await judge(spans)
    found = await together(
        segments.mean_log_likelihood(reading, **request) for pair in pairs for reading in pair
    )
    return spans[best_of(list(zip(found[::2], found[1::2], strict=True)))]
