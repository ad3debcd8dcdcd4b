"""The vLLM endpoint plugin: images in and out of chat completions, and images/generations.

vLLM's server stays as it is. A plugin's route replaces the stock route of the same path; text
replies are handed back to the stock handler with the prompt's ids, which are those that
:meth:`UnimodalProcessor.render` gives, so transformers and vLLM read the same prompt whatever the
vocabulary mode. An image in a reply is a segment of its own (serving/segments.py).

Named in pyproject.toml under ``vllm.endpoint_plugins``; loaded where ``VLLM_PLUGINS`` names it.
"""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import wraps
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import ValidationError

from tokenizer_hf.errors import CheckpointError, ConfigurationError, ServingError, UnimodalError
from tokenizer_hf.vocabulary import control_strings, neutralise
from unimodal.messages import with_codes
from unimodal.pipeline import GUIDANCE
from unimodal.processing_unimodal import UnimodalProcessor
from unimodal.serving.openai_shapes import (
    ChatAnswer,
    ChatImageRequest,
    ImageOptions,
    ImagesRequest,
    check_size,
    error_body,
    first_seed,
    image_part,
    images_answer,
    needs_stock_template,
    plain_messages,
    read_body,
    wants_image,
)
from unimodal.serving.segments import DrawSettings, ImageSegments, together
from unimodal.serving.vllm_private import (
    ChatCompletionRequest,
    check_model_name,
    load_aware_call,
    lora_of,
    stock_chat_completion,
    validate_json_request,
    with_cancellation,
    with_prompt_token_ids,
)

logger = logging.getLogger("vllm.unimodal")  # below vLLM's logger, so that its handlers print it

Handler = Callable[[Any, dict[str, Any], Request], Awaitable[Response]]


def answering_errors(handler: Handler) -> Handler:
    """Answer our own exceptions as OpenAI-shaped errors; vLLM's own handlers see to the rest."""

    @wraps(handler)
    async def wrapper(self: Any, body: dict[str, Any], raw_request: Request) -> Response:
        try:
            return await handler(self, body, raw_request)
        except (ServingError, CheckpointError) as error:
            return JSONResponse(error_body(str(error), 503, "ServiceUnavailableError"), 503)
        except UnimodalError as error:
            return JSONResponse(error_body(str(error), 400, "BadRequestError"), 400)

    return wrapper


class UnimodalEndpoints:
    """The plugin object; vLLM calls :meth:`attach_router`, then :meth:`init_state`."""

    name = "unimodal"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register both routes."""
        router = APIRouter(dependencies=[Depends(validate_json_request)])
        chat, images = self.chat_completions, self.images_generations

        # Plain functions, since FastAPI and vLLM's decorators read the parameters' names and types.
        @router.post("/v1/chat/completions", response_model=None)
        async def create_chat_completion(body: dict[str, Any], raw_request: Request) -> Any:
            return await chat(body, raw_request)

        @router.post("/v1/images/generations", response_model=None)
        @with_cancellation
        @load_aware_call
        async def create_images(body: dict[str, Any], raw_request: Request) -> Any:
            return await images(body, raw_request)

        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Load the processor and look at the engine's configuration."""
        config = engine_client.vllm_config.model_config
        self.state = state
        self.processor = await asyncio.to_thread(
            UnimodalProcessor.from_pretrained, config.model, revision=config.revision
        )
        self.vocabulary = self.processor.vocabulary
        self.segments = ImageSegments(engine_client, self.vocabulary)
        # A fast tokenizer may not be used by two threads at once.
        self._tokenizer_lock = threading.Lock()
        if self.segments.guidance_problem:
            logger.warning("%s", self.segments.guidance_problem)
        logger.info(
            "unimodal serves images of up to %d codes, vocabulary %d to %d",
            self.vocabulary.num_tokens,
            self.vocabulary.new_token_ids[0],
            self.vocabulary.vocab_size - 1,
        )

    # --- routes -----------------------------------------------------------------------------------

    @answering_errors
    async def chat_completions(self, body: dict[str, Any], raw_request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise ConfigurationError(
                f"messages is {body.get('messages')!r:.80}, expected a list of at least one message"
            )
        if wants_image(body):
            return await _draw_until_disconnect(self, raw_request, body)
        if "image" in body:
            raise ConfigurationError(
                'an "image" object came, but modalities does not hold "image"; add '
                'modalities: ["image"]'
            )
        body = {key: value for key, value in body.items() if key != "modalities"}
        return await stock_chat_completion(await self._text_request(body), raw_request)

    @answering_errors
    async def images_generations(self, body: dict[str, Any], raw_request: Request) -> Response:
        """``POST /v1/images/generations``."""
        request = read_body(ImagesRequest, body)
        check_size(request.size, self._image_size)
        refused, lora_request, _name = await self._model(request.model)
        if refused is not None:
            return refused
        prompt = await self._prompt_ids(self.processor.draw_messages(request.prompt))
        spans, images = await self._draw(
            prompt, request, request.n, request.seed, lora_request=lora_request
        )
        answer = await asyncio.to_thread(images_answer, request, images, spans, prompt)
        return JSONResponse(answer)

    async def _chat_image(self, body: dict[str, Any], raw_request: Request) -> Response:
        request = read_body(ChatImageRequest, body)
        refused, lora_request, name = await self._model(request.model)
        if refused is not None:
            return refused
        stock_only = needs_stock_template(body)
        if stock_only:
            raise ConfigurationError(
                f"{stock_only!r} came with a request for an image, expected plain turns of text "
                "and images"
            )
        values = self._template_values(body)
        prompt = await self._prompt_ids(plain_messages(request.messages), **values)
        answer = ChatAnswer(name, prompt, bool(request.return_token_ids))

        async def draw() -> tuple[list[dict[str, Any]], list[list[int]]]:
            spans, images = await self._draw(
                prompt,
                request.image,
                request.n or 1,
                request.seed,
                lora_request=lora_request,
                priority=request.priority,
            )
            return await asyncio.to_thread(self._image_parts, spans, images), spans

        if not request.stream:
            parts, spans = await draw()
            return JSONResponse(answer.whole(parts, spans))
        # What cannot be drawn is refused before the stream begins.
        settings = self._settings(request.image, first_seed(request.seed))
        self.segments.check(prompt, await self._negative(request.image), settings)
        return StreamingResponse(_events(answer, draw), media_type="text/event-stream")

    # --- prompts ----------------------------------------------------------------------------------

    async def _text_request(self, body: dict[str, Any]) -> ChatCompletionRequest:
        """Build the request that the stock handler answers with text."""
        stock_only = needs_stock_template(body)
        if stock_only:
            body = dict(body, messages=self._neutralised(body["messages"], stock_only))
            transfer = dict(body.get("kv_transfer_params") or {})
            transfer.pop("prompt_token_ids", None)
            body["kv_transfer_params"] = transfer or None
        else:
            values = self._template_values(body)
            plain = plain_messages(body["messages"])
            prompt = await self._prompt_ids(plain, **values)
            # The handler looks at the messages' shape only; pictures are in the ids.
            shown = [
                {"role": message["role"], "content": _text_of(message["content"])}
                for message in plain
            ]
            body = with_prompt_token_ids(dict(body, messages=shown), prompt)
        try:
            return ChatCompletionRequest.model_validate(body)
        except ValidationError as error:
            raise RequestValidationError(error.errors(), body=body) from error

    def _template_values(self, body: dict[str, Any]) -> dict[str, Any]:
        """The variables of the chat template that a request sets."""
        values = dict(body.get("chat_template_kwargs") or {})
        if body.get("tools") and body.get("tool_choice") != "none":
            values["tools"] = body["tools"]
        return values

    async def _prompt_ids(self, messages: Sequence[dict[str, Any]], **values: Any) -> list[int]:
        """Render messages as the processor does, off the event loop."""

        def render() -> list[int]:
            [coded] = with_codes([messages], lambda all: self.processor.encode_images(all).tolist())
            with self._tokenizer_lock:
                rendered = self.processor.render(coded, add_generation_prompt=True, **values)
            return rendered.input_ids

        return await asyncio.to_thread(render)

    async def _negative(self, options: ImageOptions) -> list[int]:
        """The unconditional prompt; not needed, and empty, where guidance is off."""
        if self._guidance(options) == 1:
            return []
        return await self._prompt_ids(self.processor.draw_messages(options.negative_prompt))

    def _neutralised(self, messages: list[Any], why: str) -> list[Any]:
        """Break control strings in messages that vLLM renders itself; no pictures there."""
        strings = control_strings(self.processor.tokenizer, self.vocabulary)

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

    # --- drawing ----------------------------------------------------------------------------------

    async def _draw(
        self, prompt: list[int], options: ImageOptions, n: int, seed: int | None, **request: Any
    ) -> tuple[list[list[int]], list[Image.Image]]:
        """Draw ``n`` images at once; if one fails or the client goes, all are cancelled."""
        first = first_seed(seed)
        negative = await self._negative(options)
        self.segments.check(prompt, negative, self._settings(options, first))
        spans = await together(
            self.segments.draw(prompt, negative, self._settings(options, first + index), **request)
            for index in range(n)
        )
        codes = [self._codes(span) for span in spans]
        return spans, await asyncio.to_thread(self.processor.decode_codes, codes)

    def _settings(self, options: ImageOptions, seed: int) -> DrawSettings:
        return DrawSettings(
            temperature=options.temperature,
            top_k=options.top_k,
            guidance=self._guidance(options),
            budget=options.budget,
            seed=seed,
        )

    def _guidance(self, options: ImageOptions) -> float:
        if options.guidance_scale is not None:
            return options.guidance_scale
        return 1.0 if self.segments.guidance_problem else GUIDANCE

    def _codes(self, span: list[int]) -> list[Any]:
        return self.vocabulary.to_codes(span[1:-1])

    def _image_parts(
        self, spans: list[list[int]], images: list[Image.Image]
    ) -> list[dict[str, Any]]:
        return [
            image_part(image, self._codes(span)) for span, image in zip(spans, images, strict=True)
        ]

    @property
    def _image_size(self) -> int:
        return int(self.processor.vq_model.config.image_size)  # type: ignore[union-attr]

    async def _model(self, name: str | None) -> tuple[JSONResponse | None, Any, str]:
        """Return a refusal or None, the LoRA adapter that the name asks for, and the name."""
        serving = self.state.openai_serving_chat
        request = ChatCompletionRequest.model_validate(
            {"model": name, "messages": [{"role": "user", "content": ""}]}
        )
        refused = await check_model_name(serving, request)
        if refused is not None:
            return JSONResponse(refused.model_dump(), refused.error.code), None, ""
        lora_request = lora_of(serving, request)
        return None, lora_request, serving.models.model_name(lora_request)


@with_cancellation
@load_aware_call
async def _draw_until_disconnect(
    endpoints: UnimodalEndpoints, raw_request: Request, body: dict[str, Any]
) -> Response:
    return await endpoints._chat_image(body, raw_request)


async def _events(
    answer: ChatAnswer,
    draw: Callable[[], Awaitable[tuple[list[dict[str, Any]], list[list[int]]]]],
) -> AsyncIterator[str]:
    """The server-sent events of a streamed image: one chunk with the role, one with each image."""

    def event(value: dict[str, Any]) -> str:
        return f"data: {json.dumps(value)}\n\n"

    yield event(answer.chunk(0, {"role": "assistant", "content": ""}))
    try:
        parts, _spans = await draw()
    except UnimodalError as error:
        yield event(error_body(str(error), 503, "ServiceUnavailableError"))
    else:
        for index, part in enumerate(parts):
            yield event(answer.chunk(index, {"images": [{**part, "index": 0}]}))
            yield event(answer.chunk(index, {}, "stop"))
    yield "data: [DONE]\n\n"


def _text_of(content: list[dict[str, Any]]) -> str:
    return "".join(part.get("text", "") for part in content)


def make() -> UnimodalEndpoints:
    """The factory that the entry point names."""
    return UnimodalEndpoints()
