"""UnimodalProcessor: batches, padding, labels, pictures both ways, and its folder."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy import (
    TEXT_TOKENIZERS,
    nested_image_tokenizer,
    tiny_image_tokenizer,
    toy_merged_folder,
)
from tokenizer_hf.errors import (
    CheckpointError,
    CodeError,
    ImageError,
    MessageError,
    MismatchError,
    VocabularyError,
)
from tokenizer_hf.vocabulary import VocabularyExtension, extend_tokenizer
from unimodal.processing_unimodal import IMAGES_PER_BATCH, NOT_YET, UnimodalProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_merged_folder(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def nested_folder(tmp_path_factory):
    return toy_merged_folder(tmp_path_factory.mktemp("nested"), nested=True)


@pytest.fixture(scope="module")
def processor(folder):
    return UnimodalProcessor.from_pretrained(folder)


def picture(seed, size=(20, 30)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


# --- messages -> ids ------------------------------------------------------------------------------


def test_one_conversation_as_text_ids_and_features(processor):
    messages = processor.caption_messages(picture(0))
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.count(processor.image_token) == 1
    assert processor.caption_instruction in text
    ids = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    tensor = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_tensors="pt"
    )
    assert tensor.tolist() == [ids]
    features = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert features["attention_mask"] == [1] * len(features["input_ids"])
    codes = processor.encode_images(picture(0))[0].tolist()
    [(start, stop)] = processor.render(messages).spans
    assert ids[start:stop] == processor.vocabulary.span(codes)


def test_text_of_the_template_and_pictures_beside_it_give_the_same_ids(processor):
    messages = processor.caption_messages(picture(1))
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert processor(text=text, images=picture(1))["input_ids"] == [ids]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_labels(processor, side):
    drawn = processor.encode_images(picture(2))[0].tolist()
    short = [
        *processor.draw_messages("a star"),
        {"role": "assistant", "content": [{"type": "image", "codes": drawn}]},
    ]
    long = [
        *processor.caption_messages(picture(3)),
        {"role": "assistant", "content": "a long answer about shapes and colours, for padding"},
    ]
    batch = processor.apply_chat_template(
        [short, long],
        tokenize=True,
        padding=True,
        padding_side=side,
        return_tensors="pt",
        return_labels=True,
    )
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    rows = [processor.render(short), processor.render(long)]
    width = len(rows[1].input_ids)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, width)
    for index, row in enumerate(rows):
        seen = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][seen].tolist() == row.input_ids
        assert batch["labels"][index][seen].tolist() == row.labels
        assert (batch["labels"][index][~seen] == -100).all()
        assert (batch["input_ids"][index][~seen] == processor.tokenizer.pad_token_id).all()
        expected = [0] * (width - len(row.input_ids)), [1] * len(row.input_ids)
        mask = expected[0] + expected[1] if side == "left" else expected[1] + expected[0]
        assert batch["attention_mask"][index].tolist() == mask
    assert (
        batch["labels"][0] == batch["input_ids"][0]
    ).sum() == processor.vocabulary.num_tokens + 3


def test_prompts_are_padded_on_the_left_by_default(processor):
    conversations = [processor.draw_messages("a"), processor.draw_messages("a red circle")]
    batch = processor.apply_chat_template(
        conversations,
        tokenize=True,
        padding="max_length",
        max_length=64,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert batch["input_ids"].shape == (2, 64)
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["attention_mask"][:, 0].tolist() == [0, 0]


def test_rows_that_cannot_be_one_tensor(processor):
    conversations = [processor.draw_messages("a"), processor.draw_messages("a red circle")]
    with pytest.raises(MessageError, match="padding=True"):
        processor.apply_chat_template(conversations, tokenize=True, return_tensors="pt")
    with pytest.raises(MessageError, match="max_length=5"):
        processor.apply_chat_template(conversations, tokenize=True, max_length=5)


def test_a_batch_gives_the_ids_of_its_conversations_alone(processor):
    conversations = [processor.caption_messages(picture(seed)) for seed in range(3)]
    rows = processor.apply_chat_template(conversations, tokenize=True)
    assert rows == [processor.apply_chat_template(one, tokenize=True) for one in conversations]


def test_all_pictures_of_a_call_are_encoded_together(processor, monkeypatch):
    sizes = []
    encode = processor.vq_model.encode

    def counted(pixel_values, **options):
        sizes.append(len(pixel_values))
        return encode(pixel_values, **options)

    monkeypatch.setattr(processor.vq_model, "encode", counted)
    processor.render_batch([processor.caption_messages(picture(seed)) for seed in range(5)])
    assert sizes == [5]


def test_call_places_pictures_at_their_markers(processor):
    marker, vocabulary = processor.image_token, processor.vocabulary
    one, two = (
        vocabulary.span(codes)
        for codes in processor.encode_images([picture(0), picture(1)]).tolist()
    )

    def ids(text):
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    pictures = [picture(0), picture(1)]
    middle = processor(text=f"a{marker}b{marker}", images=pictures)["input_ids"]
    assert middle == [[*ids("a"), *one, *ids("b"), *two]]
    front = processor(text="what?", images=pictures)["input_ids"]
    assert front == [[*one, *two, *ids("what?")]]
    each = processor(text=[f"a{marker}", f"{marker}b"], images=pictures)["input_ids"]
    assert each == [[*ids("a"), *one], [*two, *ids("b")]]
    lists = processor(text=["a", f"{marker}b{marker}"], images=[[], pictures])["input_ids"]
    assert lists == [ids("a"), [*one, *ids("b"), *two]]
    assert processor(text="a")["input_ids"] == [ids("a")]
    pixels = processor(images=pictures)["pixel_values"]
    assert pixels.shape[:2] == (2, 3) and pixels.dtype == torch.float32


@pytest.mark.parametrize(
    ("texts", "number"), [("{m}{m}", 1), ("{m}", 2), (["{m}", "{m}"], 3), ("{m}", 0)]
)
def test_call_counts_markers(processor, texts, number):
    if isinstance(texts, str):
        texts = texts.format(m=processor.image_token)
    else:
        texts = [text.format(m=processor.image_token) for text in texts]
    with pytest.raises(MessageError, match="as many pictures as markers"):
        processor(text=texts, images=[picture(i) for i in range(number)])


def test_call_does_not_read_the_spelling_of_codes(processor):
    ids = processor(text="draw <|image_00003|> and <|image_00004|>")["input_ids"][0]
    assert not any(processor.vocabulary.is_code(ids))


def test_bos_is_never_put_twice():
    model = tiny_image_tokenizer()
    tokenizer, vocabulary = extend_tokenizer(
        TEXT_TOKENIZERS["llama3"](), VocabularyExtension.from_image_tokenizer(model)
    )
    processor = UnimodalProcessor(model.image_processor, tokenizer, model, vocabulary)
    messages = processor.draw_messages("a ring")
    text = processor.apply_chat_template(messages)
    assert text.startswith(tokenizer.bos_token)
    assert processor(text=text)["input_ids"][0] == processor.render(messages).input_ids
    assert processor(text="hi")["input_ids"][0][0] == tokenizer.bos_token_id


# --- ids -> messages ------------------------------------------------------------------------------


def test_parse_gives_parts_that_a_message_can_hold(processor):
    codes = processor.encode_images([picture(0), picture(1)]).tolist()
    content = [
        {"type": "text", "text": "first "},
        {"type": "image", "codes": codes[0]},
        {"type": "text", "text": " then"},
        {"type": "image", "codes": codes[1]},
    ]
    messages = [*processor.draw_messages("x"), {"role": "assistant", "content": content}]
    rendered = processor.render(messages)
    [span] = rendered.learnt
    parts = processor.parse(torch.tensor(rendered.input_ids[span.start : span.stop]))
    assert [{k: v for k, v in part.items() if k != "image"} for part in parts] == content
    assert [part["image"].mode for part in parts if part["type"] == "image"] == ["RGB", "RGB"]
    again = processor.render([*messages[:1], {"role": "assistant", "content": parts}])
    assert again == rendered


def test_pictures_of_different_lengths_are_decoded_in_order(nested_folder):
    processor = UnimodalProcessor.from_pretrained(nested_folder)
    full = processor.encode_images([picture(0), picture(1)])
    short = processor.encode_images(picture(0), num_tokens=processor.vocabulary.min_tokens)
    assert short.tolist()[0] == full[0, : short.shape[1]].tolist()
    rows = [full[0].tolist(), short[0].tolist(), full[1].tolist()]
    images = processor.decode_codes(rows)
    for row, image in zip(rows, images, strict=True):
        [alone] = processor.decode_codes([row])
        assert image.tobytes() == alone.tobytes()


def test_a_preview_on_a_grid_is_gray_where_codes_are_missing(processor):
    codes = processor.encode_images(picture(0))[0].tolist()
    [whole] = processor.decode_codes([codes])
    assert processor.decode_beginning(codes).tobytes() == whole.tobytes()
    assert processor.decode_beginning([]) is None
    preview = processor.decode_beginning(codes[:3])  # of 2 x 2, each 8 x 8 pixels
    [filled] = processor.decode_codes([[*codes[:3], max(codes[:3], key=codes[:3].count)]])
    for left, top in ((0, 0), (8, 0), (0, 8)):
        box = (left, top, left + 8, top + 8)
        assert preview.crop(box).tobytes() == filled.crop(box).tobytes()
    assert set(preview.crop((8, 8, 16, 16)).getdata()) == {NOT_YET}
    with pytest.raises(CodeError):
        processor.decode_beginning([*codes, 1])


def test_a_preview_of_nested_codes_is_their_prefix(nested_folder):
    processor = UnimodalProcessor.from_pretrained(nested_folder)
    codes = processor.encode_images(picture(0))[0].tolist()
    least = processor.vocabulary.min_tokens
    assert processor.decode_beginning(codes[: least - 1]) is None
    for length in range(least, len(codes) + 1):
        [expected] = processor.decode_codes([codes[:length]])
        assert processor.decode_beginning(codes[:length]).tobytes() == expected.tobytes()


def test_a_preview_of_codes_without_places_is_filled_up(tmp_path):
    processor = UnimodalProcessor.from_pretrained(toy_merged_folder(tmp_path))
    processor.vq_model = nested_image_tokenizer(token_layout="1d")
    [expected] = processor.decode_codes([[3, 5, 5, 5, 5, 5]])
    assert processor.decode_beginning([3, 5, 5]).tobytes() == expected.tobytes()


def test_more_pictures_than_one_batch_holds(processor):
    images = [picture(seed % 7) for seed in range(IMAGES_PER_BATCH + 3)]
    codes = processor.encode_images(images)
    assert codes.shape == (IMAGES_PER_BATCH + 3, processor.vocabulary.num_tokens)
    assert codes.tolist() == [codes[i % 7].tolist() for i in range(len(images))]
    assert len(processor.decode_codes(codes)) == len(images)


def test_sources_of_pictures(processor, tmp_path):
    path = tmp_path / "p.png"
    picture(5).save(path)
    expected = processor.encode_images(picture(5)).tolist()
    for source in (path, str(path), path.read_bytes(), np.asarray(picture(5))):
        assert processor.encode_images(source).tolist() == expected
    broken = tmp_path / "broken.png"
    broken.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"broken\.png"):
        processor.render(processor.caption_messages(broken))


# --- folder ---------------------------------------------------------------------------------------


def test_save_and_load(processor, tmp_path):
    messages = processor.caption_messages(picture(0))
    processor.save_pretrained(tmp_path)
    again = UnimodalProcessor.from_pretrained(tmp_path)
    assert again.vocabulary == processor.vocabulary
    assert again.render(messages) == processor.render(messages)
    assert again.vq_model.fingerprint() == processor.vocabulary.fingerprint
    assert VocabularyExtension.load(tmp_path / "image_tokenizer").fingerprint == (
        processor.vocabulary.fingerprint
    )
    changed = UnimodalProcessor.from_pretrained(tmp_path, draw_instruction="Paint {prompt} now")
    assert "Paint a star now" in changed.draw_messages("a star")[0]["content"]


def test_without_the_image_tokenizer_codes_are_enough(folder, processor):
    light = UnimodalProcessor.from_pretrained(folder, load_image_tokenizer=False)
    assert light.vq_model is None
    codes = processor.encode_images(picture(0))[0].tolist()
    messages = light.caption_messages({"type": "image", "codes": codes})
    rendered = light.render(messages)
    assert rendered == processor.render(processor.caption_messages(picture(0)))
    [(start, stop)] = rendered.spans
    assert light.parse(rendered.input_ids[start:stop]) == [{"type": "image", "codes": codes}]
    with pytest.raises(MessageError, match="without codes"):
        light.render(light.caption_messages(picture(0)))
    with pytest.raises(CheckpointError, match="load_image_tokenizer"):
        light.encode_images(picture(0))


def test_auto_processor_gives_ours(folder):
    from transformers import AutoProcessor

    assert type(AutoProcessor.from_pretrained(folder)) is UnimodalProcessor


def test_remote_code_loads_saves_and_loads_again(folder, tmp_path):
    """In an interpreter that has never heard of us, twice: a copy hands its own source on."""
    code = """
import sys
class Blocked:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("unimodal", "tokenizer_hf"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(processor).__name__ == "UnimodalProcessor", type(processor)
processor.save_pretrained(sys.argv[2])
print(processor.apply_chat_template(processor.draw_messages("a star"), tokenize=True))
"""
    outputs = []
    for source, target in ((folder, tmp_path / "one"), (tmp_path / "one", tmp_path / "two")):
        done = subprocess.run(
            [sys.executable, "-c", code, source, target],
            cwd=tmp_path,
            env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
        shutil.copy(folder / "config.json", target / "config.json")
    processor = UnimodalProcessor.from_pretrained(folder)
    expected = processor.apply_chat_template(processor.draw_messages("a star"), tokenize=True)
    assert outputs == [expected, expected]


def test_folders_that_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        UnimodalProcessor.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"processor_config\.json"):
        UnimodalProcessor.from_pretrained(tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "processor_config.json").write_text('{"processor_class": "OtherProcessor"}')
    with pytest.raises(CheckpointError, match="another processor"):
        UnimodalProcessor.from_pretrained(foreign)
    (foreign / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        UnimodalProcessor.from_pretrained(foreign)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("image_tokenizer"))
    with pytest.raises(CheckpointError, match="image_tokenizer"):
        UnimodalProcessor.from_pretrained(bare)


def test_an_image_tokenizer_of_another_merge_is_refused(folder, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    other = tiny_image_tokenizer(seed=7)
    other.save_pretrained(mixed / "image_tokenizer")
    with pytest.raises(MismatchError, match="fingerprint"):
        UnimodalProcessor.from_pretrained(mixed)


def test_a_text_tokenizer_of_another_model_is_refused(processor):
    with pytest.raises(MismatchError, match="image vocabulary"):
        UnimodalProcessor(
            processor.image_processor,
            TEXT_TOKENIZERS["llama3"](),
            image_vocabulary=processor.image_vocabulary,
        )
    with pytest.raises(VocabularyError, match="image_vocabulary"):
        UnimodalProcessor(processor.image_processor, processor.tokenizer)
    with pytest.raises(MessageError, match="prompt"):
        UnimodalProcessor(
            processor.image_processor,
            processor.tokenizer,
            image_vocabulary=processor.image_vocabulary,
            draw_instruction="no place",
        )
