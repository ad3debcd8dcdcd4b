"""Shapes that need no server: what a body may hold, and what it becomes."""

from typing import Any

import pytest

from tests.serving.asking import image_part, picture
from tokenizer_hf.errors import ConfigurationError, MessageError
from unimodal.serving.openai_shapes import (
    ChatImageOptions,
    EditsRequest,
    modalities_of,
    plain_messages,
    read_body,
)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "auto"),
        ({"image": {"top_k": 3}}, "auto"),
        ({"modalities": ["text", "image"]}, "auto"),
        ({"modalities": ["image"]}, "image"),
        ({"modalities": ["text"]}, "text"),
    ],
)
def test_what_modalities_mean(body: dict[str, Any], expected: str) -> None:
    assert modalities_of(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        {"modalities": []},
        {"modalities": "image"},
        {"modalities": ["audio"]},
        {"modalities": ["text"], "image": {}},
    ],
)
def test_modalities_that_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="modalities"):
        modalities_of(body)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"cfg.*guidance_scale"):
        read_body(ChatImageOptions, {"cfg": 2})


def assistant(content: Any, *offsets: Any) -> list[dict[str, Any]]:
    images = [
        {"type": "image_url", "codes": [index], "offset": offset}
        for index, offset in enumerate(offsets)
    ]
    return [{"role": "assistant", "content": content, "images": images}]


@pytest.mark.parametrize(
    ("content", "offsets", "expected"),
    [
        ("abc", [0], [[0], "abc"]),
        ("abc", [1, 1, 3], ["a", [0], [1], "bc", [2]]),
        ("abc", [None, None], ["abc", [0], [1]]),
        ("", [0], [[0]]),
        (None, [None], [[0]]),
    ],
)
def test_images_of_a_turn_stand_where_they_stood(
    content: Any, offsets: list[Any], expected: list[Any]
) -> None:
    [message] = plain_messages(assistant(content, *offsets))
    assert [part.get("text", part.get("codes")) for part in message["content"]] == expected


@pytest.mark.parametrize("offsets", [[4], [-1], [2, 1], ["1"], [True], [1.0]])
def test_offsets_that_are_refused(offsets: list[Any]) -> None:
    with pytest.raises(MessageError, match="offset"):
        plain_messages(assistant("abc", *offsets))


def test_the_pictures_of_an_edit_become_parts() -> None:
    uri = image_part(picture())["image_url"]["url"]
    request = read_body(EditsRequest, {"prompt": "x", "image": [b"file", uri]})
    assert request.image_parts() == [
        {"type": "image", "image": b"file"},
        {"type": "image_url", "image_url": {"url": uri}},
    ]
    for wrong in ([], [1], {"url": uri}, [uri] * 17):
        with pytest.raises(ConfigurationError, match="image"):
            read_body(EditsRequest, {"prompt": "x", "image": wrong}).image_parts()
