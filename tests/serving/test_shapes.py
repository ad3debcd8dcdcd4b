"""The shapes of the HTTP interface as clients see them: OpenAI's client, curl, an OpenAPI reader.

The server is that of conftest.py.
"""

import io
import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.asking import image_part, opened, picture, user
from tests.serving.conftest import MOST
from unimodal.pipeline import Unimodal
from unimodal.serving.check import Server
from unimodal.serving.openai_shapes import data_uri

openai = pytest.importorskip("openai", reason="openai's client is not installed")
hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

GREEDY = {"temperature": 0, "guidance_scale": 1, "return_token_ids": True}


def png(index: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(index).save(buffer, "PNG")
    return buffer.getvalue()


def edit_prompt(model: Unimodal, prompt: str, pictures: list[Image.Image]) -> list[int]:
    parts = [{"type": "image", "image": shown} for shown in pictures]
    messages = model.processor.draw_messages(prompt, parts)
    return model.processor.render(messages, add_generation_prompt=True).input_ids


# --- images/generations and images/edits with OpenAI's client -------------------------------------


def test_generations_are_streamed_with_previews(client: Any, model: Unimodal) -> None:
    request = {"prompt": "a red ring", "output_format": "webp", "extra_body": GREEDY}
    whole = client.images.generate(**request)
    events = list(client.images.generate(**request, stream=True, partial_images=3))
    *partial, completed = events
    assert partial
    assert {event.type for event in partial} == {"image_generation.partial_image"}
    numbers = [event.partial_image_index for event in partial]
    assert numbers == list(range(len(numbers)))
    assert completed.type == "image_generation.completed"
    assert completed.token_ids == whole.data[0].token_ids
    assert completed.b64_json == whole.data[0].b64_json
    usage = completed.usage.model_dump()
    assert usage == whole.usage.model_dump(exclude_none=True)
    assert {event.size for event in events} == {"16x16"}
    assert {opened(event.b64_json).format for event in events} == {"WEBP"}


def test_every_image_of_a_stream_is_completed_once(client: Any) -> None:
    extra = {"seed": 4, "return_token_ids": True}
    whole = client.images.generate(prompt="a ring", n=3, extra_body=extra)
    stream = client.images.generate(prompt="a ring", n=3, stream=True, extra_body=extra)
    images = {event.index: event.token_ids for event in stream}
    assert [images[index] for index in range(3)] == [image.token_ids for image in whole.data]


def test_a_stream_that_cannot_be_drawn_is_refused_before_it_begins(client: Any) -> None:
    for extra in ({"budget": 1000}, {"size": "512x512"}):
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="a ring", stream=True, extra_body=extra)
    with pytest.raises(openai.BadRequestError, match="stream"):
        client.images.generate(prompt="a ring", extra_body={"partial_images": 2})


def test_edits_show_the_pictures_to_the_model(client: Any, model: Unimodal) -> None:
    files = [("one.png", png(1), "image/png"), ("two.png", png(2), "image/png")]
    answer = client.images.edit(
        image=files,
        prompt="the same in blue",
        n=2,
        size="16x16",
        output_format="jpeg",
        extra_body=GREEDY,
    )
    prompt = edit_prompt(model, "the same in blue", [picture(1), picture(2)])
    assert answer.prompt_token_ids == prompt
    assert [opened(image.b64_json).format for image in answer.data] == ["JPEG", "JPEG"]
    image_ids = set(model.processor.vocabulary.new_token_ids)
    num_images = sum(token_id in image_ids for token_id in prompt)
    assert answer.usage.input_tokens_details.image_tokens == num_images == 2 * (MOST + 2)
    assert answer.usage.input_tokens_details.text_tokens == len(prompt) - num_images
    alone = client.images.edit(image=png(1), prompt="the same in blue", extra_body=GREEDY)
    assert alone.prompt_token_ids == edit_prompt(model, "the same in blue", [picture(1)])


def test_edits_are_streamed(client: Any) -> None:
    events = list(client.images.edit(image=png(), prompt="brighter", stream=True, partial_images=2))
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_edit.completed"
    assert set(kinds[:-1]) <= {"image_edit.partial_image"}


def test_edits_have_no_candidates(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"candidates is 2: .*not edits"):
        client.images.edit(image=png(1), prompt="a star", extra_body={"candidates": 2})
    assert client.images.edit(image=png(1), prompt="a star", extra_body={"candidates": 1}).data


def test_edits_are_read_as_json_too(server: Server, model: Unimodal) -> None:
    body = {**GREEDY, "prompt": "brighter", "image": [data_uri(picture(3))]}
    answer = server.post("/v1/images/edits", body)
    assert answer["prompt_token_ids"] == edit_prompt(model, "brighter", [picture(3)])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mask": png()}, "mask"),
        ({"image": b"no picture"}, "not a picture"),
        ({"image": [png()] * 17}, "16"),
        ({"size": "1024x1024"}, "16x16"),
        ({"extra_body": {"typo": "1"}}, "typo"),
        ({"extra_body": {"temperature": "hot"}}, "temperature"),
        ({"prompt": " "}, "prompt"),
    ],
)
def test_edits_that_are_refused(client: Any, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**{"image": png(), "prompt": "brighter", **changes})
    assert expected in caught.value.body["message"]


def test_edits_without_a_picture_or_of_another_kind_are_refused(server: Server) -> None:
    url = f"{server.url}/v1/images/edits"
    for arguments, expected in (
        (["--form", "prompt=brighter"], "'image' is missing"),
        (["--form", "prompt=brighter", "--form", "image=https://example.com/a.png"], "data"),
        (["--data", "prompt=brighter"], "multipart/form-data"),
        (["--json", "[1]"], "object"),
        (["--json", "{"], "JSON"),
        (["--header", "Content-Type: multipart/form-data; boundary=x", "--data", "-"], ""),
    ):
        answer = json.loads(curl(url, *arguments))
        assert answer["error"]["code"] == 400
        assert expected in answer["error"]["message"]


# --- curl -----------------------------------------------------------------------------------------


def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "--silent", "--show-error", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_curl_draws(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    drawn = json.loads(
        curl(f"{server.url}/v1/images/generations", "--json", '{"prompt": "a star"}')
    )
    assert opened(drawn["data"][0]["b64_json"]).size == (16, 16)
    edited = curl(
        f"{server.url}/v1/images/edits",
        *("--form", f"image[]=@{file}"),
        *("--form", "prompt=brighter"),
        *("--form", "stream=true"),
        *("--form", "partial_images=1"),
        *("--form", "seed=3"),
    )
    events = [block.split("\n") for block in edited.strip().split("\n\n")]
    assert [kind for kind, _ in events][-1] == "event: image_edit.completed"
    for kind, data in events:
        assert json.loads(data.removeprefix("data: "))["type"] == kind.removeprefix("event: ")


def test_curl_chats_with_a_picture(server: Server) -> None:
    body = {"messages": [user("What is this?", image_part(picture()))], "max_tokens": 5}
    answer = json.loads(curl(f"{server.url}/v1/chat/completions", "--json", json.dumps(body)))
    assert isinstance(answer["choices"][0]["message"]["content"], str)


# --- models and the OpenAPI document --------------------------------------------------------------


def test_the_list_of_models_tells_the_image_abilities(client: Any, model: Unimodal) -> None:
    card, by_path = client.models.list().data  # two names of one model
    assert by_path.unimodal == card.unimodal
    assert (card.id, card.object, card.owned_by) == ("toy", "model", "vllm")
    assert card.max_model_len == 512 and card.root and card.permission
    told = card.unimodal
    assert told["size"] == "16x16"
    assert told["codes"] == {"min": 2, "max": MOST, "codebook_size": 64, "num_codebooks": 1}
    assert told["nested"] is True
    assert told["guidance"] is True and told["guidance_problem"] is None
    assert told["output_modalities"] == ["text", "image"]
    defaults = {name: told["defaults"][name] for name in ("temperature", "top_k", "guidance_scale")}
    assert defaults == {"temperature": 1.0, "top_k": 0, "guidance_scale": 3.0}
    # What is told can be sent.
    client.chat.completions.create(
        model=card.id,
        messages=[user("Draw: a ring")],
        max_tokens=MOST + 3,
        extra_body={"modalities": ["image"], "image": told["defaults"]},
    )


OURS = ("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", "/v1/models")


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    """The OpenAPI document, our routes only."""
    whole = json.loads(server.get("/openapi.json"))
    return {**whole, "paths": {path: whole["paths"][path] for path in OURS}}


def test_the_openapi_document_is_valid_and_complete(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("openapi_spec_validator", reason="not installed")
    validator.validate(document)

    def fields(path: str) -> set[str]:
        body = document["paths"][path]["post"]["requestBody"]
        schema = body["content"]["application/json"]["schema"]
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        return set(schema["properties"])

    chat = {"messages", "modalities", "image", "max_tokens", "tools"}
    assert chat <= fields("/v1/chat/completions")
    images = {"prompt", "n", "partial_images", "guidance_scale"}
    assert images <= fields("/v1/images/generations")
    answer = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert {"application/json", "text/event-stream"} <= answer.keys()
    edits = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert edits.keys() == {"application/json", "multipart/form-data"}
    for content in edits.values():
        assert {"image", "prompt", "n", "stream"} <= content["schema"]["properties"].keys()


@pytest.mark.parametrize("path", OURS)
def test_no_request_of_the_documented_shape_brings_the_server_down(
    server: Server, document: dict[str, Any], path: str
) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    api = schemathesis.openapi.from_dict(document)
    api.config.update(base_url=server.url)
    [method] = document["paths"][path]

    @hypothesis.settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=api[path][method].as_strategy())
    def check(case: Any) -> None:
        if path == "/v1/chat/completions":
            # The time of the tests is short: replies of a few tokens.
            case.body.update(max_tokens=3, n=1)
            for name in ("max_completion_tokens", "min_tokens", "use_beam_search"):
                case.body.pop(name, None)
        answer = case.call(timeout=60)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    check()
