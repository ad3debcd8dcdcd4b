"""One real vLLM server for every test that asks one: ``folder``, ``server``, ``model``, ``client``.

The model is tiny and random, but everything else is real. The image tokenizer is nested (spans of 2
to 48 codes) and the vocabulary mode is ``base``, where no text can spell a code: the harder case of
both.
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.toy import nested_image_tokenizer, save_llm
from unimodal.merge import merge
from unimodal.pipeline import Unimodal
from unimodal.serving.check import Server, running_server

MOST = 48
"""Most codes in an image of the model."""

LOG_LINES = 120
"""How much of a server's log a failing test shows."""

FLAGS = ["--max-num-seqs", "32", "--enable-prompt-tokens-details"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("served")
    # vLLM's CPU kernels want heads of 32 at least.
    llm = save_llm(base / "llm", "qwen3", head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    nested_image_tokenizer(num_latent_tokens=MOST, codebook_size=64).save_pretrained(base / "it")
    return merge(llm, base / "it", base / "toy", vocab_mode="base")


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Server]:
    with running_server(folder, FLAGS, log=folder.parent / "server.log") as it:
        yield it


@pytest.fixture(scope="session")
def model(folder: Path) -> Unimodal:
    return Unimodal.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture
def client(server: Server) -> Any:
    openai = pytest.importorskip("openai", reason="openai's client is not installed")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log under a test that failed."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, Server) and server.log.is_file():
        lines = server.log.read_text(encoding="utf-8", errors="replace").splitlines()
        report.sections.append((f"last lines of {server.log}", "\n".join(lines[-LOG_LINES:])))
    return report
