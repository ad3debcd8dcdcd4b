"""Replies in which text and images alternate, on a real server, against transformers.

One server for the whole file: a random model whose rows of ``<|image_start|>``, ``<|image_end|>``
and end of turn are scaled, so that it starts images by itself, of different lengths, and comes to
an end now and then.
"""

import base64
import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.asking import user
from tests.toy import nested_image_tokenizer, save_llm, scale_rows
from unimodal.generation.sampling import SamplingSettings, default_stop_ids, generate
from unimodal.merge import merge
from unimodal.pipeline import Unimodal
from unimodal.serving.check import Server, running_server

openai = pytest.importorskip("openai", reason="openai's client is not installed")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

LEAST, MOST = 2, 24
PROMPTS = [
    f"{what} {colour} {shape}{mark}"
    for what in ("Tell me of a", "Draw:", "What is a")
    for colour, shape in (("red", "star"), ("blue", "ring"), ("pink", "heart"), ("cyan", "cross"))
    for mark in (".", "!")
]
TOKENS = 150
FLAGS = ["--max-num-seqs", "32", "--enable-prompt-tokens-details", "--block-size", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("replies")
    llm = save_llm(base / "llm", "qwen3", head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    nested_image_tokenizer(num_latent_tokens=MOST, codebook_size=64).save_pretrained(base / "it")
    merged = merge(llm, base / "it", base / "toy", vocab_mode="base")
    processor = Unimodal.from_pretrained(merged, device="cpu", dtype="float32").processor
    vocabulary = processor.vocabulary
    factors = {
        vocabulary.start_token_id: 4.0,
        vocabulary.end_token_id: 2.0,
        processor.tokenizer.eos_token_id: 1.5,
    }
    scale_rows(merged, factors)
    return merged


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with running_server(folder, FLAGS, log=folder.parent / "server.log") as it:
        yield it


@pytest.fixture(scope="module")
def model(folder: Path) -> Unimodal:
    return Unimodal.from_pretrained(folder, device="cpu", dtype="float32")


def ask(client: Any, prompt: Any, **changes: Any) -> Any:
    """One greedy reply, ids included."""
    extra = {"return_token_ids": True, "image": {"temperature": 0, "guidance_scale": 1}}
    extra["image"] |= changes.pop("image", {})
    for name in ("modalities", "vllm_xargs"):
        if name in changes:
            extra[name] = changes.pop(name)
    request = {"temperature": 0, "max_tokens": TOKENS, **changes}
    messages = prompt if isinstance(prompt, list) else [user(prompt)]
    return client.chat.completions.create(
        model="toy", messages=messages, extra_body=extra, **request
    )


def expected(
    model: Unimodal, prompts: list[Any], mode: Any = "auto", tokens: int = TOKENS, **settings: Any
) -> list[list[int]]:
    """What transformers writes."""
    processor = model.processor
    ids = [
        processor.render(
            prompt if isinstance(prompt, list) else [user(prompt)], add_generation_prompt=True
        ).input_ids
        for prompt in prompts
    ]
    negative = processor.render(processor.draw_messages(""), add_generation_prompt=True).input_ids
    return generate(
        model.model,
        processor,
        ids,
        SamplingSettings(image_temperature=0, max_new_tokens=tokens, **settings),
        mode=mode,
        max_images=4 if mode == "auto" else None,
        negative_prompts=[negative] * len(ids),
        stop_token_ids=default_stop_ids(model.model, processor.tokenizer),
    )


def num_images(model: Unimodal, ids: list[int]) -> int:
    return ids.count(model.processor.vocabulary.start_token_id)


def check_shape(model: Unimodal, choice: Any) -> None:
    """The message says the same as the ids."""
    message = choice.message
    images = getattr(message, "images", None) or []
    parts: list[dict[str, Any]] = []
    done = 0
    for image in images:
        parts.append({"type": "text", "text": message.content[done : image["offset"]]})
        parts.append(image)
        done = image["offset"]
    parts.append({"type": "text", "text": message.content[done:]})
    parts = [part for part in parts if part.get("text") != ""]
    wanted = model.processor.parse(choice.token_ids)
    # parse cuts the white space around the whole reply, vLLM does not.
    assert [part["type"][:5] for part in parts if part.get("text", "x").strip()] == [
        part["type"][:5] for part in wanted if part.get("text", "x").strip()
    ]
    assert [image["codes"] for image in images] == [
        part["codes"] for part in wanted if part["type"] == "image"
    ]
    assert "".join(part.get("text", "") for part in wanted) == message.content.strip()
    for image, part in zip(images, (p for p in wanted if p["type"] == "image"), strict=True):
        assert opened(image).tobytes() == part["image"].tobytes()


def opened(part: dict[str, Any]) -> Image.Image:
    url = part["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def test_the_model_decides_and_writes_what_it_writes_in_transformers(
    client: Any, model: Unimodal
) -> None:
    answers = [ask(client, prompt) for prompt in PROMPTS]
    wanted = expected(model, PROMPTS)
    assert [answer.choices[0].token_ids for answer in answers] == wanted
    counts = [num_images(model, ids) for ids in wanted]
    assert {0, 1} < set(counts) and max(counts) >= 3
    ends = {answer.choices[0].finish_reason for answer in answers}
    assert ends == {"stop", "length"}
    for answer, ids in zip(answers, wanted, strict=True):
        assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
        assert answer.usage.completion_tokens == len(ids)
        assert answer.usage.total_tokens == len(answer.prompt_token_ids) + len(ids)
        check_shape(model, answer.choices[0])
