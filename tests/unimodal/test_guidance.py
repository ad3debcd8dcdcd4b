"""Guidance in one batch against two plain, separate, unbatched forward passes a step."""

import pytest
import torch

from tests.toy import tiny_llm
from tests.unimodal.test_grammar import assert_reply, bound
from tokenizer_hf.errors import ConfigurationError
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.generation.guidance import guided_generate, mix_logits
from unimodal.generation.sampling import SamplingSettings, sample_tokens

FIXED = bound(16, 1, 12, 12, text_ids=30)  # start 30, end 31, codes 32-47
PAIRS = bound(8, 2, 6, 6, text_ids=30)  # codes 32-39 and 40-47, in turn
NESTED = bound(16, 1, 2, 12, text_ids=30)
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
NEGATIVES = [[3], [3, 4, 2, 2, 2, 6, 7], [9, 1]]


def reference(model, vocabulary, prompt, negative, guidance, min_ids, max_ids):
    """Draw one image greedily: no batch, no padding, no cache, all ids again in every pass."""
    start, end = vocabulary.start_token_id, vocabulary.end_token_id
    reply = [start]
    while len(reply) <= max_ids:
        conditional, unconditional = (
            model(input_ids=torch.tensor([ids + reply])).logits[0, -1] for ids in (prompt, negative)
        )
        mixed = unconditional + guidance * (conditional - unconditional)
        legal = list(range(*vocabulary.ranges[(len(reply) - 1) % len(vocabulary.ranges)]))
        if len(reply) > min_ids:
            legal.append(end)
        reply.append(max(legal, key=lambda token_id: mixed[token_id].item()))
        if reply[-1] == end:
            return reply
    return [*reply, end]


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(
    "vocabulary, lengths",
    [(FIXED, (12, 12)), (PAIRS, (12, 12)), (NESTED, (2, 12))],
    ids=["fixed", "two-codebooks", "nested"],
)
@torch.no_grad()
def test_equals_two_separate_passes(family, vocabulary, lengths):
    changes = {"sliding_window": 7} if "gemma" in family else {}
    model = tiny_llm(family, vocab_size=64, **changes)
    grammar = ImageSpanGrammar(vocabulary, mode="image")

    def ours(guidance):
        return sample_tokens(
            model,
            grammar,
            PROMPTS,
            SamplingSettings(image_temperature=0, guidance=guidance),
            max_new_tokens=14,
            negative_prompts=NEGATIVES,
            stop_token_ids=[vocabulary.end_token_id],
        )

    expected = [
        reference(model, vocabulary, prompt, negative, 3.0, *lengths)
        for prompt, negative in zip(PROMPTS, NEGATIVES, strict=True)
    ]
    assert ours(3.0) == expected
    assert ours(1.0) != expected  # guidance changes something here, so equality says something


@torch.no_grad()
def test_text_rows_are_not_guided():
    """Text comes from the conditional logits alone, and each id goes to both halves."""
    model = tiny_llm("qwen3", vocab_size=64)
    grammar = ImageSpanGrammar(FIXED)
    prompts = [*PROMPTS, *([token_id] for token_id in range(12, 28))]
    replies = sample_tokens(
        model,
        grammar,
        prompts,
        SamplingSettings(image_temperature=0, guidance=3.0),
        max_new_tokens=30,
        negative_prompts=[[1, 2]] * len(prompts),
    )
    kinds = set()
    for prompt, reply in zip(prompts, replies, strict=True):
        conditional = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 :]
        unconditional = model(input_ids=torch.tensor([[1, 2, *reply]])).logits[0, 1:]
        state = grammar.initial(prompt)
        for step, token_id in enumerate(reply):
            allowed = grammar.allowed(state, 30 - step)
            logits = conditional[step]
            if allowed.image:
                logits = unconditional[step] + 3.0 * (logits - unconditional[step])
            legal = [i for pair in allowed.ranges for i in range(*pair)]
            assert token_id == max(legal, key=lambda i, logits=logits: logits[i].item())
            kinds.add((allowed.text, allowed.codes))
            state = grammar.advance(state, token_id)
    assert kinds >= {(True, False), (False, True)}


def test_mix_is_the_formula_and_survives_hostile_logits():
    conditional, unconditional = torch.randn(2, 5, 9)
    mixed = mix_logits(conditional, unconditional, 3.0)
    torch.testing.assert_close(mixed, unconditional + 3 * (conditional - unconditional))
    torch.testing.assert_close(mix_logits(conditional, unconditional, 1.0), conditional)
    log_mixed = mix_logits(conditional.log_softmax(-1), unconditional.log_softmax(-1), 3.0)
    torch.testing.assert_close(log_mixed.softmax(-1), mixed.softmax(-1))
    inf = float("inf")
    hostile = mix_logits(torch.tensor([[-inf, 1.0, 1e38]]), torch.tensor([[2.0, -inf, -1e38]]), 9.0)
    assert hostile[0, 0] == -inf and hostile[0, 1] == 1 and hostile[0, 2].isfinite()
    assert (mix_logits(torch.full((1, 3), -inf), torch.full((1, 3), -inf), 3.0) == 0).all()


def pad_left(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_custom_generate_is_the_same_loop():
    model = tiny_llm("qwen3", vocab_size=64)
    grammar = ImageSpanGrammar(NESTED, mode="image")
    options = SamplingSettings(image_temperature=1.5, guidance=3.0, seed=5)
    ids, mask = pad_left(PROMPTS)
    negative_ids, negative_mask = pad_left(NEGATIVES)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        custom_generate=guided_generate,
        negative_input_ids=negative_ids,
        negative_attention_mask=negative_mask,
        grammar=grammar,
        settings=options,
        max_new_tokens=14,
        eos_token_id=NESTED.end_token_id,
        pad_token_id=0,
    )
    replies = sample_tokens(
        model,
        grammar,
        PROMPTS,
        options,
        max_new_tokens=14,
        negative_prompts=NEGATIVES,
        stop_token_ids=[NESTED.end_token_id],
    )
    assert torch.equal(out[:, : ids.shape[1]], ids)
    width = max(map(len, replies))
    assert out[:, ids.shape[1] :].tolist() == [
        reply + [0] * (width - len(reply)) for reply in replies
    ]


def test_custom_generate_with_one_negative_prompt_and_several_returns():
    model = tiny_llm("qwen3", vocab_size=64)
    grammar = ImageSpanGrammar(FIXED, mode="image")
    ids, mask = pad_left(PROMPTS)
    options = {
        "input_ids": ids,
        "attention_mask": mask,
        "custom_generate": guided_generate,
        "grammar": grammar,
        "settings": SamplingSettings(guidance=2.0, seed=1),
        "max_new_tokens": 14,
        "eos_token_id": FIXED.end_token_id,
    }
    one = torch.tensor([[3, 4]])
    out = model.generate(**options, negative_input_ids=one, num_return_sequences=4, do_sample=True)
    assert out.shape == (12, 5 + 14)
    for reply in out[:, 5:].tolist():
        assert_reply(grammar, reply, 14)
    assert len({tuple(row) for row in out[:4].tolist()}) == 4  # one prompt, four seeds
    with pytest.raises(ConfigurationError, match="2 negative prompts came for 3"):
        model.generate(**options, negative_input_ids=torch.tensor([[1], [2]]))
    with pytest.raises(ConfigurationError, match="no negative prompts came"):
        model.generate(**options)
    with pytest.raises(ConfigurationError, match="num_beams is 2"):
        model.generate(**options, negative_input_ids=one, num_beams=2)
    with pytest.raises(ConfigurationError, match=r"call model\.generate"):
        guided_generate(model, ids, grammar=grammar, settings=options["settings"])
