"""README keeps its word: every link leads somewhere, every command and option exists."""

import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from eval.shapes.render import render
from eval.shapes.scene import sample_scene
from unimodal.shipped import resolve

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    from unimodal.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    blocks = [body for language, body in fenced if language in ("", "sh")]
    for line in re.findall(r"^unimodal .*$", "\n".join(blocks), flags=re.MULTILINE):
        words = shlex.split(line.rstrip("\\"), comments=True)
        for name in words[1].split("|"):
            assert name in commands, f"{page.name}: {line}"
        command = commands[words[1].split("|")[0]]
        if hasattr(command, "commands"):
            command = command.commands[words[2]]
        known = {option for parameter in command.params for option in parameter.opts}
        if command.name in ("serve",):  # every flag of vLLM may follow
            continue
        for word in words[2:]:
            if word.startswith("--") and word != "--" and " " not in word:  # a value in quotes
                assert word.split("=")[0] in known | {"--help", "--debug"}, f"{page.name}: {line}"


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `make demo`, whose model is of the shipped one's kind."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "model").symlink_to(resolve("shipped:model"))
    render(sample_scene(random.Random(0))).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block, found)
    assert found["codes"].shape == (1, 16) and "in [0, 1920)" in text
    assert found["tokenizer"].config.codebook_size == 1920
    assert len(blocks) == 2 and "model" in found


def test_the_guided_tour_names_the_walk() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = text.split("## Read these files first")[1].split("## ")[0]
    files = re.findall(r"^\d\. \[([^\]]+)\]", tour, flags=re.MULTILINE)
    assert len(files) == 8
    assert all((ROOT / file).is_file() for file in files)


def test_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in (ROOT / "README.md").read_text(encoding="utf-8")
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
