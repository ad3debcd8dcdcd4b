"""Merge: text stays bit for bit what it was, new rows start well, nothing half-written is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.toy import (
    llama2_tokenizer,
    nested_image_tokenizer,
    qwen_tokenizer,
    save_llm,
    sentencepiece_model,
    tiny_image_tokenizer,
    toy_extension,
    toy_merged_folder,
)
from tokenizer_hf.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    MessageError,
    MismatchError,
    VocabularyError,
)
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from tokenizer_hf.vocabulary import VocabularyExtension
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.generation.sampling import generate
from unimodal.merge import export_vocabulary, merge
from unimodal.pipeline import Unimodal
from unimodal.processing_unimodal import UnimodalProcessor
from unimodal.row_initialisation import caption_evidence, new_rows
from unimodal.weight_shards import read_header

TEXT = "A small red circle is left of a blue star.\nnaïve 123 <|im_end|>"
FAMILIES = ("qwen3", "llama", "gemma3_text", "gpt_neox", "mistral", "phi3", "phi")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with a base LLM, `llm`, and an image tokenizer, `image_tokenizer`."""
    folder = tmp_path_factory.mktemp("parts")
    save_llm(folder / "llm")
    tiny_image_tokenizer().save_pretrained(folder / "image_tokenizer")
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy_merged_folder(folder)
    return folder


def logits(folder, text=TEXT):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model, model(ids).logits


def tensors(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return found


# --- text stays what it was -----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_text(tmp_path, family, tied):
    out = toy_merged_folder(tmp_path, family, tied=tied)
    base, base_logits = logits(tmp_path / "llm")
    model, new_logits = logits(out)
    text = len(AutoTokenizer.from_pretrained(tmp_path / "llm"))

    assert type(model) is type(base)
    assert torch.equal(new_logits[..., :text], base_logits[..., :text])
    for one, other in (
        (model.get_input_embeddings(), base.get_input_embeddings()),
        (model.get_output_embeddings(), base.get_output_embeddings()),
    ):
        assert one.weight.shape[0] == model.config.vocab_size == 448
        assert torch.equal(one.weight[:text], other.weight[:text])
        assert one.weight[text:].isfinite().all()
        assert one.weight[text : text + 18].std() > 0.3 * other.weight[:text].std()
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared is tied

    stored, original = tensors(out), tensors(tmp_path / "llm")
    assert stored.keys() == original.keys()
    if (bias := stored.pop("lm_head.bias", None)) is not None:
        assert torch.equal(bias[:text], original["lm_head.bias"][:text]) and len(bias) == 448
    grown = [name for name in stored if stored[name].shape != original[name].shape]
    assert len(grown) == (1 if tied else 2)
    for name in stored:
        assert torch.equal(stored[name][: len(original[name])][:text], original[name][:text])


@pytest.mark.parametrize("mode", ["added", "base"])
@pytest.mark.parametrize("style", ["qwen", "llama3", "llama2"])
def test_every_tokenizer_style_keeps_its_logits(tmp_path, style, mode):
    out = toy_merged_folder(tmp_path, "llama", style=style, vocab_mode=mode)
    _, base_logits = logits(tmp_path / "llm")
    _, new_logits = logits(out)
    text = len(AutoTokenizer.from_pretrained(tmp_path / "llm"))
    assert torch.equal(new_logits[..., :text], base_logits[..., :text])


def test_config_changes_in_its_vocabulary_size_alone(merged):
    old = json.loads((merged / "llm" / "config.json").read_text())
    new = json.loads((merged / "merged" / "config.json").read_text())
    assert new == {**old, "vocab_size": 448} and old["vocab_size"] != 448
    generation = "generation_config.json"
    assert (merged / "merged" / generation).read_text() == (merged / "llm" / generation).read_text()


def test_the_processor_of_the_folder_works(merged):
    processor = UnimodalProcessor.from_pretrained(merged / "merged")
    vocabulary = processor.vocabulary
    assert vocabulary.rows == 448 and vocabulary.vocab_size == vocabulary.start_token_id + 18
    codes = processor.encode_images([np.full((20, 30, 3), 200, np.uint8)])
    ids = vocabulary.span(codes[0].tolist())
    [part] = processor.parse(ids)
    assert part["codes"] == codes[0].tolist() and part["image"].size == (16, 16)
    again = ImageTokenizer.from_pretrained(merged / "merged" / "image_tokenizer")
    original = ImageTokenizer.from_pretrained(merged / "image_tokenizer")
    assert again.fingerprint() == original.fingerprint() == vocabulary.fingerprint


@pytest.mark.parametrize("vocab_mode", ["added", "base"])
def test_rows_of_codes_may_end(tmp_path, parts, vocab_mode):
    model = merge(
        parts / "llm",
        parts / "image_tokenizer",
        tmp_path / "merged",
        vocab_mode=vocab_mode,
        row_ends=1,
        row_init="codebook",
    )
    unimodal = Unimodal.from_pretrained(model, device="cpu", dtype="float32")
    processor, vocabulary = unimodal.processor, unimodal.processor.vocabulary
    assert (vocabulary.row_length, vocabulary.num_tokens) == (2, 4)
    row_end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|image_row_end|>")
    assert row_end == vocabulary.row_end_token_id == vocabulary.start_token_id + 2
    ids = vocabulary.span([1, 2, 3, 4])
    assert ids.index(row_end) == 3 and ids.count(row_end) == 1
    assert processor.parse(ids)[0]["codes"] == [1, 2, 3, 4]
    moved = [*ids[:2], row_end, ids[2], *ids[4:]]
    for wrong in (
        [i for i in ids if i != row_end],
        moved,
        [row_end],
        [*ids[:4], row_end, *ids[4:]],
    ):
        with pytest.raises(MessageError, match="position 0"):
            processor.parse(wrong)
    [span] = generate(unimodal.model, processor, [[5, 6]], mode="image")
    assert ImageSpanGrammar(vocabulary).check_span(span) is None and span[3] == row_end
    [plain] = unimodal.draw("a red circle", seed=0)
    assert plain.size == (16, 16)
    said = f"a {vocabulary.row_end_string} here"
    prompt = processor.render([{"role": "user", "content": said}])
    assert row_end not in prompt.input_ids
    assert "in rows of 2 with `<|image_row_end|>` between" in (model / "README.md").read_text()
    with pytest.raises(VocabularyError, match="have no rows"):
        nested_image_tokenizer().save_pretrained(tmp_path / "nested")
        merge(parts / "llm", tmp_path / "nested", tmp_path / "out", row_ends=1)


def test_a_large_base_embedding_is_never_cut(tmp_path, parts):
    llm = save_llm(tmp_path / "llm", vocab_size=1000)
    out = merge(llm, parts / "image_tokenizer", tmp_path / "out")
    processor = UnimodalProcessor.from_pretrained(out, load_image_tokenizer=False)
    text = len(qwen_tokenizer())
    assert processor.vocabulary.start_token_id == text and processor.vocabulary.rows == 1024
    [(name, weight)] = [(n, t) for n, t in tensors(out).items() if len(t) == 1024]
    assert torch.equal(weight[:text], tensors(llm)[name][:text])


def test_a_base_without_chat_template_gets_a_plain_one(tmp_path, parts):
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = None
    llm = save_llm(tmp_path / "llm", tokenizer=tokenizer)
    merged_tokenizer = AutoTokenizer.from_pretrained(
        merge(llm, parts / "image_tokenizer", tmp_path / "out")
    )
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = merged_tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "User:\nhi\nAssistant:\nyes<|im_end|>\n"
    prompt = merged_tokenizer.apply_chat_template(
        chat[:1], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(prompt) and prompt.endswith("Assistant:\n")


def test_a_sentencepiece_model_beside_the_tokenizer_is_kept_in_step(tmp_path, parts):
    import sentencepiece

    llm = save_llm(tmp_path / "llm", "llama", tokenizer=llama2_tokenizer())
    (llm / "tokenizer.model").write_bytes(sentencepiece_model())
    out = merge(llm, parts / "image_tokenizer", tmp_path / "out", vocab_mode="base")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert [pieces.id_to_piece(i) for i in range(len(pieces))] == words


# --- shards, dtypes, memory -----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sharded_bfloat16_stays_sharded_and_bfloat16(tmp_path, parts, tied):
    llm = save_llm(tmp_path / "llm", tied=tied, dtype=torch.bfloat16, max_shard_size="10KB")
    out = merge(llm, parts / "image_tokenizer", tmp_path / "out")
    names = sorted(file.name for file in llm.glob("*.safetensors"))
    assert len(names) > 2 and sorted(f.name for f in out.glob("*.safetensors")) == names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = tensors(out)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    base, base_logits = logits(llm)
    model, new_logits = logits(out)
    text = len(qwen_tokenizer())
    assert model.dtype == base.dtype == torch.bfloat16
    assert torch.equal(new_logits[..., :text], base_logits[..., :text])


def test_dtype_converts_every_weight(tmp_path, parts):
    out = merge(parts / "llm", parts / "image_tokenizer", tmp_path / "out", dtype="bfloat16")
    stored, original = tensors(out), tensors(parts / "llm")
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        rows = min(len(tensor), 400)
        assert torch.equal(tensor[:rows], original[name][:rows].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    with pytest.raises(ConfigurationError, match="expected float32, bfloat16 or float16"):
        merge(parts / "llm", parts / "image_tokenizer", tmp_path / "no", dtype="int8")


def test_output_files_are_read_by_the_safetensors_library_with_any_dtype(tmp_path):
    from unimodal.weight_shards import NewRows, rewrite

    values = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(2, 3, dtype=torch.float64),
        "c": torch.tensor([True, False]),
        "d": torch.randn(0, 4),
        "e": torch.randn(5).bfloat16(),
        "f": torch.tensor(3),
    }
    save_file(values, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    change = NewRows(1, torch.ones(2, 3))
    rewrite([tmp_path / "model.safetensors"], tmp_path / "out", {"b": change})
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == values.keys()
    for name in values.keys() - {"b"}:
        assert torch.equal(back[name], values[name]) and back[name].dtype == values[name].dtype
    assert torch.equal(back["b"], torch.cat([values["b"][:1], torch.ones(2, 3).double()]))


# --- hard times ----------------------------------------------------------------------------------

# One fresh process does three things, so that transformers is imported once: it measures the memory
# of a merge, merges under a limit on file sizes (to a program that is a full disk: OSError
# on write), and kills a forked child in the middle of a merge.
HARD_TIMES = """
import json, os, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from unimodal.merge import merge

llm, pictures, large, out = map(Path, sys.argv[2:])
found = {}

def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

merge(llm, pictures, out / "warm")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again at what is used now
before = memory("VmRSS")
merge(large, pictures, out / "large")
found["grown"] = memory("VmHWM") - before

full = out / "full"
full.mkdir()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
try:
    merge(llm, pictures, full / "merged")
except OSError as error:
    found["full"] = [type(error).__name__, [path.name for path in full.iterdir()]]
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

killed = out / "killed"
killed.mkdir()
child = os.fork()
if child == 0:
    merge(large, pictures, killed / "merged")
    os._exit(0)
while not any(killed.glob(".merged.*/*.safetensors")):
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended too early"
    time.sleep(0.002)
os.kill(child, signal.SIGKILL)
found["killed"] = [os.waitpid(child, 0)[1], (killed / "merged").exists()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hard_times(parts, tmp_path_factory):
    """What HARD_TIMES found, the base LLM of over 100 MB, and where it was merged to."""
    if sys.platform != "linux":
        pytest.skip("reads /proc and limits file sizes")
    folder = tmp_path_factory.mktemp("hard")
    large = save_llm(
        folder / "llm",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        head_dim=64,
        max_shard_size="20MB",
    )
    root = Path(__file__).parents[2]
    paths = (root, parts / "llm", parts / "image_tokenizer", large, folder)
    result = subprocess.run(
        [sys.executable, "-c", HARD_TIMES, *map(str, paths)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), large, folder / "large"


def test_a_merge_takes_far_less_memory_than_the_model(hard_times):
    found, large, out = hard_times
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 100e6 and found["grown"] < 40e6, (size, found)
    assert tensors(out).keys() == tensors(large).keys()


def test_a_full_disk_leaves_nothing(hard_times):
    assert hard_times[0]["full"] == ["OSError", []]


def test_a_killed_merge_leaves_nothing_at_its_place(hard_times):
    assert hard_times[0]["killed"] == [signal.SIGKILL, False]


def test_a_merged_folder_is_replaced_and_no_other_folder_is(parts, tmp_path):
    llm, pictures, out = parts / "llm", parts / "image_tokenizer", tmp_path / "out"
    merge(llm, pictures, out)
    (out / "stale.txt").write_text("from an older merge")
    merge(llm, pictures, out)
    assert not (out / "stale.txt").exists() and (out / "config.json").is_file()
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("keep me")
    for place in (precious, precious / "letter.txt"):
        with pytest.raises(ConfigurationError, match="give a new folder"):
            merge(llm, pictures, place)
    for source in (llm, llm.parent):
        with pytest.raises(ConfigurationError, match="holds the source"):
            merge(llm, pictures, source)
    assert (precious / "letter.txt").read_text() == "keep me"
    assert (llm / "config.json").is_file()


# --- mistakes -------------------------------------------------------------------------------------


def edited(parts, tmp_path, name, **changes):
    """A copy of the base LLM with changed fields in its config.json."""
    folder = tmp_path / name
    shutil.copytree(parts / "llm", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_mistakes_are_explained(parts, tmp_path):
    pictures, out = parts / "image_tokenizer", tmp_path / "out"

    def refuse(error, match, llm=parts / "llm", image_tokenizer=pictures, **settings):
        with pytest.raises(error, match=match):
            merge(llm, image_tokenizer, out, **settings)
        assert not out.exists()

    refuse(CheckpointError, "there is no folder .*nowhere", llm=tmp_path / "nowhere")
    refuse(CheckpointError, "is a file", llm=parts / "llm" / "config.json")
    (tmp_path / "empty").mkdir()
    refuse(CheckpointError, "has no config.json", llm=tmp_path / "empty")
    refuse(CheckpointError, "empty", image_tokenizer=tmp_path / "empty")
    refuse(CheckpointError, "llm", image_tokenizer=parts / "llm")
    refuse(CheckpointError, "expected a text-only causal LM", llm=pictures)

    bert = edited(parts, tmp_path, "bert", model_type="bert", architectures=["BertForMaskedLM"])
    refuse(CheckpointError, "is a BertForMaskedLM", llm=bert)
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    t5 = edited(parts, tmp_path, "t5", is_encoder_decoder=True, **t5)
    refuse(CheckpointError, "is an encoder-decoder", llm=t5)
    unknown = edited(parts, tmp_path, "unknown", model_type="from-the-future")
    refuse(CheckpointError, "no config that transformers knows", llm=unknown)

    pickled = edited(parts, tmp_path, "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refuse(CheckpointError, "only pickled weights", llm=pickled)
    (pickled / "pytorch_model.bin").unlink()
    refuse(CheckpointError, "has no model.safetensors", llm=pickled)

    small = edited(parts, tmp_path, "small", vocab_size=300)
    refuse(VocabularyError, "has 403 ids but the model has 300", llm=small)
    other = edited(parts, tmp_path, "other", vocab_size=500)
    refuse(CheckpointError, "config.json says", llm=other)
    untied = edited(parts, tmp_path, "untied", tie_word_embeddings=False)
    refuse(CheckpointError, "has no tensor lm_head.weight", llm=untied)

    truncated = edited(parts, tmp_path, "truncated")
    weights = (truncated / "model.safetensors").read_bytes()
    for content in (weights[: len(weights) // 2], b"", b"garbage of some length", b"\xff" * 100):
        (truncated / "model.safetensors").write_bytes(content)
        refuse(CheckpointError, "corrupt or truncated", llm=truncated)

    broken = edited(parts, tmp_path, "broken")
    (broken / "tokenizer.json").write_text("{")
    refuse(CheckpointError, "tokenizer in .* cannot be loaded", llm=broken)

    refuse(ConfigurationError, "expected one of mean_cov", row_init="best")
    refuse(ConfigurationError, "pairs", row_init="meaning")
    refuse(ConfigurationError, "pairs", pairs=tmp_path)
    refuse(ConfigurationError, "pad_to is 0", pad_to=0)
    refuse(VocabularyError, "expected one of added, base", vocab_mode="best")


def test_a_missing_shard_is_named(tmp_path, parts):
    llm = save_llm(tmp_path / "llm", max_shard_size="10KB")
    gone = sorted(llm.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        merge(llm, parts / "image_tokenizer", tmp_path / "out")


def test_a_merged_model_is_not_merged_again(merged, tmp_path):
    with pytest.raises(VocabularyError, match="already has 18 of the image words"):
        merge(merged / "merged", merged / "image_tokenizer", tmp_path / "out")


# --- how the rows start ---------------------------------------------------------------------------


def text_rows(count=5000, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    offset = torch.randn(width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + offset


def test_mean_cov_rows_have_the_mean_and_covariance_of_text_rows():
    text = text_rows()
    vocabulary = toy_extension(8192).bind(len(text))
    rows = new_rows(text, vocabulary)
    assert rows.shape == (vocabulary.rows - len(text), 8)
    new = rows[: vocabulary.num_codes + 2]
    assert torch.allclose(new.mean(0), text.mean(0), atol=0.15)
    scale = text.T.cov().diagonal().mean()
    assert (new.T.cov() - text.T.cov()).abs().max() < 0.1 * scale
    assert torch.equal(new_rows(text, vocabulary), rows)
    assert not torch.equal(new_rows(text, vocabulary, seed=1), rows)
    padding = rows[vocabulary.vocab_size - len(text) :]
    assert len(padding) and torch.allclose(padding, text.mean(0).expand_as(padding), atol=1e-5)


def test_fewer_text_rows_than_dimensions_are_enough():
    text = text_rows(20, 64)
    rows = new_rows(text, toy_extension(16).bind(20))
    assert rows.isfinite().all()
    assert 0.5 < (rows[:18] - text.mean(0)).norm() / (text[:18] - text.mean(0)).norm() < 2


def test_normal_rows_have_the_scale_of_text_rows_and_no_mean():
    text = text_rows() + 3
    rows = new_rows(text, toy_extension(8192).bind(len(text)), "normal")[:8194]
    assert rows.mean().abs() < 0.1 and abs(rows.std() / text.std() - 1) < 0.05


def test_codebook_rows_put_like_codes_together():
    text = text_rows(5000, 64)
    vocabulary = toy_extension(64).bind(len(text))
    vectors = torch.randn(32, 16).repeat_interleave(2, 0)  # codes 2i and 2i + 1 are alike
    vectors[1::2] += 0.05 * torch.randn(32, 16)
    rows = new_rows(text, vocabulary, "codebook", code_vectors=vectors)[2:66]
    distances = torch.cdist(rows, rows).fill_diagonal_(float("inf"))
    assert torch.equal(distances.argmin(1), torch.arange(64) ^ 1)
    spread = (rows - text.mean(0)).norm(dim=1).mean() / (text - text.mean(0)).norm(dim=1).mean()
    assert 0.7 < spread < 1.4
    with pytest.raises(ConfigurationError, match="needs the code vectors"):
        new_rows(text, vocabulary, "codebook")


@pytest.fixture
def pairs(tmp_path):
    """A code cache in which code 3 means red, code 5 blue, code 0 is everywhere, 9 nowhere."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(200):
        colour = ("red", "blue")[index % 2]
        noise = int(rng.integers(10, 16))
        rows.append(
            {
                "key": str(index),
                "codes": [0, 3 if colour == "red" else 5, noise, 0],
                "captions": [f"a {colour} circle", f"There is a {colour} circle."],
                "questions": [],
                "source": "toy",
            }
        )
    folder = tmp_path / "pairs"
    folder.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), folder / "codes-00000.parquet")
    manifest = {"fingerprint": tiny_image_tokenizer().fingerprint()}
    (folder / "cache_manifest.json").write_text(json.dumps(manifest))
    return folder


def test_evidence_is_what_codes_and_words_say_of_each_other(pairs):
    tokenizer = qwen_tokenizer()
    vocabulary = VocabularyExtension.from_image_tokenizer(tiny_image_tokenizer()).bind(403)
    alone = tiny_image_tokenizer().config.code_factors()
    evidence = caption_evidence(pairs, tokenizer, vocabulary, alone).toarray()
    assert evidence.shape == (16, 403)
    red, blue = (tokenizer(f" {word}")["input_ids"] for word in ("red", "blue"))
    assert len(red) == len(blue) == 1
    assert evidence[3, red[0]] == pytest.approx(np.log(2) * 100 / 101)
    assert evidence[5, blue[0]] == pytest.approx(np.log(2) * 100 / 101)
    assert evidence[3, blue[0]] == evidence[5, red[0]] == 0
    assert set(np.flatnonzero(evidence[3])) == {red[0]}  # words of every caption drop out
    assert not evidence[0].any() and not evidence[9].any()


def test_evidence_of_factors_reaches_codes_that_no_picture_has(pairs):
    tokenizer = qwen_tokenizer()
    vocabulary = VocabularyExtension.from_image_tokenizer(tiny_image_tokenizer()).bind(403)
    factors = np.stack([np.arange(16) % 4, 4 + np.arange(16) // 4], axis=1)
    evidence = caption_evidence(pairs, tokenizer, vocabulary, factors).toarray()
    red, blue = (tokenizer(f" {word}")["input_ids"][0] for word in ("red", "blue"))
    # Code 3 (red) is factors 3 and 4, code 5 (blue) factors 1 and 5; nobody saw 7 and 13.
    assert evidence[7, red] > 0 and evidence[7, blue] > 0  # 3 of the red code, 5 of the blue one
    assert evidence[13, blue] > 0 and evidence[13, red] == 0  # 1 of the blue code


def test_meaning_puts_a_code_near_its_words(pairs, parts, tmp_path):
    out = merge(
        parts / "llm", parts / "image_tokenizer", tmp_path / "m", row_init="meaning", pairs=pairs
    )
    plain = merge(parts / "llm", parts / "image_tokenizer", tmp_path / "plain")
    name = "model.embed_tokens.weight"
    rows, reference = tensors(out)[name], tensors(plain)[name]
    tokenizer = qwen_tokenizer()
    text, mean = rows[: len(tokenizer)], rows[: len(tokenizer)].mean(0)
    for code, word in ((3, " red"), (5, " blue")):
        row = rows[len(tokenizer) + 2 + code] - mean
        alike = torch.nn.functional.cosine_similarity(row[None], text - mean)
        assert alike.argmax() == tokenizer(word)["input_ids"][0] and alike.max() > 0.8
    unseen = len(tokenizer) + 2 + 9
    assert torch.equal(rows[unseen], reference[unseen])


def test_pairs_that_do_not_fit_are_refused(pairs, parts, tmp_path):
    def refuse(error, match):
        with pytest.raises(error, match=match):
            merge(
                parts / "llm",
                parts / "image_tokenizer",
                tmp_path / "out",
                row_init="meaning",
                pairs=pairs,
            )

    manifest = pairs / "cache_manifest.json"
    (pairs / "codes-00000.parquet").rename(tmp_path / "away.parquet")
    refuse(DataError, "no picture with codes and captions")
    manifest.write_text(json.dumps({"fingerprint": "f" * 64}))
    refuse(MismatchError, "encode the pictures again")
    manifest.unlink()
    refuse(DataError, "is no code cache")


# --- without our packages -------------------------------------------------------------------------

STRANGER = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tokenizer_hf", "unimodal", "eval", "training"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

merged, base, again = sys.argv[1:]
model, plain = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (merged, base))
tokenizer, old = (AutoTokenizer.from_pretrained(path) for path in (merged, base))
ids = tokenizer("A small red circle", return_tensors="pt")["input_ids"]
with torch.inference_mode():
    same = torch.equal(model(ids).logits[..., : len(old)], plain(ids).logits[..., : len(old)])
picture = Image.new("RGB", (20, 30), (220, 35, 40))
AutoProcessor.from_pretrained(merged, trust_remote_code=True).save_pretrained(again)
found = {"same": same}
for name, path in (("first", merged), ("again", again)):
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    codes = processor.encode_images([picture])
    image_tokenizer = AutoModel.from_pretrained(path + "/image_tokenizer", trust_remote_code=True)
    found[name] = {
        "class": f"{type(processor).__module__}.{type(processor).__name__}",
        "codes": codes.tolist(),
        "pixel": processor.decode_codes(codes)[0].getpixel((3, 4)),
        "prompt": processor.apply_chat_template(
            processor.caption_messages(picture), tokenize=True, add_generation_prompt=True
        ),
        "fingerprint": image_tokenizer.fingerprint(),
    }
print(json.dumps(found))
"""


def test_a_stranger_loads_everything(merged, tmp_path):
    paths = (merged / "merged", merged / "llm", tmp_path / "again")
    result = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *map(str, paths)],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    ours = UnimodalProcessor.from_pretrained(merged / "merged")
    picture = np.full((30, 20, 3), (220, 35, 40), np.uint8)
    codes = ours.encode_images([picture])
    assert found["same"] is True
    for one in (found["first"], found["again"]):
        assert one["class"].startswith("transformers_modules.")
        assert one["class"].endswith("processing_unimodal.UnimodalProcessor")
        assert one["codes"] == codes.tolist()
        assert tuple(one["pixel"]) == ours.decode_codes(codes)[0].getpixel((3, 4))
        assert one["fingerprint"] == ours.vocabulary.fingerprint
        assert one["prompt"] == ours.apply_chat_template(
            ours.caption_messages(picture), tokenize=True, add_generation_prompt=True
        )


def test_the_root_asks_for_no_code_and_the_copies_import_only_each_other(merged):
    folder = merged / "merged"
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text())
    for place in (folder, folder / "image_tokenizer"):
        names = {file.stem for file in place.glob("*.py")}
        for file in place.glob("*.py"):
            for line in file.read_text().splitlines():
                words = line.split()
                if words[:1] == ["from"] and words[1].startswith("."):
                    assert words[1][1:] in names, (file, line)
                assert not line.strip().startswith(("from tokenizer_hf", "from unimodal"))


# --- the command line -----------------------------------------------------------------------------


def command(*words):
    from typer.testing import CliRunner

    from unimodal.cli import app

    return CliRunner().invoke(app, [str(word) for word in words])


def test_merge_as_a_command(parts, tmp_path):
    result = command(
        *("merge", "--llm", parts / "llm", "--image-tokenizer", parts / "image_tokenizer"),
        *("--out", tmp_path / "out", "--vocab-mode", "base", "--row-init", "codebook"),
        *("--draw-instruction", "Paint {prompt}.", "--row-ends", "1"),
    )
    assert result.exit_code == 0, result.output
    processor = UnimodalProcessor.from_pretrained(tmp_path / "out")
    assert processor.vocabulary.row_length == 2
    assert processor.draw_messages("a star")[0]["content"] == "Paint a star."
    result = command("merge", "--llm", "nowhere", "--image-tokenizer", "x", "--out", tmp_path / "o")
    assert isinstance(result.exception, CheckpointError)
    result = command(
        *("merge", "--llm", parts / "llm", "--image-tokenizer", parts / "image_tokenizer"),
        *("--out", tmp_path / "rows", "--row-ends", "many"),
    )
    assert isinstance(result.exception, ConfigurationError)


def test_the_vocabulary_is_exported_alone_and_with_a_text_tokenizer(parts, tmp_path):
    pictures = tmp_path / "pictures"
    nested_image_tokenizer().save_pretrained(pictures)
    (pictures / "vocabulary_extension.json").unlink()
    assert command("export-vocabulary", pictures).exit_code == 0
    extension = VocabularyExtension.load(pictures)
    assert (extension.min_tokens, extension.num_tokens, extension.nested) == (2, 6, True)

    out = tmp_path / "extended"
    result = command(
        *("export-vocabulary", pictures, "--text-tokenizer", parts / "llm"),
        *("--vocab-mode", "base", "--out", out),
    )
    assert result.exit_code == 0 and "403 to 420" in result.output
    values = json.loads((out / "image_vocabulary.json").read_text())
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|image_00000|>") == 405
    assert values["offsets"] == [405]
    without_out = command("export-vocabulary", pictures, "--text-tokenizer", parts / "llm")
    assert isinstance(without_out.exception, ConfigurationError)

    (tmp_path / "a.model").write_bytes(sentencepiece_model())
    options = ("--row-ends", "1", "--out", out)
    rows = command("export-vocabulary", parts / "image_tokenizer", *options)
    assert "19 new words" in rows.output and VocabularyExtension.load(out).row_length == 2
    lines = export_vocabulary(pictures, tmp_path / "sp", tmp_path / "a.model")
    assert len(lines) == 2 and (tmp_path / "sp" / "tokenizer.model").is_file()


def test_a_text_tokenizer_is_trained_by_command(tmp_path):
    from tests.toy import corpus

    (tmp_path / "texts.txt").write_text("\n".join(corpus()))
    out = tmp_path / "tokenizer"
    result = command(
        "train-text-tokenizer", tmp_path / "texts.txt", "--vocab-size", 400, "--out", out
    )
    assert result.exit_code == 0, result.output
    assert len(AutoTokenizer.from_pretrained(out)) == 400


def test_headers_name_every_tensor(parts):
    header = read_header(parts / "llm" / "model.safetensors")
    library = load_file(parts / "llm" / "model.safetensors")
    assert header.keys() == library.keys()
    for name, tensor in header.items():
        assert torch.equal(tensor.read(), library[name])
