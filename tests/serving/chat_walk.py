"""A walk through the chat page in headless Chromium, against a real server: for the test and for
the pictures of docs/chat_page.md.

    python -m tests.serving.chat_walk --model runs/demo/model --out docs

serves the model, walks, and writes the screenshots. ``--picture FILE`` and ``--prompt TEXT`` choose
what is uploaded and what is drawn.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_SECONDS = 120
MOST_REPLIES = 20
"""Drawings that are asked for until one shows a preview."""
DESKTOP = {"width": 1200, "height": 860}
PHONE = {"width": 390, "height": 844}


WATCH = """() => {
    window.previews = 0;
    window.begun = 0;  // replies: the button Stop came
    let stop = false;
    const look = () => {
        window.previews += document.querySelectorAll("#chat img.preview").length;
        const named = button => button.innerText.trim() === "Stop" && button.offsetParent !== null;
        const before = stop;
        stop = [...document.querySelectorAll("button")].some(named);
        window.begun += stop && !before;
    };
    const changes = { childList: true, subtree: true, attributes: true };
    new MutationObserver(look).observe(document.body, changes);
}"""  # a small model's previews, and whole replies, are gone before one could look for them


@contextmanager
def running_ui(url: str, log: Path, api_key: str | None = None) -> Iterator[str]:
    """Run ``unimodal ui`` on a free port while the block runs; gives the page's address."""
    environment = {**os.environ, **({"UNIMODAL_API_KEY": api_key} if api_key else {})}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "unimodal.cli", "ui", "--url", url, "--port", port]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("chat page: "), line + log.read_text()
            yield line.split()[-1]
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def browser_page(address: str) -> Iterator[Any]:
    """Open the chat page in a new Chromium; ``page.hosts`` collects whom it asked for files."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=CHROMIUM_FLAGS
        )
        page = browser.new_page(viewport=DESKTOP)
        page.set_default_timeout(WAIT_SECONDS * 1000)
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(urlsplit(request.url).netloc))
        page.goto(address)
        page.get_by_label("Message", exact=True).wait_for()
        page.locator("#status strong").wait_for()  # the server's model, or what is wrong
        yield page
        browser.close()


class Walk:
    """What a visitor does; each step waits until its effect is seen."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.replies = page.locator("#chat [data-testid=bot]")

    def choose(self, mode: str) -> None:
        """Press Auto, Draw or Text only."""
        self.page.get_by_label(mode, exact=True).check()

    def limit(self, tokens: int) -> None:
        """Set the most tokens of a reply, in the settings that are folded away at first."""
        field = self.page.get_by_label("number input for Most tokens")
        if not field.is_visible():
            self.page.locator("button.label-wrap", has_text="Text").click()
        field.fill(str(tokens))
        field.press("Tab")

    def attach(self, picture: Path) -> None:
        """Put a picture into the message."""
        self.page.set_input_files("#message input[type=file]", str(picture))
        self.page.locator("#message .thumbnail-item").last.wait_for()

    def send(self, text: str) -> None:
        """Write a message and press Enter."""
        box = self.page.get_by_label("Message", exact=True)
        box.fill(text)
        box.press("Enter")
        self.page.locator("#chat [data-testid=user]").last.wait_for()

    def rest(self) -> None:
        """Wait until the reply is over."""
        self.page.get_by_role("button", name="Submit").wait_for()

    def sees_a_preview(self, reply: int) -> bool:
        """Wait until a preview is shown, or the reply with this number is over without one."""
        self.page.wait_for_function("reply => begun >= reply", arg=reply)
        limit = time.monotonic() + WAIT_SECONDS
        while not self.page.evaluate("previews"):
            if self.page.get_by_role("button", name="Submit").is_visible():
                return False
            assert time.monotonic() < limit, f"no preview and no end in {WAIT_SECONDS} s"
            self.page.wait_for_timeout(10)
        return True

    def ask(self, text: str) -> str:
        """Send a message and return the text of the reply."""
        before = self.replies.count()
        self.send(text)
        self.page.wait_for_function(
            "n => document.querySelectorAll('#chat [data-testid=bot]').length > n", arg=before
        )
        self.rest()
        return str(self.replies.last.inner_text())

    def drawn(self) -> Any:
        """The whole pictures of the conversation."""
        return self.page.locator("#chat img.drawn")


def walk(
    page: Any,
    picture: Path,
    prompt: str,
    instruction: str,
    most_tokens: int = 0,
    shoot: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Upload → caption → ask → draw → preview → image → follow-up with the drawing as input.

    Args:
        page: the open page.
        picture: the file to upload.
        prompt: the whole message that asks for a drawing.
        instruction: the message that asks for a caption.
        most_tokens: of each reply.
        shoot: called with the name of each state worth a picture.

    Returns:
        The texts of the replies, and the bytes of the downloaded drawing.
    """
    steps = Walk(page)
    shoot("open")
    if most_tokens:
        steps.limit(most_tokens)
    steps.choose("Text only")
    steps.attach(picture)
    caption = steps.ask(instruction)
    answer = steps.ask("What colour is it?")
    shoot("caption")
    steps.choose("Draw")
    page.evaluate(WATCH)
    steps.send(prompt)
    reply = 1
    while not steps.sees_a_preview(reply):  # a nested picture of a random model may end before one
        reply += 1
        assert reply <= MOST_REPLIES, "no preview was shown of any of so many drawings"
        steps.rest()
        page.get_by_role("button", name="Regenerate").click()
    shoot("preview")
    steps.drawn().wait_for()
    steps.rest()
    with page.expect_download() as download:
        page.locator("#download, a:has(#download)").first.click()
    drawing = Path(download.value.path()).read_bytes()
    page.get_by_role("button", name="Use as input").click()
    page.locator("#message .thumbnail-item").wait_for()
    shoot("drawn")
    steps.choose("Text only")
    follow_up = steps.ask(instruction)
    shoot("follow-up")
    return {"caption": caption, "answer": answer, "drawing": drawing, "follow_up": follow_up}


def main() -> None:
    """Write the screenshots of docs/chat_page.md."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="a merged model")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--picture", type=Path, help="default: a scene of the embedded world")
    parser.add_argument("--prompt", default="a red star above a blue ring")
    arguments = parser.parse_args()
    from tests.serving.asking import engine_slowed
    from unimodal.processing_unimodal import UnimodalProcessor
    from unimodal.serving.check import running_server

    processor = UnimodalProcessor.from_pretrained(arguments.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        picture = arguments.picture or _scene(Path(folder, "scene.png"))
        with (
            running_server(arguments.model) as server,
            running_ui(f"{server.url}/v1", Path(folder, "ui.log")) as address,
            browser_page(address) as page,
        ):

            def shoot(name: str) -> None:
                page.wait_for_timeout(0 if name == "preview" else 400)  # what moves comes to rest
                page.screenshot(path=arguments.out / f"chat_page_{name}.png")

            with engine_slowed(server):  # or a small model's previews are gone at once
                walk(
                    page,
                    picture,
                    processor.draw_instruction.replace("{prompt}", arguments.prompt),
                    processor.caption_instruction,
                    shoot=shoot,
                )
            page.set_viewport_size(PHONE)
            shoot("phone")
    print(*sorted(arguments.out.glob("chat_page_*.png")), sep="\n")


def _scene(path: Path) -> Path:
    import random

    from eval.shapes.render import render
    from eval.shapes.scene import sample_scene

    render(sample_scene(random.Random(3))).save(path)
    return path


if __name__ == "__main__":
    main()
