"""`unimodal caption | draw | chat`: what they print and write, and what a mistake looks like."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.toy import toy_merged_folder
from unimodal import cli
from unimodal.terminal import (
    Chat,
    detect_protocol,
    picture_escape,
    picture_path,
    printable,
    save_png,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_merged_folder(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the real main() and gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIMODAL_DEBUG", raising=False)

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["unimodal", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


def make_picture(path, seed=0, size=(24, 24)):
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def assert_one_line_error(result, *said):
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "Traceback" not in err
    for words in said:
        assert words in err


# --- caption --------------------------------------------------------------------------------------


def test_caption(run, folder, tmp_path):
    pictures = [make_picture(tmp_path / f"{i}.png", i) for i in range(2)]
    code, out, err = run("caption", "--model", folder, *pictures, "--max-new-tokens", 8)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(picture) for picture in pictures]
    again = run("caption", "-m", folder, pictures[1], "--max-new-tokens", 8)
    assert again[1].splitlines() == lines[1:]


def test_caption_of_odd_pictures(run, folder, tmp_path):
    make_picture(tmp_path / "dot.png", size=(1, 1))
    make_picture(tmp_path / "strip.png", size=(4000, 1))
    code, out, _ = run("caption", "--model", folder, "dot.png", "strip.png", "--max-new-tokens", 4)
    assert code == 0 and len(out.splitlines()) == 2


def test_caption_of_what_is_no_picture(run, folder, tmp_path):
    whole = make_picture(tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("I am a text file.")
    for name in ("cut.png", "text.png", "missing.png"):
        assert_one_line_error(run("caption", "--model", folder, "whole.png", name), name)


# --- draw -----------------------------------------------------------------------------------------


def test_draw_writes_png_with_its_settings(run, folder, tmp_path):
    arguments = ("draw", "--model", folder, "a red circle", "un cœur", "--n", 2, "--seed", 5)
    options = ("--guidance", 2, "--negative", "blue", "--top-k", 7, "--candidates", 3)
    code, out, err = run(*arguments, *options)
    assert (code, err) == (0, "")
    paths = [Path(line) for line in out.splitlines()]
    assert [path.name for path in paths] == [
        "a-red-circle-seed5.png",
        "a-red-circle-seed6.png",
        "un-cœur-seed7.png",
        "un-cœur-seed8.png",
    ]
    assert all(path.parent == Path("drawings") for path in paths)
    image = Image.open(paths[3])
    assert image.size == (16, 16) and image.text["prompt"] == "un cœur"
    settings = json.loads(image.text["unimodal"])
    assert settings["image_tokenizer"] and settings.pop("image_tokenizer")
    assert settings == {
        "prompt": "un cœur",
        "seed": 8,
        "guidance": 2.0,
        "temperature": 1.0,
        "top_k": 7,
        "candidates": 3,
        "budget": None,
        "negative_prompt": "blue",
        "model": str(folder),
        "adapter": None,
    }
    # What the metadata says draws the same picture again, into a file of its own.
    again = run(
        *("draw", "-m", folder, "un cœur", "--seed", 8, "--guidance", 2, "--negative", "blue"),
        *("--top-k", 7, "--candidates", 3, "--out", tmp_path / "again.png"),
    )
    assert again[1] == f"{tmp_path / 'again.png'}\n"
    assert Image.open(tmp_path / "again.png").tobytes() == image.tobytes()
    # A picture that is there is not overwritten.
    second = run(*arguments)[1].splitlines()
    assert Path(second[0]).name == "a-red-circle-seed5-2.png"


def test_draw_a_file_of_prompts(run, folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a star", "n": 2}\n{"prompt": "a ring"}\n')
    arguments = ("draw", "--model", folder, "--prompts", "p.jsonl", "--seed", 5, "--guidance", 1)
    code, out, _ = run(*arguments)
    assert (code, out) == (0, "drawings: 3 drawn, 0 were there, 0 failed\n")
    with Image.open(tmp_path / "drawings" / "000002.png") as image:
        about = json.loads(image.text["unimodal"])
    assert (about["seed"], about["guidance"], about["model"]) == (7, 1.0, str(folder.resolve()))
    assert run(*arguments)[1] == "drawings: 0 drawn, 3 were there, 0 failed\n"
    code, out, err = run(*arguments[:-1], 2)
    assert (code, out) == (2, "") and "guidance 1.0, now it is 2.0" in err
    (tmp_path / "p.jsonl").write_text('{"prompt": "' + "star " * 600 + '"}\n')
    code, out, err = run("draw", "--model", folder, "--prompts", "p.jsonl", "--out", "other")
    assert (code, out) == (1, "other: 0 drawn, 0 were there, 1 failed\n") and "512" in err


def test_mistakes_about_files_of_prompts(run, folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a star"}\n{"promt": "a ring"}\n')
    (tmp_path / "fine.jsonl").write_text('{"prompt": "a star", "budget": 99}\n')

    def draw(*arguments):
        return run("draw", "--model", folder, *arguments)

    assert_one_line_error(draw("--prompts", "p.jsonl"), "line 2", "'promt'", "expected prompt, id")
    assert_one_line_error(draw("a star", "--prompts", "p.jsonl"), "both")
    assert_one_line_error(draw("a star", "--backend", "vllm"), "--prompts")
    assert_one_line_error(draw(), "nothing to draw")
    assert_one_line_error(draw("--prompts", "fine.jsonl", "--backend", "x"), "transformers or vllm")
    assert_one_line_error(draw("--prompts", "fine.jsonl", "--vllm-args", "-x"), "--backend vllm")
    flags = ("--backend", "vllm", "--device", "cpu")
    assert_one_line_error(draw("--prompts", "fine.jsonl", *flags), "--device")
    assert_one_line_error(draw("--prompts", "fine.jsonl"), "000001", "99")
    assert not (tmp_path / "drawings").exists()


def test_draw_mistakes(run, folder, tmp_path):
    def draw(*arguments, model=folder):
        return run("draw", "--model", model, *arguments)

    assert_one_line_error(draw(""), "prompt is empty")
    assert_one_line_error(draw("circle " * 14_300), "reads at most 512", "shorten")
    assert_one_line_error(draw("a star", model=tmp_path / "nothing"), "no folder", "unimodal merge")
    assert_one_line_error(draw("a star", model=tmp_path), "processor_config.json")
    codec = folder / "image_tokenizer"
    assert_one_line_error(draw("a star", model=codec), "image_tokenizer", "unimodal merge")
    assert_one_line_error(draw("a star", "--n", 2, "--out", "one.png"), "one.png", "folder")
    assert_one_line_error(draw("a star", "--budget", 2), "budget")
    assert_one_line_error(draw("a star", "--guidance", "much"), "--guidance")
    assert_one_line_error(draw("a star", "--device", "quantum"), "--device quantum")
    assert_one_line_error(draw("a star", "--dtype", "float7"), "--dtype float7", "bfloat16")
    assert_one_line_error(run("draw", "--model", folder), "nothing to draw")
    assert_one_line_error(run("drawn", "a star"), "drawn")
    assert list(tmp_path.rglob("*.png")) == []


def test_damaged_and_mixed_folders(run, folder, tmp_path):
    import shutil

    from tests.toy import tiny_image_tokenizer

    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(b"\xff" * 5000)
    assert_one_line_error(run("draw", "--model", damaged, "a star"), str(damaged))
    tiny_image_tokenizer(seed=3).save_pretrained(damaged / "image_tokenizer")
    assert_one_line_error(run("draw", "--model", damaged, "a star"), "fingerprint")


def test_a_picture_is_written_whole_or_not_at_all(run, folder, tmp_path, monkeypatch):
    def full(self, path, **options):
        Path(path).write_bytes(b"\x89PNG half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    result = run("draw", "--model", folder, "a star", "--out", tmp_path / "out")
    assert_one_line_error(result, "No space left on device")
    assert list((tmp_path / "out").iterdir()) == []


def test_debug_shows_the_traceback(run, folder, monkeypatch):
    monkeypatch.setenv("UNIMODAL_DEBUG", "")
    monkeypatch.setattr(sys, "argv", ["unimodal", "draw", "--model", str(folder), "", "--debug"])
    with pytest.raises(ValueError, match="empty"):
        cli.main()


def test_a_bug_is_one_line_too(run, monkeypatch):
    def broken(**options):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(cli, "app", broken)
    code, _, err = run("draw")
    assert code == 1
    assert err == "error: RuntimeError: two lines (a bug? --debug shows where)\n"


@pytest.mark.parametrize("command", ["caption", "draw", "chat"])
def test_help_teaches(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Examples" in out and re.search(rf"unimodal {command}\s+--model", out)


# --- chat -----------------------------------------------------------------------------------------


def test_chat_through_a_pipe(run, folder, tmp_path):
    make_picture(tmp_path / "cat.png")
    stdin = "/image cat.png\nWhat is this?\n/draw on\nDraw a star\n/save talk.jsonl\n/quit\nnever\n"
    options = ("--seed", 1, "--temperature", 0, "--max-new-tokens", 16, "--out", "made")
    code, out, err = run("chat", "--model", folder, *options, stdin=stdin)
    assert (code, err) == (0, "")
    [drawn] = list((tmp_path / "made").glob("*.png"))
    assert f"[{drawn}]" in out and drawn.name == "draw-a-star-seed2.png"
    settings = json.loads(Image.open(drawn).text["unimodal"])
    assert settings["prompt"] == "Draw a star" and settings["seed"] == 2
    [line] = (tmp_path / "talk.jsonl").read_text().splitlines()
    messages = json.loads(line)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == [
        {"type": "image", "image": str(tmp_path / "cat.png")},
        {"type": "text", "text": "What is this?"},
    ]
    assert {"type": "image", "image": str(drawn)} in messages[3]["content"]


def test_an_error_ends_a_chat_through_a_pipe(run, folder):
    code, out, err = run("chat", "--model", folder, stdin="/image nothing.png\nhello\n")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and "nothing.png" in err and err.count("\n") == 1
    assert run("chat", "--model", folder, "--draw", "maybe")[0] == 2


@pytest.fixture(scope="module")
def model(folder):
    from unimodal import Unimodal

    return Unimodal.from_pretrained(folder)


@pytest.fixture
def chat(model, tmp_path):
    written = []
    options = {"temperature": 0.0, "max_new_tokens": 16}
    chat = Chat(model, out=tmp_path / "made", options=options, seed=0, write=written.append)
    chat.written = written
    return chat


def test_chat_commands(chat, tmp_path):
    make_picture(tmp_path / "cat.png")
    (tmp_path / "text.png").write_text("no picture")
    chat.run(
        [
            "/help",
            "/draw sometimes",
            "/seed x",
            "/dance",
            "/image",
            f"/image {tmp_path / 'text.png'}",
            "",
        ]
    )
    help_, *errors = chat.written
    assert "/image PATH" in help_
    assert len(errors) == 5 and all(line.startswith("error: ") for line in errors)
    assert chat.messages == []
    chat.run(["/seed 9", "/draw off", f"/image {tmp_path / 'cat.png'}", "//what is it"])
    assert chat.seed == 10 and len(chat.messages) == 2
    assert [part["type"] for part in chat.messages[0]["content"]] == ["image", "text"]
    assert chat.messages[0]["content"][1]["text"] == "/what is it"
    chat.run(["/reset"])
    assert chat.messages == []


def test_chat_remembers(chat):
    chat.run(["/draw on", "one", "two"])
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert len(list(chat.out.glob("*.png"))) == 2
    rendered = chat.model.processor.render(chat.messages)
    assert len(rendered.spans) == 2


def test_an_error_leaves_the_conversation_as_it_was(chat):
    chat.run(["hello", "x" * 100_000, "still there?"])
    assert sum(line.startswith("error: ") for line in chat.written) == 1
    assert [message["content"][0]["text"] for message in chat.messages[::2]] == [
        "hello",
        "still there?",
    ]


def test_ctrl_c_ends_with_one_line(folder, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "unimodal.cli", "chat", "--model", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and would hand that down to what is tested here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdin.write("/help\n")
    process.stdin.flush()
    assert "command" in process.stdout.readline()  # it is loaded and waits for a line
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "error: interrupted\n"


# --- terminal -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "COLORTERM": "truecolor"}, "truecolor"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, "none"),
        ({"TERM": "xterm-256color", "COLORTERM": "24bit"}, "truecolor"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, "256"),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, "none"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, "none"),
        ({}, "none"),
    ],
)
def test_detect_protocol(environment, expected):
    assert detect_protocol(environment, is_terminal=True) == expected
    assert detect_protocol(environment, is_terminal=False) == "none"


def test_picture_escapes_carry_the_picture():
    import base64

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    kitty = picture_escape(image, "kitty")
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty)
    assert len(pieces) > 1 and max(len(data) for _, data in pieces) <= 4096
    assert pieces[0][0].startswith("a=T,f=100,") and pieces[-1][0] == "m=0"
    assert all(control.endswith("m=1") for control, _ in pieces[:-1])
    iterm = re.fullmatch(
        r"\x1b]1337;File=inline=1;size=(\d+);width=32:(.*)\x07\n", picture_escape(image, "iterm2")
    )
    for data in ("".join(data for _, data in pieces), iterm[2]):
        decoded = base64.b64decode(data)
        assert Image.open(io.BytesIO(decoded)).tobytes() == image.tobytes()
    assert int(iterm[1]) == len(decoded)


def test_half_blocks():
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 4, 4))
    top, bottom = picture_escape(image, "truecolor", columns=4).splitlines()
    assert top == "\x1b[38;2;255;0;0m\x1b[48;2;255;0;0m▀" * 4 + "\x1b[0m"
    assert bottom == "\x1b[38;2;0;0;255m\x1b[48;2;0;0;255m▀" * 4 + "\x1b[0m"
    small = picture_escape(image, "256", columns=4).splitlines()
    assert small[0] == "\x1b[38;5;196m\x1b[48;5;196m▀" * 4 + "\x1b[0m"
    assert picture_escape(image, "none") == ""


def test_printable_drops_what_steers_a_terminal():
    assert printable("a\x1b[2Jb\x07\r\nc\td\u200b") == "a[2Jb\nc\td"


def test_picture_paths(tmp_path):
    assert picture_path(tmp_path, "../../etc/passwd", 1).parent == tmp_path
    assert picture_path(tmp_path, "!?", 1).name == "picture-seed1.png"
    assert len(picture_path(tmp_path, "word " * 200, 1).name) < 90
    path = picture_path(tmp_path, "A  star!", 1)
    assert path.name == "a-star-seed1.png"
    save_png(Image.new("RGB", (2, 2)), path, {"prompt": "A  star!"})
    assert picture_path(tmp_path, "A star", 1).name == "a-star-seed1-2.png"
