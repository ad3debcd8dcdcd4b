"""The vLLM endpoint plugin: the routes that take images in and give images out.

vLLM's server stays as it is. A plugin's route replaces the stock route of the same path: chat
completions, whose text is still written by vLLM's own handler, and the list of models. The images
routes are new. What the routes share is in prompts.py (messages -> ids), drawing.py (ids -> images)
and replies.py (a chat reply in segments); the shapes are in openai_shapes.py and openapi.py.

Named in pyproject.toml under ``vllm.endpoint_plugins``; loaded where ``VLLM_PLUGINS`` names it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from tokenizer_hf.errors import CheckpointError, ConfigurationError, ServingError, UnimodalError
from unimodal.processing_unimodal import UnimodalProcessor
from unimodal.serving import metrics, openapi
from unimodal.serving.codec import ImageCodec
from unimodal.serving.drawing import Drawing
from unimodal.serving.gate import Admission
from unimodal.serving.images import ImagesReply
from unimodal.serving.lifecycle import ENGINE_DEAD, drain_on_sigterm, health_answer
from unimodal.serving.limits import Limits
from unimodal.serving.logits import START_BEFORE_KEY
from unimodal.serving.openai_shapes import (
    ChatImageOptions,
    EditsRequest,
    ImagesRequest,
    abilities,
    check_partial_images,
    check_size,
    error_body,
    modalities_of,
    needs_stock_template,
    plain_messages,
    read_body,
)
from unimodal.serving.prompts import Prompts
from unimodal.serving.replies import Reply, why_no_images
from unimodal.serving.segments import ImageSegments
from unimodal.serving.user_text import harmless_request, template_values
from unimodal.serving.vllm_private import (
    ChatCompletionRequest,
    EngineDeadError,
    check_model_name,
    load_aware_call,
    lora_of,
    stock_chat_completion,
    validate_json_request,
    with_cancellation,
    with_prompt_token_ids,
)

logger = logging.getLogger("vllm.unimodal")  # below vLLM's logger, so that its handlers print it

Body = dict[str, Any]
Handler = Callable[[Any, Body, Request], Awaitable[Response]]


def answering_errors(handler: Handler) -> Handler:
    """Answer our own exceptions as OpenAI-shaped errors; vLLM's own handlers see to the rest."""

    @wraps(handler)
    async def wrapper(self: Any, body: Body, raw_request: Request) -> Response:
        try:
            return await handler(self, body, raw_request)
        except (ServingError, CheckpointError) as error:
            return JSONResponse(error_body(str(error), 503, "ServiceUnavailableError"), 503)
        except UnimodalError as error:
            return JSONResponse(error_body(str(error), 400, "BadRequestError"), 400)
        except RecursionError:
            message = "the request is nested too deeply, expected what the API describes"
            return JSONResponse(error_body(message, 400, "BadRequestError"), 400)
        except EngineDeadError:  # vLLM's watchdog ends the server within seconds
            return JSONResponse(error_body(ENGINE_DEAD, 503, "ServiceUnavailableError"), 503)

    return wrapper


class UnimodalEndpoints:
    """The plugin object; vLLM calls :meth:`attach_router`, then :meth:`init_state`."""

    name = "unimodal"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes."""
        router = APIRouter()
        chat, images, edits = self.chat_completions, self.images_generations, self.images_edits
        models = self.models
        json_only = [Depends(validate_json_request)]

        # Plain functions, since FastAPI reads the parameters' names and types.
        @router.post("/v1/chat/completions", dependencies=json_only, **openapi.CHAT)
        async def create_chat_completion(body: openapi.ChatBody, raw_request: Request) -> Any:
            return await chat(body, raw_request)

        @router.post("/v1/images/generations", dependencies=json_only, **openapi.IMAGES)
        async def create_images(body: openapi.ImagesBody, raw_request: Request) -> Any:
            return await images(body, raw_request)

        @router.post("/v1/images/edits", **openapi.EDITS)
        async def create_image_edits(raw_request: Request) -> Any:
            return await edits({}, raw_request)

        @router.get("/v1/models", **openapi.MODELS)
        async def show_available_models() -> Any:
            return await models()

        @router.get("/health", response_class=JSONResponse)
        async def health() -> Any:
            return await health_answer(self.engine, self.processor.vq_model, self.admission)

        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Load the processor and look at the engine's configuration."""
        config = engine_client.vllm_config.model_config
        self.state = state
        self.processor = await asyncio.to_thread(
            UnimodalProcessor.from_pretrained, config.model, revision=config.revision
        )
        vocabulary = self.processor.vocabulary
        self.engine = engine_client
        self.limits = Limits.from_environ()
        if self.limits.max_image_pixels:
            self.processor.image_processor.max_pixels = self.limits.max_image_pixels
        vllm = engine_client.vllm_config
        seats = vllm.scheduler_config.max_num_seqs * vllm.parallel_config.data_parallel_size
        self.admission = state.unimodal_admission = Admission(seats + self.limits.max_queue)
        self._drain = asyncio.create_task(
            drain_on_sigterm(state, self.admission, vllm.shutdown_timeout)
        )
        codec = ImageCodec(
            self.processor,
            encode_took=metrics.ENCODE_SECONDS.observe,
            decode_took=metrics.DECODE_SECONDS.observe,
        )
        self.prompts = Prompts(self.processor, codec, self.limits)
        self.drawing = Drawing(ImageSegments(engine_client, vocabulary), self.prompts)
        self.image_size = int(self.processor.vq_model.config.image_size)  # type: ignore[union-attr]
        problem = self.drawing.segments.guidance_problem
        if problem:
            logger.warning("%s", problem)
        logger.info(
            "unimodal serves images of up to %d codes, vocabulary %d to %d",
            vocabulary.num_tokens,
            vocabulary.new_token_ids[0],
            vocabulary.vocab_size - 1,
        )

    # --- routes -----------------------------------------------------------------------------------

    @answering_errors
    async def chat_completions(self, body: Body, raw_request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise ConfigurationError(
                f"messages is {body.get('messages')!r:.80}, expected a list of at least one message"
            )
        metrics.current().model = str(body.get("model"))[:128]
        mode = modalities_of(body)
        options = read_body(ChatImageOptions, _object(body, "image"))
        check_partial_images(options, body.get("stream"))
        request, prompt = await self._chat_request(body)
        obstacle = needs_stock_template(body) or why_no_images(request)
        if mode == "image" and obstacle:
            raise ConfigurationError(
                f"{obstacle!r} came with a request for an image, expected plain turns of text and "
                "images, and a reply that is free to hold one"
            )
        if START_BEFORE_KEY in (request.vllm_xargs or {}):
            raise ConfigurationError(
                f"vllm_xargs holds {START_BEFORE_KEY!r}, which is the server's own; leave it out"
            )
        if mode == "text" or obstacle:
            return await stock_chat_completion(request, raw_request)
        refused = await self._refused_model(request)
        if refused is not None:
            return refused
        span = self.drawing.span_tokens(options)
        most = self.limits.images_each(request.n or 1, span)
        if mode == "image":
            self.limits.check_image_tokens(request.n or 1, span)
        elif most == 0:  # who did not ask for images gets text
            return await stock_chat_completion(request, raw_request)
        elif most is not None and most < options.max_images:
            options = options.model_copy(update={"max_images": most})
        reply = Reply(
            self.state.openai_serving_chat,
            self.drawing,
            request,
            prompt,
            options,
            mode,
            raw_request,
        )
        return await _until_disconnect(reply.respond, raw_request)

    @answering_errors
    async def images_generations(self, body: Body, raw_request: Request) -> Response:
        """``POST /v1/images/generations``."""
        request = read_body(ImagesRequest, body)
        return await self._images(request, [], "image_generation", raw_request)

    @answering_errors
    async def images_edits(self, body: Body, raw_request: Request) -> Response:
        """``POST /v1/images/edits``; the body is read here, JSON or a form."""
        request = read_body(EditsRequest, await openapi.read_json_or_form(raw_request))
        return await self._images(request, request.image_parts(), "image_edit", raw_request)

    async def models(self) -> Response:
        """``GET /v1/models``."""
        listed = await self.state.openai_serving_models.show_available_models()
        answer = listed.model_dump()
        own = self.drawing.settings(ChatImageOptions(), 0)
        defaults = {
            "temperature": own.temperature,
            "top_k": own.top_k,
            "guidance_scale": own.guidance,
        }
        for card in answer["data"]:
            card["unimodal"] = abilities(
                self.drawing.vocabulary,
                self.image_size,
                defaults,
                self.drawing.segments.guidance_problem,
                self.drawing.own_candidates,
            ).model_dump()
        return JSONResponse(answer)

    # --- what they need ---------------------------------------------------------------------------

    async def _images(
        self,
        request: ImagesRequest,
        pictures: list[dict[str, Any]],
        kind: str,
        raw_request: Request,
    ) -> Response:
        metrics.current().model = request.model
        check_size(request.size, self.image_size)
        check_partial_images(request, request.stream)
        drawings = request.n * self.drawing.candidates(request)
        self.limits.check_image_tokens(drawings, self.drawing.span_tokens(request))
        named = ChatCompletionRequest.model_validate({"model": request.model, "messages": []})
        refused = await self._refused_model(named)
        if refused is not None:
            return refused
        prompt = await self.prompts.of_drawing(request.prompt, pictures)
        lora_request = lora_of(self.state.openai_serving_chat, named)
        reply = ImagesReply(self.drawing, request, prompt, kind, lora_request)
        return await _until_disconnect(reply.respond, raw_request)

    async def _chat_request(self, body: Body) -> tuple[ChatCompletionRequest, list[int]]:
        """Return the request as vLLM reads it and the prompt's ids, empty where vLLM renders."""
        body = {key: value for key, value in body.items() if key not in ("modalities", "image")}
        stock_only = needs_stock_template(body)
        prompt: list[int] = []
        transfer = {**_object(body, "kv_transfer_params")}
        if stock_only:
            transfer.pop("prompt_token_ids", None)
            body["kv_transfer_params"] = transfer or None
            body = harmless_request(body, stock_only, self.processor)
        else:
            plain = plain_messages(body["messages"])
            prompt = await self.prompts.of_messages(
                plain, **template_values(body, self.processor.tokenizer)
            )
            # The handler looks at the messages' shape only; pictures are in the ids.
            body["messages"] = [
                {"role": message["role"], "content": _text_of(message["content"])}
                for message in plain
            ]
            body = with_prompt_token_ids(body, prompt)
        try:
            return ChatCompletionRequest.model_validate(body), prompt
        except ValidationError as error:
            raise RequestValidationError(error.errors(), body=body) from error
        except (AttributeError, KeyError, TypeError) as error:
            # vLLM's checks look into some fields before it is known what they are.
            raise ConfigurationError(
                f"the request is malformed near {error}; compare it with /docs of this server"
            ) from error

    async def _refused_model(self, request: ChatCompletionRequest) -> JSONResponse | None:
        """Return vLLM's answer to a model name that it does not serve, or None."""
        refused = await check_model_name(self.state.openai_serving_chat, request)
        return refused and JSONResponse(refused.model_dump(), refused.error.code)


@with_cancellation
@load_aware_call
async def _until_disconnect(
    respond: Callable[[], Awaitable[Response]], raw_request: Request
) -> Response:
    """Run a request of ours as vLLM runs its own: given up when its client leaves."""
    return await respond()


def _object(body: Body, name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise ConfigurationError(f"{name} is {value!r:.80}, expected an object")
    return value or {}


def _text_of(content: list[dict[str, Any]]) -> str:
    return "".join(part.get("text", "") for part in content)


def make() -> UnimodalEndpoints:
    """The factory that the entry point names."""
    return UnimodalEndpoints()
