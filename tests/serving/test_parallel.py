"""Two ranks on two cores: tensor and data parallelism on a real server, against transformers."""

import os
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tests.toy import nested_image_tokenizer, save_llm
from unimodal.merge import merge
from unimodal.pipeline import Unimodal
from unimodal.serving.check import compare, running_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores"),
]

PROMPTS = [f"{count} {shape}s" for count in ("two", "three") for shape in ("star", "ring", "heart")]


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--data-parallel-size"])
def test_two_ranks_give_the_ids_of_transformers(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = save_llm(tmp_path / "llm", head_dim=32, num_attention_heads=4, num_key_value_heads=2)
    nested_image_tokenizer(num_latent_tokens=16, codebook_size=64).save_pretrained(tmp_path / "it")
    folder = merge(llm, tmp_path / "it", tmp_path / "toy")
    model = Unimodal.from_pretrained(folder, device="cpu", dtype="float32")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core for each rank
    pictures = [Image.new("RGB", (16, 16), (40 * index, 90, 200)) for index in range(4)]
    with running_server(folder, [flag, "2"], log=tmp_path / "log") as server:
        result = compare(server, model, PROMPTS, pictures)
        assert result["different"] == []
        # Guided pairs side by side: both halves of each have to meet on one rank.
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            asked = [pool.submit(compare, server, model, [p], [], guidance=3.0) for p in PROMPTS]
            assert [task.result()["different"] for task in asked] == [[]] * len(PROMPTS)
        ranks = {
            line.split('engine="')[1].split('"')[0]
            for line in server.get("/metrics").splitlines()
            if line.startswith("vllm:generation_tokens_total{") and not line.endswith(" 0.0")
        }
    assert ranks == ({"0", "1"} if flag.startswith("--data") else {"0"})
