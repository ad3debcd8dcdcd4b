"""Prompts of the server: OpenAI messages -> token ids, off the event loop.

The ids are those that :meth:`UnimodalProcessor.render` gives, so transformers and vLLM read the
same prompt whatever the vocabulary mode.
"""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from unimodal.generation.candidates import Reading, readings
from unimodal.messages import Message
from unimodal.processing_unimodal import UnimodalProcessor
from unimodal.serving import metrics
from unimodal.serving.codec import ImageCodec
from unimodal.serving.fetch import ImageFetcher
from unimodal.serving.limits import Limits


class Prompts:
    """Words prompts with one processor, whose tokenizer no two threads may use at once."""

    def __init__(self, processor: UnimodalProcessor, codec: ImageCodec, limits: Limits) -> None:
        self.processor = processor
        self.codec = codec
        self.limits = limits
        self.fetcher = ImageFetcher(limits)
        self._tokenizer_lock = threading.Lock()

    async def of_messages(self, messages: Sequence[Message], **values: Any) -> list[int]:
        """Render messages, encoding their pictures.

        Args:
            values: variables of the chat template.

        Raises:
            MessageError, ImageError, CodeError: as ``UnimodalProcessor.render``.
        """
        pictures, with_codes = self.limits.check_images(messages)
        metrics.came_in(pictures, with_codes)
        with metrics.timed("fetch"):
            messages = await self.fetcher.messages(messages)
        with metrics.timed("encode"):
            coded = await self.codec.encode_messages(messages)

        def render() -> list[int]:
            with self._tokenizer_lock:
                rendered = self.processor.render(coded, add_generation_prompt=True, **values)
            return rendered.input_ids

        prompt = await asyncio.to_thread(render)
        self.limits.check_prompt(len(prompt))
        metrics.prompt_is_ready(len(prompt))
        return prompt

    async def of_drawing(self, prompt: str, images: Sequence[Message] = ()) -> list[int]:
        """The prompt of a drawing; the empty one is what guidance leads away from."""
        return await self.of_messages(self.processor.draw_messages(prompt, images))

    async def judging(
        self, prompt: str, spans: Sequence[Sequence[int]]
    ) -> list[tuple[Reading, Reading]]:
        """The conversations that judge drawings of a prompt; see `readings`."""

        def render() -> list[tuple[Reading, Reading]]:
            with self._tokenizer_lock:
                return [readings(self.processor, prompt, span) for span in spans]

        return await asyncio.to_thread(render)
