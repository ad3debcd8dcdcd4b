"""Unimodal: caption, draw and chat with a real (tiny, random) merged model."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy import TEXT_TOKENIZERS, save_llm, toy_merged_folder
from tokenizer_hf.errors import (
    CheckpointError,
    ConfigurationError,
    ImageError,
    MessageError,
    MismatchError,
)
from unimodal.pipeline import Reply, Unimodal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_merged_folder(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def model(folder):
    return Unimodal.from_pretrained(folder)


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    folder = toy_merged_folder(tmp_path_factory.mktemp("nested"), "llama", nested=True, tied=False)
    return Unimodal.from_pretrained(folder)


def picture(seed):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))


def same(one, two):
    return [image.tobytes() for image in one] == [image.tobytes() for image in two]


def test_it_is_ready_to_use(model):
    assert not model.model.training and not model.processor.vq_model.training
    assert model.model.device == model.processor.vq_model.device


def test_caption_of_one_and_of_many(model):
    pictures = [picture(seed) for seed in range(3)]
    captions = model.caption(pictures, max_new_tokens=8)
    assert len(captions) == 3 and all(isinstance(caption, str) for caption in captions)
    assert [model.caption(one, max_new_tokens=8) for one in pictures] == captions
    asked = model.caption(pictures[0], instruction="What colour is it?", max_new_tokens=8)
    assert isinstance(asked, str) and asked != captions[0]


def test_sampled_captions_depend_on_the_seed_alone(model):
    options = {"temperature": 1.0, "max_new_tokens": 8}
    three = model.caption([picture(0)] * 3, seed=4, **options)
    assert len(set(three)) > 1
    assert model.caption(picture(0), seed=6, **options) == three[2]


def test_a_drawing_depends_on_its_prompt_and_seed_alone(model):
    four = model.draw(["a red circle", "a blue square with a green star"], n=2, seed=10)
    assert [image.size for image in four] == [(16, 16)] * 4
    assert {image.mode for image in four} == {"RGB"}
    assert len({image.tobytes() for image in four}) > 1
    assert same(model.draw("a red circle", seed=11), four[1:2])
    assert same(model.draw("a blue square with a green star", seed=13), four[3:])


def test_many_drawings_do_not_depend_on_the_size_of_a_batch(model, monkeypatch):
    five = model.draw("a ring", n=5, seed=0)
    monkeypatch.setattr(model, "rows_per_batch", 2)
    seen = []
    assert same(model.draw("a ring", n=5, seed=0, on_token=lambda row, _: seen.append(row)), five)
    assert set(seen) == {0, 1, 2, 3, 4}


def test_without_a_seed_drawings_differ(model):
    assert len({model.draw("a ring")[0].tobytes() for _ in range(6)}) > 1


def test_guidance_and_negative_prompt_change_the_drawing(model):
    def drawn(**options):
        return [image.tobytes() for image in model.draw("a heart", n=8, seed=1, **options)]

    assert drawn(guidance=1) != drawn(guidance=6)
    assert drawn(guidance=6) != drawn(guidance=6, negative_prompt="a blue square")
    assert drawn(guidance=1) == drawn(guidance=1, negative_prompt="a blue square")


def test_the_best_candidate_is_the_one_that_the_model_judges_best(model):
    prompts, each = ["a red circle", "a blue square with a green star"], 5
    spans = {}
    options = {"seed": 20, "candidates": each, "temperature": 2.0}
    kept = model.draw(
        prompts, on_token=lambda row, token: spans.setdefault(row, []).append(token), **options
    )
    assert sorted(spans) == list(range(10))
    processor = model.processor
    best = []
    for row, span in sorted(spans.items()):  # by hand: one conversation at a time, all logits
        prompt = prompts[row // each]
        image = {"type": "image", "codes": processor.vocabulary.to_codes(span[1:-1])}
        said = {"role": "assistant", "content": prompt}
        drew = {"role": "assistant", "content": [image]}
        score = 0.0
        for question, answer, counted in (
            (processor.caption_messages(image), said, None),
            (processor.draw_messages(prompt), drew, np.size(image["codes"])),
        ):
            ids = torch.tensor(processor.render([*question, answer]).input_ids)
            labels = torch.tensor(processor.render([*question, answer]).labels)[1:]
            with torch.inference_mode():
                logits = model.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            likely = logits[labels >= 0, labels[labels >= 0]]
            score += float(likely.sum()) / (counted or len(likely))
        best.append(score)
    likeliest = np.array(best).reshape(2, each).argmax(1)
    assert likeliest.any()  # not simply the first
    for index, candidate in enumerate(likeliest):
        codes = processor.vocabulary.to_codes(spans[index * each + candidate][1:-1])
        assert same([kept[index]], processor.decode_codes([codes]))
    first = model.draw(prompts, seed=20, candidates=1, temperature=2.0)
    assert not same(first, kept)
    codes = [processor.vocabulary.to_codes(spans[row][1:-1]) for row in (0, each)]
    assert same(first, processor.decode_codes(codes))  # the first candidate has the seed itself
    assert same(model.draw(prompts[1], **{**options, "seed": 21}), kept[1:])
    with pytest.raises(ConfigurationError, match="candidates is 0"):
        model.draw("a star", candidates=0)


def test_temperature_zero_is_greedy(model):
    assert len({image.tobytes() for image in model.draw("a heart", n=3, temperature=0)}) == 1


def test_budget_of_a_nested_tokenizer(nested):
    vocabulary = nested.processor.vocabulary
    counts = []
    for budget in (vocabulary.min_tokens, vocabulary.num_tokens):
        reply = nested.chat(
            [{"role": "user", "content": "draw"}],
            images="force",
            budget=budget,
            seed=0,
            max_new_tokens=16,
        )
        counts.append(len(reply.parts[0]["codes"]))
    assert counts[0] == vocabulary.min_tokens
    assert vocabulary.min_tokens <= counts[1] <= vocabulary.num_tokens
    assert len(nested.draw("a star", n=3, budget=vocabulary.min_tokens, seed=0)) == 3
    with pytest.raises(ConfigurationError, match="budget"):
        nested.draw("a star", budget=vocabulary.num_tokens + 1)


def test_chat_force_never_and_auto(model):
    messages = [{"role": "user", "content": "hello"}]
    options = {"seed": 3, "temperature": 1.0, "max_new_tokens": 24}
    forced = model.chat(messages, images="force", **options)
    assert isinstance(forced, Reply)
    assert forced.parts[0]["type"] == "image" and len(forced.images) == 1
    assert model.chat(messages, images="never", **options).images == []
    automatic = model.chat([messages] * 8, images="auto", **options)
    assert len(automatic) == 8
    assert automatic[5].parts == automatic[5].message["content"]
    for reply in automatic:
        assert reply.text == "".join(p["text"] for p in reply.parts if p["type"] == "text")


def test_chat_goes_on_from_its_own_replies(model):
    messages = [{"role": "user", "content": [{"type": "image", "image": picture(0)}]}]
    first = model.chat(messages, images="force", seed=0, max_new_tokens=16)
    messages += [first.message, {"role": "user", "content": "again"}]
    second = model.chat(messages, images="force", seed=0, max_new_tokens=16)
    rendered = model.processor.render([*messages, second.message])
    codes = [
        model.processor.vocabulary.to_codes(rendered.input_ids[start + 1 : stop - 1])
        for start, stop in rendered.spans
    ]
    assert codes == [
        model.processor.encode_images(picture(0))[0].tolist(),
        first.parts[0]["codes"],
        second.parts[0]["codes"],
    ]


def test_what_cannot_be_asked(model):
    with pytest.raises(MessageError, match="empty"):
        model.draw("  ")
    with pytest.raises(MessageError, match="empty"):
        model.draw(["a star", ""])
    with pytest.raises(MessageError, match="reads at most 512"):
        model.draw("circle " * 15_000)
    with pytest.raises(MessageError, match="reads at most 512"):
        model.chat([{"role": "user", "content": "x" * 100_000}])
    with pytest.raises(MessageError, match="empty"):
        model.caption(picture(0), instruction="")
    with pytest.raises(ImageError, match=r"nothing\.png"):
        model.caption("nothing.png")
    for settings in ({"n": 0}, {"guidance": -1}, {"temperature": -1}, {"seed": -1}, {"budget": 2}):
        with pytest.raises(ConfigurationError):
            model.draw("a star", **settings)
    with pytest.raises(ConfigurationError, match="'auto', 'never', 'force'"):
        model.chat([{"role": "user", "content": "x"}], images="always")


def test_an_adapter_is_applied(folder, model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    tuned = get_peft_model(
        base, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    adapted = Unimodal.from_pretrained(folder, adapter=tmp_path / "adapter")
    assert adapted.caption(picture(0), max_new_tokens=8) != model.caption(
        picture(0), max_new_tokens=8
    )
    assert len(adapted.draw("a star", n=2, seed=0)) == 2
    with pytest.raises(CheckpointError, match="adapter"):
        Unimodal.from_pretrained(folder, adapter=tmp_path / "nothing")


def test_folders_that_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        Unimodal.from_pretrained(tmp_path / "nothing")
    corrupt = tmp_path / "corrupt"
    shutil.copytree(folder, corrupt)
    weights = corrupt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Unimodal.from_pretrained(corrupt)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Unimodal.from_pretrained(corrupt)
    shutil.copy(folder / "model.safetensors", weights)
    codec = corrupt / "image_tokenizer" / "model.safetensors"
    codec.write_bytes(codec.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="image_tokenizer"):
        Unimodal.from_pretrained(corrupt)


def test_a_language_model_that_was_not_merged_is_refused(folder, model, tmp_path):
    from transformers import AutoModelForCausalLM

    plain = save_llm(tmp_path / "llm", tokenizer=TEXT_TOKENIZERS["qwen"]())
    with pytest.raises(MismatchError, match="embedding rows"):
        Unimodal(AutoModelForCausalLM.from_pretrained(plain), model.processor)
