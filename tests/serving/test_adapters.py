"""LoRA adapters swapped per request on a real server, against transformers and PEFT.

One server for the whole file, with two random adapters of different rank; a third is trained by
`unimodal train` and loaded while the server runs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.adapters import random_adapter
from tests.toy import nested_image_tokenizer, save_llm
from tokenizer_hf.errors import CheckpointError, ServingError
from unimodal.generation.sampling import SamplingSettings, generate
from unimodal.merge import merge
from unimodal.pipeline import Unimodal
from unimodal.serving.adapters import adapter_flags, check_adapter, lora_folders
from unimodal.serving.check import Server, running_server
from unimodal.serving.openai_shapes import data_uri

ROOT = Path(__file__).parents[2]
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
CAPTION_TOKENS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model ``toy`` and the adapters ``one``, ``two``, ``trained``, ``rows``."""
    base = tmp_path_factory.mktemp("adapters")
    llm = save_llm(base / "llm", head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    nested_image_tokenizer(num_latent_tokens=24, codebook_size=64).save_pretrained(base / "it")
    merge(llm, base / "it", base / "toy")
    random_adapter(base / "toy", base / "one", seed=1, rank=8)
    random_adapter(base / "toy", base / "two", seed=2, rank=20)
    return base


def trained(base: Path, name: str, rows: str) -> Path:
    """Train an adapter with the command line, as a user does."""
    (base / "text.jsonl").write_text('{"text": "A red circle is above a blue star."}\n' * 8)
    recipe = {
        "model": "toy",
        "output_dir": name,
        "data": {"text": ["text.jsonl"]},
        "lora": {"rank": 8, "rows": rows},
        "optimizer": {"learning_rate": 0.05},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4},
    }
    (base / "recipe.json").write_text(json.dumps(recipe))  # YAML too
    command = [sys.executable, "-m", "unimodal.cli", "train", "--config", "recipe.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return base / name


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Server]:
    modules = [f"one={base / 'one'}", json.dumps({"name": "two", "path": str(base / "two")})]
    flags = ["--enable-lora", "--lora-modules", *modules, "--max-num-seqs", "32"]
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    try:
        with running_server(base / "toy", flags, log=base / "server.log") as it:
            yield it
    finally:
        del os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]


def picture(index: int) -> Image.Image:
    image = Image.new("RGB", (16, 16), (40 * index % 255, 90, 255 - 30 * index % 255))
    image.paste((250, 250, 20), (index, index, index + 9, index + 9))
    return image


def drawn(server: Server, name: str, prompt: str, guidance: float) -> list[int]:
    body = {"model": name, "prompt": prompt, "temperature": 0, "guidance_scale": guidance}
    answer = server.post("/v1/images/generations", {**body, "return_token_ids": True})
    return list(answer["data"][0]["token_ids"])


def captioned(server: Server, name: str, index: int) -> list[int]:
    part = {"type": "image_url", "image_url": {"url": data_uri(picture(index))}}
    body = {
        "model": name,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}],
        "temperature": 0,
        "max_tokens": CAPTION_TOKENS,
        "return_token_ids": True,
    }
    return list(server.post("/v1/chat/completions", body)["choices"][0]["token_ids"])


def expected(model: Unimodal, prompts: list[str], guidance: float | None) -> list[list[int]]:
    """Greedy drawings of the prompts; captions of as many pictures where guidance is None."""
    processor = model.processor
    if guidance is None:
        turns = [
            [{"type": "image", "image": picture(index)}, {"type": "text", "text": "What?"}]
            for index in range(len(prompts))
        ]
        rendered = [
            processor.render([{"role": "user", "content": turn}], add_generation_prompt=True)
            for turn in turns
        ]
        settings = SamplingSettings(max_new_tokens=CAPTION_TOKENS)
        rows = [row.input_ids for row in rendered]
        return generate(model.model, processor, rows, settings, mode="text")
    rows = [
        processor.render(processor.draw_messages(prompt), add_generation_prompt=True).input_ids
        for prompt in [*prompts, ""]
    ]
    settings = SamplingSettings(image_temperature=0, guidance=guidance)
    negative = [rows[-1]] * len(prompts)
    return generate(
        model.model, processor, rows[:-1], settings, mode="image", negative_prompts=negative
    )


PROMPTS = ["a red circle", "two blue stars", "a heart above a ring", "three crosses"]


def everything(model: Unimodal) -> list[list[int]]:
    return [ids for guidance in (None, 1.0, 3.0) for ids in expected(model, PROMPTS, guidance)]


def ask_everything(server: Server, names: list[str]) -> dict[str, list[list[int]]]:
    """Ask every model for all of it at once, so that a batch holds rows of several adapters."""
    with ThreadPoolExecutor(64) as pool:
        asked = {
            name: [
                *(pool.submit(captioned, server, name, index) for index in range(len(PROMPTS))),
                *(pool.submit(drawn, server, name, prompt, 1.0) for prompt in PROMPTS),
                *(pool.submit(drawn, server, name, prompt, 3.0) for prompt in PROMPTS),
            ]
            for name in names
        }
        return {name: [task.result() for task in tasks] for name, tasks in asked.items()}


class TestServed:
    pytestmark = needs_vllm

    def test_adapters_in_one_batch_give_the_ids_of_peft(self, server: Server, base: Path) -> None:
        found = ask_everything(server, ["toy", "one", "two"])
        assert found["toy"] != found["one"] != found["two"] != found["toy"]
        for name in ("toy", "one", "two"):
            adapter = None if name == "toy" else base / name
            model = Unimodal.from_pretrained(
                base / "toy", device="cpu", dtype="float32", adapter=adapter
            )
            assert found[name] == everything(model), name

    def test_an_adapter_is_trained_and_loaded_while_the_server_runs(
        self, server: Server, base: Path
    ) -> None:
        new = trained(base, "new", rows="none")
        with pytest.raises(ServingError, match="404"):
            drawn(server, "new", PROMPTS[0], 1.0)
        request = {"lora_name": "new", "lora_path": str(new)}
        load(server, "load", request)
        names = [model["id"] for model in json.loads(server.get("/v1/models"))["data"]]
        assert {"toy", "one", "two", "new"} <= set(names)
        found = ask_everything(server, ["toy", "one", "new"])
        for name, folder in (("toy", None), ("one", base / "one"), ("new", new)):
            model = Unimodal.from_pretrained(
                base / "toy", device="cpu", dtype="float32", adapter=folder
            )
            assert found[name] == everything(model), name
        load(server, "unload", {"lora_name": "new"})
        with pytest.raises(ServingError, match="404"):
            captioned(server, "new", 0)

    def test_trained_rows_are_refused_before_the_server_starts(self, base: Path) -> None:
        rows = trained(base, "rows", rows="free")
        with (
            pytest.raises(ServingError, match=r"unimodal merge-adapter .*rows"),
            running_server(base / "toy", ["--lora-modules", f"r={rows}"], log=base / "log"),
        ):
            pass
        assert "EngineCore" not in (base / "log").read_text()

    def test_trained_rows_are_refused_at_run_time_too(self, server: Server, base: Path) -> None:
        rows = trained(base, "rows", rows="free")
        with pytest.raises(ServingError, match="unsupported LoRA weight"):  # vLLM's own words
            load(server, "load", {"lora_name": "rows", "lora_path": str(rows)})
        assert drawn(server, "one", PROMPTS[0], 1.0)


def load(server: Server, what: str, body: dict[str, Any]) -> None:
    """Load or unload an adapter; vLLM answers with a bare string."""
    import urllib.error
    import urllib.request

    request = urllib.request.Request(
        f"{server.url}/v1/{what}_lora_adapter",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert b"Success" in answer.read()
    except urllib.error.HTTPError as error:
        raise ServingError(f"{error.code}: {error.read().decode()}") from error


# --- flags, without a server ----------------------------------------------------------------------


def write_adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, **config}))
    return folder


def test_flags_follow_the_adapters(tmp_path: Path) -> None:
    small = write_adapter(tmp_path / "small", r=8)
    large = write_adapter(tmp_path / "large", r=8, rank_pattern={"q_proj": 48})
    given = ["--port", "8000", "--lora-modules", f"a={small}", f"b={large}", "--enforce-eager"]
    assert lora_folders(given) == [str(small), str(large)]
    flags = adapter_flags(given)
    assert flags == ["--enable-lora", "--max-lora-rank", "64", "--max-loras", "2"]
    assert adapter_flags([*given, "--enable_lora", "--max-lora-rank=128"]) == ["--max-loras", "2"]
    assert adapter_flags(["--port", "8000"]) == []
    # On a CPU one slot stays empty, whatever is loaded later.
    assert adapter_flags(given, on_cpu=True)[-2:] == ["--max-loras", "3"]
    runtime = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    assert adapter_flags(given, on_cpu=True, environ=runtime)[-2:] == ["--max-loras", "10"]
    assert adapter_flags(["--enable-lora"], on_cpu=True) == ["--max-loras", "2"]
    with pytest.raises(ServingError, match="expected 3 or more"):
        adapter_flags([*given, "--max-loras", "2"], on_cpu=True)
    as_json = json.dumps({"name": "a", "path": str(small), "base_model_name": "toy"})
    assert lora_folders([f"--lora-modules={as_json}"]) == [str(small)]
    assert check_adapter("owner/hub-id") == 0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "merge-adapter"),
        ({"trainable_token_indices": [5]}, "rows: none"),
        ({"modules_to_save": ["embed_tokens"]}, "trained rows .*merge-adapter"),
        (
            {"modules_to_save": ["ln_f", "q_norm"]},
            r"trained norms \(ln_f, q_norm\).*norms_learning_rate",
        ),
        (
            {"trainable_token_indices": [5], "modules_to_save": ["norm"]},
            r"rows of the embedding and norms \(norm\).*rows: none` and .*norms_learning_rate",
        ),
        ({"use_dora": True}, "use_dora"),
        ({"r": 1024}, "1024"),
    ],
)
def test_adapters_that_are_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", **config)
    with pytest.raises(ServingError, match=said):
        adapter_flags(["--lora-modules", f"a={folder}"])


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        adapter_flags(["--lora-modules", f"a={tmp_path}"])
    with pytest.raises(ServingError, match="NAME=FOLDER"):
        adapter_flags(["--lora-modules", str(tmp_path)])
