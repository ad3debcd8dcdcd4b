"""Chat replies in which text and images alternate, in one request.

A reply is made of segments. A text segment is a request of vLLM's own chat handler, so streaming,
logprobs, tools and reasoning are vLLM's; it stops where the model writes ``<|image_start|>``. The
image is a segment of its own (drawing.py). Then the next text segment goes on behind all that was
written, and so on to the end of the reply. Prefix caching makes the seams nearly free.

The ids of a reply are those that ``unimodal.generation.sampling.generate`` would write.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tokenizer_hf.errors import ConfigurationError, UnimodalError
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.serving.drawing import Drawing, Preview
from unimodal.serving.lifecycle import ENGINE_DEAD
from unimodal.serving.logits import START_BEFORE_KEY
from unimodal.serving.openai_shapes import (
    MAX_IMAGES,
    ChatImageOptions,
    Modalities,
    error_body,
    event,
    first_seed,
    image_part,
)
from unimodal.serving.segments import DrawSettings, together
from unimodal.serving.vllm_private import (
    ChatCompletionRequest,
    EngineDeadError,
    ErrorResponse,
    lora_of,
    merge_async_iterators,
    metrics_headers,
    most_reply_tokens,
    with_keep_alive,
    with_prompt_token_ids,
)

Chunk = dict[str, Any]
"""A ``chat.completion.chunk`` object."""


def why_no_images(request: ChatCompletionRequest) -> str | None:
    """Name what in a chat request leaves no room for images in its reply, or return None."""
    form = getattr(request.response_format, "type", None)
    reasons = {
        "use_beam_search": request.use_beam_search,
        "truncate_prompt_tokens": request.truncate_prompt_tokens is not None,
        "structured_outputs": request.structured_outputs is not None,
        "response_format": form not in (None, "text"),
        "tool_choice": request.tool_choice not in (None, "none", "auto"),
        "include_reasoning": not request.include_reasoning,
        "allowed_token_ids": request.allowed_token_ids is not None,
        f"n above {MAX_IMAGES}": (request.n or 1) > MAX_IMAGES,
    }
    return next((name for name, is_set in reasons.items() if is_set), None)


class EventStream(StreamingResponse):
    """A stream of server-sent events whose source is closed with it, whoever ends it."""

    media_type = "text/event-stream"

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


@dataclass
class _Choice:
    """One of the ``n`` replies, as far as it is written."""

    index: int
    image_seed: int
    """Of its first image."""
    at_image: bool
    """An image comes next."""
    ids: list[int] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Text and image parts, in order."""
    num_texts: int = 0
    num_images: int = 0
    num_characters: int = 0
    """Of the text."""
    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant"})
    """The other fields of vLLM's message, from the last text segment."""
    reasoning: str = ""
    tool_calls: list[Any] = field(default_factory=list)
    logprobs: list[Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    role_sent: bool = False

    def add_text(self, text: str) -> None:
        self.num_characters += len(text)
        if self.parts and self.parts[-1]["type"] == "text":
            self.parts[-1]["text"] += text
        elif text:
            self.parts.append({"type": "text", "text": text})

    def add_image(self, part: dict[str, Any], span: list[int]) -> None:
        self.parts.append(part)
        self.ids += span
        self.num_images += 1
        self.at_image = False


class _Refused(Exception):
    """vLLM answered a segment with an error."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(str(body))
        self.body = body


class Reply:
    """The answer to one chat request.

    Args:
        serving_chat: vLLM's chat handler.
        drawing: draws the images.
        request: the request as vLLM reads it, pictures only in the prompt. It is not changed.
        prompt: the prompt's token ids.
        options: of the images.
        mode: "auto", the model may start images; "image", the reply begins with exactly one.
        raw_request: the HTTP request; vLLM reads its headers.
    """

    def __init__(
        self,
        serving_chat: Any,
        drawing: Drawing,
        request: ChatCompletionRequest,
        prompt: list[int],
        options: ChatImageOptions,
        mode: Modalities,
        raw_request: Request,
    ) -> None:
        self.serving_chat = serving_chat
        self.drawing = drawing
        self.start = drawing.vocabulary.start_token_id
        self.request = request
        self.prompt = prompt
        self.options = options
        self.mode = mode
        self.raw_request = raw_request
        self.grammar = ImageSpanGrammar(drawing.vocabulary, max_codes=options.budget)
        seed = first_seed(request.seed) & (2**62 - 1)  # vLLM takes negative ones too
        self.choices = [
            _Choice(index, seed + index, at_image=mode == "image")
            for index in range(request.n or 1)
        ]
        self.negative: list[int] = []
        self.most_ids = 0
        """Most ids in a reply."""
        self.most_ids_to_image = 0
        """Up to which of its ids an image may reach: the unconditional prompt may be longer."""
        self.head: dict[str, Any] = {}
        """The fields that all chunks of the answer share."""
        self.first_answer: dict[str, Any] = {}
        """The first text segment of the first choice, whole; the answer takes over its fields."""
        self.first_usage: dict[str, Any] | None = None
        """The chunk with the usage that vLLM's first stream ended with."""

    async def respond(self) -> Response:
        """Run the request and return the HTTP answer.

        Raises:
            ConfigurationError, MessageError: an image was asked for that cannot be drawn.
            ServingError: as :meth:`ImageSegments.draw`.
        """
        await self._prepare()
        try:
            if self.request.stream:
                # vLLM refuses what it does not like here, before the stream begins.
                first = [
                    None if choice.at_image else await self._ask(choice) for choice in self.choices
                ]
                events = with_keep_alive(self._events(first), self.raw_request)
                return EventStream(events)
            answer = await self._whole()
        except _Refused as refused:
            return JSONResponse(refused.body, refused.body["error"]["code"])
        return JSONResponse(answer, headers=metrics_headers(self.raw_request))

    async def _prepare(self) -> None:
        """Work out how long the reply may be, and refuse what cannot be drawn."""
        segments = self.drawing.segments
        self.negative = await self.drawing.negative(self.options)
        self.most_ids = most_reply_tokens(self.serving_chat, self.request, len(self.prompt))
        longest = max(len(self.prompt), len(self.negative))
        self.most_ids_to_image = min(self.most_ids, segments.max_model_len - longest)
        lora_request = lora_of(self.serving_chat, self.request)
        name = self.raw_request.headers.get("X-Request-Id") or self.request.request_id
        self.head = {
            "id": f"chatcmpl-{name}",
            "created": int(time.time()),
            "model": self.serving_chat.models.model_name(lora_request),
        }
        self.request_options: dict[str, Any] = {
            "lora_request": lora_request,
            "priority": self.request.priority,
        }
        if self.mode != "image":
            return
        least = self.grammar.min_span_ids
        if self.most_ids < least <= segments.max_model_len - longest:
            raise ConfigurationError(
                f"the reply may have {self.most_ids} ids, but an image takes {least}; raise "
                "max_completion_tokens"
            )
        settings = self._settings(self.choices[0]) if self.most_ids_to_image >= least else None
        segments.check(
            self.prompt, self.negative, settings or self.drawing.settings(self.options, 0)
        )

    # --- the segments of one choice ---------------------------------------------------------------

    async def _run(self, choice: _Choice, first: Any = None) -> AsyncGenerator[Chunk, None]:
        """Write a choice to its end.

        Args:
            first: vLLM's stream of its first text segment, if that is asked for already.

        Yields:
            The chunks of the choice; none where the request is not streamed.
        """
        if not choice.at_image:
            async with aclosing(self._text(choice, first)) as chunks:
                async for chunk in chunks:
                    yield chunk
        elif self.request.stream:
            yield self._chunk(choice, {"role": "assistant", "content": ""})
            choice.role_sent = True
        while choice.at_image:
            for segment in (self._image, self._text):
                async with aclosing(segment(choice)) as chunks:
                    async for chunk in chunks:
                        yield chunk

    async def _image(self, choice: _Choice) -> AsyncGenerator[Chunk, None]:
        """Draw the image that comes next."""
        drawing = self.drawing.draw(
            [*self.prompt, *choice.ids],
            [*self.negative, *choice.ids] if self.negative else [],
            self._settings(choice),
            self.options.partial_images if self.request.stream else 0,
            **self.request_options,
        )
        index = choice.num_images
        async with aclosing(drawing) as steps:
            async for step in steps:
                if isinstance(step, Preview):
                    part = await asyncio.to_thread(image_part, step.image)
                    yield self._chunk(
                        choice, {"images": [{"index": index, **part, "partial": True}]}
                    )
                    continue
                part = await asyncio.to_thread(
                    image_part, step.image, codes=step.codes, offset=choice.num_characters
                )
                choice.add_image(part, step.span)
                if self.request.stream:
                    yield self._chunk(
                        choice,
                        {"images": [{"index": index, **part, "partial": False}]},
                        step.span,
                    )

    async def _text(self, choice: _Choice, first: Any = None) -> AsyncGenerator[Chunk, None]:
        """Write the text that comes next, up to an image or to the end."""
        if len(choice.ids) >= self.most_ids:
            choice.finish_reason = "length"
            if self.request.stream:
                yield self._chunk(choice, {}, finish_reason="length")
            return
        answer = first or await self._ask(choice)
        choice.num_texts += 1
        if not self.request.stream:
            self._take_whole(choice, answer.model_dump())
            return
        async with aclosing(answer) as lines:
            async for line in lines:
                chunk = _read_event(line)
                if chunk is not None and self._take_chunk(choice, chunk):
                    yield chunk

    async def _ask(self, choice: _Choice) -> Any:
        """Ask vLLM's handler for a text segment: its answer, or its stream of events."""
        answer = await self.serving_chat.create_chat_completion(
            self._text_request(choice), self.raw_request
        )
        if isinstance(answer, ErrorResponse):
            raise _Refused(answer.model_dump())
        return answer

    def _text_request(self, choice: _Choice) -> ChatCompletionRequest:
        request, written = self.request, len(choice.ids)
        changes: dict[str, Any] = {"n": 1, "return_token_ids": True}
        if request.seed is not None:
            seed = request.seed + choice.index  # as vLLM numbers the choices of n > 1
            changes["seed"] = _seed(seed, "text", choice.num_texts) if written else seed
        if written:
            changes |= {
                "max_tokens": None,
                "max_completion_tokens": self.most_ids - written,
                "min_tokens": max(0, request.min_tokens - written),
            }
        start_before = self.most_ids_to_image - written - self.grammar.min_span_ids + 1
        if self.mode == "auto" and choice.num_images < self.options.max_images and start_before > 0:
            changes["stop_token_ids"] = [*(request.stop_token_ids or []), self.start]
            changes["vllm_xargs"] = {
                **(request.vllm_xargs or {}),
                START_BEFORE_KEY: start_before,
            }
        changes["kv_transfer_params"] = request.kv_transfer_params
        changes = with_prompt_token_ids(changes, [*self.prompt, *choice.ids])
        return request.model_copy(update=changes)

    def _settings(self, choice: _Choice) -> DrawSettings:
        """How the next image of a choice is drawn: no longer than there is room."""
        seed = choice.image_seed
        if choice.num_images:
            seed = _seed(seed, "image", choice.num_images)
        settings = self.drawing.settings(self.options, seed)
        room = self.most_ids_to_image - len(choice.ids)
        most = (room - 2) // len(self.drawing.vocabulary.ranges)
        if most < (self.grammar.max_codes or 0):
            settings = replace(settings, budget=most)
        return settings

    def _stopped_at_image(self, choice: _Choice, item: dict[str, Any]) -> bool:
        """Take the end of a text segment; say whether its last id is ``<|image_start|>``."""
        at_start = item["stop_reason"] == self.start
        # Behind a tool call nothing can follow.
        choice.at_image = at_start and item["finish_reason"] == "stop"
        if not choice.at_image:
            choice.finish_reason = item["finish_reason"]
            choice.stop_reason = None if at_start else item["stop_reason"]
        return at_start

    # --- whole ------------------------------------------------------------------------------------

    async def _whole(self) -> dict[str, Any]:
        """Return the ``chat.completion`` object."""
        await together(self._to_end(choice) for choice in self.choices)
        wants_ids = bool(self.request.return_token_ids)
        if len(self.choices) == 1 and not self.choices[0].num_images:
            answer = self.first_answer
            if not wants_ids:
                answer["prompt_token_ids"] = answer["choices"][0]["token_ids"] = None
            return answer
        return {
            **self.first_answer,
            **self.head,
            "object": "chat.completion",
            "choices": [self._item(choice) for choice in self.choices],
            "usage": self._usage(self.first_answer.get("usage")),
            "prompt_token_ids": self.prompt if wants_ids else None,
        }

    async def _to_end(self, choice: _Choice) -> None:
        async for _ in self._run(choice):
            pass

    def _take_whole(self, choice: _Choice, answer: dict[str, Any]) -> None:
        """Take a text segment that came whole."""
        [item] = answer["choices"]
        message = dict(item["message"])
        text = message.pop("content", None) or ""
        entries = (item["logprobs"] or {}).get("content")
        ids = item["token_ids"] or []
        if self._stopped_at_image(choice, item):
            ids, text, entries = ids[:-1], self._without_start(text), entries and entries[:-1]
        if not choice.index and not choice.ids:
            self.first_answer = answer
        choice.ids += ids
        choice.add_text(text)
        choice.reasoning += message.pop("reasoning", None) or ""
        choice.tool_calls += message.pop("tool_calls", None) or []
        choice.message |= message
        if entries is not None:
            choice.logprobs = [*(choice.logprobs or []), *entries]

    def _item(self, choice: _Choice) -> dict[str, Any]:
        """Return a choice of the whole answer."""
        message: dict[str, Any] = {**choice.message, "reasoning": choice.reasoning or None}
        if choice.tool_calls:
            message["tool_calls"] = choice.tool_calls
        images = [part for part in choice.parts if part["type"] == "image_url"]
        if images and self.options.content_format == "parts":
            message["content"] = choice.parts
        else:
            texts = (part["text"] for part in choice.parts if part["type"] == "text")
            message["content"] = "".join(texts)
            if images:
                message["images"] = images
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None if choice.logprobs is None else {"content": choice.logprobs},
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.ids if self.request.return_token_ids else None,
        }

    def _usage(self, first: dict[str, Any] | None) -> dict[str, Any]:
        """Count the whole reply; the prompt counts once."""
        written = sum(len(choice.ids) for choice in self.choices)
        counts = {
            "prompt_tokens": len(self.prompt),
            "total_tokens": len(self.prompt) + written,
            "completion_tokens": written,
        }
        # Behind a forced image the prompt is cached because of that image alone.
        return counts if self.mode == "image" else {**(first or {}), **counts}

    # --- streamed ---------------------------------------------------------------------------------

    async def _events(self, first: list[Any]) -> AsyncGenerator[str, None]:
        """The server-sent events of the answer; ``first`` are vLLM's streams of each choice."""
        runs = [self._run(*pair) for pair in zip(self.choices, first, strict=True)]
        try:
            async with aclosing(merge_async_iterators(*runs)) as chunks:
                async for _, chunk in chunks:
                    yield event(chunk)
            options = self.request.stream_options
            if self.first_usage or (options and options.include_usage):
                usage = self._usage((self.first_usage or {}).get("usage"))
                chunk = {**self.head, "object": "chat.completion.chunk", "choices": []}
                yield event({**(self.first_usage or {}), **chunk, "usage": usage})
        except _Refused as refused:
            yield event(refused.body)
        except UnimodalError as error:
            yield event(error_body(str(error), 503, "ServiceUnavailableError"))
        except EngineDeadError:
            yield event(error_body(ENGINE_DEAD, 503, "ServiceUnavailableError"))
        yield "data: [DONE]\n\n"

    def _chunk(
        self,
        choice: _Choice,
        delta: dict[str, Any],
        token_ids: list[int] | None = None,
        finish_reason: str | None = None,
    ) -> Chunk:
        item = {"index": choice.index, "delta": delta, "finish_reason": finish_reason}
        if token_ids is not None and self.request.return_token_ids:
            item["token_ids"] = token_ids
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": [item]}
        if self.request.return_token_ids and not choice.role_sent:
            chunk["prompt_token_ids"] = self.prompt
        return chunk

    def _take_chunk(self, choice: _Choice, chunk: Chunk) -> bool:
        """Take a chunk of a text segment and make it one of the reply; say whether to pass it on.

        Raises:
            _Refused: it is an error.
        """
        if "error" in chunk:
            raise _Refused(chunk)
        if not chunk["choices"]:
            if self.first_usage is None:
                self.first_usage = chunk
            return False
        chunk |= self.head
        [item] = chunk["choices"]
        item["index"] = choice.index
        delta = item["delta"]
        ids = item.pop("token_ids", None) or []
        if not self.request.return_token_ids:
            chunk.pop("prompt_token_ids", None)
        if "role" in delta:
            was_sent, choice.role_sent = choice.role_sent, True
            return not was_sent
        if item["finish_reason"] is not None and self._stopped_at_image(choice, item):
            ids = ids[:-1]
            delta["content"] = self._without_start(delta.get("content") or "")
            if item.get("logprobs"):
                item["logprobs"]["content"] = item["logprobs"]["content"][:-1]
            item["stop_reason"] = None
            if choice.at_image:
                item["finish_reason"] = None
        choice.ids += ids
        choice.num_characters += len(delta.get("content") or "")
        if self.request.return_token_ids:
            item["token_ids"] = ids
        if "usage" in chunk:
            chunk["usage"] = {
                **chunk["usage"],
                "prompt_tokens": len(self.prompt),
                "completion_tokens": len(choice.ids),
                "total_tokens": len(self.prompt) + len(choice.ids),
            }
        return bool(ids or any(delta.values()) or item["finish_reason"])

    def _without_start(self, text: str) -> str:
        """Cut the image start, which is in the text where ``skip_special_tokens`` is off."""
        return text.removesuffix(self.drawing.vocabulary.start_string)


def _seed(seed: int, what: str, number: int) -> int:
    """Return the seed of a later segment: another for each, the same for the same request."""
    digest = hashlib.blake2b(f"{seed} {what} {number}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _read_event(line: str) -> dict[str, Any] | None:
    """Return the object of a server-sent event of vLLM's; None at the end."""
    text = line.removeprefix("data: ").strip()
    if text == "[DONE]":
        return None
    value: dict[str, Any] = json.loads(text)
    return value
