"""The shapes of the HTTP interface: what may be asked, and what is answered. No engine, no model.

OpenAI's fields keep their names and meanings; ours are the fields of :class:`ImageOptions`. A field
that we do not know is refused by name, so that a misspelt one is never silently ignored.
"""

import base64
import io
import json
import secrets
from collections.abc import Container, Sequence
from typing import Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenizer_hf.errors import ConfigurationError, MessageError
from tokenizer_hf.vocabulary import VocabularyExtension
from unimodal.generation.candidates import MAX_CANDIDATES

MAX_IMAGES = 10
"""Most images in one answer, as OpenAI's."""

MAX_PREVIEWS = 3
"""Most previews of one image, as OpenAI's."""

MAX_EDITED = 16
"""Most images that one drawing may take up, as OpenAI's."""

Modalities = Literal["auto", "image", "text"]
"""The modes of :class:`unimodal.generation.grammar.ImageSpanGrammar`."""

Model = TypeVar("Model", bound=BaseModel)


class ImageOptions(BaseModel):
    """How images are drawn: ``image`` of a chat request, top-level fields of images/generations."""

    model_config = ConfigDict(extra="forbid")

    temperature: float | None = Field(default=None, ge=0, le=100)
    """0 takes the likeliest code. None, here and in the next two: the model's own
    (``draw_settings``), as ``Unimodal.draw``."""
    top_k: int | None = Field(default=None, ge=0)
    """Draw from this many of the likeliest codes; 0 for all."""
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    """1 is off; 2 to 5 follows the prompt more closely and takes two requests of the engine. None
    is 1 on a server whose flags leave no room for pairs."""
    negative_prompt: str = ""
    """What the unconditional prompt describes; used with guidance."""
    budget: int | None = Field(default=None, ge=1)
    """Most codes in an image, where the image tokenizer is nested."""
    partial_images: int = Field(default=0, ge=0, le=MAX_PREVIEWS)
    """Previews of each image while it is drawn, spread over its codes; for streams. Fewer come
    where drawing is faster than showing."""


class ChatImageOptions(ImageOptions):
    """``image`` of a chat request."""

    max_images: int = Field(default=4, ge=1, le=MAX_IMAGES)
    """Most images in a reply where the model decides when to draw."""
    content_format: Literal["images", "parts"] = "images"
    """"images": ``message.content`` is the text, ``message.images`` holds the images. "parts":
    ``message.content`` is the list of both, in order."""


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
    candidates: int | None = Field(default=None, ge=1, le=MAX_CANDIDATES)
    """Draw each image so many times and keep the one that the model itself judges best. None: the
    model's own number (``draw_settings``)."""
    return_token_ids: bool = False
    """Add ``prompt_token_ids`` and, to each image, ``token_ids``."""
    stream: bool | None = None
    """Answer with events: the previews, and each image as soon as it is finished."""
    background: Literal["auto", "opaque"] | None = None
    # Accepted because OpenAI's clients send them; they change nothing here.
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    user: str | None = None


class EditsRequest(ImagesRequest):
    """The body of ``POST /v1/images/edits``, as JSON or as a form."""

    image: Any = Field(
        json_schema_extra={"type": "array", "items": {"type": "string"}, "minItems": 1}
    )
    """The images that the drawing takes up: a data URI or a list of them; in a form, files."""
    # Accepted because OpenAI's clients send it; it changes nothing here.
    input_fidelity: str | None = None

    def image_parts(self) -> list[dict[str, Any]]:
        """Return the images as parts of a message.

        Raises:
            ConfigurationError: no image, too many, or something else than data URIs and files.
        """
        images = self.image if isinstance(self.image, list) else [self.image]
        if not 0 < len(images) <= MAX_EDITED:
            raise ConfigurationError(
                f"{len(images)} images came in 'image', expected 1 to {MAX_EDITED}"
            )
        for image in images:
            if not isinstance(image, str | bytes):
                raise ConfigurationError(
                    f"'image' holds {image!r:.80}, expected a data URI, or a file in a form"
                )
        return [
            {"type": "image", "image": image}
            if isinstance(image, bytes)
            else {"type": "image_url", "image_url": {"url": image}}
            for image in images
        ]


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


def modalities_of(body: dict[str, Any]) -> Modalities:
    """Say what a chat request wants: the model decides, an image first, or text only.

    Raises:
        ConfigurationError: ``modalities`` holds something else than "text" and "image", or forbids
            the images that the "image" object describes.
    """
    modalities = body.get("modalities")
    if modalities is None:
        return "auto"
    if (
        not isinstance(modalities, list)
        or not modalities
        or any(item not in ("text", "image") for item in modalities)
    ):
        raise ConfigurationError(
            f'modalities is {modalities!r:.80}, expected ["text"], ["image"] or ["text", "image"]'
        )
    if "image" not in modalities:
        if body.get("image") is not None:
            raise ConfigurationError(
                'an "image" object came, but modalities is ["text"]; leave one of them out'
            )
        return "text"
    return "auto" if "text" in modalities else "image"


def check_partial_images(options: ImageOptions, stream: bool | None) -> None:
    """Refuse previews outside a stream, where nobody could see them in time.

    Raises:
        ConfigurationError: ``partial_images`` without ``stream``.
    """
    if options.partial_images and not stream:
        raise ConfigurationError(
            f"partial_images is {options.partial_images}, but stream is not true; previews come "
            "in streams only"
        )


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
    stand in its text where their ``offset`` says, else behind it; their ``codes``, if they are
    still there, are taken as they are, so that the model sees exactly what it drew.

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
        if isinstance(content, str):
            parts = _placed(content, images, index)
        elif isinstance(content, list):
            parts = [*content, *images]
        else:
            raise MessageError(
                f"content of message {index} is {content!r:.80}, expected a string or a list of "
                "parts"
            )
        parts = [_plain_part(part, index) for part in parts]
        plain.append({"role": message["role"], "content": parts})
    return plain


def _placed(text: str, images: list[Any], index: int) -> list[Any]:
    """Put the images of message ``index`` into its text, at their offsets or behind it."""
    parts: list[Any] = []
    done = 0
    for image in images:
        offset = image.get("offset") if isinstance(image, dict) else None
        stop = len(text) if offset is None else offset
        if type(stop) is not int or not done <= stop <= len(text):
            raise MessageError(
                f"an image of message {index} has the offset {offset!r:.80}, expected {done} to "
                f"{len(text)}: offsets count the characters of content before each image"
            )
        parts += [*([{"type": "text", "text": text[done:stop]}] if done < stop else []), image]
        done = stop
    if done < len(text) or not parts:
        parts.append({"type": "text", "text": text[done:]})
    return parts


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


def image_part(image: Image.Image, **values: Any) -> dict[str, Any]:
    """Return an image of an answer, with more values.

    Sent back as history, its ``codes`` spare encoding it again and its ``offset`` says where in
    the text it stands.
    """
    return {"type": "image_url", "image_url": {"url": data_uri(image)}, **values}


class Codes(BaseModel):
    """How many codes an image may have."""

    min: int
    max: int
    """Where they differ, ``budget`` may be anything between them."""
    codebook_size: int
    num_codebooks: int


class Abilities(BaseModel):
    """What a model does with images: ``unimodal`` in the list of models."""

    input_modalities: list[str] = ["text", "image"]
    output_modalities: list[str] = ["text", "image"]
    size: str
    """The only one that it draws, as width x height in pixels."""
    codes: Codes
    nested: bool
    """Any number of codes from min to max is an image, the coarser the fewer."""
    guidance: bool
    """Whether the server's flags leave room for it."""
    guidance_problem: str | None
    """Why not."""
    candidates: int
    """That an image of the images endpoint is the best of, without a word."""
    max_n: int = MAX_IMAGES
    max_partial_images: int = MAX_PREVIEWS
    output_formats: list[str] = ["png", "jpeg", "webp"]
    defaults: dict[str, Any]
    """Of the ``image`` object of a chat request."""


def abilities(
    vocabulary: VocabularyExtension,
    image_size: int,
    defaults: dict[str, Any],
    guidance_problem: str | None,
    candidates: int,
) -> Abilities:
    """Say what a model does with images; ``defaults`` and ``candidates`` are its own settings."""
    return Abilities(
        size=f"{image_size}x{image_size}",
        codes=Codes(
            min=vocabulary.min_tokens,
            max=vocabulary.num_tokens,
            codebook_size=vocabulary.codebook_size,
            num_codebooks=vocabulary.num_codebooks,
        ),
        nested=vocabulary.nested,
        guidance=guidance_problem is None,
        guidance_problem=guidance_problem,
        candidates=candidates,
        defaults={**ChatImageOptions().model_dump(), **defaults},
    )


class InputDetails(BaseModel):
    """What a prompt consists of."""

    text_tokens: int
    image_tokens: int


class ImagesUsage(BaseModel):
    """Token counts of an answer of the images endpoints."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails


class ImageData(BaseModel):
    """One image of an answer."""

    b64_json: str
    token_ids: list[int] | None = None
    """Where ``return_token_ids`` asked for it."""


class ImagesAnswer(BaseModel):
    """The answer of ``/v1/images/generations`` and ``/v1/images/edits``."""

    created: int
    data: list[ImageData]
    background: str = "opaque"
    output_format: str
    quality: str = "auto"
    size: str
    usage: ImagesUsage
    prompt_token_ids: list[int] | None = None
    """Where ``return_token_ids`` asked for it."""


class ImageEvent(BaseModel):
    """One event of a streamed answer of the images endpoints."""

    type: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    index: int
    """Which of the ``n`` images, from 0; OpenAI has no such field."""
    b64_json: str
    created_at: int
    background: str = "opaque"
    output_format: str
    quality: str = "auto"
    size: str
    partial_image_index: int | None = None
    """In the events ``partial_image``, from 0."""
    usage: ImagesUsage | None = None
    """Of this image, in the events ``completed``."""
    token_ids: list[int] | None = None
    """In the events ``completed``, where ``return_token_ids`` asked for it."""


def images_usage(
    prompt_token_ids: Sequence[int], image_ids: Container[int], num_drawn: int
) -> ImagesUsage:
    """Count the ids of a prompt, of what kind they are, and those that were drawn."""
    images = sum(token_id in image_ids for token_id in prompt_token_ids)
    return ImagesUsage(
        input_tokens=len(prompt_token_ids),
        output_tokens=num_drawn,
        total_tokens=len(prompt_token_ids) + num_drawn,
        input_tokens_details=InputDetails(
            text_tokens=len(prompt_token_ids) - images, image_tokens=images
        ),
    )


def file_of(image: Image.Image, request: ImagesRequest) -> dict[str, Any]:
    """Return an image as the fields that answers and events have in common."""
    return {
        "b64_json": encode_image(image, request.output_format, request.output_compression),
        "output_format": request.output_format,
        "size": f"{image.width}x{image.height}",
    }


def event(value: dict[str, Any], kind: str | None = None) -> str:
    """Return one server-sent event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {text}\n\n" if kind else f"data: {text}\n\n"


def error_body(message: str, status: int, kind: str, param: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
