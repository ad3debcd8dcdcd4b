"""The limits, their environment variables, and the checks; the flags of the command. No server."""

import os
import subprocess
import sys
from typing import Any

import pytest

from tokenizer_hf.errors import ConfigurationError, MessageError
from unimodal.serving.limits import Limits, flag, variable


def test_limits_go_through_the_environment_unchanged() -> None:
    limits = Limits(max_queue=3, max_body_mib=0.5, image_hosts="a,b", allow_http_images=True)
    environ = limits.to_environ()
    assert environ["UNIMODAL_MAX_QUEUE"] == "3"
    assert Limits.from_environ(environ) == limits
    assert Limits.from_environ({}) == Limits()
    assert (flag("max_queue"), variable("max_queue")) == ("--max-queue", "UNIMODAL_MAX_QUEUE")


@pytest.mark.parametrize(
    "environ",
    [
        {"UNIMODAL_MAX_QUEUE": "many"},
        {"UNIMODAL_MAX_QUEUE": "1.5"},
        {"UNIMODAL_MAX_QUEUE": "-1"},
        {"UNIMODAL_MAX_BODY_MIB": "0"},
        {"UNIMODAL_MAX_BODY_MIB": "nan"},
        {"UNIMODAL_REQUEST_TIMEOUT": "inf"},
        {"UNIMODAL_ALLOW_HTTP_IMAGES": "perhaps"},
    ],
)
def test_limits_that_cannot_be(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        Limits.from_environ(environ)


def turn(*kinds: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": kind} for kind in kinds]}


def test_images_are_counted_over_all_turns() -> None:
    limits = Limits(max_images=3)
    messages = [turn("text", "image_url"), {"role": "user", "content": "x"}, turn("image", "image")]
    assert limits.check_images(messages) == (1, 2)
    with pytest.raises(MessageError, match=r"hold 4 images, expected at most 3.*--max-images"):
        limits.check_images([*messages, turn("image_url")])


def test_token_budgets() -> None:
    limits = Limits(max_prompt_tokens=10, max_image_tokens=100)
    limits.check_prompt(10)
    limits.check_image_tokens(10, 10)
    with pytest.raises(MessageError, match="--max-prompt-tokens"):
        limits.check_prompt(11)
    with pytest.raises(ConfigurationError, match=r"110 image ids.*--max-image-tokens"):
        limits.check_image_tokens(11, 10)
    free = Limits(max_prompt_tokens=0, max_image_tokens=0)
    free.check_prompt(10**9)
    free.check_image_tokens(10**9, 10**9)


def test_the_command_shows_every_limit() -> None:
    command = [sys.executable, "-m", "unimodal.cli", "serve", "--help"]
    environ = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout
    for name in Limits.__dataclass_fields__:
        assert flag(name) in shown and variable(name) in shown
