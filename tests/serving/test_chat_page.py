"""The chat page in headless Chromium, against a real ``unimodal serve``; and what it shows."""

import io
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.serving.asking import engine_asleep, engine_slowed, metric
from tests.serving.chat_walk import (
    CHROMIUM,
    PHONE,
    WATCH,
    Walk,
    browser_page,
    running_ui,
    walk,
)
from unimodal.serving.chat_client import Chat, Picture
from unimodal.serving.check import Server

ROOT = Path(__file__).parents[2]
API_KEY = "sk-not-for-the-page"
MOST_TOKENS = 60
"""Of a reply: room for an image of 48 codes and a few words. A random model never stops itself."""

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")


def browsing(test: Any) -> Any:
    """Mark a test that needs a browser."""
    for missing, reason in (
        (find_spec("gradio") is None, "gradio is not installed"),
        (find_spec("playwright") is None, "playwright is not installed"),
        (CHROMIUM is None, "there is no chromium; apt-get install chromium"),
    ):
        test = pytest.mark.skipif(missing, reason=reason)(test)
    return test


def served(test: Any) -> Any:
    """Mark a test that needs a browser and a real server."""
    no_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
    return browsing(no_vllm(pytest.mark.vllm(test)))


# --- without a browser ----------------------------------------------------------------------------


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@needs_gradio
def test_what_is_shown_of_a_conversation(tmp_path: Path) -> None:
    from unimodal.serving.chat_page import PictureFiles, shown_messages

    chat = Chat()
    first = chat.ask([Picture(png("blue")), "is <b>this</b> *x*?"])
    first.state, first.reply = "done", ["yes", Picture(png(), codes=[1]), "there"]
    second = chat.ask(["again"])
    second.state, second.reply = "stopped", [Picture(png("green"), partial=True)]
    third = chat.ask(["again"])
    third.state, third.note = "failed", "too <many> words"
    chat.ask(["and now"])
    shown = shown_messages(chat, PictureFiles(tmp_path), sharp=True)
    assert [message["role"] for message in shown] == ["user", "assistant"] * 3 + ["user"]
    contents = [message["content"] for message in shown]
    assert 'alt="Attached picture"' in contents[0][0]
    assert contents[0][1] == "is &lt;b&gt;this&lt;/b&gt; *x*?"
    text, picture, rest = contents[1]
    assert (text, rest) == ("yes", "there")
    assert picture.startswith('<img class="drawn sharp" src="gradio_api/file=')
    assert 'alt="Picture 1"' in picture
    assert "preview" in contents[3][0]
    assert 'alt="Preview of picture 2"' in contents[3][0]
    assert contents[3][1] == "*Stopped.*"
    assert "too &lt;many&gt; words" in contents[5][0]
    [file] = tmp_path.rglob("picture-1.png")
    assert file.read_bytes() == png()


@needs_gradio
def test_the_page_needs_neither_torch_nor_vllm() -> None:
    code = """
import sys
for name in ("torch", "vllm", "transformers"):
    sys.modules[name] = None  # importing them fails
from pathlib import Path
from unimodal.serving.chat_client import Connection
from unimodal.serving.chat_page import ChatPage
ChatPage(Connection("http://127.0.0.1:1/v1"), Path(".")).build()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--url", "localhost:8000"], "expected an address like http://127.0.0.1:8000/v1"),
        (["--share"], "--share"),
    ],
)
@needs_gradio
def test_mistakes_on_the_command_line(arguments: list[str], expected: str) -> None:
    command = [sys.executable, "-m", "unimodal.cli", "ui", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("ui") / "ui.log"
    with running_ui(f"{server.url}/v1", log, API_KEY) as it:
        yield it


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with browser_page(address) as it:
        yield it


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    image = Image.new("RGB", (120, 90), (250, 240, 220))
    image.paste((40, 120, 90), (30, 20, 80, 70))
    image.save(path)
    return path


@served
def test_upload_caption_ask_draw_preview_image_follow_up(
    page: Any, address: str, server: Server, picture: Path
) -> None:
    assert "draws 16 × 16 pixels" in page.locator("#status").inner_text()
    assert page.get_by_label("number input for Budget").input_value() == "48"
    with engine_slowed(server):  # previews are gone before the page can show them otherwise
        said = walk(page, picture, "Draw: a red star", "Describe the picture.", MOST_TOKENS)
    assert said["caption"]
    assert said["answer"]
    assert said["follow_up"]
    assert page.locator("#chat img.attached").count() == 2
    assert page.locator("#chat img.preview").count() == 0
    assert page.locator("#chat").get_by_text("No answer").count() == 0
    drawing = Image.open(io.BytesIO(said["drawing"]))
    assert (drawing.format, drawing.size) == ("PNG", (16, 16))
    # The picture is really there, not a broken link.
    assert Walk(page).drawn().evaluate("image => image.naturalWidth") == 16
    # Nothing came from elsewhere, and the key is nowhere in what the browser got.
    assert page.hosts == {urlsplit(address).netloc}
    with urllib.request.urlopen(f"{address}/config") as answer:
        assert API_KEY not in answer.read().decode()
    assert API_KEY not in page.content()


@served
def test_regenerate_draws_anew_and_clear_forgets(page: Any) -> None:
    steps = Walk(page)
    steps.limit(MOST_TOKENS)
    steps.choose("Draw")
    steps.send("Draw: a ring")
    steps.drawn().wait_for()
    steps.rest()
    field = page.locator("#seed input")
    replies = page.locator("#chat .bot-row")
    first, seed = replies.inner_html(), field.input_value()
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_function("old => document.querySelector('#seed input').value !== old", arg=seed)
    steps.rest()
    second = replies.inner_html()
    # The words behind the picture; the pictures of a random tokenizer are all alike.
    assert second != first
    # The seed that is shown says the same again.
    page.get_by_label("A new seed each time").uncheck()
    page.evaluate(WATCH)
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_function("begun >= 1")
    steps.rest()
    assert replies.inner_html() == second
    page.get_by_role("button", name="Clear").click()
    steps.drawn().wait_for(state="detached")
    assert not page.get_by_role("button", name="Use as input").is_visible()


def eventually(condition: Any, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.05)
    return False


@contextmanager
def a_reply_that_waits(page: Any, server: Server) -> Iterator[None]:
    """A question is at the server while the block runs, and its engine does not get on with it: the
    toy model would have answered before a button can be pressed."""
    with engine_asleep(server):
        steps = Walk(page)
        steps.choose("Text only")
        steps.send("Tell me everything.")
        assert eventually(lambda: metric(server, "unimodal:queue_depth") == 1, 20)
        yield


def assert_nothing_was_written(server: Server, before: float) -> None:
    assert eventually(lambda: metric(server, "unimodal:queue_depth") == 0, 2)
    assert eventually(lambda: metric(server, "vllm:num_requests_running") == 0, 2)
    time.sleep(0.5)  # a whole reply would take about so long
    assert metric(server, WRITTEN) - before < 20


WRITTEN = "vllm:generation_tokens_total"


@served
def test_stop_takes_the_request_from_the_server(page: Any, server: Server) -> None:
    before = metric(server, WRITTEN)
    with a_reply_that_waits(page, server):
        page.get_by_role("button", name="Stop").click()
        page.locator("#chat").get_by_text("Stopped.").wait_for()
    assert_nothing_was_written(server, before)
    Walk(page).rest()


@served
def test_a_closed_tab_takes_its_request_along(page: Any, server: Server) -> None:
    before = metric(server, WRITTEN)
    with a_reply_that_waits(page, server):
        page.close()
        assert eventually(lambda: metric(server, "unimodal:queue_depth") == 0, 10)
    assert_nothing_was_written(server, before)


@served
def test_an_error_of_the_server_is_shown_and_a_phone_has_no_sideways_scrolling(page: Any) -> None:
    steps = Walk(page)
    page.set_viewport_size(PHONE)
    steps.limit(MOST_TOKENS)
    steps.choose("Draw")
    steps.send("red " * 20_000)
    told = page.locator("#chat").get_by_text("No answer")
    told.wait_for()
    assert "context" in steps.replies.last.inner_text()
    steps.rest()
    steps.send("Draw: a ring")  # the turn that failed is not sent again
    steps.drawn().wait_for()
    steps.rest()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea')]
            .filter(e => e.checkVisibility() && e.type !== 'file')
            .filter(e => !(e.innerText || e.ariaLabel || e.title || e.labels?.length))
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []


@browsing
def test_a_server_that_is_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with (
        running_ui("http://127.0.0.1:9/v1", tmp_path / "ui.log") as address,
        browser_page(address) as page,
    ):
        assert list(tmp_path.glob("unimodal-ui-*"))
        assert "Not connected" in page.locator("#status").inner_text()
        assert "unimodal serve" in Walk(page).ask("hello")
    assert not list(tmp_path.glob("unimodal-ui-*"))  # pictures do not stay behind
