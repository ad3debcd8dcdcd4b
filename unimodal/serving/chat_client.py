"""A chat with one of our servers, as the chat page keeps it: turns, history, the streamed reply.

No gradio, no torch and no vLLM here: what is said to the server is HTTP, by OpenAI's client.

A picture that the model drew stays beside its codes and goes back to the server with them, so that
the model sees exactly what it drew; also where it comes back as the picture of a user's message.
"""

import base64
import binascii
import hashlib
import io
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from tokenizer_hf.errors import ImageError, ServingError

MAX_SIDE_PIXELS = 1024
"""Larger pictures are made smaller before they are sent, with every turn again."""
SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0
"""Longest silence of the server before the page gives up."""

Mode = Literal["auto", "draw", "text"]
_MODALITIES: dict[str, list[str] | None] = {"auto": None, "draw": ["image"], "text": ["text"]}


@dataclass(frozen=True)
class Picture:
    """An image file of a message."""

    data: bytes
    media_type: str = "image/png"
    codes: list[Any] | None = None
    """Of a picture that the model drew; None for any other."""
    partial: bool = False
    """A preview, which a later one replaces."""

    @property
    def key(self) -> str:
        """The same for the same file with the same codes."""
        return hashlib.sha256(self.data + repr(self.codes).encode()).hexdigest()[:32]

    @property
    def part(self) -> dict[str, Any]:
        """The content part of a message."""
        uri = f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": uri}}
        return {**part, "codes": self.codes} if self.codes is not None else part


Part = str | Picture


@dataclass
class Turn:
    """A question and, as far as it has come, its answer."""

    question: list[Part]
    reply: list[Part] = field(default_factory=list)
    """Text and pictures in the order in which they came."""
    state: Literal["running", "done", "stopped", "failed"] = "running"
    note: str = ""
    """Why the turn failed, or what the reader should know of the reply."""

    @property
    def drawn(self) -> list[Picture]:
        """The pictures of the reply that are whole."""
        return [part for part in self.reply if isinstance(part, Picture) and not part.partial]


@dataclass
class Chat:
    """All turns of a conversation."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def drawn(self) -> list[Picture]:
        """Every picture that the model drew, oldest first."""
        return [picture for turn in self.turns for picture in turn.drawn]

    def ask(self, question: Sequence[Part]) -> Turn:
        """Begin a turn. A picture that the model drew itself is put in with its codes."""
        drawn = {picture.data: picture for picture in self.drawn}
        turn = Turn(
            [
                drawn.get(part.data, part)
                if isinstance(part, Picture) and part.codes is None
                else part
                for part in question
            ]
        )
        self.turns.append(turn)
        return turn

    def ask_again(self) -> Turn:
        """Take the last turn back and ask its question anew.

        Raises:
            ServingError: nothing was asked yet.
        """
        if not self.turns:
            raise ServingError("nothing was asked yet; write a message first")
        return self.ask(self.turns.pop().question)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the server reads it, up to the last question.

        Turns that failed are left out with their questions; of a reply that was stopped, a preview
        is.
        """
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            if turn.state == "failed":
                continue
            messages.append({"role": "user", "content": _parts(turn.question)})
            if turn.state != "running":
                messages.append({"role": "assistant", **_reply_fields(turn.reply)})
        return messages


def _parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": part} if isinstance(part, str) else part.part for part in parts
    ]


def _reply_fields(reply: Sequence[Part]) -> dict[str, Any]:
    """``content`` and ``images`` of an assistant turn; an image's ``offset`` is its place."""
    text, images = "", []
    for part in reply:
        if isinstance(part, str):
            text += part
        elif not part.partial:
            images.append({**part.part, "offset": len(text)})
    return {"content": text, "images": images} if images else {"content": text}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the page lets the user choose."""

    mode: Mode = "auto"
    """``auto``: the model decides; ``draw``: the reply begins with an image; ``text``: none."""
    guidance: float | None = None
    """None: the server's own."""
    image_temperature: float = 1.0
    top_k: int = 0
    budget: int | None = None
    previews: int = 3
    negative_prompt: str = ""
    temperature: float = 0.7
    max_tokens: int = 0
    """Most tokens of a reply; 0: as many as the model's context has room for."""
    seed: int | None = None


def request_body(messages: list[dict[str, Any]], model: str, settings: Settings) -> dict[str, Any]:
    """The body of ``/v1/chat/completions``."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "temperature": settings.temperature,
    }
    if settings.max_tokens:
        body["max_tokens"] = settings.max_tokens
    if settings.seed is not None:
        body["seed"] = settings.seed
    modalities = _MODALITIES[settings.mode]
    if modalities is not None:
        body["modalities"] = modalities
    if settings.mode != "text":
        options = {
            "temperature": settings.image_temperature,
            "top_k": settings.top_k,
            "guidance_scale": settings.guidance,
            "negative_prompt": settings.negative_prompt,
            "budget": settings.budget,
            "partial_images": settings.previews,
        }
        body["image"] = {name: value for name, value in options.items() if value is not None}
    return body


def take_chunk(turn: Turn, chunk: Mapping[str, Any]) -> None:
    """Add a ``chat.completion.chunk`` to the reply of a turn.

    Text grows; an image takes the place of the previews with the same index.

    Raises:
        ServingError: an image of the chunk is no data URI.
    """
    for choice in chunk.get("choices") or []:
        delta = choice.get("delta") or {}
        text = delta.get("content")
        if text:
            if turn.reply and isinstance(turn.reply[-1], str):
                turn.reply[-1] += text
            else:
                turn.reply.append(text)
        for image in delta.get("images") or []:
            _take_image(turn, image)
        if choice.get("finish_reason") == "length":
            turn.note = "The reply is cut off: it reached the most tokens of a reply."


def _take_image(turn: Turn, image: Mapping[str, Any]) -> None:
    media_type, data = read_data_uri((image.get("image_url") or {}).get("url"))
    picture = Picture(data, media_type, image.get("codes"), bool(image.get("partial")))
    places = [at for at, part in enumerate(turn.reply) if isinstance(part, Picture)]
    index = image.get("index", len(places))
    if index < len(places):
        turn.reply[places[index]] = picture
    else:
        turn.reply.append(picture)


def read_data_uri(uri: Any) -> tuple[str, bytes]:
    """Return media type and bytes of a base64 data URI.

    Raises:
        ServingError: it is something else.
    """
    head, comma, body = uri.partition(",") if isinstance(uri, str) else ("", "", "")
    if comma and head.startswith("data:image/") and head.endswith(";base64"):
        try:
            return head[len("data:") : -len(";base64")], base64.b64decode(body, validate=True)
        except binascii.Error:
            pass
    raise ServingError(
        f"the server sent an image as {uri!r:.60}, expected data:image/png;base64,...; is it "
        "`unimodal serve`?"
    )


def read_picture(path: str | Path) -> Picture:
    """Read a picture file for a message.

    PNG, JPEG and WebP up to ``MAX_SIDE_PIXELS`` stay as they are; all others become such a PNG.

    Raises:
        ImageError: the file is not a picture, or far too large.
    """
    data = Path(path).read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            media_type = SENT_AS_THEY_ARE.get(image.format or "")
            if media_type and max(image.size) <= MAX_SIDE_PIXELS:
                image.verify()
                return Picture(data, media_type)
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ImageError(
            f"{Path(path).name} cannot be read as a picture ({error}); expected PNG, JPEG, WebP, "
            "GIF, ..."
        ) from error
    upright.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    buffer = io.BytesIO()
    upright.save(buffer, "PNG")
    return Picture(buffer.getvalue())


@dataclass(frozen=True)
class ModelCard:
    """What ``/v1/models`` tells about a model."""

    name: str
    abilities: dict[str, Any] = field(default_factory=dict)
    """The ``unimodal`` object; empty where the server tells nothing."""

    @property
    def side_pixels(self) -> int | None:
        """The side of the images that the model draws."""
        side = str(self.abilities.get("size", "")).partition("x")[0]
        return int(side) if side.isdecimal() else None

    @property
    def budget(self) -> tuple[int, int] | None:
        """Fewest and most codes of an image where its tokenizer is nested, else None."""
        codes = self.abilities.get("codes") or {}
        if not self.abilities.get("nested") or not {"min", "max"} <= codes.keys():
            return None
        return codes["min"], codes["max"]

    @property
    def codebook_size(self) -> int | None:
        """How many codes there are to choose from."""
        return (self.abilities.get("codes") or {}).get("codebook_size")

    @property
    def guidance_problem(self) -> str | None:
        """Why the server cannot guide, or None."""
        return self.abilities.get("guidance_problem")

    def default(self, name: str, otherwise: float) -> float:
        """What the server takes where a request leaves a field of its ``image`` object out."""
        value = (self.abilities.get("defaults") or {}).get(name)
        return otherwise if value is None else value


def model_cards(listed: Sequence[Mapping[str, Any]]) -> list[ModelCard]:
    """Read the list of models; of several names of one model (``root``), the first."""
    cards, roots = [], set()
    for item in listed:
        root = item.get("root") or item["id"]
        if root not in roots:
            roots.add(root)
            cards.append(ModelCard(item["id"], item.get("unimodal") or {}))
    return cards


class Connection:
    """A server at an OpenAI-compatible address."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        from openai import AsyncOpenAI, Timeout

        self.url = url
        self._client = AsyncOpenAI(
            base_url=url,
            api_key=api_key or "none",
            max_retries=0,
            timeout=Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
        )

    async def models(self) -> list[ModelCard]:
        """Ask which models are served.

        Raises:
            ServingError: says what is wrong and what to do.
        """
        try:
            page = await self._client.with_options(timeout=CONNECT_SECONDS).models.list()
        except Exception as error:
            raise self._readable(error) from error
        return model_cards([item.model_dump() for item in page.data])

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Send a chat request and yield its chunks.

        Closing the iterator, or cancelling the task that reads it, closes the HTTP stream; the
        server then stops working on the request.

        Raises:
            ServingError: says what is wrong and what to do.
        """
        known = ("model", "messages", "stream", "temperature", "max_tokens", "seed")
        arguments = {name: body[name] for name in known if name in body}
        extra = {name: value for name, value in body.items() if name not in known}
        try:
            stream = await self._client.chat.completions.create(**arguments, extra_body=extra)
            async with stream:
                async for chunk in stream:
                    yield chunk.model_dump()
        except Exception as error:
            raise self._readable(error) from error

    def _readable(self, error: Exception) -> ServingError:
        import openai

        if isinstance(error, openai.APITimeoutError):
            text = f"{self.url} did not answer in time; the server may be overloaded, try again"
        elif isinstance(error, openai.APIConnectionError):
            text = (
                f"there is no connection to {self.url}, or it broke off; see that `unimodal serve` "
                "runs there, or start `unimodal ui` with the right --url"
            )
        elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            text = (
                f"{self.url} refuses the API key; set UNIMODAL_API_KEY or --api-key to the "
                "server's and start the page again"
            )
        elif isinstance(error, openai.APIError):
            told = error.body.get("message") if isinstance(error.body, dict) else None
            text = str(told or f"{self.url} answered: {error.message}")
        else:
            text = f"{self.url} sent something unexpected ({type(error).__name__}: {error:.200})"
        return ServingError(text)
