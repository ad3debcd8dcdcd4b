"""`unimodal draw --backend vllm`: killed and resumed, with an adapter, against transformers."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serving.adapters import random_adapter
from tests.toy import nested_image_tokenizer, save_llm, tiny_image_tokenizer
from unimodal.merge import merge

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

ROOT = Path(__file__).parents[2]


def entries(out: Path) -> dict[str, dict[str, Any]]:
    path = out / "manifest.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["file"]: entry for entry in map(json.loads, lines)}


def command(folder: Path, backend: str, *more: str, adapted: bool = True) -> list[str]:
    words = ["draw", "--model", "toy", "--prompts", "prompts.jsonl"]
    words += ["--adapter", "adapter"] if adapted else []
    words += ["--dtype", "float32", "--backend", backend, "--out", backend, *more]
    return [sys.executable, "-m", "unimodal.cli", *words]


def test_a_killed_batch_goes_on_and_equals_that_of_transformers(tmp_path: Path) -> None:
    llm = save_llm(tmp_path / "llm", head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    image_tokenizer = nested_image_tokenizer(num_latent_tokens=32, codebook_size=64)
    image_tokenizer.save_pretrained(tmp_path / "it")
    folder = merge(llm, tmp_path / "it", tmp_path / "toy")
    random_adapter(folder, tmp_path / "adapter", seed=1)
    lines = [{"prompt": f"a red circle {i}", "guidance": 1 + i % 2, "n": 4} for i in range(40)]
    lines[5]["prompt"] = "star " * 600  # longer than the context
    lines[5]["n"] = 1
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "prompts.jsonl").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options: Any = {"cwd": tmp_path, "env": environment}

    few = ("--vllm-args", "--max-num-seqs 2")  # slow enough to be killed in the middle
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(command(folder, "vllm", *few), stdout=log, stderr=log, **options)
    limit = time.monotonic() + 300
    while len(entries(tmp_path / "vllm")) < 5 and time.monotonic() < limit:
        assert first.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    started = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    done = {name for name, entry in entries(tmp_path / "vllm").items() if "codes" in entry}
    assert 4 <= len(done) < 150
    times = {name: (tmp_path / "vllm" / name).stat().st_mtime_ns for name in done}

    again = subprocess.run(command(folder, "vllm"), capture_output=True, text=True, **options)
    assert again.returncode == 1, again.stderr  # one prompt is too long
    assert f"{156 - len(done)} drawn, {len(done)} were there, 1 failed" in again.stdout
    assert {name: (tmp_path / "vllm" / name).stat().st_mtime_ns for name in done} == times

    plain = subprocess.run(command(folder, "transformers"), capture_output=True, **options)
    assert plain.returncode == 1, plain.stderr
    ours, theirs = entries(tmp_path / "vllm"), entries(tmp_path / "transformers")
    too_long = ours.pop("000006.png"), theirs.pop("000006.png")
    assert [entry["status"] for entry in too_long] == ["error", "error"]
    assert len(ours) == 156 and ours == theirs
    for name in ours:
        drawn = [(tmp_path / backend / name).read_bytes() for backend in ("vllm", "transformers")]
        assert drawn[0] == drawn[1]


def test_the_best_candidates_equal_those_of_transformers(tmp_path: Path) -> None:
    llm = save_llm(tmp_path / "llm", head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    tiny_image_tokenizer(image_size=32).save_pretrained(tmp_path / "it")  # 4 x 4 codes
    folder = merge(llm, tmp_path / "it", tmp_path / "toy", row_ends="auto")
    lines = [{"prompt": f"a red circle {i}", "guidance": 1 + i % 2, "n": 2} for i in range(6)]
    text = "".join(json.dumps({**line, "candidates": 4}) + "\n" for line in lines)
    (tmp_path / "prompts.jsonl").write_text(text)
    options: Any = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    found = []
    for backend in ("vllm", "transformers"):
        words = command(folder, backend, adapted=False)
        subprocess.run(words, check=True, capture_output=True, **options)
        found.append(entries(tmp_path / backend))
    assert len(found[0]) == 12 and found[0] == found[1]

    random_adapter(folder, tmp_path / "adapter", seed=1)
    words = command(folder, "vllm", "--candidates", "2")
    refused = subprocess.run(words, capture_output=True, text=True, **options)
    assert refused.returncode != 0 and "candidates" in refused.stderr
    assert "Loading" not in refused.stderr  # before an engine is started
