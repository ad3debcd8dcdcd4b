"""What of a chat request reaches the chat template besides the messages, made harmless.

The messages themselves are made harmless where they are rendered (:mod:`unimodal.messages`). Where
vLLM renders, everything that its template sees goes through here.
"""

import inspect
import json
from contextlib import suppress
from functools import partial
from typing import Any

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.vocabulary import harmless, harmless_values
from unimodal.processing_unimodal import UnimodalProcessor

RENDERED = ("messages", "tools", "documents", "chat_template_kwargs")
"""The fields of a chat request that a chat template can put into the prompt."""


def template_values(body: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the variables of the chat template that a request sets.

    Raises:
        ConfigurationError: ``chat_template_kwargs`` is no object, or names what only the server
            sets (the template itself, for example).
    """
    values = body.get("chat_template_kwargs") or {}
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"chat_template_kwargs is {values!r:.80}, expected an object of template variables"
        )
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {
        "messages",
        "encode_images",
        "vocabulary",
    }
    wrong = sorted(taken.intersection(values) - {"tools", "documents"})
    if wrong:
        raise ConfigurationError(
            f"chat_template_kwargs holds {wrong[0]!r}, expected variables of the model's chat "
            "template: leave it out"
        )
    values = dict(values)
    if body.get("tools") and body.get("tool_choice") != "none":
        values["tools"] = body["tools"]
    return values


def harmless_request(
    body: dict[str, Any], why: str, processor: UnimodalProcessor
) -> dict[str, Any]:
    """Return a chat request that vLLM renders itself, its control strings broken.

    Args:
        body: the request.
        why: the field that only vLLM's template code understands.
        processor: of the model.

    Raises:
        ConfigurationError: a picture came with it.
    """
    _require_no_picture(body["messages"], why)
    clean = partial(harmless, tokenizer=processor.tokenizer, extension=processor.vocabulary)
    present = {name: _arguments_read(body[name]) for name in RENDERED if body.get(name)}
    return {**body, **harmless_values(present, clean)}


def _arguments_read(value: Any) -> Any:
    """Return messages whose tool calls' arguments hold no JSON escapes.

    vLLM reads the arguments before it gives them to the template, so an escaped letter would be one
    again behind our back.
    """
    if isinstance(value, list):
        return [_arguments_read(item) for item in value]
    if not isinstance(value, dict):
        return value
    read = {key: _arguments_read(item) for key, item in value.items()}
    if isinstance(value.get("arguments"), str):
        with suppress(ValueError):
            read["arguments"] = json.dumps(json.loads(value["arguments"]), ensure_ascii=False)
    return read


def _require_no_picture(value: Any, why: str) -> None:
    if isinstance(value, list):
        for item in value:
            _require_no_picture(item, why)
    elif isinstance(value, dict):
        if value.get("type") == "image_url" or value.get("images"):
            raise ConfigurationError(
                f"{why!r} came together with a picture; this server renders pictures in plain "
                f"turns only: leave out {why!r} or the pictures"
            )
        for item in value.values():
            _require_no_picture(item, why)
