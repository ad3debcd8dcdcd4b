"""``unimodal ui``: a page to chat with a server of ours, pictures in both directions.

The page (serving/chat_page.py) talks to the server over HTTP only (serving/chat_client.py); it
needs gradio and OpenAI's client, and neither torch nor vLLM. The browser loads nothing from
anywhere but the page itself.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizer_hf.errors import ServingError

MAX_UPLOAD = "20mb"

# What the browser may load: the page's own files. A link in a model's text can fetch nothing.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # gradio's own page needs both
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "frame-ancestors 'self'",
    )
)


def run_page(
    url: str, *, host: str = "127.0.0.1", port: int = 7860, api_key: str | None = None
) -> None:
    """Show the chat page until it is interrupted.

    Args:
        url: the server's address, ``http://HOST:PORT/v1``.
        host: the address to listen on.
        port: the port to listen on.
        api_key: the server's key; it stays in this process.

    Raises:
        ServingError: gradio is not installed, ``url`` is no address, or the port is taken.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the pictures are taken away
    with running_page(url, host=host, port=port, api_key=api_key) as page:
        print(f"chat page: http://{host}:{port}", flush=True)
        page.block_thread()


@contextmanager
def running_page(
    url: str, *, host: str = "127.0.0.1", port: int, api_key: str | None = None
) -> Iterator[Any]:
    """Serve the chat page while the block runs; arguments and errors of :func:`run_page`."""
    missing = [name for name in ("gradio", "openai") if find_spec(name) is None]
    if missing:
        raise ServingError(
            f"{' and '.join(missing)} not installed; run `pip install 'unimodal[ui]'`"
        )
    if not url.startswith(("http://", "https://")):
        raise ServingError(f"--url is {url!r}, expected an address like http://127.0.0.1:8000/v1")
    # Before gradio is imported: else it reports to its makers.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with TemporaryDirectory(prefix="unimodal-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        from unimodal.serving.chat_client import Connection
        from unimodal.serving.chat_page import ChatPage

        page = ChatPage(Connection(url, api_key), Path(folder)).build()
        _launch(page, host, port)
        try:
            yield page
        finally:
            page.close(verbose=False)


def _launch(page: Any, host: str, port: int) -> None:
    from starlette.middleware import Middleware

    from unimodal.serving.chat_page import CSS, theme

    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            ssr_mode=False,
            theme=theme(),
            css=CSS,
            app_kwargs={"middleware": [Middleware(_OwnFilesOnly)]},
        )
    except OSError as error:
        raise ServingError(f"port {port} of {host} is taken; choose another --port") from error


class _OwnFilesOnly:
    """Middleware that tells browsers to load nothing from other hosts."""

    HEADERS = (
        (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_policy)
