"""The command line that ``unimodal serve`` builds, and the shapes of requests. No server here."""

import base64
import io
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenizer_hf.errors import CheckpointError, ConfigurationError, MessageError, ServingError
from unimodal.serving.openai_shapes import (
    ChatImageOptions,
    ImagesRequest,
    check_size,
    data_uri,
    encode_image,
    needs_stock_template,
    plain_messages,
    read_body,
)
from unimodal.serving.serve import (
    LOGITS_PROCESSOR,
    MIDDLEWARE,
    check_head_size,
    check_packed_dtype,
    http_flags,
    prepare,
    read_config,
)

FLOAT32 = {"dtype": "float32"}


def arguments_of(*given: str, **options: Any) -> tuple[list[str], dict[str, str]]:
    options = {"on_cpu": True, "config": FLOAT32, "environ": {}, **options}
    return prepare("owner/model", given, **options)


def values_of(arguments: list[str], flag: str) -> list[str]:
    assert arguments.count(flag) == 1
    rest = arguments[arguments.index(flag) + 1 :]
    stop = next((at for at, value in enumerate(rest) if value.startswith("-")), len(rest))
    return rest[:stop]


def test_defaults_on_a_cpu() -> None:
    arguments, environment = arguments_of("--port", "8000")
    assert arguments[:4] == ["serve", "owner/model", "--port", "8000"]
    assert values_of(arguments, "--served-model-name") == ["owner/model"]
    assert values_of(arguments, "--dtype") == ["float32"]
    assert values_of(arguments, "--max-model-len") == ["auto"]
    assert "--enforce-eager" in arguments
    assert values_of(arguments, "--logits-processors") == [LOGITS_PROCESSOR]
    assert environment == {"VLLM_PLUGINS": "unimodal", "VLLM_CPU_KVCACHE_SPACE": "1"}


def test_flags_and_variables_of_the_user_win() -> None:
    arguments, environment = arguments_of(
        "--dtype=bfloat16",
        "--max_model_len",
        "64",
        "--no-enforce-eager",
        "--served-model-name",
        "mine",
        environ={"VLLM_PLUGINS": "other", "VLLM_CPU_KVCACHE_SPACE": "9"},
    )
    assert values_of(arguments, "--served-model-name") == ["mine"]
    for flag in ("--dtype", "--max-model-len", "--enforce-eager"):
        assert flag not in arguments
    assert environment == {"VLLM_PLUGINS": "other,unimodal"}


def test_a_bfloat16_checkpoint_keeps_its_type_and_a_gpu_gets_no_cpu_flags() -> None:
    assert "--dtype" not in arguments_of(config={"dtype": "bfloat16"})[0]
    arguments, environment = arguments_of(on_cpu=False)
    assert not {"--enforce-eager", "--dtype", "--max-model-len"} & set(arguments)
    assert environment == {"VLLM_PLUGINS": "unimodal", "VLLM_USE_V2_MODEL_RUNNER": "0"}


def test_logits_processors_of_the_user_stay_beside_ours() -> None:
    for given in (["--logits-processors", "a:B", "c:D"], ["--logits_processors=a:B"]):
        arguments, _ = arguments_of(*given, "--port", "1")
        own = ["a:B", "c:D"] if len(given) == 3 else ["a:B"]
        assert values_of(arguments, "--logits-processors") == [*own, LOGITS_PROCESSOR]
        assert values_of(arguments, "--port") == ["1"]


def test_the_same_server_without_what_is_ours() -> None:
    settings: Any = {"on_cpu": True, "config": {}, "environ": {}}
    ours, our_environment = prepare("owner/name", ["--port", "1"], **settings)
    plain, environment = prepare("owner/name", ["--port", "1"], **settings, plugin=False)
    assert not [word for word in plain if "unimodal" in word]
    assert "VLLM_PLUGINS" not in environment
    assert set(plain) < set(ours)
    assert environment.items() < our_environment.items()
    own = ["--logits-processors", "a:B"]
    assert prepare("owner/name", own, **settings, plugin=False)[0][-2:] == own


def test_the_http_server_gets_the_gate_and_time_to_drain() -> None:
    assert http_flags(["--port", "1"]) == ["--middleware", MIDDLEWARE, "--shutdown-timeout", "30"]
    for given in (["--shutdown-timeout=5"], ["--shutdown_timeout", "5"]):
        assert http_flags(given) == ["--middleware", MIDDLEWARE]
    module, _, name = MIDDLEWARE.rpartition(".")
    assert isinstance(getattr(import_module(module), name), type)


def test_a_folder_is_served_under_its_name_and_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    arguments, _ = prepare(folder, [], on_cpu=False, config={}, environ={})
    assert values_of(arguments, "--served-model-name") == ["my-model", str(folder)]


def test_folders_that_are_no_merged_models(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_config("/nowhere/at/all")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="unimodal merge"):
        read_config(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        read_config(tmp_path)
    assert read_config("owner/name") == {}


def test_a_head_size_without_a_cpu_kernel() -> None:
    with pytest.raises(ServingError, match="heads are 8 wide"):
        check_head_size({"hidden_size": 32, "num_attention_heads": 4}, [32, 64])
    check_head_size({"head_dim": 64, "hidden_size": 32, "num_attention_heads": 4}, [32, 64])
    check_head_size({}, [32])


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    import subprocess
    import sys

    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    command = [sys.executable, "-m", "unimodal.cli", "serve", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "has no config.json" in done.stderr


# --- requests -------------------------------------------------------------------------------------


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown field 'guidance'.*guidance_scale"):
        read_body(ImagesRequest, {"prompt": "x", "guidance": 3})
    with pytest.raises(ConfigurationError, match=r"unknown field 'seed'.*top_k"):
        read_body(ChatImageOptions, {"seed": 3})


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "  "},
        {"prompt": "x", "n": 0},
        {"prompt": "x", "n": 11},
        {"prompt": "x", "response_format": "url"},
        {"prompt": "x", "output_format": "gif"},
        {"prompt": "x", "background": "transparent"},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "temperature": float("nan")},
        {"prompt": "x", "seed": -1},
    ],
)
def test_images_requests_that_cannot_be_right(body: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        read_body(ImagesRequest, body)


def test_fields_of_openai_clients_are_accepted() -> None:
    body = {
        "prompt": "x",
        "model": "m",
        "n": 2,
        "size": "auto",
        "quality": "standard",
        "style": "vivid",
        "moderation": "auto",
        "user": "u",
        "response_format": "b64_json",
        "output_format": "webp",
        "background": "opaque",
    }
    assert read_body(ImagesRequest, body).n == 2


def test_sizes() -> None:
    for size in (None, "auto", "64x64"):
        check_size(size, 64)
    with pytest.raises(ConfigurationError, match='expected "64x64"'):
        check_size("1024x1024", 64)


def test_images_of_an_assistant_turn_follow_its_text() -> None:
    url = data_uri(Image.new("RGB", (4, 4)))
    part = {"type": "image_url", "image_url": {"url": url}}
    [plain] = plain_messages(
        [{"role": "assistant", "content": "here", "images": [{**part, "codes": [1, 2]}, part]}]
    )
    kinds = [content["type"] for content in plain["content"]]
    assert kinds == ["text", "image", "image_url"]
    assert plain["content"][1]["codes"] == [1, 2]
    [empty] = plain_messages([{"role": "assistant", "content": None, "images": [part]}])
    assert empty["content"] == [part]


@pytest.mark.parametrize(
    "message",
    [
        "hello",
        {"content": "no role"},
        {"role": "user"},
        {"role": "user", "content": 3},
        {"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]},
        {"role": "user", "content": [{"type": "input_audio"}]},
        {"role": "user", "content": [{"type": "text", "text": 3}]},
        {"role": "assistant", "content": "x", "images": "one"},
        {"role": "assistant", "content": "x", "images": [{"type": "image_url", "codes": "1"}]},
    ],
)
def test_messages_of_another_shape(message: Any) -> None:
    with pytest.raises(MessageError):
        plain_messages([message])


def test_what_only_vllm_renders() -> None:
    plain = {"messages": [{"role": "user", "content": "x"}]}
    assert needs_stock_template(plain) is None
    assert needs_stock_template({**plain, "continue_final_message": True}) is not None
    assert needs_stock_template({**plain, "add_generation_prompt": False}) is not None
    calls = {"messages": [{"role": "assistant", "tool_calls": [{}]}]}
    assert needs_stock_template(calls) == "tool_calls"


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_images_are_written_in_every_format(output_format: str) -> None:
    image = Image.new("RGB", (8, 8), (200, 30, 30))
    data = base64.b64decode(encode_image(image, output_format))
    opened = Image.open(io.BytesIO(data))
    assert (opened.format or "").lower() == output_format
    assert opened.size == (8, 8)


def test_requests_are_plain_json() -> None:
    json.dumps(read_body(ImagesRequest, {"prompt": "x"}).model_dump())


def test_packed_weights_are_not_computed_in_float32_on_a_cpu(tmp_path: Path) -> None:
    packed = {"dtype": "float32", "quantization_config": {"format": "pack-quantized"}}
    arguments, _ = prepare(tmp_path, [], on_cpu=True, config=packed, environ={})
    assert arguments[arguments.index("--dtype") + 1] == "bfloat16"
    check_packed_dtype(packed, ["--dtype", "bfloat16", "--port", "1"])
    check_packed_dtype({"dtype": "float32"}, ["--dtype", "float32"])
    for words in (["--dtype", "float32"], ["--dtype=float"]):
        with pytest.raises(ServingError, match="W4A16"):
            check_packed_dtype(packed, words)
