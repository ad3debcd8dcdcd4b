"""Images for the routes: options in, pictures out, with previews on the way.

Between the requests (openai_shapes.py) and the engine (segments.py). Decoding runs elsewhere
(codec.py), so it holds up neither the event loop nor the codes.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from tokenizer_hf.errors import ConfigurationError
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.serving import metrics
from unimodal.serving.candidates import Judge, draw_best
from unimodal.serving.openai_shapes import EditsRequest, ImageOptions, ImagesRequest
from unimodal.serving.prompts import Prompts
from unimodal.serving.segments import DrawSettings, ImageSegments

NEGATIVES_KEPT = 64
"""Unconditional prompts that are not rendered again."""


@dataclass(frozen=True)
class Preview:
    """What an unfinished image looks like."""

    image: Image.Image


@dataclass(frozen=True)
class Drawn:
    """A finished image."""

    image: Image.Image
    codes: list[Any]
    span: list[int]
    """Its token ids, from ``<|image_start|>`` to ``<|image_end|>``."""


class Drawing:
    """Draws images with one engine and one image tokenizer."""

    def __init__(self, segments: ImageSegments, prompts: Prompts) -> None:
        self.segments = segments
        self.prompts = prompts
        self.processor = prompts.processor
        self.codec = prompts.codec
        self.vocabulary = segments.vocabulary
        self._negatives: dict[str, list[int]] = {}
        """Unconditional prompts by text; nearly every request has the same."""

    def settings(self, options: ImageOptions, seed: int) -> DrawSettings:
        """Return how one image is drawn."""
        own = self.prompts.processor.draw_settings
        top_k = own["top_k"] if options.top_k is None else options.top_k
        return DrawSettings(
            temperature=own["temperature"] if options.temperature is None else options.temperature,
            top_k=top_k or 0,
            guidance=self.guidance(options),
            budget=options.budget,
            seed=seed,
        )

    def guidance(self, options: ImageOptions) -> float:
        """Return the guidance that was asked for, or what this server takes without a word."""
        if options.guidance_scale is not None:
            return options.guidance_scale
        return (
            1.0
            if self.segments.guidance_problem
            else self.prompts.processor.draw_settings["guidance"]
        )

    def candidates(self, request: ImagesRequest) -> int:
        """Return how many drawings each image is the best of.

        Raises:
            ConfigurationError: candidates of a drawing that takes images up, or on a server that
                cannot judge them.
        """
        wanted, problem = request.candidates, self.segments.candidates_problem
        if isinstance(request, EditsRequest):
            problem = "only drawings from words alone have candidates, not edits; leave it out"
        if wanted is None:
            return 1 if problem else self.own_candidates
        if wanted > 1 and problem:
            raise ConfigurationError(f"candidates is {wanted}: {problem}")
        return wanted

    @property
    def own_candidates(self) -> int:
        """How many candidates a drawing has here without a word."""
        if self.segments.candidates_problem:
            return 1
        return self.prompts.processor.draw_settings["candidates"]

    def judge(self, prompt: str) -> Judge:
        """Return what gives the conversations by which drawings of a prompt are judged."""
        return partial(self.prompts.judging, prompt)

    def span_tokens(self, options: ImageOptions) -> int:
        """Return how many token ids an image of these options takes at most.

        Raises:
            ConfigurationError: a budget that the image tokenizer does not have.
        """
        return ImageSpanGrammar(self.vocabulary, max_codes=options.budget).max_span_ids

    async def negative(self, options: ImageOptions) -> list[int]:
        """The unconditional prompt; not needed, and empty, where guidance is off."""
        if self.guidance(options) == 1:
            return []
        text = options.negative_prompt
        if text not in self._negatives:
            self._negatives[text] = await self.prompts.of_drawing(text)
            while len(self._negatives) > NEGATIVES_KEPT:
                del self._negatives[next(iter(self._negatives))]
        return self._negatives[text]

    async def draw(
        self,
        prompt: Sequence[int],
        negative: Sequence[int],
        settings: DrawSettings,
        num_previews: int = 0,
        *,
        candidates: int = 1,
        judge: Judge | None = None,
        **request: Any,
    ) -> AsyncGenerator[Preview | Drawn, None]:
        """Draw one image.

        Args:
            prompt, negative, settings, request: as :meth:`ImageSegments.draw`.
            candidates: the image is the best of so many; the previews are of the first.
            judge: of `judge`; needed for more than one.
            num_previews: how many, spread over the codes as `_Previews` says. One that is not shown
                before the next is due is left out.

        Yields:
            Previews, then the image.

        Raises:
            ConfigurationError, MessageError, ServingError: as :meth:`ImageSegments.draw`.
        """
        previews = _Previews(self.segments.check(prompt, negative, settings), num_previews)
        drawing = asyncio.ensure_future(
            draw_best(
                self.segments,
                prompt,
                negative,
                settings,
                candidates,
                judge,
                on_codes=previews.take if num_previews else None,
                **request,
            )
        )
        drawing.add_done_callback(lambda _: previews.close())
        try:
            while (ids := await previews.next()) is not None:
                codes = self.vocabulary.to_codes(ids)
                with metrics.timed("decode"):
                    image = await self.codec.decode_beginning(codes)
                if image is not None and not drawing.done():
                    yield Preview(image)
            span = await drawing
        finally:
            drawing.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await drawing
        codes = self.vocabulary.to_codes(span[1:-1])
        with metrics.timed("decode"):
            [image] = await self.codec.decode([codes])
        metrics.went_out(1, len(span))
        yield Drawn(image, codes, span)


class _Previews:
    """Decides which of the growing codes of an image are shown.

    Args:
        grammar: of the image.
        number: of previews; preview i (from 1) behind (2i - 1)/(2 number + 1) of the codes: evenly,
            but the first comes early, since it is the one that somebody waits for.
    """

    def __init__(self, grammar: Any, number: int) -> None:
        self._group = len(grammar.vocabulary.ranges)
        most = grammar.max_codes
        due = (-(-most * step // (2 * number + 1)) for step in range(1, 2 * number, 2))
        self._due = sorted({position for position in due if 0 < position < most})
        self._ids: list[int] = []
        self._news = asyncio.Event()
        self._closed = False

    def take(self, ids: list[int]) -> None:
        """Take all code ids so far."""
        self._ids = ids
        if self._due and len(ids) // self._group >= self._due[0]:
            self._news.set()

    def close(self) -> None:
        """Say that no more codes come."""
        self._closed = True
        self._news.set()

    async def next(self) -> list[int] | None:
        """Wait until a preview is due and return the ids to show, or None at the end."""
        await self._news.wait()
        self._news.clear()
        if self._closed:
            return None
        positions = len(self._ids) // self._group
        self._due = [position for position in self._due if position > positions]
        return self._ids[: positions * self._group]
