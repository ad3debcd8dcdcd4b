"""The chat page's client: turns, history, the streamed reply; and what it says when things fail."""

import asyncio
import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenizer_hf.errors import ImageError, ServingError
from unimodal.serving.chat_client import (
    MAX_SIDE_PIXELS,
    Chat,
    Connection,
    ModelCard,
    Picture,
    Settings,
    Turn,
    model_cards,
    read_data_uri,
    read_picture,
    request_body,
    take_chunk,
)


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def image(index: int, colour: str, *, partial: bool = False, **extra: Any) -> dict[str, Any]:
    url = {"url": uri(png(colour))}
    return {"index": index, "type": "image_url", "image_url": url, "partial": partial, **extra}


def test_a_stream_becomes_text_and_pictures_in_their_order() -> None:
    turn = Turn(["draw"])
    for item in (
        chunk(role="assistant", content=""),
        chunk(content="First "),
        chunk(content="one:"),
        chunk(images=[image(0, "red", partial=True)]),
        chunk(images=[image(0, "green", partial=True)]),
        chunk(images=[image(0, "blue", codes=[1, 2])]),
        chunk(content="and another"),
        chunk(images=[image(1, "white", partial=True)]),
        {"choices": [], "usage": {"total_tokens": 3}},
    ):
        take_chunk(turn, item)
    assert turn.reply == [
        "First one:",
        Picture(png("blue"), codes=[1, 2]),
        "and another",
        Picture(png("white"), partial=True),
    ]
    assert turn.drawn == [Picture(png("blue"), codes=[1, 2])]
    take_chunk(turn, chunk("length"))
    assert "cut off" in turn.note


def test_history_goes_back_as_it_came_with_the_codes() -> None:
    drawn = Picture(png(), codes=[5, 6])
    other = Picture(png("blue"), codes=[7])
    chat = Chat()
    chat.ask(["draw two"]).reply = ["one", drawn, "two", other]
    chat.turns[-1].state = "done"
    chat.ask([Picture(png("white")), "like this"])
    assert chat.messages() == [
        {"role": "user", "content": [{"type": "text", "text": "draw two"}]},
        {
            "role": "assistant",
            "content": "onetwo",
            "images": [{**drawn.part, "offset": 3}, {**other.part, "offset": 6}],
        },
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": uri(png("white"))}},
                {"type": "text", "text": "like this"},
            ],
        },
    ]
    assert drawn.part["codes"] == [5, 6]


def test_failed_turns_and_unfinished_pictures_stay_at_home() -> None:
    chat = Chat()
    failed, stopped = chat.ask(["one"]), chat.ask(["two"])
    failed.state = "failed"
    stopped.state, stopped.reply = "stopped", ["a", Picture(png(), partial=True)]
    chat.ask(["three"])
    told = [(message["role"], message["content"]) for message in chat.messages()]
    assert told == [
        ("user", [{"type": "text", "text": "two"}]),
        ("assistant", "a"),
        ("user", [{"type": "text", "text": "three"}]),
    ]
    assert all("images" not in message for message in chat.messages())


def test_a_drawn_picture_that_comes_back_as_input_has_its_codes(tmp_path: Path) -> None:
    chat = Chat()
    turn = chat.ask(["draw"])
    turn.state, turn.reply = "done", [Picture(png(), codes=[1, 2, 3])]
    file = tmp_path / "picture.png"
    file.write_bytes(png())
    [part] = chat.ask([read_picture(file)]).question
    assert isinstance(part, Picture)
    assert part.codes == [1, 2, 3]
    twin = Picture(png(), codes=[1, 2, 4])
    assert twin.key != turn.reply[0].key  # type: ignore[union-attr]
    assert chat.ask([twin]).question == [twin]
    file.write_bytes(png("blue"))
    [part] = chat.ask([read_picture(file)]).question
    assert isinstance(part, Picture)
    assert part.codes is None


def test_asking_again_forgets_the_last_reply() -> None:
    chat = Chat()
    with pytest.raises(ServingError, match="nothing was asked"):
        chat.ask_again()
    chat.ask(["one"]).state = "done"
    chat.ask(["two"]).reply = ["no"]
    assert chat.ask_again() == Turn(["two"])
    assert [turn.question for turn in chat.turns] == [["one"], ["two"]]


@pytest.mark.parametrize(
    ("mode", "modalities"), [("auto", None), ("draw", ["image"]), ("text", ["text"])]
)
def test_settings_become_a_request(mode: Any, modalities: Any) -> None:
    settings = Settings(mode=mode, guidance=2.5, top_k=7, budget=12, seed=3, negative_prompt="dogs")
    body = request_body([{"role": "user", "content": "x"}], "toy", settings)
    assert body.get("modalities") == modalities
    assert body["seed"] == 3
    assert body["stream"] is True
    if mode == "text":
        assert "image" not in body
    else:
        assert body["image"] == {
            "temperature": 1.0,
            "top_k": 7,
            "guidance_scale": 2.5,
            "negative_prompt": "dogs",
            "budget": 12,
            "partial_images": 3,
        }
    plain = request_body([], "toy", Settings())
    assert not {"seed", "max_tokens"} & plain.keys()
    assert request_body([], "toy", Settings(max_tokens=5))["max_tokens"] == 5
    assert not {"budget", "guidance_scale"} & plain["image"].keys()


def test_pictures_are_sent_as_they_are_unless_they_are_large(tmp_path: Path) -> None:
    small = tmp_path / "small.jpg"
    Image.new("RGB", (60, 40), "green").save(small, "JPEG")
    assert read_picture(small) == Picture(small.read_bytes(), "image/jpeg")
    large = tmp_path / "large.jpg"
    rotated = Image.Exif()
    rotated[274] = 6  # the camera lay on its side
    Image.new("RGB", (2 * MAX_SIDE_PIXELS, 400), "green").save(large, "JPEG", exif=rotated)
    sent = read_picture(large)
    assert sent.media_type == "image/png"
    assert Image.open(io.BytesIO(sent.data)).size == (200, MAX_SIDE_PIXELS)
    bitmap = tmp_path / "picture.bmp"
    Image.new("RGB", (5, 6)).save(bitmap)
    assert Image.open(io.BytesIO(read_picture(bitmap).data)).format == "PNG"


@pytest.mark.parametrize("data", [b"hello", png()[:50], b""])
def test_a_file_that_is_no_picture_is_named(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "note.png"
    file.write_bytes(data)
    with pytest.raises(ImageError, match=r"note\.png cannot be read as a picture"):
        read_picture(file)


@pytest.mark.parametrize(
    "value", [None, "https://example.com/a.png", "data:image/png;base64,???", "data:text/html,x"]
)
def test_an_image_that_is_no_data_uri_is_refused(value: Any) -> None:
    with pytest.raises(ServingError, match="data:image/png;base64"):
        read_data_uri(value)


def test_what_a_model_card_tells() -> None:
    codes = {"min": 2, "max": 48, "codebook_size": 64}
    card = ModelCard("toy", {"size": "16x16", "codes": codes, "nested": True})
    assert (card.side_pixels, card.budget, card.codebook_size) == (16, (2, 48), 64)
    assert ModelCard("toy", {"codes": codes, "nested": False}).budget is None
    assert ModelCard("toy", {"defaults": {"top_k": 0}}).default("top_k", 5) == 0
    listed = [
        {"id": "toy", "root": "/models/toy", "unimodal": {"nested": False}},
        {"id": "/models/toy", "root": "/models/toy"},
        {"id": "cats", "root": "/adapters/cats", "parent": "toy"},
    ]
    assert [item.name for item in model_cards(listed)] == ["toy", "cats"]
    unknown = ModelCard("gpt")
    assert (unknown.side_pixels, unknown.budget, unknown.default("top_k", 5)) == (None, None, 5)


# --- a server that fails --------------------------------------------------------------------------


@contextmanager
def failing_server(status: int, body: str, kind: str = "application/json") -> Iterator[str]:
    """A server that says ``body`` to everything and then hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            # More than comes, so that the end is a connection that broke.
            self.send_header("Content-Length", str(len(body) + (kind != "application/json")))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def answer(url: str) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        chunks = Connection(url, "secret-key").answer(request_body([], "toy", Settings()))
        return [item async for item in chunks]

    return asyncio.run(collect())


def told(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": 1}})


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, told("budget is 1, expected 2 to 48"), "budget is 1, expected 2 to 48"),
        (429, told("64 requests wait; try again in 3 s"), "try again in 3 s"),
        (503, told("try again later"), "try again later"),
        (401, told("no"), "UNIMODAL_API_KEY"),
        (500, "<html>oops</html>", "Error code: 500"),
    ],
)
def test_errors_of_the_server_are_readable(status: int, body: str, expected: str) -> None:
    with failing_server(status, body) as url, pytest.raises(ServingError) as caught:
        answer(url)
    assert expected in str(caught.value)
    assert "secret-key" not in str(caught.value)


def test_errors_in_the_middle_of_a_stream_are_readable() -> None:
    stream = f"data: {json.dumps(chunk(content='a'))}\n\n"
    kind = "text/event-stream"
    with (
        failing_server(200, f"{stream}data: {told('too many restarts')}\n\n", kind) as url,
        pytest.raises(ServingError, match="too many restarts"),
    ):
        answer(url)
    with failing_server(200, stream, kind) as url, pytest.raises(ServingError, match="broke off"):
        answer(url)


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(ServingError, match="unimodal serve"):
            asyncio.run(Connection(url).models())
