"""The logits processor: random grammars, batches, paddings and adversarial logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy import tiny_llm
from tests.unimodal.test_grammar import assert_reply, bound, grammars
from tokenizer_hf.errors import ConfigurationError
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.generation.logits_processor import ImageSpanLogitsProcessor, clean, draw, warp

INF = float("inf")


def hostile_logits(rng: torch.Generator, rows: int, width: int, hostility: float) -> torch.Tensor:
    """Random logits in which any entry may be NaN, infinite or huge, and whole rows may be -inf."""
    logits = torch.randn(rows, width, generator=rng) * 3
    poison = torch.tensor([float("nan"), INF, -INF, 3e38, -3e38, 0.0])
    chosen = poison[torch.randint(len(poison), logits.shape, generator=rng)]
    logits = torch.where(torch.rand(logits.shape, generator=rng) < hostility, chosen, logits)
    hopeless = torch.rand(rows, 1, generator=rng) < hostility / 4
    return torch.where(hopeless, poison[torch.randint(3, (rows, 1), generator=rng)], logits)


def simulate(processor, prompt, steps, rng, hostility, eagerness, width):
    """What ``generate`` does with a processor, with random logits in a model's place."""
    ids = prompt
    start = processor.grammar.vocabulary.start_token_id
    for _ in range(steps):
        logits = hostile_logits(rng, len(ids), width, hostility)
        logits[:, start] += eagerness
        scores = processor(ids, logits)
        assert scores.shape == logits.shape
        assert not scores.isnan().any() and not (scores == INF).any()
        probabilities = scores.softmax(-1)  # NaN, and an error below, if a row is all -inf
        token_ids = torch.multinomial(probabilities, 1, generator=rng)
        assert (scores.gather(-1, token_ids) > -INF).all()
        ids = torch.cat([ids, token_ids], dim=1)
    return ids[:, prompt.shape[1] :]


temperatures = st.sampled_from((0.0, 0.01, 0.7, 1.0, 30.0))
top_ks = st.sampled_from((None, 0, 1, 2, 50))


@settings(deadline=None, max_examples=150)
@given(
    grammars(),
    st.integers(1, 30),
    st.integers(1, 6),
    st.sampled_from((0.0, 0.2, 0.9, 1.0)),
    st.sampled_from((-5.0, 0.0, 5.0)),
    st.tuples(temperatures, top_ks, temperatures, top_ks),
    st.integers(0, 2**32),
)
def test_every_reply_is_well_formed(grammar, budget, rows, hostility, eagerness, warps, seed):
    rng = torch.Generator().manual_seed(seed)
    vocabulary = grammar.vocabulary
    # Left padding of any length, with ids that may look like anything but an open image.
    prompt = torch.randint(vocabulary.start_token_id, (rows, 5), generator=rng)
    prompt[0, :3] = torch.tensor([vocabulary.start_token_id, 0, vocabulary.end_token_id])
    processor = ImageSpanLogitsProcessor(
        grammar,
        5,
        budget,
        text_temperature=warps[0],
        text_top_k=warps[1],
        image_temperature=warps[2],
        image_top_k=warps[3],
    )
    replies = simulate(processor, prompt, budget, rng, hostility, eagerness, vocabulary.rows)
    for reply in replies.tolist():
        assert_reply(grammar, reply, budget)


def test_no_malformed_image_in_a_hundred_thousand_spans():
    """Rows drift apart at once, so each is in a state of its own; one logit in 20 is hostile."""
    total = 0
    for books, least, most in ((1, 3, 3), (1, 1, 4), (2, 1, 3)):
        grammar = ImageSpanGrammar(bound(4, books, least, most, text_ids=3))
        rng = torch.Generator().manual_seed(least)
        steps, rows = 150, 3072
        processor = ImageSpanLogitsProcessor(grammar, 1, steps)
        prompt = torch.zeros(rows, 1, dtype=torch.int64)
        replies = simulate(processor, prompt, steps, rng, 0.05, 1.0, grammar.vocabulary.rows)
        spans = [span for reply in replies.tolist() for span in grammar.find_spans(reply)]
        assert [span for span in spans if span.problem] == []
        total += len(spans)
    assert total >= 100_000


def test_spans_that_prompts_left_open_are_finished():
    vocabulary = bound(4, 1, 4, 4)  # start 5, end 6, codes 7-10
    grammar = ImageSpanGrammar(vocabulary, mode="text")
    prompt = torch.tensor([[0, 0, 1, 2], [0, 0, 2, 5], [5, 7, 8, 9], [8, 9, 10, 6]])
    rng = torch.Generator().manual_seed(0)
    processor = ImageSpanLogitsProcessor(grammar, 4, 8)
    replies = simulate(processor, prompt, 8, rng, 0.0, 9.0, vocabulary.rows).tolist()
    assert all(grammar.vocabulary.is_code(replies[1][:4])) and replies[1][4] == 6
    assert vocabulary.is_code(replies[2])[0] and replies[2][1] == 6
    for reply in (replies[0], replies[1][5:], replies[2][2:], replies[3]):
        assert max(reply) < 5


@settings(deadline=None, max_examples=60)
@given(grammars(), st.integers(0, 2**32))
def test_state_kept_along_the_way_equals_state_from_the_ids(grammar, seed):
    """Also when rows are swapped between steps, as beam search does."""
    rng = torch.Generator().manual_seed(seed)
    width = grammar.vocabulary.rows
    kept = ImageSpanLogitsProcessor(grammar, 2, 12)
    ids = torch.zeros(4, 2, dtype=torch.int64)
    for step in range(12):
        logits = torch.randn(4, width, generator=rng)
        fresh = ImageSpanLogitsProcessor(grammar, 2, 12)
        scores = kept(ids, logits)
        assert torch.equal(scores, fresh(ids, logits))
        ids = torch.cat([ids, scores.softmax(-1).multinomial(1, generator=rng)], dim=1)
        if step % 3 == 2:
            ids = ids[torch.randint(4, (4,), generator=rng)]


def test_text_and_image_rows_have_their_own_temperature_and_top_k():
    vocabulary = bound(4, 1, 2, 2)  # text 0-4, start 5, end 6, codes 7-10
    logits = torch.arange(16.0).repeat(2, 1) / 4
    processor = ImageSpanLogitsProcessor(
        ImageSpanGrammar(vocabulary),
        2,
        9,
        text_temperature=2.0,
        text_top_k=3,
        image_temperature=0.5,
        image_top_k=2,
    )
    text, image = processor(torch.tensor([[1, 2], [1, 5]]), logits)
    assert text.isfinite().nonzero().flatten().tolist() == [3, 4, 5]
    assert image.isfinite().nonzero().flatten().tolist() == [9, 10]
    torch.testing.assert_close(text[3:6].softmax(-1), (logits[0, 3:6] / 2).softmax(-1))
    torch.testing.assert_close(image[9:11].softmax(-1), (logits[0, 9:11] * 2).softmax(-1))


def test_untouched_logits_pass_unchanged():
    """Beam search adds scores up over steps, so a plain processor must not shift a row."""
    logits = torch.randn(1, 16)
    scores = ImageSpanLogitsProcessor(ImageSpanGrammar(bound()), 1, 9)(torch.tensor([[0]]), logits)
    assert torch.equal(scores[0, :6], logits[0, :6]) and (scores[0, 6:] == -INF).all()


def test_clean_and_greedy_on_hostile_rows():
    rows = torch.tensor([[float("nan"), 1, 2], [INF, 3e38, -INF], [-INF] * 3, [float("nan")] * 3])
    cleaned = clean(rows)
    assert cleaned[0].tolist() == [-INF, 1, 2]
    assert cleaned[1].isfinite().tolist() == [True, True, False]
    assert (cleaned[2:] == 0).all()  # uniform over what is legal
    assert warp(cleaned, 0, None).isfinite().sum(-1).tolist() == [1, 1, 1, 1]
    assert clean(rows.half()).isnan().sum() == 0


def test_draw_follows_the_distribution_and_needs_one_uniform():
    logits = torch.tensor([[0.0, 1.0, -INF, 2.0]])
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    columns = draw(logits.expand(20_000, 4), uniforms, 0.5, None)
    shares = columns.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=1e-4, rtol=0)
    top = draw(logits.expand(20_000, 4), uniforms, 1.0, 2).bincount(minlength=4) / 20_000
    expected = torch.tensor([0.0, 0.2689, 0.0, 0.7311])
    torch.testing.assert_close(top, expected, atol=1e-3, rtol=0)
    assert draw(logits, torch.tensor([0.99]), 0.0, None).tolist() == [3]
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(2, 4), edges, 1.0, None).tolist() == [0, 3]
    impossible_first = torch.tensor([[-INF, 0.0, 1.0, 2.0]])
    assert draw(impossible_first, edges[:1], 1.0, None).tolist() == [1]


def test_settings_that_cannot_be_right():
    grammar = ImageSpanGrammar(bound())
    with pytest.raises(ConfigurationError, match="text temperature is -1"):
        ImageSpanLogitsProcessor(grammar, 1, 1, text_temperature=-1)
    with pytest.raises(ConfigurationError, match="image top-k is -2"):
        ImageSpanLogitsProcessor(grammar, 1, 1, image_top_k=-2)


# --- through transformers' own generate -----------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_llm("qwen3", vocab_size=64)


VOCABULARY = bound(16, 1, 2, 4, text_ids=30)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 40},
        {"do_sample": False},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 4},
        {"do_sample": True, "num_beams": 3},
    ],
    ids=["sample", "greedy", "beams", "beam-sample"],
)
@pytest.mark.parametrize("mode", ["auto", "image"])
def test_plain_generate_writes_legal_spans_only(model, options, mode):
    torch.manual_seed(0)
    grammar = ImageSpanGrammar(VOCABULARY, mode=mode)
    prompt = torch.tensor([[0, 0, 3, 4, 5], [7, 8, 9, 10, 11]])
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        logits_processor=[ImageSpanLogitsProcessor(grammar, 5, 24)],
        max_new_tokens=24,
        top_k=0,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    spans = 0
    for reply in out[:, 5:].tolist():
        spans += assert_reply(grammar, reply, 24)
    assert spans or options.get("num_return_sequences", 1) < 40
