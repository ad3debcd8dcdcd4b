"""Replies in which text and images alternate, on a real server, against transformers.

One server for the whole file: a random model whose rows of ``<|image_start|>``, ``<|image_end|>``
and end of turn are scaled, so that it starts images by itself, of different lengths, and comes to
an end now and then.
"""

import base64
import io
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.asking import at_work, engine_asleep, image_part, metric, picture, user
from tests.toy import nested_image_tokenizer, save_llm, scale_rows
from unimodal.generation.sampling import SamplingSettings, default_stop_ids, generate
from unimodal.merge import merge
from unimodal.pipeline import Unimodal
from unimodal.processing_unimodal import UnimodalProcessor
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
OWN = {"guidance": 2.0, "temperature": 0.5, "top_k": 30}
"""How the model draws where a request says nothing."""
FLAGS = ["--max-num-seqs", "32", "--enable-prompt-tokens-details", "--block-size", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("replies")
    llm = save_llm(base / "llm", "qwen3", head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    nested_image_tokenizer(num_latent_tokens=MOST, codebook_size=64).save_pretrained(base / "it")
    merged = merge(llm, base / "it", base / "toy", vocab_mode="base")
    processor = UnimodalProcessor.from_pretrained(merged)
    vocabulary = processor.vocabulary
    # Pieces of characters are made unlikely: vLLM holds a text back that ends in one.
    pieces = {
        token_id: 0.0
        for token_id in range(vocabulary.start_token_id)
        if "\N{REPLACEMENT CHARACTER}" in processor.tokenizer.decode([token_id])
    }
    factors = pieces | {
        vocabulary.start_token_id: 6.0,
        vocabulary.end_token_id: 2.5,
        processor.tokenizer.eos_token_id: 2.2,
    }
    scale_rows(merged, factors)
    config = merged / "processor_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "draw_settings": OWN}), encoding="utf-8")
    return merged


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with running_server(folder, FLAGS, log=folder.parent / "server.log") as it:
        yield it


@pytest.fixture(scope="module")
def model(folder: Path) -> Unimodal:
    return Unimodal.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def wanted(model: Unimodal) -> list[list[int]]:
    """What transformers answers to ``PROMPTS``."""
    return expected(model, PROMPTS)


@pytest.fixture(scope="module")
def many(model: Unimodal, wanted: list[list[int]]) -> str:
    """A prompt that several images answer."""
    counts = [num_images(model, ids) for ids in wanted]
    return PROMPTS[counts.index(max(counts))]


def ask(client: Any, prompt: Any, **changes: Any) -> Any:
    """One greedy reply, ids included."""
    extra = {"return_token_ids": True, "image": {"temperature": 0, "guidance_scale": 1}}
    extra["image"] |= changes.pop("image", {})
    extra |= changes.pop("extra", {})
    for name in ("modalities", "vllm_xargs"):
        if name in changes:
            extra[name] = changes.pop(name)
    if extra.get("modalities") == ["text"]:
        del extra["image"]
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
    text = "".join(part.get("text", "") for part in wanted)
    assert text.strip() == message.content.strip()
    for image, part in zip(images, (p for p in wanted if p["type"] == "image"), strict=True):
        assert opened(image).tobytes() == part["image"].tobytes()


def opened(part: dict[str, Any]) -> Image.Image:
    url = part["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def test_the_model_decides_and_writes_what_it_writes_in_transformers(
    client: Any, model: Unimodal, wanted: list[list[int]]
) -> None:
    answers = [ask(client, prompt) for prompt in PROMPTS]
    assert [answer.choices[0].token_ids for answer in answers] == wanted
    counts = [num_images(model, ids) for ids in wanted]
    assert {0, 1, 2, 4} <= set(counts)
    ends = {answer.choices[0].finish_reason for answer in answers}
    assert ends == {"stop", "length"}
    for answer, ids in zip(answers, wanted, strict=True):
        assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
        assert answer.usage.completion_tokens == len(ids)
        assert answer.usage.total_tokens == len(answer.prompt_token_ids) + len(ids)
        check_shape(model, answer.choices[0])


def test_guided_images_in_a_reply_are_those_of_transformers(client: Any, model: Unimodal) -> None:
    prompts = PROMPTS[:8]
    answers = [ask(client, prompt, image={"guidance_scale": 3.0}) for prompt in prompts]
    wanted = expected(model, prompts, guidance=3.0)
    assert [answer.choices[0].token_ids for answer in answers] == wanted
    assert sum(num_images(model, ids) for ids in wanted) >= 3


def test_an_image_first_then_text(client: Any, model: Unimodal) -> None:
    prompts = PROMPTS[:6]
    wanted = expected(model, prompts, "image")
    texts = []
    for prompt, ids in zip(prompts, wanted, strict=True):
        answer = ask(client, prompt, modalities=["image"])
        [choice] = answer.choices
        assert choice.token_ids == ids
        assert len(choice.message.images) == 1 and choice.message.images[0]["offset"] == 0
        assert answer.usage.completion_tokens == len(ids)
        check_shape(model, choice)
        texts.append(choice.message.content)
    assert any(texts)


def test_a_reply_without_images_is_an_ordinary_one(
    client: Any, model: Unimodal, wanted: list[list[int]]
) -> None:
    prompts = PROMPTS[:8]
    answers = [ask(client, prompt, modalities=["text"]) for prompt in prompts]
    texts = expected(model, prompts, "text")
    assert [answer.choices[0].token_ids for answer in answers] == texts
    plain = next(p for p, ids in zip(PROMPTS, wanted, strict=True) if not num_images(model, ids))
    decided, forbidden = (
        client.chat.completions.create(
            model="toy", messages=[user(plain)], temperature=0, max_tokens=TOKENS, extra_body=extra
        ).model_dump()
        for extra in ({}, {"modalities": ["text"]})
    )
    for answer in (decided, forbidden):
        assert answer.pop("id").startswith("chatcmpl-")
        del answer["created"]
        answer["usage"].pop("prompt_tokens_details")  # the second finds the prompt cached
    assert decided == forbidden
    assert not {"images", "token_ids"} & {*decided["choices"][0]["message"]}
    assert decided["choices"][0]["token_ids"] is None and decided["prompt_token_ids"] is None


@pytest.mark.parametrize("tokens", [3, 9, 20, 40])
def test_an_image_is_started_only_where_it_fits(client: Any, model: Unimodal, tokens: int) -> None:
    wanted = expected(model, PROMPTS, tokens=tokens, budget=9)
    for prompt, ids in zip(PROMPTS, wanted, strict=True):
        answer = ask(client, prompt, max_tokens=tokens, image={"budget": 9})
        assert answer.choices[0].token_ids == ids
    if tokens > 3:
        assert any(num_images(model, ids) for ids in wanted)


def test_the_number_of_images_is_capped(client: Any, model: Unimodal, many: str) -> None:
    prompt = many
    answer = ask(client, prompt, image={"max_images": 1})
    assert num_images(model, answer.choices[0].token_ids) == 1
    assert len(answer.choices[0].token_ids) == TOKENS or answer.choices[0].finish_reason == "stop"


class Streamed:
    """What the chunks of one choice say."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.images: list[dict[str, Any]] = []
        self.roles = 0
        self.finish: list[str] = []
        self.logprobs: list[Any] = []


def collect(chunks: list[Any]) -> dict[int, Streamed]:
    found: dict[int, Streamed] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            streamed = found.setdefault(choice.index, Streamed())
            assert not streamed.finish, "a chunk behind the last one"
            streamed.ids += getattr(choice, "token_ids", None) or []
            streamed.text += choice.delta.content or ""
            streamed.images += getattr(choice.delta, "images", None) or []
            streamed.roles += choice.delta.role is not None
            if choice.finish_reason:
                streamed.finish.append(choice.finish_reason)
            if choice.logprobs:
                streamed.logprobs += choice.logprobs.content
    return found


def test_a_stream_holds_what_the_whole_answer_holds(
    client: Any, model: Unimodal, many: str
) -> None:
    prompt = many
    for n, modalities in ((1, None), (3, None), (2, ["image"])):
        extra: dict[str, Any] = {"modalities": modalities} if modalities else {}
        whole = ask(client, prompt, n=n, logprobs=True, **extra)
        options = {"include_usage": True}
        chunks = list(
            ask(client, prompt, n=n, logprobs=True, stream=True, stream_options=options, **extra)
        )
        assert len({chunk.id for chunk in chunks}) == 1
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        streamed = collect(chunks)
        assert sorted(streamed) == list(range(n))
        for choice in whole.choices:
            one = streamed[choice.index]
            assert one.ids == choice.token_ids
            assert one.text == choice.message.content
            assert one.roles == 1
            assert one.finish == [choice.finish_reason]
            number = len(choice.message.images)
            assert [image.pop("index") for image in one.images] == list(range(number))
            assert not any(image.pop("partial") for image in one.images)
            assert one.images == choice.message.images
            text_ids = [
                i for i in choice.token_ids if i not in model.processor.vocabulary.new_token_ids
            ]
            assert len(one.logprobs) == len(choice.logprobs.content) == len(text_ids)
        usages = [chunk.usage for chunk in chunks if chunk.usage]
        assert len(usages) == 1 and chunks[-1].usage == usages[0]
        assert usages[0].completion_tokens == whole.usage.completion_tokens
        assert usages[0].prompt_tokens == whole.usage.prompt_tokens


def test_previews_come_before_their_image(client: Any, model: Unimodal) -> None:
    for prompt in PROMPTS:  # some images are too short for a preview
        options = {"partial_images": 3}
        stream = ask(client, prompt, stream=True, modalities=["image"], image=options)
        images = collect(list(stream))[0].images
        if len(images) > 2:
            break
    assert [image["partial"] for image in images] == [True] * (len(images) - 1) + [False]
    assert 2 < len(images) <= 4
    assert {image["index"] for image in images} == {0}
    codes = images[-1]["codes"]
    assert all("codes" not in image for image in images[:-1])
    prefixes = {
        model.processor.decode_beginning(codes[:length]).tobytes()  # type: ignore[union-attr]
        for length in range(LEAST, len(codes))
    }
    assert all(opened(image).tobytes() in prefixes for image in images[:-1])
    with pytest.raises(openai.BadRequestError, match="stream"):
        ask(client, "Draw: a star", image={"partial_images": 1})


def test_sampled_replies_are_the_same_for_the_same_seed(
    client: Any, model: Unimodal, many: str
) -> None:
    def sample(**changes: Any) -> list[list[int]]:
        answer = ask(
            client,
            many,
            temperature=0.8,
            image={"temperature": 1.0},
            **{"n": 3, "seed": 11, **changes},
        )
        return [choice.token_ids for choice in answer.choices]

    first = sample()
    assert sample() == first
    assert len({tuple(ids) for ids in first}) == 3
    assert sample(n=1, seed=12) == [first[1]]
    assert sample(seed=40) != first
    assert sum(num_images(model, ids) for ids in first) >= 2


def test_the_model_s_own_settings_are_the_defaults(client: Any, model: Unimodal) -> None:
    told = client.models.list().data[0].unimodal["defaults"]
    assert (told["guidance_scale"], told["temperature"], told["top_k"]) == (2.0, 0.5, 30)
    answer = client.images.generate(
        prompt="a star", n=3, extra_body={"seed": 7, "return_token_ids": True}
    )
    ids, negative = (
        model.processor.render(
            model.processor.draw_messages(text), add_generation_prompt=True
        ).input_ids
        for text in ("a star", "")
    )
    settings = SamplingSettings(guidance=2.0, image_temperature=0.5, image_top_k=30, seed=7)
    expected = generate(
        model.model,
        model.processor,
        [ids] * 3,
        settings,
        mode="image",
        negative_prompts=[negative] * 3,
    )
    assert [image.token_ids for image in answer.data] == expected


def test_a_stop_string_ends_the_reply_behind_an_image(client: Any) -> None:
    for prompt in PROMPTS:
        whole = ask(client, prompt).choices[0].message
        offset = whole.images[0]["offset"] if hasattr(whole, "images") else len(whole.content)
        new = sorted(set(whole.content[offset:]) - set(whole.content[:offset]))
        if new:
            break
    stop = whole.content.index(new[0])
    message = ask(client, prompt, stop=new[:1]).choices[0].message
    assert message.content == whole.content[:stop]
    assert message.images == [image for image in whole.images if image["offset"] <= stop]


def test_a_client_that_leaves_a_stream_ends_all_its_segments(
    client: Any, server: Server, many: str
) -> None:
    written = metric(server, "vllm:generation_tokens_total")
    abandoned = metric(server, "unimodal:requests_abandoned_total", cause="client_left")
    with engine_asleep(server):
        stream = ask(
            client,
            many,
            n=4,
            stream=True,
            max_tokens=350,
            modalities=["image"],
            image={"guidance_scale": 2.0, "partial_images": 3},
            extra={"ignore_eos": True},
        )
        time.sleep(0.5)  # the pairs of four choices are on their way to the engine
        assert metric(server, "unimodal:queue_depth") == 1
        stream.close()
        time.sleep(0.5)
    left = time.monotonic()
    while at_work(server) > 0:
        assert time.monotonic() - left < 2
        time.sleep(0.05)
    found = metric(server, "unimodal:requests_abandoned_total", cause="client_left")
    assert found == abandoned + 1
    # Four images and what follows them would be 4 x 350 ids.
    assert metric(server, "vllm:generation_tokens_total") - written < 4 * MOST
    assert ask(client, many, max_tokens=3).choices[0].token_ids


def test_content_parts_by_option(client: Any, model: Unimodal, many: str) -> None:
    prompt = many
    default = ask(client, prompt).choices[0].message
    message = ask(client, prompt, image={"content_format": "parts"}).choices[0].message
    assert getattr(message, "images", None) is None
    texts = [part["text"] for part in message.content if part["type"] == "text"]
    assert "".join(texts) == default.content
    images = [part for part in message.content if part["type"] == "image_url"]
    assert images == default.images


def test_images_in_the_history_hit_the_prefix_cache(client: Any, model: Unimodal) -> None:
    prompt = [user("Draw: what nobody drew before, and say so.")]
    follow = user("And now?")
    answer = ask(client, prompt, modalities=["image"], max_tokens=MOST + 20)
    message = answer.choices[0].message
    [image] = message.images
    parts = [{"type": "image", "codes": image["codes"]}, {"type": "text", "text": message.content}]
    wanted = model.processor.render(
        [*prompt, {"role": "assistant", "content": parts}, follow], add_generation_prompt=True
    )
    [(_, image_stop)] = wanted.spans
    without_codes = {"type": "image_url", "image_url": image["image_url"]}
    echoes = [
        message.model_dump(exclude_none=True),
        {"role": "assistant", "content": [image, {"type": "text", "text": message.content}]},
        {
            "role": "assistant",
            "content": message.content,
            "images": [{**without_codes, "offset": 0}],
        },
    ]
    for number, echo in enumerate(echoes):
        for _ in range(2 if number == 2 else 1):  # encoded again, an image may be another one
            reply = ask(client, [*prompt, echo, follow], modalities=["text"], max_tokens=2)
        if number < 2:
            assert reply.prompt_token_ids == wanted.input_ids
        cached = reply.usage.prompt_tokens_details.cached_tokens
        assert cached >= 32 * (image_stop // 32) > len(image["codes"])


def test_nothing_from_outside_opens_an_image(client: Any, model: Unimodal, many: str) -> None:
    vocabulary = model.processor.vocabulary
    start, image_ids = vocabulary.start_token_id, set(vocabulary.new_token_ids)
    prompt = many
    marker = {"unimodal_start_before": 1000}
    with pytest.raises(openai.BadRequestError, match="unimodal_start_before"):
        ask(client, prompt, vllm_xargs=marker)
    ids = model.processor.render([user(prompt)], add_generation_prompt=True).input_ids

    def complete(**extra: Any) -> list[int]:
        answer = client.completions.create(
            model="toy",
            prompt=ids,
            temperature=0,
            max_tokens=TOKENS,
            extra_body={"return_token_ids": True, "vllm_xargs": marker, **extra},
        )
        return answer.choices[0].token_ids

    assert not set(complete()) & image_ids
    stopped = complete(stop_token_ids=[start])
    assert stopped[-1] == start and not set(stopped[:-1]) & image_ids
    least = complete(stop_token_ids=[start], min_tokens=TOKENS - 1)
    assert not set(least[:-1]) & image_ids


def test_a_client_that_never_heard_of_images_gets_text(
    server: Server, model: Unimodal, many: str
) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    agent = pydantic_ai.Agent(OpenAIChatModel("toy", provider=provider))
    # Greedy images: drawn by lot, they now and then lead to a reply without a word, an error there.
    greedy = {"image": {"temperature": 0, "guidance_scale": 1}}
    settings = {"temperature": 0.0, "max_tokens": TOKENS, "extra_body": greedy}
    picture_bytes = io.BytesIO()
    picture().save(picture_bytes, "PNG")
    shown = pydantic_ai.BinaryContent(picture_bytes.getvalue(), media_type="image/png")
    first = agent.run_sync(many, model_settings=settings)
    assert isinstance(first.output, str) and first.output
    assert first.usage.output_tokens > 10
    history = first.all_messages()
    settings["extra_body"] = {"modalities": ["text"], "min_tokens": 5}
    second = agent.run_sync(
        ["And what is this?", shown], model_settings=settings, message_history=history
    )
    assert isinstance(second.output, str) and second.output
    assert second.usage.input_tokens > first.usage.input_tokens + LEAST


def test_curl_reads_a_stream_of_text_and_images(server: Server, model: Unimodal, many: str) -> None:
    body = {
        "messages": [user(many, image_part(picture()))],
        "stream": True,
        "temperature": 0,
        "max_tokens": 60,
        "modalities": ["image"],
    }
    url = f"{server.url}/v1/chat/completions"
    lines = curl(url, "--no-buffer", "--json", json.dumps(body)).split("\n")
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(text)["choices"][0]["delta"] for text in events[:-1]]
    assert deltas[0]["role"] == "assistant"
    assert sum(len(delta.get("images", [])) for delta in deltas) == 1


def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "--silent", "--show-error", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
