"""What the OpenAPI document says of our routes.

The routes read their bodies as plain JSON, so that every error is worded as the rest of this server
words it, and answer with plain JSON. The models here say in the document what those bodies are.
"""

from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile

from tokenizer_hf.errors import ConfigurationError
from unimodal.serving.openai_shapes import (
    MAX_EDITED,
    Abilities,
    ChatImageOptions,
    EditsRequest,
    ImagesAnswer,
    ImagesRequest,
)
from unimodal.serving.vllm_private import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
    ErrorResponse,
    ModelCard,
    ModelList,
)


class _DocumentedAs:
    """Annotation of a parameter that is read as it is and documented as a model."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return handler(self.model.__pydantic_core_schema__)


class TextPart(BaseModel):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """A picture as a data URI; nothing is fetched."""

    url: str = Field(pattern=r"^data:[^,]*;base64,")


class ImagePart(BaseModel):
    """A picture in a message, or an image of an answer."""

    type: Literal["image_url"]
    image_url: ImageUrl
    codes: list[Any] | None = None
    """Of an image that this model drew; they spare encoding it again."""
    offset: int | None = Field(default=None, ge=0)
    """In ``images``: how many characters of ``content`` come before the image."""


class Message(BaseModel):
    """A turn of a conversation."""

    role: str
    content: str | list[TextPart | ImagePart] | None = None
    images: list[ImagePart] | None = None
    """Of an assistant turn, as an answer holds them."""


class ChatRequest(ChatCompletionRequest):
    """vLLM's chat request, and what the reply may hold."""

    messages: list[Message] = Field(min_length=1)  # type: ignore[assignment]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1)] | None = None
    """Absent or both: the model decides. ["image"]: the reply begins with an image. ["text"]: no
    image."""
    image: ChatImageOptions | None = None
    """How images are drawn."""


class AnswerMessage(ChatMessage):
    """A reply; its ``images`` are those that it holds, if any."""

    content: str | list[TextPart | ImagePart] | None = None  # type: ignore[assignment]
    images: list[ImagePart] | None = None


class AnswerChoice(ChatCompletionResponseChoice):
    """One of the ``n`` replies."""

    message: AnswerMessage


class ChatAnswer(ChatCompletionResponse):
    """The ``chat.completion`` object."""

    choices: list[AnswerChoice]  # type: ignore[assignment]


class Card(ModelCard):
    """A model and what it does with images."""

    unimodal: Abilities


class Cards(ModelList):
    """The models that are served."""

    data: list[Card]  # type: ignore[assignment]


ChatBody = Annotated[dict[str, Any], _DocumentedAs(ChatRequest)]
ImagesBody = Annotated[dict[str, Any], _DocumentedAs(ImagesRequest)]

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse, "description": description}
    for code, description in {
        400: "The request is wrong; the message says what to do.",
        404: "No such model.",
        500: "The server failed.",
        503: "Try again.",
    }.items()
}


def _route(answer: type[BaseModel], description: str, events: bool = False) -> dict[str, Any]:
    ok: dict[str, Any] = {"model": answer, "description": description}
    if events:
        ok["content"] = {"text/event-stream": {}}
    return {"response_model": None, "responses": {200: ok, **_ERRORS}}


def _edits_body() -> dict[str, Any]:
    """The two kinds of body of images/edits. Neither has nested models, so both stand in line."""
    as_json = EditsRequest.model_json_schema()
    uri = {"type": "string", "pattern": "^data:[^,]*;base64,"}
    files = {"type": "string", "format": "binary"}
    as_form = {**as_json, "properties": {**as_json["properties"]}}
    as_json["properties"]["image"] = {
        "anyOf": [uri, {"type": "array", "items": uri, "minItems": 1, "maxItems": MAX_EDITED}]
    }
    as_form["properties"]["image"] = {
        "type": "array",
        "items": files,
        "minItems": 1,
        "maxItems": MAX_EDITED,
    }
    content = {
        "multipart/form-data": {"schema": as_form},
        "application/json": {"schema": as_json},
    }
    return {"requestBody": {"required": True, "content": content}}


CHAT = _route(ChatAnswer, "The reply, or chunks of it.", events=True)
IMAGES = _route(ImagesAnswer, "The images, or events.", events=True)
EDITS = {
    **_route(ImagesAnswer, "The images, or events.", events=True),
    "openapi_extra": _edits_body(),
}
MODELS = _route(Cards, "The models.")


async def read_json_or_form(raw_request: Request) -> dict[str, Any]:
    """Read a body that may be a form with files or JSON.

    Returns:
        Form fields as strings, the files of ``image`` and ``image[]`` as a list of bytes under
        ``image``.

    Raises:
        ConfigurationError: neither of the two kinds, or a file under another name.
    """
    kind = raw_request.headers.get("content-type", "").lower().partition(";")[0].strip()
    if kind == "application/json":
        try:
            body = await raw_request.json()
        except ValueError as error:
            raise ConfigurationError(f"the body is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise ConfigurationError(f"the body is {body!r:.80}, expected an object")
        _refuse_mask(body)
        return body
    if kind != "multipart/form-data":
        raise ConfigurationError(
            f"the content type is {kind!r}, expected multipart/form-data or application/json"
        )
    fields: dict[str, Any] = {}
    files: list[Any] = []
    async with raw_request.form(max_files=MAX_EDITED + 1, max_fields=100) as form:
        for name, value in form.multi_items():
            if name in ("image", "image[]"):
                files.append(await value.read() if isinstance(value, UploadFile) else value)
            elif isinstance(value, UploadFile) and name != "mask":
                raise ConfigurationError(f"a file came as {name!r}, expected 'image' or 'image[]'")
            else:
                fields[name] = value
        _refuse_mask(fields)
    return {**fields, **({"image": files} if files else {})}


def _refuse_mask(fields: dict[str, Any]) -> None:
    if fields.get("mask") is not None:
        raise ConfigurationError(
            "a mask came, but this model draws whole images; leave it out and say in the prompt "
            "what should change"
        )
