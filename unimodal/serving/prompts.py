"""Prompts of the server: OpenAI messages -> token ids, off the event loop.

The ids are those that :meth:`UnimodalProcessor.render` gives, so transformers and vLLM read the
same prompt whatever the vocabulary mode.
"""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.vocabulary import control_strings, neutralise
from unimodal.messages import Message
from unimodal.processing_unimodal import UnimodalProcessor
from unimodal.serving.codec import ImageCodec


class Prompts:
    """Words prompts with one processor, whose tokenizer no two threads may use at once."""

    def __init__(self, processor: UnimodalProcessor, codec: ImageCodec) -> None:
        self.processor = processor
        self.codec = codec
        self._tokenizer_lock = threading.Lock()

    async def of_messages(self, messages: Sequence[Message], **values: Any) -> list[int]:
        """Render messages, encoding their pictures.

        Args:
            values: variables of the chat template.

        Raises:
            MessageError, ImageError, CodeError: as ``UnimodalProcessor.render``.
        """
        coded = await self.codec.encode_messages(messages)

        def render() -> list[int]:
            with self._tokenizer_lock:
                rendered = self.processor.render(coded, add_generation_prompt=True, **values)
            return rendered.input_ids

        return await asyncio.to_thread(render)

    async def of_drawing(self, prompt: str, images: Sequence[Message] = ()) -> list[int]:
        """The prompt of a drawing; the empty one is what guidance leads away from."""
        return await self.of_messages(self.processor.draw_messages(prompt, images))

    def neutralised(self, messages: list[Any], why: str) -> list[Any]:
        """Break control strings in messages that vLLM renders itself.

        Raises:
            ConfigurationError: a picture, which vLLM's rendering would lose; ``why`` is named.
        """
        strings = control_strings(self.processor.tokenizer, self.processor.vocabulary)

        def clean(value: Any) -> Any:
            if isinstance(value, str):
                return neutralise(value, strings)
            if isinstance(value, list):
                return [clean(item) for item in value]
            if isinstance(value, dict):
                if value.get("type") == "image_url" or value.get("images"):
                    raise ConfigurationError(
                        f"{why!r} came together with a picture; this server renders pictures in "
                        f"plain turns only: leave out {why!r} or the pictures"
                    )
                return {key: clean(item) for key, item in value.items()}
            return value

        return clean(messages)


def template_values(body: dict[str, Any]) -> dict[str, Any]:
    """The variables of the chat template that a chat request sets.

    Raises:
        ConfigurationError: ``chat_template_kwargs`` is no object, or sets what the server sets.
    """
    values = body.get("chat_template_kwargs") or {}
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"chat_template_kwargs is {values!r:.80}, expected an object of template variables"
        )
    taken = {"messages", "add_generation_prompt", "chat_template"} & values.keys()
    if taken:
        raise ConfigurationError(
            f"chat_template_kwargs sets {sorted(taken)}, expected variables of the template only"
        )
    values = dict(values)
    if body.get("tools") and body.get("tool_choice") != "none":
        values["tools"] = body["tools"]
    return values
