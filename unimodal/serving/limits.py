"""What one request, and all of them together, may take. The flags of ``unimodal serve`` say it.

The command hands :class:`Limits` to the server's processes by ``UNIMODAL_*`` environment variables,
since vLLM's parser knows vLLM's flags only. All checks raise before anything is computed.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tokenizer_hf.errors import ConfigurationError, MessageError

PREFIX = "UNIMODAL_"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each field is the flag of the same name (``max_queue``: ``--max-queue``)."""

    max_queue: int = 256
    """Requests that may wait beyond those that the engine runs at once (--max-num-seqs); for each
    API server process."""
    max_body_mib: float = 64.0
    request_timeout: float = 600.0
    """Seconds until a request is ended; 0 for no limit."""
    reader_timeout: float = 60.0
    """Seconds that a client may let an answer wait without reading; 0 for no limit."""
    max_images: int = 32
    """Images in one request, history included."""
    max_image_pixels: int = 0
    """Pixels of one image, before decoding; 0 takes the model's own limit."""
    max_prompt_tokens: int = 0
    """Ids of one prompt, images included; 0 leaves it to the context length."""
    max_image_tokens: int = 16384
    """Image ids that one request may have drawn (n images of one span each); 0 for no limit."""
    image_hosts: str = ""
    """Hosts that images may be fetched from, with commas: ``host``, ``host:port``, ``*.domain``."""
    image_fetch_mib: float = 20.0
    image_fetch_timeout: float = 10.0
    """Seconds for one image, redirects included."""
    allow_http_images: bool = False
    """Fetch over plain http too."""
    request_log: str = "-"
    """Where the line per request goes: "-" standard error, "off", or a file."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                raise ConfigurationError(
                    f"{flag(item.name)} is {value}, expected a number that is not negative"
                )
        for name in ("max_body_mib", "image_fetch_mib", "image_fetch_timeout"):
            if not getattr(self, name):
                raise ConfigurationError(f"{flag(name)} is 0, expected more than that")

    def to_environ(self) -> dict[str, str]:
        """Return the environment variables that :meth:`from_environ` reads."""
        return {variable(item.name): _text(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Limits":
        """Read the limits; what is not set has its default.

        Raises:
            ConfigurationError: a variable that is no such number.
        """
        values: dict[str, Any] = {}
        for item in fields(cls):
            text = environ.get(variable(item.name))
            if text is not None:
                values[item.name] = _value(item.name, text, type(item.default))
        return cls(**values)

    @property
    def max_body_bytes(self) -> int:
        """``max_body_mib`` in bytes."""
        return int(self.max_body_mib * 1024 * 1024)

    def check_images(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        """Count the images of plain messages.

        Returns:
            The numbers of pictures to encode, and of images that bring their codes.

        Raises:
            MessageError: more than ``max_images``.
        """
        contents = [message["content"] for message in messages]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        coded = sum(part["type"] == "image" for part in parts)
        pictures = sum(part["type"] == "image_url" for part in parts)
        if pictures + coded > self.max_images:
            raise MessageError(
                f"the messages hold {pictures + coded} images, expected at most "
                f"{self.max_images}: leave out older turns, or start the server with a larger "
                f"{flag('max_images')}"
            )
        return pictures, coded

    def check_prompt(self, num_tokens: int) -> None:
        """Refuse a prompt of too many ids.

        Raises:
            MessageError: more than ``max_prompt_tokens``.
        """
        if self.max_prompt_tokens and num_tokens > self.max_prompt_tokens:
            raise MessageError(
                f"the prompt has {num_tokens} ids, expected at most {self.max_prompt_tokens}: "
                f"shorten the messages, or start the server with a larger "
                f"{flag('max_prompt_tokens')}"
            )

    def check_image_tokens(self, num_images: int, span_tokens: int) -> None:
        """Refuse to draw too many image ids for one request.

        Args:
            num_images: that the request may have drawn.
            span_tokens: most ids of one of them.

        Raises:
            ConfigurationError: together more than ``max_image_tokens``.
        """
        if self.max_image_tokens and num_images * span_tokens > self.max_image_tokens:
            raise ConfigurationError(
                f"{num_images} images of up to {span_tokens} ids each are "
                f"{num_images * span_tokens} image ids, expected at most {self.max_image_tokens}: "
                "ask for fewer images or a smaller budget, or start the server with a larger "
                f"{flag('max_image_tokens')}"
            )


def flag(name: str) -> str:
    """Return the flag of a field of :class:`Limits`."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """Return the environment variable of a field of :class:`Limits`."""
    return PREFIX + name.upper()


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _value(name: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("", "0", "false", "no"):
            return False
        if text.lower() in ("1", "true", "yes"):
            return True
        raise ConfigurationError(f"{variable(name)} is {text!r}, expected 0 or 1")
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigurationError(f"{variable(name)} is {text!r}, expected a number") from error
