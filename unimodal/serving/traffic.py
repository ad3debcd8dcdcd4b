"""Requests of ``unimodal bench serve``, and a naive server over transformers that answers the same.

The naive server has one queue. When a batch is finished it takes the next one: the longest run of
requests from the head of the queue that can share a batch (the same kind, guidance and budget), up
to so many rows. A batch runs to its longest reply. That is what one writes with ``generate`` in an
afternoon. With ``by_kind`` it may also look further down the queue for requests that fit the first
one, which is fairer to transformers and less so to those who wait.

It has no HTTP, no JSON and no process to talk to; all of that is the real server's burden alone.
"""

import io
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

from unimodal.generation.sampling import SamplingSettings, generate
from unimodal.pipeline import Unimodal
from unimodal.serving.load import Hit, Shot
from unimodal.serving.openai_shapes import data_uri, encode_image

KINDS = ("captions", "drawings", "guided", "mixed")
CAPTION_TOKENS = 32
WORDS = (
    "a large small red green blue yellow orange purple circle square triangle star ring heart "
    "above below left of right beside white black background two three four and the is describe"
)
"""What prompts are made of."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request of a bench, as both sides answer it."""

    prompt: str = ""
    """Of a drawing."""
    picture: bytes = b""
    """The file of a picture to caption; empty for a drawing."""
    question: str = ""
    """What is asked about the picture."""
    tokens: int = CAPTION_TOKENS
    """Length of a caption; it ends neither sooner nor later."""
    guidance: float = 1.0
    budget: int | None = None
    seed: int = 0
    previews: int = 0

    @property
    def draws(self) -> bool:
        """Whether the answer is a picture."""
        return not self.picture

    @property
    def settings(self) -> tuple[Any, ...]:
        """What all requests of a batch must have in common."""
        return (self.draws, self.guidance, self.budget)

    @property
    def rows(self) -> int:
        """Rows of a batch that it takes."""
        return 2 if self.guidance != 1 else 1

    def shot(self, url: str, at: float | None = None) -> Shot:
        """The same as an HTTP request to the server at ``url``."""
        if self.draws:
            body: dict[str, Any] = {
                "prompt": self.prompt,
                "guidance_scale": self.guidance,
                "temperature": 1.0,  # and not what the model's own settings say
                "top_k": 0,
                "seed": self.seed,
            }
            if self.budget is not None:
                body["budget"] = self.budget
            if self.previews:
                body |= {"stream": True, "partial_images": self.previews}
            return Shot(url=f"{url}/v1/images/generations", body=body, at=at)
        with Image.open(io.BytesIO(self.picture)) as image:
            picture = {"url": data_uri(image)}
        body = {
            "messages": self.messages({"type": "image_url", "image_url": picture}),
            "modalities": ["text"],
            "temperature": 0,
            "max_tokens": self.tokens,
            "ignore_eos": True,
        }
        return Shot(url=f"{url}/v1/chat/completions", body=body, at=at)

    def messages(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        """The conversation that asks for the caption; ``part`` is the picture."""
        return [{"role": "user", "content": [part, {"type": "text", "text": self.question}]}]


def make_asks(
    kind: str,
    number: int,
    seed: int,
    *,
    image_size: int,
    budgets: Sequence[int | None] = (None,),
    guidance: float = 3.0,
    varied: bool = False,
    previews: int = 0,
) -> list[Ask]:
    """Make requests, the same ones for the same arguments; no two are alike.

    Args:
        kind: of :data:`KINDS`; "mixed" is a third of each of the others.
        image_size: edge of the pictures, in pixels.
        budgets: one is taken for each drawing, where ``varied``.
        guidance: of the guided drawings.
        varied: prompts of 3 to 40 words and captions of 8 to 64 ids, instead of equal lengths.
        previews: partial images asked for with each drawing.
    """
    dice = random.Random(f"{kind} {seed}")
    asks = []
    for _ in range(number):
        chosen = dice.choice(KINDS[:3]) if kind == "mixed" else kind
        words = dice.choices(WORDS.split(), k=dice.randint(3, 40) if varied else 8)
        common: dict[str, Any] = {"seed": dice.getrandbits(40)}
        if chosen == "captions":
            asks.append(
                Ask(
                    picture=_picture(dice, image_size),
                    question=" ".join(["describe", *(words if varied else ())]),
                    tokens=dice.choice((8, 16, 32, 64)) if varied else CAPTION_TOKENS,
                    **common,
                )
            )
        else:
            asks.append(
                Ask(
                    prompt=" ".join(words),
                    guidance=guidance if chosen == "guided" else 1.0,
                    budget=dice.choice(budgets) if varied else None,
                    previews=previews,
                    **common,
                )
            )
    return asks


def poisson_times(rate: float, number: int, seed: int) -> list[float]:
    """Times of ``number`` arrivals at ``rate`` a second, in seconds from the first one."""
    dice = random.Random(seed)
    times = [0.0]
    while len(times) < number:
        times.append(times[-1] + dice.expovariate(rate))
    return times[:number]


def _picture(dice: random.Random, size: int) -> bytes:
    """A PNG with a few coloured boxes and circles."""
    image = Image.new("RGB", (size, size), "white")
    canvas = ImageDraw.Draw(image)
    for _ in range(3):
        left, top = dice.randrange(size * 3 // 4), dice.randrange(size * 3 // 4)
        shape = dice.choice((canvas.rectangle, canvas.ellipse))
        colour = tuple(dice.randrange(256) for _ in range(3))
        shape((left, top, left + size // 4, top + size // 4), fill=colour)  # type: ignore[operator]
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass
class NaiveServer:
    """The baseline; see the module's docstring."""

    model: Unimodal
    max_rows: int
    """Rows of a batch, as vLLM's ``--max-num-seqs``."""
    by_kind: bool = False
    image_tokenizer_seconds: float = 0.0
    """Spent encoding and decoding since it was set to 0."""
    _queue: deque[tuple[int, Ask, float]] = field(default_factory=deque)

    def closed_loop(self, asks: Sequence[Ask], concurrency: int) -> list[Hit]:
        """Answer requests of ``concurrency`` clients, each sending its next at once."""
        start, waiting = time.perf_counter(), deque(enumerate(asks))

        def arrive(free: int) -> float | None:
            now = time.perf_counter() - start
            for _ in range(min(free, len(waiting))):
                index, ask = waiting.popleft()
                self._queue.append((index, ask, now))
            return None

        return self._serve(len(asks), start, arrive, concurrency)

    def open_loop(self, asks: Sequence[Ask], times: Sequence[float]) -> list[Hit]:
        """Answer requests that arrive at given times."""
        start, waiting = time.perf_counter(), deque(zip(range(len(asks)), asks, times, strict=True))

        def arrive(_free: int) -> float | None:
            now = time.perf_counter() - start
            while waiting and waiting[0][2] <= now:
                self._queue.append(waiting.popleft())
            return waiting[0][2] - now if waiting else None

        return self._serve(len(asks), start, arrive, 0)

    def _serve(
        self, number: int, start: float, arrive: Callable[[int], float | None], free: int
    ) -> list[Hit]:
        hits: list[Hit | None] = [None] * number
        while None in hits:
            wait = arrive(free)
            if not self._queue:
                time.sleep(max(0.0, wait or 0.0))
                continue
            batch = self._take()
            written = self._answer([ask for _, ask, _ in batch])
            done = time.perf_counter() - start
            for (index, ask, sent), tokens in zip(batch, written, strict=True):
                hits[index] = Hit(sent=sent, done=done, tokens=tokens, images=int(ask.draws))
            free = len(batch)
        return [hit for hit in hits if hit is not None]

    def _take(self) -> list[tuple[int, Ask, float]]:
        """The next batch."""
        settings, rows = self._queue[0][1].settings, 0
        batch: list[tuple[int, Ask, float]] = []
        left: deque[tuple[int, Ask, float]] = deque()
        while self._queue:
            item = self._queue.popleft()
            fits = item[1].settings == settings and rows + item[1].rows <= self.max_rows
            if fits:
                batch.append(item)
                rows += item[1].rows
            else:
                left.append(item)
                if not self.by_kind or rows >= self.max_rows:
                    break
        self._queue.extendleft(reversed(left))
        return batch

    def _answer(self, asks: list[Ask]) -> list[int]:
        """Answer a batch whole, pictures included; return how many ids each answer has."""
        return self._draw(asks) if asks[0].draws else self._caption(asks)

    def _caption(self, asks: list[Ask]) -> list[int]:
        processor = self.model.processor
        codes = self._timed(processor.encode_images, [ask.picture for ask in asks])
        conversations = [
            ask.messages({"type": "image", "codes": row})
            for ask, row in zip(asks, codes.tolist(), strict=True)
        ]
        rendered = processor.render_batch(conversations, add_generation_prompt=True)
        replies = generate(
            self.model.model,
            processor,
            [row.input_ids for row in rendered],
            SamplingSettings(max_new_tokens=max(ask.tokens for ask in asks)),
            mode="text",
            stop_token_ids=(),
        )
        kept = [reply[: ask.tokens] for reply, ask in zip(replies, asks, strict=True)]
        processor.tokenizer.batch_decode(kept)
        return [len(reply) for reply in kept]

    def _draw(self, asks: list[Ask]) -> list[int]:
        processor = self.model.processor
        conversations = [processor.draw_messages(ask.prompt) for ask in asks]
        rendered = processor.render_batch(conversations, add_generation_prompt=True)
        negative = processor.render(processor.draw_messages(""), add_generation_prompt=True)
        spans = generate(
            self.model.model,
            processor,
            [row.input_ids for row in rendered],
            SamplingSettings(guidance=asks[0].guidance, budget=asks[0].budget),
            mode="image",
            negative_prompts=[negative.input_ids] * len(asks),
            seeds=[ask.seed for ask in asks],
        )
        codes = [processor.vocabulary.to_codes(span[1:-1]) for span in spans]
        for image in self._timed(processor.decode_codes, codes):
            encode_image(image)
        return [len(span) for span in spans]

    def _timed(self, function: Callable[[Any], Any], items: Any) -> Any:
        began = time.perf_counter()
        result = function(items)
        self.image_tokenizer_seconds += time.perf_counter() - began
        return result
