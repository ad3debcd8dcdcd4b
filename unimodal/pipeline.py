"""The whole model in one object: caption, draw, chat.

>>> model = Unimodal.from_pretrained("my-model")
>>> model.caption("cat.png")
'a grey cat on a sofa'
>>> pictures = model.draw("a red circle above a blue square", n=4, seed=7)
>>> reply = model.chat([{"role": "user", "content": "Draw a star, then say what you drew."}])
>>> reply.text, reply.images
"""

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from tokenizer_hf.errors import CheckpointError, ConfigurationError, MessageError, MismatchError
from unimodal.generation.candidates import (
    best_of,
    candidate_seeds,
    check_candidates,
    mean_log_likelihoods,
    readings,
)
from unimodal.generation.grammar import Mode
from unimodal.generation.sampling import SamplingSettings, default_stop_ids, generate
from unimodal.messages import Message
from unimodal.processing_unimodal import UnimodalProcessor
from unimodal.shipped import resolve

ROWS_PER_BATCH = 16
"""Pictures, captions or replies that are generated at once; results do not depend on it."""
SMALL_ROWS_PER_BATCH = 64
"""Likewise of a small model, whose cache of keys and values is small too."""
CAPTION_TOKENS = 128
SMALL_PARAMETERS = 100_000_000
REPLY_TOKENS = 512

ImagesInReply = Literal["auto", "never", "force"]
_MODES: dict[str, Mode] = {"auto": "auto", "never": "text", "force": "image"}
OnToken = Callable[[int, int], None]


@dataclass(frozen=True)
class Reply:
    """An assistant's turn."""

    text: str
    """Its text parts, joined."""
    images: list[Image.Image]
    """Its pictures, in order."""
    parts: list[dict[str, Any]]
    """Text and pictures in order; pictures have "image" (PIL) and "codes"."""
    message: Message
    """The turn as a message: append it to the conversation and go on."""


class Unimodal:
    """A merged model with its processor.

    Args:
        model: a causal LM whose vocabulary holds the image words; it is put into eval mode.
        processor: the processor of the same folder.

    Raises:
        MismatchError: the model has fewer embedding rows than the vocabulary has ids.
    """

    def __init__(self, model: Any, processor: UnimodalProcessor) -> None:
        rows = model.get_input_embeddings().weight.shape[0]
        needed = processor.vocabulary.vocab_size
        if rows < needed:
            raise MismatchError(
                f"the language model has {rows} embedding rows; expected at least {needed}, one "
                "per id of the tokenizer: use the model that was merged with this processor"
            )
        self.model = model.eval()
        self.processor = processor
        small = model.num_parameters() < SMALL_PARAMETERS
        self.rows_per_batch = SMALL_ROWS_PER_BATCH if small else ROWS_PER_BATCH

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        adapter: str | os.PathLike[str] | None = None,
    ) -> "Unimodal":
        """Load a merged folder or hub id, or "shipped:model", which comes with this package.

        Args:
            device: None takes CUDA where there is one, else the CPU.
            dtype: None keeps the type that the weights were saved in; but a small model computes in
                float32 on a CPU, which is as fast there as bfloat16 is, or much faster.
            adapter: a PEFT folder that was trained on this model; it is applied, not merged.

        Raises:
            CheckpointError: a folder that is missing, foreign or damaged.
            MismatchError: parts of the folder that do not belong together.
        """
        name_or_path = resolve(os.fspath(name_or_path))
        processor = UnimodalProcessor.from_pretrained(name_or_path)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = _load_language_model(name_or_path, dtype)
        small = model.num_parameters() < SMALL_PARAMETERS
        if dtype is None and device.type == "cpu" and small and not _is_quantized(model):
            model = model.float()
        if adapter is not None:
            model = _with_adapter(model, os.fspath(adapter))
        if processor.vq_model is not None:
            cast(Any, processor.vq_model).to(device)
        return cls(model.to(device), processor)

    # --- the three things it does -----------------------------------------------------------------

    def caption(
        self,
        image: Any,
        *,
        instruction: str | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int | None = None,
        max_new_tokens: int = CAPTION_TOKENS,
    ) -> Any:
        """Say what a picture shows.

        Args:
            image: PIL, path, bytes, numpy array, data URI; or a list of them.
            instruction: asked in place of the model's own "Describe the picture.", a question for
                example.
            temperature: 0 is greedy.
            seed: picture i draws with seed + i.

        Returns:
            A caption, or a list of captions for a list.

        Raises:
            ImageError: a picture that cannot be read.
            MessageError: an empty instruction, or one that does not fit into the context.
        """
        images = image if isinstance(image, list) else [image]
        conversations = [self.processor.caption_messages(one) for one in images]
        if instruction is not None:
            text = {"type": "text", "text": _not_empty(instruction, "instruction")}
            conversations = [
                [{**message, "content": [message["content"][0], text]}]
                for [message] in conversations
            ]
        settings = SamplingSettings(
            text_temperature=temperature, text_top_k=top_k, max_new_tokens=max_new_tokens
        )
        rows = self._generate(conversations, settings, "text", _seeds(seed, len(images)))
        captions = [_as_reply(parts).text for parts in self.processor.parse_batch(rows)]
        return captions if isinstance(image, list) else captions[0]

    def draw(
        self,
        prompt: str | list[str],
        *,
        n: int = 1,
        seed: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        candidates: int | None = None,
        budget: int | None = None,
        negative_prompt: str = "",
        on_token: OnToken | None = None,
    ) -> list[Image.Image]:
        """Draw what a prompt says.

        Args:
            prompt: a prompt, or a list of prompts.
            n: pictures of each prompt.
            seed: picture i of the call draws with seed + i, so it is the same picture in any call
                that reaches the same seed. None takes a new seed.
            guidance: 1 is off; above 1 the picture follows the prompt more closely.
            temperature: of the image codes; 0 is greedy, and all n pictures are then the same.
            top_k: keep this many of the likeliest codes.
            candidates: draw each picture so many times and keep the one that the model itself
                judges best; see `unimodal.generation.candidates`. These four, where None: the
                model's own (``processor.draw_settings``).
            budget: codes of a picture, where the image tokenizer is nested; None for all.
            negative_prompt: what guidance leads away from.
            on_token: called with (row, token_id) as each id is drawn; picture i has the rows from
                i * candidates on.

        Returns:
            PIL pictures, RGB: n of the first prompt, n of the second, ...

        Raises:
            MessageError: an empty prompt, or one that does not fit into the model's context.
            ConfigurationError: settings that cannot be right.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if n < 1:
            raise ConfigurationError(f"n is {n}; expected at least 1 picture of each prompt")
        if candidates is None:
            candidates = self.processor.draw_settings["candidates"]
        check_candidates(candidates)
        wanted = [_not_empty(one, "prompt") for one in prompts for _ in range(n)]
        conversations = [self.processor.draw_messages(one) for one in wanted]
        settings = SamplingSettings(
            budget=budget, **self._image_settings(guidance, temperature, top_k)
        )
        seeds = [
            one for first in _seeds(seed, len(wanted)) for one in candidate_seeds(first, candidates)
        ]
        rows = self._generate(
            [one for one in conversations for _ in range(candidates)],
            settings,
            "image",
            seeds,
            negative_prompt,
            on_token=on_token,
        )
        if candidates > 1:
            rows = self.best_candidates(wanted, rows)
        return [parts[0]["image"] for parts in self.processor.parse_batch(rows)]

    def best_candidates(
        self, prompts: Sequence[str], spans: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Keep one drawing of each prompt, as `draw` does.

        Args:
            spans: ids of drawings, ``<|image_start|>`` to ``<|image_end|>``; as many for each
                prompt, prompt by prompt.
        """
        each = len(spans) // len(prompts)
        judged = [
            readings(self.processor, prompts[row // each], span) for row, span in enumerate(spans)
        ]
        described, drawn = (
            mean_log_likelihoods(self.model, [pair[term] for pair in judged], self.rows_per_batch)
            for term in (0, 1)
        )
        terms = list(zip(described, drawn, strict=True))
        firsts = range(0, len(spans), each)
        return [list(spans[first + best_of(terms[first : first + each])]) for first in firsts]

    def chat(
        self,
        messages: Any,
        *,
        images: ImagesInReply = "auto",
        seed: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        guidance: float | None = None,
        image_temperature: float | None = None,
        image_top_k: int | None = None,
        budget: int | None = None,
        negative_prompt: str = "",
        max_new_tokens: int | None = None,
        on_token: OnToken | None = None,
    ) -> Any:
        """Answer a conversation, in text and pictures.

        Args:
            messages: one conversation, or a list of conversations. The history is in the messages:
                append ``reply.message`` and the next user turn, and call again.
            images: "auto", the model decides when to draw; "never"; or "force", the reply begins
                with exactly one picture.
            seed: conversation i draws with seed + i.
            temperature, top_k: of the text; 0 is greedy.
            image_temperature, image_top_k, guidance, budget, negative_prompt: of the pictures, as
                in ``draw``.
            max_new_tokens: most ids in the reply, those of its pictures included. None: 512, or
                more where one picture takes more. A picture that does not fit is not begun.

        Returns:
            A Reply, or a list of them for a list of conversations.

        Raises:
            MessageError: messages that the model's chat template refuses, or that leave too little
                of its context.
            ImageError: a picture that cannot be read.
        """
        if images not in _MODES:
            raise ConfigurationError(
                f"images is {images!r}; expected one of {', '.join(map(repr, _MODES))}"
            )
        single = bool(messages) and isinstance(messages[0], dict)
        conversations = [messages] if single else list(messages)
        vocabulary = self.processor.vocabulary
        if max_new_tokens is None:
            max_new_tokens = max(REPLY_TOKENS, 2 * vocabulary.span_length())
        settings = SamplingSettings(
            text_temperature=temperature,
            text_top_k=top_k,
            budget=budget,
            max_new_tokens=max_new_tokens,
            **self._image_settings(guidance, image_temperature, image_top_k),
        )
        rows = self._generate(
            conversations,
            settings,
            _MODES[images],
            _seeds(seed, len(conversations)),
            negative_prompt,
            stop_token_ids=default_stop_ids(self.model, self.processor.tokenizer),
            on_token=on_token,
        )
        replies = [_as_reply(parts) for parts in self.processor.parse_batch(rows)]
        return replies[0] if single else replies

    # --- how --------------------------------------------------------------------------------------

    def _image_settings(
        self, guidance: float | None, temperature: float | None, top_k: int | None
    ) -> dict[str, Any]:
        """The sampling settings of pictures: what the caller gave, else the model's own."""
        own = self.processor.draw_settings
        return {
            "guidance": own["guidance"] if guidance is None else guidance,
            "image_temperature": own["temperature"] if temperature is None else temperature,
            "image_top_k": own["top_k"] if top_k is None else top_k,
        }

    def _generate(
        self,
        conversations: Sequence[Sequence[Message]],
        settings: SamplingSettings,
        mode: Mode,
        seeds: list[int],
        negative_prompt: str = "",
        *,
        stop_token_ids: set[int] | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """Generate the ids of the next turn of each conversation, some at a time, each with its own
        seed."""
        rendered = self.processor.render_batch(conversations, add_generation_prompt=True)
        prompts = [row.input_ids for row in rendered]
        negative = None
        if mode != "text" and settings.guidance != 1:
            unwanted = self.processor.draw_messages(negative_prompt)
            negative = self.processor.render(unwanted, add_generation_prompt=True).input_ids
        rows: list[list[int]] = []
        for first in range(0, len(prompts), self.rows_per_batch):
            batch = prompts[first : first + self.rows_per_batch]
            rows += generate(
                self.model,
                self.processor,
                batch,
                settings,
                mode=mode,
                negative_prompts=None if negative is None else [negative] * len(batch),
                seeds=seeds[first : first + self.rows_per_batch],
                stop_token_ids=stop_token_ids,
                on_token=_shifted(on_token, first),
            )
        return rows


def _as_reply(parts: list[dict[str, Any]]) -> Reply:
    return Reply(
        text="".join(part["text"] for part in parts if part["type"] == "text"),
        images=[part["image"] for part in parts if "image" in part],
        parts=parts,
        message={"role": "assistant", "content": parts},
    )


def _shifted(on_token: OnToken | None, first: int) -> OnToken | None:
    if on_token is None:
        return None
    return lambda row, token_id: on_token(first + row, token_id)


def _not_empty(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise MessageError(f"a {what} of type {type(text).__name__}; expected a string")
    if not text.strip():
        raise MessageError(f"the {what} is empty; expected some words")
    return text


def _seeds(seed: int | None, number: int) -> list[int]:
    first = secrets.randbits(31) if seed is None else seed
    if not 0 <= first < 2**63 - number:
        raise ConfigurationError(f"seed is {first}; expected 0 or more, below 2**63")
    return list(range(first, first + number))


def _load_language_model(name_or_path: str, dtype: str | torch.dtype | None) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"the language model in {name_or_path} cannot be loaded: {_first_line(error)}; "
            "expected a folder that `unimodal merge` wrote: merge it again, or copy it again"
        ) from error
    model, info = loaded
    wrong = [key for name in ("missing_keys", "mismatched_keys") for key in info.get(name, ())]
    if wrong:
        raise CheckpointError(
            f"the weights of {name_or_path} do not fit its config.json: {len(wrong)} are missing "
            f"or of another shape, for example {min(map(str, wrong))}; merge it again"
        )
    return model


def _is_quantized(model: Any) -> bool:
    """Such a model keeps its type; transformers refuses to cast it."""
    return getattr(model, "quantization_method", None) is not None


def _with_adapter(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter {adapter} cannot be loaded: {_first_line(error)}; expected a PEFT folder "
            "that was trained on this model"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
