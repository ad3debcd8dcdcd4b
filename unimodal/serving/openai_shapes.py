"""The shapes of the HTTP interface: what may be asked, and what is answered. No engine, no model.

OpenAI's fields keep their names and meanings; ours are the fields of :class:`ImageOptions`. A field
that we do not know is refused by name, so that a misspelt one is never silently ignored.
"""

import base64
import io
import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenizer_hf.errors import ConfigurationError, MessageError

MAX_IMAGES = 10
"""Most images in one answer, as OpenAI's."""

Model = TypeVar("Model", bound=BaseModel)


class ImageOptions(BaseModel):
    """How images are drawn: ``image`` of a chat request, top-level fields of images/generations."""

    model_config = ConfigDict(extra="forbid")

    temperature: float = Field(default=1.0, ge=0, le=100)
    """0 takes the likeliest code."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many of the likeliest codes; 0 for all."""
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    """1 is off; 2 to 5 follows the prompt more closely and takes two requests of the engine. None:
    what ``Unimodal.draw`` takes, or 1 on a server whose flags leave no room for pairs."""
    negative_prompt: str = ""
    """What the unconditional prompt describes; used with guidance."""
    budget: int | None = Field(default=None, ge=1)
    """Most codes in an image, where the image tokenizer is nested."""


class ImagesRequest(ImageOptions):
    """The body of ``POST /v1/images/generations``."""

    prompt: str = Field(pattern=r"\S")
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_IMAGES)
    size: str | None = None
    """"auto" or the size that the model draws."""
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(default=90, ge=0, le=100)
    """Quality of jpeg and webp."""
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    """Image i is drawn with seed + i."""
    return_token_ids: bool = False
    """Add ``prompt_token_ids`` and, to each image, ``token_ids``."""
    stream: Literal[False] | None = None
    background: Literal["auto", "opaque"] | None = None
    # Accepted because OpenAI's clients send them; they change nothing here.
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    user: str | None = None


class ChatImageRequest(BaseModel):
    """The fields of a chat request that matter when the answer is an image."""

    model_config = ConfigDict(extra="ignore")

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    image: ImageOptions = ImageOptions()
    n: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    stream: bool | None = None
    return_token_ids: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: int = 0


def read_body(shape: type[Model], body: dict[str, Any]) -> Model:
    """Validate a request body.

    Raises:
        ConfigurationError: names the field, what came and what was expected.
    """
    try:
        return shape.model_validate(body)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            field = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                known = ", ".join(
                    shape.model_fields if len(item["loc"]) == 1 else ImageOptions.model_fields
                )
                problems.append(f"unknown field {field!r}, expected one of {known}")
            elif item["type"] == "missing":
                problems.append(f"{field!r} is missing, expected a value")
            else:
                problems.append(f"{field!r} is {item['input']!r:.80}: {item['msg']}")
        raise ConfigurationError("; ".join(problems)) from error


def wants_image(body: dict[str, Any]) -> bool:
    """Say whether a chat request asks for an image.

    Raises:
        ConfigurationError: ``modalities`` holds something else than "text" and "image".
    """
    modalities = body.get("modalities")
    if modalities is None:
        return False
    if (
        not isinstance(modalities, list)
        or not modalities
        or any(item not in ("text", "image") for item in modalities)
    ):
        raise ConfigurationError(
            f'modalities is {modalities!r:.80}, expected ["text"], ["image"] or ["text", "image"]'
        )
    return "image" in modalities


def check_size(size: str | None, image_size: int) -> None:
    """Refuse a size that this model does not draw.

    Raises:
        ConfigurationError: not "auto" and not the model's own size.
    """
    own = f"{image_size}x{image_size}"
    if size not in (None, "auto", own):
        raise ConfigurationError(
            f'size is {size!r}, expected "{own}" or "auto": the model draws no other'
        )


def first_seed(seed: int | None) -> int:
    """Return the seed of the first image; a fresh one where none was given."""
    return secrets.randbits(48) if seed is None else seed


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Bring OpenAI messages into the form that :mod:`unimodal.messages` renders.

    Parts may be text and ``image_url`` only. ``images`` of an assistant turn, as we return them,
    follow its text; their ``codes``, if they are still there, are taken as they are, so that the
    model sees exactly what it drew.

    Raises:
        MessageError: a message or a part of another shape.
    """
    plain = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise MessageError(
                f'message {index} is {message!r:.80}, expected {{"role", "content"}}'
            )
        content = message.get("content")
        images = message.get("images") or []
        if not isinstance(images, list):
            raise MessageError(
                f"images of message {index} is {images!r:.80}, expected a list of image_url parts"
            )
        if content is None and images:
            content = ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise MessageError(
                f"content of message {index} is {content!r:.80}, expected a string or a list of "
                "parts"
            )
        parts = [_plain_part(part, index) for part in [*parts, *images]]
        plain.append({"role": message["role"], "content": parts})
    return plain


def _plain_part(part: Any, index: int) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        codes = part.get("codes")
        if codes is not None:
            if not isinstance(codes, list) or not codes:
                raise MessageError(
                    f"codes of an image in message {index} are {codes!r:.80}, expected a list"
                )
            return {"type": "image", "codes": codes}
        return {"type": "image_url", "image_url": part.get("image_url")}
    raise MessageError(
        f"message {index} has a part {part!r:.80}, expected "
        '{"type": "text", "text": ...} or '
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
    )


def needs_stock_template(body: dict[str, Any]) -> str | None:
    """Name what in a chat request only vLLM's own template code understands, or return None."""
    for name in ("continue_final_message", "echo", "documents", "chat_template"):
        if body.get(name):
            return name
    if body.get("add_generation_prompt") is False:
        return "add_generation_prompt"
    for message in body["messages"]:
        if isinstance(message, dict):
            for name in ("tool_calls", "tool_call_id", "function_call", "reasoning"):
                if message.get(name):
                    return name
    return None


# --- answers --------------------------------------------------------------------------------------


def encode_image(image: Image.Image, output_format: str = "png", quality: int = 90) -> str:
    """Return an image file as base64."""
    buffer = io.BytesIO()
    options = {} if output_format == "png" else {"quality": quality}
    image.save(buffer, output_format.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def data_uri(image: Image.Image) -> str:
    """Return an image as a PNG data URI: the inverse of what a message's ``image_url`` holds."""
    return f"data:image/png;base64,{encode_image(image)}"


def image_part(image: Image.Image, codes: list[Any]) -> dict[str, Any]:
    """Return an image of an answer. Sent back as history, its codes spare encoding it again."""
    return {"type": "image_url", "image_url": {"url": data_uri(image)}, "codes": codes}


def usage(num_prompt_tokens: int, num_drawn_tokens: int) -> dict[str, int]:
    """Token counts of a chat answer."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_drawn_tokens,
        "total_tokens": num_prompt_tokens + num_drawn_tokens,
    }


class ChatAnswer:
    """Builds the answer to a chat request whose reply is images, whole or as a stream of events."""

    def __init__(self, model: str, prompt_token_ids: list[int], return_token_ids: bool) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.prompt_token_ids = prompt_token_ids
        self.return_token_ids = return_token_ids

    def whole(self, parts: list[dict[str, Any]], spans: list[list[int]]) -> dict[str, Any]:
        """Return the ``chat.completion`` object: one choice per image."""
        choices = []
        for index, (part, span) in enumerate(zip(parts, spans, strict=True)):
            message = {"role": "assistant", "content": "", "images": [part]}
            choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": "stop"}
            if self.return_token_ids:
                choice["token_ids"] = span
            choices.append(choice)
        counts = usage(len(self.prompt_token_ids), sum(map(len, spans)))
        answer = {**self.head, "object": "chat.completion", "choices": choices, "usage": counts}
        if self.return_token_ids:
            answer["prompt_token_ids"] = self.prompt_token_ids
        return answer

    def chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        """Return one ``chat.completion.chunk`` object."""
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}


def images_answer(
    request: ImagesRequest,
    images: list[Image.Image],
    spans: list[list[int]],
    prompt_token_ids: list[int],
) -> dict[str, Any]:
    """Return the answer of ``/v1/images/generations``."""
    data: list[dict[str, Any]] = []
    for image, span in zip(images, spans, strict=True):
        item: dict[str, Any] = {
            "b64_json": encode_image(image, request.output_format, request.output_compression)
        }
        if request.return_token_ids:
            item["token_ids"] = span
        data.append(item)
    drawn = sum(map(len, spans))
    answer: dict[str, Any] = {
        "created": int(time.time()),
        "data": data,
        "output_format": request.output_format,
        "size": f"{images[0].width}x{images[0].height}",
        "usage": {
            "input_tokens": len(prompt_token_ids),
            "output_tokens": drawn,
            "total_tokens": len(prompt_token_ids) + drawn,
            "input_tokens_details": {"text_tokens": len(prompt_token_ids), "image_tokens": 0},
        },
    }
    if request.return_token_ids:
        answer["prompt_token_ids"] = prompt_token_ids
    return answer


def error_body(message: str, status: int, kind: str, param: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
