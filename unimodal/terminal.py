"""The terminal chat, and pictures in a terminal.

Pictures are shown inline by the kitty protocol, by iTerm2's, or as half blocks in colour, whichever
the terminal knows; their path is always printed too.
"""

import base64
import contextlib
import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tokenizer_hf.errors import ConfigurationError, UnimodalError
from tokenizer_hf.files import atomic_write
from unimodal.messages import Message
from unimodal.pipeline import Unimodal

Protocol = Literal["kitty", "iterm2", "truecolor", "256", "none"]

HELP = """\
Write a message and press Enter. A line that begins with / is a command:
  /image PATH       put a picture into your next message (again for more)
  /draw auto        the model decides when to draw (the default)
  /draw on          every reply begins with a picture
  /draw off         no pictures
  /seed N           the seed of the next reply; it counts up from there
  /save [FILE]      write the conversation as one line of chat JSONL
  /reset            forget the conversation
  /help             this text
  /quit             leave (so does Ctrl-D)
To begin a message with /, write // instead."""


def printable(text: str) -> str:
    """The text without control characters: what a model writes must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


# --- pictures in files ----------------------------------------------------------------------------


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> Path:
    """Write a PNG, whole or not at all, with how it was made in its text chunks.

    Args:
        settings: plain JSON. The chunk ``unimodal`` holds them all, ``prompt`` the prompt.
    """
    path = Path(path)
    info = PngInfo()
    if "prompt" in settings:
        info.add_text("prompt", str(settings["prompt"]))
    info.add_text("unimodal", json.dumps(settings))
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return path


def picture_path(folder: str | Path, title: str, seed: int) -> Path:
    """A path for a new picture, ``a-red-circle-seed7.png``; a file that exists is never taken."""
    words = "".join(c if c.isalnum() else " " for c in title.lower()).split()
    stem = f"{'-'.join(words)[:60].strip('-') or 'picture'}-seed{seed}"
    path = Path(folder) / f"{stem}.png"
    number = 2
    while path.exists():
        path = Path(folder) / f"{stem}-{number}.png"
        number += 1
    return path


# --- pictures in a terminal -----------------------------------------------------------------------


def detect_protocol(environment: Mapping[str, str], is_terminal: bool) -> Protocol:
    """How this terminal shows pictures, from its environment variables.

    Multiplexers (tmux, screen) swallow the picture protocols, so half blocks are used in them.
    """
    term = environment.get("TERM", "")
    program = environment.get("TERM_PROGRAM", "")
    if not is_terminal or term in ("", "dumb") or environment.get("NO_COLOR"):
        return "none"
    inside = "TMUX" in environment or term.startswith(("screen", "tmux"))
    if not inside:
        if term in ("xterm-kitty", "xterm-ghostty") or "KITTY_WINDOW_ID" in environment:
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    if environment.get("COLORTERM", "") in ("truecolor", "24bit"):
        return "truecolor"
    return "256" if "256" in term else "none"


def picture_escape(image: Image.Image, protocol: Protocol, columns: int = 32) -> str:
    """The characters that show a picture, ending in a newline; empty for "none".

    Args:
        columns: width on the screen, in characters; a character is taken as twice as high as wide.
    """
    if protocol == "none":
        return ""
    if protocol in ("kitty", "iterm2"):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        payload = base64.standard_b64encode(buffer.getvalue()).decode("ascii")
        if protocol == "iterm2":
            size = len(buffer.getvalue())
            return f"\x1b]1337;File=inline=1;size={size};width={columns}:{payload}\x07\n"
        return _kitty(payload, columns)
    return _half_blocks(image, columns, truecolor=protocol == "truecolor")


def _kitty(payload: str, columns: int) -> str:
    """Source: the kitty graphics protocol; payloads go in pieces of at most 4096 characters."""
    pieces = [payload[first : first + 4096] for first in range(0, len(payload), 4096)]
    out = []
    for index, piece in enumerate(pieces):
        control = f"a=T,f=100,c={columns}," if index == 0 else ""
        more = int(index < len(pieces) - 1)
        out.append(f"\x1b_G{control}m={more};{piece}\x1b\\")
    return "".join(out) + "\n"


def _half_blocks(image: Image.Image, columns: int, truecolor: bool) -> str:
    """Two pixels a character: the upper one is the letter's colour, the lower one the ground's."""
    height = max(2, round(columns * image.height / image.width / 2) * 2)
    pixels: Any = image.convert("RGB").resize((columns, height), Image.Resampling.BOX).load()

    def colour(rgb: tuple[int, int, int]) -> str:
        if truecolor:
            return "2;{};{};{}".format(*rgb)
        red, green, blue = (round(value / 51) for value in rgb)  # the cube of 6 × 6 × 6 colours
        return f"5;{16 + 36 * red + 6 * green + blue}"

    lines = []
    for y in range(0, height, 2):
        cells = [
            f"\x1b[38;{colour(pixels[x, y])}m\x1b[48;{colour(pixels[x, y + 1])}m▀"
            for x in range(columns)
        ]
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)


# --- the chat -------------------------------------------------------------------------------------


@dataclass
class Chat:
    """A conversation in a terminal. ``run`` is the loop; the rest is what its lines do.

    Args:
        model: answers.
        out: the folder for pictures and saved conversations.
        options: what ``Unimodal.chat`` takes besides messages, images and seed.
        system: a system message, or None.
    """

    model: Unimodal
    out: Path = Path("drawings")
    options: dict[str, Any] = field(default_factory=dict)
    images: Literal["auto", "never", "force"] = "auto"
    seed: int = field(default_factory=lambda: random.randrange(2**31))
    system: str | None = None
    write: Callable[[str], None] = print
    protocol: Protocol = "none"

    def __post_init__(self) -> None:
        self.messages: list[Message] = []
        self.pending: list[Message] = []  # pictures of the next message
        self.reset()

    def run(self, lines: Iterable[str], stop_at_error: bool = False) -> None:
        """Answer line by line until the lines end or one says /quit.

        Args:
            stop_at_error: raise what goes wrong (a script wants that) instead of writing it.
        """
        for line in lines:
            try:
                if self.handle(line) == "quit":
                    return
            except (UnimodalError, OSError) as error:
                if stop_at_error:
                    raise
                self.write(f"error: {' '.join(str(error).split())}")

    def handle(self, line: str) -> Literal["quit"] | None:
        """Do what one line says."""
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            command, _, argument = line[1:].partition(" ")
            return self._command(command, argument.strip())
        if line or self.pending:
            self._say(line.removeprefix("/"))
        return None

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.pending = []

    def save(self, path: Path) -> None:
        """Write the conversation as one line of chat JSONL, its pictures by path."""
        messages = []
        for message in self.messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [
                    {"type": "image", "image": str(part["path"])}
                    if part["type"] == "image"
                    else part
                    for part in content
                ]
            messages.append({"role": message["role"], "content": content})
        with atomic_write(path) as temporary:
            line = json.dumps({"messages": messages}, ensure_ascii=False)
            temporary.write_text(line + "\n", encoding="utf-8")

    def _command(self, command: str, argument: str) -> Literal["quit"] | None:
        if command in ("quit", "exit"):
            return "quit"
        if command == "help":
            self.write(HELP)
        elif command == "reset":
            self.reset()
            self.write("The conversation is forgotten.")
        elif command == "image":
            self._attach(argument)
        elif command == "draw":
            self._set_drawing(argument)
        elif command == "seed":
            if not argument.isdecimal():
                raise ConfigurationError(f"/seed {argument}; expected a whole number, 0 or more")
            self.seed = int(argument)
            self.write(f"The next reply has seed {self.seed}.")
        elif command == "save":
            path = Path(argument) if argument else self.out / "chat.jsonl"
            self.save(path)
            self.write(f"Saved: {path}")
        else:
            raise ConfigurationError(f"unknown command /{command}; /help lists the commands")
        return None

    def _attach(self, argument: str) -> None:
        if not argument:
            raise ConfigurationError("/image without a path; expected /image PATH")
        path = Path(argument.strip("'\"")).expanduser()
        [codes] = self.model.processor.encode_images(path).tolist()
        self.pending.append({"type": "image", "codes": codes, "path": path.absolute()})
        self.write(f"{path} goes with your next message.")

    def _set_drawing(self, argument: str) -> None:
        choices: dict[str, Any] = {"auto": "auto", "on": "force", "off": "never"}
        if argument not in choices:
            raise ConfigurationError(f"/draw {argument}; expected /draw auto, on or off")
        self.images = choices[argument]
        self.write(f"Drawing: {argument}.")

    def _say(self, text: str) -> None:
        parts = list(self.pending)
        if text:
            parts.append({"type": "text", "text": text})
        turn: Message = {"role": "user", "content": parts}
        reply = self.model.chat(
            [*self.messages, turn], images=self.images, seed=self.seed, **self.options
        )
        for part in reply.parts:
            if part["type"] == "image":
                settings = {"prompt": text, "seed": self.seed, "chat": True, **self.options}
                part["path"] = picture_path(self.out, text or "chat", self.seed).absolute()
                save_png(part["image"], part["path"], settings)
                self.write(picture_escape(part["image"], self.protocol) + f"[{part['path']}]")
            else:
                self.write(printable(part["text"]).strip())
        if not reply.parts:
            self.write("(the model said nothing)")
        # Only now, so that an error or Ctrl-C leaves the conversation as it was.
        self.messages += [turn, reply.message]
        self.pending = []
        self.seed += 1


def read_lines(prompt: str = "> ") -> Iterable[str]:
    """Lines from the keyboard, with editing and history where readline is there, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401
    while True:
        try:
            yield input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return


def terminal_protocol() -> Protocol:
    """``detect_protocol`` of the terminal that standard output goes to."""
    return detect_protocol(os.environ, sys.stdout.isatty())
