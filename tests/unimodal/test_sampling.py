"""The decoding loop on tiny random models of several families."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.toy import tiny_llm, toy_merged_folder
from tests.unimodal.test_grammar import assert_reply, bound, grammars
from tokenizer_hf.errors import ConfigurationError, MessageError
from unimodal.cli import app
from unimodal.generation.benchmark import measure_guidance
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.generation.logits_processor import ImageSpanLogitsProcessor
from unimodal.generation.sampling import (
    SamplingSettings,
    default_stop_ids,
    generate,
    sample_tokens,
)
from unimodal.pipeline import Unimodal

VOCABULARY = bound(16, 1, 4, 4, text_ids=30)  # start 30, end 31, codes 32-47
NESTED = bound(16, 1, 1, 6, text_ids=30)
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14]]
NEGATIVES = [[3], [3, 4, 2, 2, 2, 6, 7], [9], [12]]
WILD = SamplingSettings(text_temperature=1.5, image_temperature=1.5, seed=3)
GREEDY = SamplingSettings(image_temperature=0)


@pytest.fixture(scope="module")
def model():
    return tiny_llm("qwen3", vocab_size=64)


@pytest.fixture
def calls(model):
    """The shape of ``input_ids`` in each forward of the model."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    yield shapes
    hook.remove()


@settings(deadline=None, max_examples=40)
@given(grammars(), st.integers(1, 20), st.integers(1, 5), st.booleans(), st.integers(0, 2**32))
def test_every_reply_is_well_formed(grammar, budget, rows, guided, seed):
    model = tiny_llm("qwen3", vocab_size=grammar.vocabulary.rows)
    prompts = [[0] * (1 + row % 3) for row in range(rows)]
    options = SamplingSettings(
        text_temperature=2, image_temperature=2, seed=seed, guidance=3 if guided else 1
    )
    replies = sample_tokens(
        model,
        grammar,
        prompts,
        options,
        max_new_tokens=budget + grammar.min_span_ids,
        negative_prompts=prompts[::-1],
    )
    for reply in replies:
        assert len(reply) == budget + grammar.min_span_ids
        assert_reply(grammar, reply, len(reply))


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "gemma3_text", "gpt_neox"])
def test_equals_plain_generate_with_the_logits_processor(family):
    """Greedy, left padded, text and images in one reply; Gemma with a sliding window of 6."""
    changes = {"sliding_window": 6} if "gemma" in family else {}
    model = tiny_llm(family, vocab_size=64, **changes)
    grammar = ImageSpanGrammar(NESTED)
    ours = sample_tokens(model, grammar, PROMPTS, GREEDY, max_new_tokens=20, stop_token_ids=[2])
    mask = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in PROMPTS])
    theirs = model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=[ImageSpanLogitsProcessor(grammar, 5, 20)],
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    for our, their in zip(ours, theirs[:, 5:].tolist(), strict=True):
        assert our == their[: len(our)]
        assert len(our) == 20 or our[-1] == 2


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("mode", ["auto", "image"])
def test_a_row_does_not_depend_on_the_rows_beside_it(model, guidance, mode):
    grammar = ImageSpanGrammar(NESTED, mode=mode)
    options = SamplingSettings(text_temperature=1.5, image_temperature=1.5, guidance=guidance)

    def run(rows):
        return sample_tokens(
            model,
            grammar,
            [PROMPTS[row] for row in rows],
            options,
            max_new_tokens=16,
            negative_prompts=[NEGATIVES[row] for row in rows],
            seeds=[100 + row for row in rows],
            stop_token_ids=[2, 7, 11],
        )

    together = run([0, 1, 2, 3])
    assert run([3, 1]) == [together[3], together[1]]
    assert [run([row])[0] for row in range(4)] == together


def test_seeds(model):
    grammar = ImageSpanGrammar(VOCABULARY, mode="image")

    def run(settings, **more):
        return sample_tokens(model, grammar, [[5]] * 3, settings, **{"max_new_tokens": 6, **more})

    first = run(WILD)
    assert first == run(WILD) != run(SamplingSettings(seed=4, image_temperature=1.5))
    assert len({tuple(reply) for reply in first}) == 3
    assert first == run(WILD, seeds=[3, 4, 5])
    assert [reply[:6] for reply in run(WILD, max_new_tokens=40)] == first
    assert run(SamplingSettings()) != run(SamplingSettings())
    with pytest.raises(ConfigurationError, match="2 seeds came for 3 rows"):
        run(WILD, seeds=[1, 2])


def test_forced_ids_cost_no_forward(model, calls):
    grammar = ImageSpanGrammar(VOCABULARY, mode="image")
    replies = sample_tokens(
        model, grammar, PROMPTS, WILD, max_new_tokens=6, stop_token_ids=[VOCABULARY.end_token_id]
    )
    assert calls == [(4, 6), (4, 1), (4, 1), (4, 1)]  # prompt and start id together; 4 codes
    assert all(len(reply) == 6 for reply in replies)
    calls.clear()
    longer = sample_tokens(model, grammar, PROMPTS, WILD, max_new_tokens=7)
    assert calls == [(4, 6), (4, 1), (4, 1), (4, 1), (4, 2)]  # last code and end id together
    assert [reply[:6] for reply in longer] == replies


def test_guidance_doubles_the_rows_and_nothing_else(model, calls):
    grammar = ImageSpanGrammar(VOCABULARY, mode="image")
    stop = [VOCABULARY.end_token_id]
    guided = SamplingSettings(seed=3, guidance=2.0)
    options = {"max_new_tokens": 6, "negative_prompts": NEGATIVES, "stop_token_ids": stop}
    sample_tokens(model, grammar, PROMPTS, guided, **options)
    assert calls == [(8, 8), (8, 1), (8, 1), (8, 1)]
    calls.clear()
    sample_tokens(model, grammar, PROMPTS, SamplingSettings(seed=3), **options)
    text = ImageSpanGrammar(VOCABULARY, mode="text")
    sample_tokens(model, text, PROMPTS, guided, **options)
    assert {rows for rows, _ in calls} == {4}


def test_equal_prompts_are_read_once(model, calls):
    """Four drawings of one prompt and one unconditional prompt: two rows to read, eight to draw."""
    grammar = ImageSpanGrammar(VOCABULARY, mode="image")
    options = {"max_new_tokens": 6, "stop_token_ids": [VOCABULARY.end_token_id]}
    guided = SamplingSettings(guidance=2.0)

    def run(prompts, seeds):
        negatives = [[3, 4]] * len(prompts)
        return sample_tokens(
            model, grammar, prompts, guided, negative_prompts=negatives, seeds=seeds, **options
        )

    together = run([PROMPTS[0]] * 4, range(4))
    assert [rows for rows, _ in calls] == [2, 8, 8, 8]
    assert together == [run([PROMPTS[0]], [seed])[0] for seed in range(4)]
    calls.clear()
    mixed = run([PROMPTS[0], PROMPTS[2], PROMPTS[0], [3, 4]], range(4))
    assert [rows for rows, _ in calls] == [3, 8, 8, 8]
    assert mixed[0] == together[0] and mixed[2] == together[2]


def test_finished_rows_leave_the_batch(model, calls):
    """Replies are the same as those that never stopped, up to their stop ids."""
    grammar = ImageSpanGrammar(NESTED)
    seeds = range(8)
    prompts = PROMPTS * 2
    full = sample_tokens(model, grammar, prompts, WILD, max_new_tokens=40, seeds=seeds)
    calls.clear()
    stop = set(range(12))
    replies = sample_tokens(
        model, grammar, prompts, WILD, max_new_tokens=40, seeds=seeds, stop_token_ids=stop
    )
    for reply, whole in zip(replies, full, strict=True):
        assert reply == whole[: len(reply)]
        assert not stop & set(reply[:-1])
        assert reply[-1] in stop or len(reply) == 40
    rows = [shape[0] for shape in calls]
    assert rows[1] == 8 and rows[-1] < 8 and len(rows) <= max(map(len, replies)) < 40


def test_callback_sees_every_id_in_order(model):
    seen = [[] for _ in PROMPTS]
    replies = sample_tokens(
        model,
        ImageSpanGrammar(NESTED),
        PROMPTS,
        WILD,
        max_new_tokens=12,
        stop_token_ids=[4, 9],
        on_token=lambda row, token_id: seen[row].append(token_id),
    )
    assert seen == replies


def test_max_images_and_text_mode(model):
    for options, most in (({"max_images": 1}, 1), ({"max_images": 0}, 0), ({"mode": "text"}, 0)):
        grammar = ImageSpanGrammar(NESTED, **options)
        replies = sample_tokens(model, grammar, PROMPTS * 4, WILD, max_new_tokens=60)
        assert max(len(grammar.find_spans(reply)) for reply in replies) == most


def test_open_span_in_a_prompt_is_finished(model):
    grammar = ImageSpanGrammar(VOCABULARY, mode="image")
    prompt = [5, VOCABULARY.start_token_id, 40]
    (reply,) = sample_tokens(model, grammar, [prompt], WILD, max_new_tokens=9)
    assert grammar.find_spans(prompt + reply)[0].problem is None
    assert len(grammar.find_spans(prompt + reply)) == 1
    with pytest.raises(ConfigurationError, match="an image takes 4 here"):
        sample_tokens(model, grammar, [prompt], WILD, max_new_tokens=3)


def test_context_ends_a_row_before_its_limit(model):
    """512 positions: the long row gets what is left, and no image that does not fit into it."""
    prompts = [[5] * 500, [6]]
    grammar = ImageSpanGrammar(VOCABULARY)
    long, short = sample_tokens(model, grammar, prompts, WILD, max_new_tokens=30)
    assert (len(long), len(short)) == (12, 30)
    assert_reply(grammar, long, 12)
    forced = ImageSpanGrammar(VOCABULARY, mode="image")
    with pytest.raises(MessageError, match=r"prompt 1 has 507 ids .* at most 512; shorten"):
        sample_tokens(model, forced, [[5], [5] * 507], WILD, max_new_tokens=6)
    with pytest.raises(MessageError, match="prompt 0 has 100000 ids"):
        sample_tokens(model, grammar, [[5] * 100_000], WILD, max_new_tokens=6)


def test_mistakes_are_named(model):
    grammar = ImageSpanGrammar(VOCABULARY, mode="image")
    guided = SamplingSettings(guidance=2)
    assert sample_tokens(model, grammar, [], WILD, max_new_tokens=6) == []
    with pytest.raises(MessageError, match="prompt 1 has no ids"):
        sample_tokens(model, grammar, [[5], []], WILD, max_new_tokens=6)
    with pytest.raises(ConfigurationError, match="no negative prompts"):
        sample_tokens(model, grammar, PROMPTS, guided, max_new_tokens=6)
    with pytest.raises(ConfigurationError, match="1 negative prompts came for 4"):
        sample_tokens(
            model, grammar, PROMPTS, guided, max_new_tokens=6, negative_prompts=NEGATIVES[:1]
        )
    with pytest.raises(ConfigurationError, match="an image takes 6 here"):
        sample_tokens(model, grammar, PROMPTS, WILD, max_new_tokens=5)
    for wrong in ({"guidance": -1}, {"image_temperature": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigurationError):
            SamplingSettings(**wrong)


def test_training_mode_is_put_back(model):
    dropping = tiny_llm("gpt_neox", vocab_size=64, hidden_dropout=0.5)
    grammar = ImageSpanGrammar(VOCABULARY)
    still = sample_tokens(dropping, grammar, PROMPTS, GREEDY, max_new_tokens=8)
    dropping.train()
    assert sample_tokens(dropping, grammar, PROMPTS, GREEDY, max_new_tokens=8) == still
    assert dropping.training


def test_peft_model_samples_like_its_merged_self():
    from peft import LoraConfig, get_peft_model

    base = tiny_llm("qwen3", vocab_size=64)
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    grammar = ImageSpanGrammar(VOCABULARY, mode="image")
    before = sample_tokens(adapted, grammar, PROMPTS, GREEDY, max_new_tokens=12)
    merged = adapted.merge_and_unload()
    assert sample_tokens(merged, grammar, PROMPTS, GREEDY, max_new_tokens=12) == before


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return toy_merged_folder(tmp_path_factory.mktemp("model"))


def test_generate_takes_lengths_and_stop_ids_from_model_and_processor(merged):
    loaded = Unimodal.from_pretrained(merged)
    model, processor, tokenizer = loaded.model, loaded.processor, loaded.processor.tokenizer
    prompts = [tokenizer("Draw: a red circle")["input_ids"], tokenizer("Draw:")["input_ids"]]
    images = generate(model, processor, prompts, mode="image")
    grammar = ImageSpanGrammar(processor.vocabulary)
    assert [grammar.check_span(reply) for reply in images] == [None, None]
    wild = SamplingSettings(text_temperature=2, seed=0, max_new_tokens=60)
    replies = generate(model, processor, prompts * 16, wild)
    stop = default_stop_ids(model, tokenizer)
    assert tokenizer.eos_token_id in stop
    assert any(len(reply) < 60 for reply in replies)
    for reply in replies:
        assert not stop & set(reply[:-1])
        assert reply[-1] in stop or len(reply) == 60
    unstopped = generate(
        model, processor, prompts, SamplingSettings(max_new_tokens=30), stop_token_ids=()
    )
    assert [len(reply) for reply in unstopped] == [30, 30]


def test_bench_guidance_prints_and_writes_paired_ratios(merged, tmp_path):
    out = tmp_path / "deep" / "bench.json"
    command = ["bench", "guidance", "--model", str(merged), "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--rounds", "3", "--batch", "1", "--batch", "2"])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert json.loads(done.stdout) == result
    one, two = result["batches"]
    assert (one["batch"], one["target"], two["batch"], two["target"]) == (1, 1.4, 2, None)
    for entry in (one, two):
        assert entry["unguided_seconds"] > 0 and entry["guided_seconds"] > 0
        assert entry["low"] <= entry["ratio"] <= entry["high"]
    with pytest.raises(ConfigurationError, match="guidance is 1"):
        measure_guidance(None, None, guidance=1.0)
    with pytest.raises(ConfigurationError, match="1 rounds"):
        measure_guidance(None, None, rounds=1)
