"""The chat page in gradio: what it shows, and what happens when something is pressed."""

import asyncio
import html
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from tokenizer_hf.errors import ServingError, UnimodalError
from unimodal.serving.chat_client import (
    Chat,
    Connection,
    ModelCard,
    Part,
    Picture,
    Settings,
    Turn,
    read_picture,
    request_body,
    take_chunk,
)

TITLE = "unimodal"
KEPT_SECONDS = 24 * 3600
"""How long pictures stay in the page's temporary folder; the folder goes when the page ends."""
SMALL_PIXELS = 256
"""A model's pictures of fewer pixels are shown enlarged with sharp edges."""
MOST_SEED = 2**31 - 1
GUIDANCE, MOST_CODES = 3.0, 1000
"""Where the server does not tell its default, and its codebook."""

CSS = """
.gradio-container { width: 100% !important; max-width: 1200px !important; }
.gradio-container { margin: 0 auto !important; }
#columns > .column { min-width: 0 !important; }
@media (max-width: 720px) {
    #columns { flex-direction: column; }
    #columns > .column { width: 100%; }
}
#title h1 { font-size: 1.4rem; margin: 0; }
#status p { color: var(--body-text-color-subdued); margin: 0; }
#chat { min-height: 340px; }
#chat .prose { opacity: 1; }  /* else pictures look washed out */
#chat button[aria-label="Clear"] { display: none; }  /* our own button says it in words */
#chat img { width: min(256px, 60vw); margin: 4px 0; border-radius: 8px; display: block; }
#chat img { aspect-ratio: auto 1; }  /* room for it before it is loaded, so that scrolling fits */
#chat img.attached { width: min(160px, 45vw); }
#chat img.preview { opacity: 0.7; }
#chat img.sharp, #drawn.sharp img { image-rendering: pixelated; }
input[type="radio"]:checked:hover, input[type="radio"]:checked:focus {
    background-color: var(--checkbox-background-color-selected) !important;  /* else it vanishes */
}
#drawn .caption-label { display: none; }  /* it is the alternative text */
"""


# gradio's message box has a placeholder only, which screen readers may pass over.
_LABELS = """() => {
    document.querySelector("#message textarea").setAttribute("aria-label", "Message");
}"""


def theme() -> Any:
    """Colours, and fonts that every machine has."""
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


# --- what is shown --------------------------------------------------------------------------------


class PictureFiles:
    """The files that the page shows, in its temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, picture: Picture, name: str) -> Path:
        """Return the file of a picture, written on first use."""
        suffix = picture.media_type.partition("/")[2]
        path = self.folder / "pictures" / picture.key / f"{name}.{suffix}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.data)
        return path

    def drawn(self, chat: Chat) -> list[Path]:
        """The files of all pictures that the model drew."""
        return [self.path(p, f"picture-{number}") for number, p in enumerate(chat.drawn, 1)]

    def html(self, picture: Picture, name: str, described: str, classes: str) -> str:
        """Return an ``img`` element."""
        source = f"gradio_api/file={quote(str(self.path(picture, name)))}"
        return f'<img class="{classes}" src="{source}" alt="{described}">'


def shown_messages(chat: Chat, files: PictureFiles, sharp: bool = False) -> list[dict[str, Any]]:
    """The conversation as gradio's Chatbot shows it.

    Args:
        chat: the conversation.
        files: where the pictures are put.
        sharp: show what the model drew with sharp pixels.
    """
    messages: list[dict[str, Any]] = []
    drawn = 0
    extra = " sharp" if sharp else ""
    for turn in chat.turns:
        # What the user wrote is shown as it was written; Markdown would swallow tags.
        question = [
            html.escape(part, quote=False)
            if isinstance(part, str)
            else files.html(
                part, "attached", "Attached picture", f"attached{extra if part.codes else ''}"
            )
            for part in turn.question
        ]
        messages.append({"role": "user", "content": question})
        reply = []
        for part in turn.reply:
            if isinstance(part, str):
                reply.append(part)
            elif part.partial:
                described = f"Preview of picture {drawn + 1}"
                reply.append(files.html(part, "preview", described, f"preview{extra}"))
            else:
                drawn += 1
                name, described = f"picture-{drawn}", f"Picture {drawn}"
                reply.append(files.html(part, name, described, f"drawn{extra}"))
        reply.extend(_remarks(turn))
        if reply:
            messages.append({"role": "assistant", "content": reply})
    return messages


def _remarks(turn: Turn) -> list[str]:
    note = html.escape(turn.note, quote=False)
    if turn.state == "failed":
        return [f"**No answer:** {note}\n\n*This turn is left out of the conversation.*"]
    return [f"*{text}*" for text in (note, "Stopped." if turn.state == "stopped" else "") if text]


def described(card: ModelCard) -> str:
    """One line about a served model."""
    parts = [f"**{html.escape(card.name, quote=False)}**"]
    if card.side_pixels:
        parts.append(f"draws {card.side_pixels} × {card.side_pixels} pixels")
    if card.budget:
        parts.append("{} to {} codes a picture".format(*card.budget))
    return " · ".join(parts)


# --- the reply ------------------------------------------------------------------------------------


class Replies:
    """The replies that are being received, one for each browser session."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._running: dict[str, asyncio.Task[None]] = {}

    async def receive(
        self, session: str, chat: Chat, turn: Turn, model: str | None, settings: Settings
    ) -> AsyncGenerator[None, None]:
        """Ask the server for a turn's reply; yields each time it grew, and when it is over.

        Whatever ends this early (Stop, a closed tab) closes the HTTP stream too.
        """
        news = asyncio.Event()
        task = asyncio.create_task(self._read(chat, turn, model, settings, news))
        task.add_done_callback(lambda _task: news.set())
        self._running[session] = task
        try:
            while not task.done():
                await news.wait()
                news.clear()  # chunks that came meanwhile are shown together
                yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            if turn.state == "running":  # cancelled before it began
                turn.state = "stopped"
            if self._running.get(session) is task:
                del self._running[session]

    def require_idle(self, session: str) -> None:
        """Raise ServingError while a session's reply is on its way."""
        if session in self._running:
            raise ServingError("a reply is on its way; wait for it, or stop it first")

    def stop(self, session: str) -> None:
        """Close the stream of a session's reply, if there is one."""
        if task := self._running.get(session):
            task.cancel()

    async def _read(
        self, chat: Chat, turn: Turn, model: str | None, settings: Settings, news: asyncio.Event
    ) -> None:
        try:
            name = model or await self._first_model()
            body = request_body(chat.messages(), name, settings)
            async with aclosing(self.connection.answer(body)) as chunks:
                async for chunk in chunks:
                    take_chunk(turn, chunk)
                    news.set()
            turn.state = "done"
        except asyncio.CancelledError:
            turn.state = "stopped"
        except UnimodalError as error:
            turn.state, turn.note = "failed", str(error)

    async def _first_model(self) -> str:
        """The name to ask for where the page was opened before the server was up."""
        cards = await self.connection.models()
        if not cards:
            raise ServingError(f"{self.connection.url} serves no model")
        return cards[0].name


# --- the page -------------------------------------------------------------------------------------


class SettingsPanel:
    """The column of settings."""

    def __init__(self) -> None:
        self.model = gr.Dropdown(label="Model", choices=[], visible=False)
        mode = gr.Radio(
            [("Auto", "auto"), ("Draw", "draw"), ("Text only", "text")],
            value="auto",
            label="Reply",
            info="Auto: the model decides when to draw.",
        )
        with gr.Accordion("Pictures", open=True):
            self.guidance = gr.Slider(0, 10, GUIDANCE, step=0.1, label="Guidance", info="1: off")
            self.temperature = gr.Slider(0, 2, 1, step=0.05, label="Picture temperature")
            self.top_k = gr.Slider(0, MOST_CODES, 0, step=1, label="Top-k", info="0: all codes")
            self.budget = gr.Slider(
                1, 2, 2, step=1, label="Budget", info="most codes of a picture", visible=False
            )
            previews = gr.Slider(0, 3, 3, step=1, label="Previews")
            negative = gr.Textbox(label="Negative prompt", placeholder="What not to draw")
        with gr.Accordion("Text", open=False):
            temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Text temperature")
            max_tokens = gr.Slider(
                0, 4096, 0, step=1, label="Most tokens", info="0: as many as fit"
            )
        with gr.Accordion("Seed", open=True):
            self.new_seed = gr.Checkbox(True, label="A new seed each time")
            self.seed = gr.Number(
                0, precision=0, minimum=0, maximum=MOST_SEED, label="Seed", elem_id="seed"
            )
        self._fields = {
            "mode": mode,
            "guidance": self.guidance,
            "image_temperature": self.temperature,
            "top_k": self.top_k,
            "budget": self.budget,
            "previews": previews,
            "negative_prompt": negative,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }

    @property
    def of_the_server(self) -> list[Any]:
        """The components that :meth:`follow` changes."""
        return [self.model, self.guidance, self.temperature, self.top_k, self.budget]

    def follow(self, cards: Sequence[ModelCard]) -> dict[Any, Any]:
        """Offer what the served model can do."""
        card, names = cards[0], [card.name for card in cards]
        least, most = card.budget or (1, 2)
        problem = card.guidance_problem
        guidance: dict[str, Any] = (
            {"info": f"Off: {problem}", "interactive": False} if problem else {}
        )
        return {
            self.model: gr.Dropdown(choices=names, value=names[0], visible=len(names) > 1),
            self.guidance: gr.Slider(value=card.default("guidance_scale", GUIDANCE), **guidance),
            self.temperature: gr.Slider(value=card.default("temperature", 1)),
            self.top_k: gr.Slider(
                value=card.default("top_k", 0), maximum=card.codebook_size or MOST_CODES
            ),
            self.budget: gr.Slider(
                minimum=least, maximum=most, value=most, visible=card.budget is not None
            ),
        }

    @property
    def inputs(self) -> set[Any]:
        """The components that :meth:`read` needs the values of."""
        return {self.model, self.new_seed, self.seed, *self._fields.values()}

    def read(self, values: dict[Any, Any], nested: bool) -> Settings:
        """What was chosen; a fresh seed where one is wanted."""
        chosen = {name: values[component] for name, component in self._fields.items()}
        if not nested:
            chosen["budget"] = None
        seed = values[self.seed]
        if values[self.new_seed] or seed is None:
            seed = secrets.randbelow(MOST_SEED)
        return Settings(**chosen, seed=int(seed))


class ChatPage:
    """The page of one server."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        """Make a page.

        Args:
            connection: the server.
            folder: where the pictures that are shown are written.
        """
        self.connection = connection
        self.files = PictureFiles(folder)
        self.replies = Replies(connection)
        self.nested = self.sharp = False

    def build(self) -> Any:
        """Return the page as ``gradio.Blocks``."""
        lasting = (3600, KEPT_SECONDS)
        with gr.Blocks(
            title=TITLE, analytics_enabled=False, delete_cache=lasting, fill_width=True
        ) as page:
            self.chat = gr.State(Chat())
            self.chosen = gr.State(0)  # number of the drawn picture that the buttons below it mean
            gr.Markdown(f"# {TITLE}", elem_id="title")
            self.status = gr.Markdown("Connecting…", elem_id="status")
            with gr.Row(equal_height=False, elem_id="columns"):
                with gr.Column(scale=3, min_width=320):
                    self._conversation()
                with gr.Column(scale=1, min_width=270):
                    self.settings = SettingsPanel()
            self._wire(page)
        return page

    def _conversation(self) -> None:
        self.log = gr.Chatbot(
            label="Conversation",
            show_label=False,
            elem_id="chat",
            height="58vh",
            buttons=["copy"],
            allow_tags=False,
            placeholder="Ask for a picture, or drop one in and ask about it.",
        )
        self.entry = gr.MultimodalTextbox(
            label="Message",
            show_label=False,
            elem_id="message",
            placeholder="Write a message. Drop or paste pictures here.",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            submit_btn="Send",
            autofocus=True,
        )
        with gr.Row():
            self.again = gr.Button("Regenerate", size="sm", min_width=70)
            self.clear = gr.Button("Clear", size="sm", min_width=70)
            self.reuse = gr.Button("Use as input", size="sm", min_width=70, visible=False)
            self.download = gr.DownloadButton(
                "Download", elem_id="download", size="sm", min_width=70, visible=False
            )
        self.gallery = gr.Gallery(
            label="Drawn pictures",
            show_label=False,
            elem_id="drawn",
            columns=6,
            fit_columns=False,
            height=140,
            object_fit="contain",
            allow_preview=False,
            buttons=[],
            interactive=False,
            visible=False,
        )

    def _wire(self, page: Any) -> None:
        asked = {self.chat, self.entry, *self.settings.inputs}
        shown = [
            self.log,
            self.entry,
            self.settings.seed,
            self.again,
            self.clear,
            self.reuse,
            self.download,
            self.gallery,
            self.chosen,
        ]
        long: dict[str, Any] = {
            "concurrency_limit": None,
            "api_visibility": "private",
            "show_progress": "hidden",
        }
        short: dict[str, Any] = {**long, "queue": False}
        self.entry.submit(self.send, asked, shown, **long)
        self.again.click(self.send_again, asked, shown, **long)
        self.entry.stop(self.stop, None, None, **short)
        self.clear.click(self.start_anew, self.chat, shown, **long)
        self.gallery.select(self.choose, self.chat, [self.chosen, self.download], **long)
        self.reuse.click(
            self.use_as_input, [self.chat, self.chosen, self.entry], self.entry, **long
        )
        page.load(
            self.connect,
            None,
            [self.status, self.gallery, *self.settings.of_the_server],
            js=_LABELS,
            **long,
        )
        page.unload(self.leave)

    # --- what happens -----------------------------------------------------------------------------

    async def connect(self) -> dict[Any, Any]:
        """When the page opens: ask the server what it can do."""
        try:
            cards = await self.connection.models()
            if not cards:
                raise ServingError(f"{self.connection.url} serves no model")
        except ServingError as error:
            return {self.status: f"**Not connected:** {html.escape(str(error), quote=False)}"}
        card = cards[0]
        self.nested = card.budget is not None
        self.sharp = card.side_pixels is not None and card.side_pixels < SMALL_PIXELS
        return {
            self.status: described(card),
            self.gallery: gr.Gallery(elem_classes=["sharp"] if self.sharp else []),
            **self.settings.follow(cards),
        }

    async def send(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[Any]:
        """Send what stands in the message box."""
        entry, chat = values[self.entry], values[self.chat]
        text = (entry.get("text") or "").strip()
        with _told_to_the_user():
            # Two drawings may look alike and still differ in their codes: the file tells which.
            files = map(str, self.files.drawn(chat))
            drawn: dict[str, Picture] = dict(zip(files, chat.drawn, strict=True))
            pictures = [
                drawn[path] if path in drawn else await asyncio.to_thread(read_picture, path)
                for path in entry.get("files") or []
            ]
            if not text and not pictures:
                raise ServingError("write a message or add a picture first")
            question: list[Part] = [*pictures, *([text] if text else [])]
            self.replies.require_idle(_session(request))
        async for update in self._reply(chat, chat.ask(question), values, request):
            yield update

    async def send_again(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[Any]:
        """Ask the last question once more, with the settings as they are now."""
        chat = values[self.chat]
        with _told_to_the_user():
            self.replies.require_idle(_session(request))
            turn = chat.ask_again()
        async for update in self._reply(chat, turn, values, request, keep_entry=True):
            yield update

    async def _reply(
        self,
        chat: Chat,
        turn: Turn,
        values: dict[Any, Any],
        request: gr.Request,
        keep_entry: bool = False,
    ) -> AsyncIterator[dict[Any, Any]]:
        settings = self.settings.read(values, self.nested)
        emptied: dict[str, Any] = {} if keep_entry else {"value": None}
        yield {
            self.log: shown_messages(chat, self.files, self.sharp),
            self.entry: gr.MultimodalTextbox(submit_btn=False, stop_btn="Stop", **emptied),
            self.settings.seed: settings.seed,
            self.again: gr.Button(interactive=False),
        }
        model = values[self.settings.model]
        replies = self.replies.receive(_session(request), chat, turn, model, settings)
        async with aclosing(replies):
            async for _ in replies:
                yield {self.log: shown_messages(chat, self.files, self.sharp)}
        yield {
            self.log: shown_messages(chat, self.files, self.sharp),
            self.entry: gr.MultimodalTextbox(submit_btn="Send", stop_btn=False),
            self.again: gr.Button(interactive=True),
            **self._drawn(chat, len(chat.drawn) - 1),
        }

    def _drawn(self, chat: Chat, chosen: int) -> dict[Any, Any]:
        """The strip of drawn pictures, one of them chosen."""
        paths = self.files.drawn(chat)
        if not paths:
            hidden: dict[str, Any] = {"visible": False}
            return {
                self.gallery: gr.Gallery([], **hidden),
                self.reuse: gr.Button(**hidden),
                self.download: gr.DownloadButton(**hidden),
            }
        named = [(path, f"Picture {number}") for number, path in enumerate(paths, 1)]
        return {
            self.chosen: chosen,
            self.gallery: gr.Gallery(named, selected_index=chosen, visible=True),
            self.reuse: gr.Button(visible=True),
            self.download: gr.DownloadButton(value=paths[chosen], visible=True),
        }

    def choose(self, chat: Chat, event: gr.SelectData) -> tuple[int, Path]:
        """Another of the drawn pictures was pressed."""
        return event.index, self.files.drawn(chat)[event.index]

    def use_as_input(self, chat: Chat, chosen: int, entry: dict[str, Any]) -> Any:
        """Attach the chosen drawing to the next message."""
        path = str(self.files.drawn(chat)[chosen])
        return {"text": entry.get("text") or "", "files": [*(entry.get("files") or []), path]}

    def stop(self, request: gr.Request) -> None:
        """The stop button: close the stream of the reply."""
        self.replies.stop(_session(request))

    def start_anew(self, chat: Chat, request: gr.Request) -> dict[Any, Any]:
        """Forget the conversation."""
        self.replies.stop(_session(request))
        chat.turns.clear()
        return {self.log: [], **self._drawn(chat, 0)}

    def leave(self, request: gr.Request) -> None:
        """The tab was closed."""
        self.replies.stop(_session(request))


def _session(request: gr.Request) -> str:
    """The browser tab that a request comes from."""
    return request.session_hash or ""


@contextmanager
def _told_to_the_user() -> Iterator[None]:
    """Show our errors in a corner of the page."""
    try:
        yield
    except UnimodalError as error:
        raise gr.Error(str(error), title="Not sent", print_exception=False) from error
