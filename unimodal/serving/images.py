"""Answers of /v1/images/generations and /v1/images/edits, whole or as events."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, Response

from tokenizer_hf.errors import UnimodalError
from unimodal.serving.drawing import Drawing, Drawn, Preview
from unimodal.serving.lifecycle import ENGINE_DEAD
from unimodal.serving.openai_shapes import (
    ImageData,
    ImageEvent,
    ImagesAnswer,
    ImagesRequest,
    error_body,
    event,
    file_of,
    first_seed,
    images_usage,
)
from unimodal.serving.replies import EventStream
from unimodal.serving.segments import together
from unimodal.serving.vllm_private import EngineDeadError, merge_async_iterators


class ImagesReply:
    """The answer to one request for images.

    Args:
        drawing: draws them.
        request: what was asked for.
        prompt: its token ids.
        kind: "image_generation" or "image_edit", as OpenAI's events are called.
        lora_request: vLLM's adapter, if the model name asks for one.
    """

    def __init__(
        self, drawing: Drawing, request: ImagesRequest, prompt: list[int], kind: str, lora: Any
    ) -> None:
        self.drawing = drawing
        self.request = request
        self.prompt = prompt
        self.kind = kind
        self.lora_request = lora
        self.image_ids = frozenset(drawing.vocabulary.new_token_ids)
        self.first_seed = first_seed(request.seed)
        self.negative: list[int] = []

    async def respond(self) -> Response:
        """Draw and return the HTTP answer.

        Raises:
            ConfigurationError, MessageError, ServingError: as :meth:`ImageSegments.draw`.
        """
        self.negative = await self.drawing.negative(self.request)
        settings = self.drawing.settings(self.request, self.first_seed)
        # What cannot be drawn is refused before a stream begins.
        self.drawing.segments.check(self.prompt, self.negative, settings)
        if self.request.stream:
            return EventStream(self._events())
        drawn = await together(self._whole(index) for index in range(self.request.n))
        answer = await asyncio.to_thread(self._answer, drawn)
        return JSONResponse(answer.model_dump(exclude_none=True))

    def _draw(self, index: int) -> AsyncGenerator[Preview | Drawn, None]:
        return self.drawing.draw(
            self.prompt,
            self.negative,
            self.drawing.settings(self.request, self.first_seed + index),
            self.request.partial_images,
            candidates=self.drawing.candidates(self.request),
            judge=self.drawing.judge(self.request.prompt),
            lora_request=self.lora_request,
        )

    async def _whole(self, index: int) -> Drawn:
        [drawn] = [step async for step in self._draw(index) if isinstance(step, Drawn)]
        return drawn

    def _answer(self, images: list[Drawn]) -> ImagesAnswer:
        files = [file_of(drawn.image, self.request) for drawn in images]
        wanted = self.request.return_token_ids
        return ImagesAnswer(
            created=int(time.time()),
            data=[
                ImageData(b64_json=file.pop("b64_json"), token_ids=drawn.span if wanted else None)
                for file, drawn in zip(files, images, strict=True)
            ],
            usage=self._usage(images),
            prompt_token_ids=self.prompt if wanted else None,
            **files[0],
        )

    def _usage(self, images: list[Drawn]) -> Any:
        return images_usage(self.prompt, self.image_ids, sum(len(drawn.span) for drawn in images))

    async def _events(self) -> AsyncGenerator[str, None]:
        """The events of all images, as they come."""
        try:
            runs = [self._image_events(index) for index in range(self.request.n)]
            async with aclosing(merge_async_iterators(*runs)) as events:
                async for _, item in events:
                    yield event(item.model_dump(exclude_none=True), item.type)
        except UnimodalError as error:
            yield event(error_body(str(error), 503, "ServiceUnavailableError"), "error")
        except EngineDeadError:
            yield event(error_body(ENGINE_DEAD, 503, "ServiceUnavailableError"), "error")

    async def _image_events(self, index: int) -> AsyncGenerator[ImageEvent, None]:
        num_previews = 0
        async with aclosing(self._draw(index)) as steps:
            async for step in steps:
                file = await asyncio.to_thread(file_of, step.image, self.request)
                file |= {"index": index, "created_at": int(time.time())}
                if isinstance(step, Preview):
                    file |= {"type": f"{self.kind}.partial_image"}
                    yield ImageEvent(partial_image_index=num_previews, **file)
                    num_previews += 1
                    continue
                ids = step.span if self.request.return_token_ids else None
                file |= {"type": f"{self.kind}.completed"}
                yield ImageEvent(usage=self._usage([step]), token_ids=ids, **file)
