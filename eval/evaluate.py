"""Measure a merged and trained model: reconstruction, drawing, captions, answers, text, spans.

Writes `report.json` (schema: docs/report_schema.md) and beside it `samples.json`, the pictures and
texts that `unimodal report` shows. Drawing takes nearly all of the time, so drawings are kept in
`drawings.part.jsonl` until the end: start a killed evaluation again, and it goes on behind them.
"""

import io
import json
import logging
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from eval.environment import environment
from eval.reconstruction import agreements, psnr, score_reconstruction
from eval.resume import FinishedDrawings, png_base64
from eval.retrieval import score_by_both
from eval.scores import (
    Score,
    caption_is_exact,
    judge_drawings,
    score_answers,
    score_captions,
    share,
)
from eval.shapes.captions import NUMBERS, list_objects, questions
from eval.shapes.parser import parse_picture
from eval.shapes.prompts import Prompt, prompts
from eval.shapes.render import render
from eval.shapes.requirement import ObjectRequirement, Requirement
from eval.shapes.scene import CATEGORIES, Level, Scene, sample_scene
from eval.shapes.world import WorldManifest, read_world
from eval.text import score_text
from tokenizer_hf.errors import CheckpointError, ConfigurationError, DataError
from tokenizer_hf.files import atomic_write
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.pipeline import Unimodal
from unimodal.shipped import resolve

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SAMPLES = "samples.json"
UNFINISHED = "drawings.part.jsonl"
_CHUNK = 64
_ANSWER_TOKENS = 16
_DIALOGUE_QUESTIONS = 2
_SHOWN = 8
"""Samples of each kind that the report shows; failures, as many again."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How much is measured, and how the model is sampled."""

    n: int = 100
    """Drawings of each category; as many again with held-out pairs."""
    pictures: int = 200
    """Held-out pictures that are reconstructed and captioned."""
    dialogues: int = 100
    """Conversations of a drawing and two questions about it."""
    texts: int = 400
    """Text sequences for perplexity and KL."""
    seed: int = 0
    """Of the prompts and the drawings."""
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    candidates: int | None = None
    """Of the drawings; where None, the model's own. Captions and answers are greedy, and a drawing
    within a dialogue is the first that comes."""

    def __post_init__(self) -> None:
        for name in ("n", "pictures", "dialogues", "texts"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Captioned:
    """A held-out picture. Without a scene only what needs no parser is measured."""

    image: Image.Image
    captions: Sequence[str]
    questions: Sequence[tuple[str, str]] = ()
    scene: Scene | None = None


@dataclass
class _Run:
    """One evaluation: the model, what is found, what is shown."""

    model: Unimodal
    settings: EvaluationSettings
    progress: bool
    finished: FinishedDrawings
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    spans: dict[str, int] = field(default_factory=lambda: {"generated": 0, "malformed": 0})

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], Any]]:
        began = time.monotonic()
        with tqdm(total=total, desc=name, disable=None if self.progress else True) as bar:
            yield bar.update
        self.seconds[name] = round(time.monotonic() - began, 2)


def evaluate(
    model: str | Path | Unimodal,
    base_llm: str | Path,
    world: str | Path | Sequence[Captioned],
    out: str | Path,
    *,
    settings: EvaluationSettings | None = None,
    text_files: Sequence[str | Path] | None = None,
    train_pictures: Iterable[Captioned] | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a model and write the report's JSON.

    Args:
        model: a merged folder or hub id, or a loaded model.
        base_llm: the text LLM before the merge, for perplexity and KL.
        world: a folder that `unimodal shapes` wrote, of which the validation split is used; or
            held-out pictures of any other kind, for which retrieval stands in the place of the
            parser's verdicts (eval/retrieval.py).
        out: the JSON file; `samples.json` is written beside it. Where a model folder was given and
            an evaluation of the same was killed, its drawings are there and are taken. Sections of
            an older report there that this run does not measure (`vllm`, `seconds` of other
            stages) are kept.
        text_files: JSONL of held-out text or text-only chats; default the world's.
        train_pictures: what the model was trained on, beside held-out pictures without a world:
            the classifier of the retrieval scores learns from them. None: no such classifier.
        device: see `Unimodal.from_pretrained`.
        progress: show progress bars.

    Returns:
        The report, as written.

    Raises:
        CheckpointError, MismatchError: a folder that cannot be loaded, or does not fit.
        DataError: no world, no picture or no text there.
        ConfigurationError: training pictures beside a world.
    """
    settings = settings or EvaluationSettings()
    out = Path(out)
    name = str(model) if not isinstance(model, Unimodal) else model.model.name_or_path
    level: Level | None = None
    described: Any = None
    if isinstance(world, str | Path):
        if train_pictures is not None:
            raise ConfigurationError(
                f"training pictures came with the world {world}, whose drawings a parser judges; "
                "leave them out"
            )
        manifest = WorldManifest.load(world)
        level, described = manifest.level, {"folder": str(world), **asdict(manifest)}
        pictures = load_validation(world, settings.pictures)
        if text_files is None:
            text_files = [Path(world) / "chat" / "validation.jsonl"]
    else:
        pictures = list(world)[: settings.pictures]
    if not pictures:
        raise DataError("no held-out picture came; expected at least one")
    unfinished: Path | None = None
    if not isinstance(model, Unimodal):
        unfinished = out.parent / UNFINISHED  # a loaded model may have been changed in memory
        model = Unimodal.from_pretrained(model, device=device)
    settings = _resolved(settings, model.processor.draw_settings)
    finished = FinishedDrawings(unfinished, {"model": _identity(model), **asdict(settings)})
    if finished.count:
        logger.info("goes on behind %d drawings of a killed evaluation", finished.count)
    run = _Run(model, settings, progress, finished)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": name,
        "base_llm": str(base_llm),
        "world": described,
        "settings": asdict(settings),
        "reconstruction": _reconstruction(run, pictures),
        **_captions(run, pictures, level),
        **_drawings(run, pictures, level, train_pictures),
        **_dialogues(run, level),
    }
    if text_files:
        report["text"] = _text(run, base_llm, text_files)
    report["spans"] = run.spans
    report["seconds"] = {f"evaluate.{key}": value for key, value in run.seconds.items()}
    report["peak_rss_bytes"] = peak_rss_bytes()
    report["environment"] = environment(str(model.model.device))
    with atomic_write(out.parent / SAMPLES) as temporary:
        temporary.write_text(json.dumps(run.samples) + "\n", encoding="utf-8")
    whole = update_report(out, report)
    finished.remove()
    return whole


def _identity(model: Unimodal) -> list[Any]:
    """What tells a model from another at the same place: its weight files, device and format."""
    folder = Path(model.model.name_or_path)
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    return [
        str(folder),
        getattr(model.model.config, "_commit_hash", None),
        [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
        str(model.model.device),
        str(model.model.dtype),
    ]


def _resolved(settings: EvaluationSettings, own: dict[str, Any]) -> EvaluationSettings:
    """Put the model's own sampling settings where none are given, so that the report has them."""
    missing = {name: value for name, value in own.items() if getattr(settings, name) is None}
    return replace(settings, **missing)


def load_validation(world: str | Path, limit: int | None = None) -> list[Captioned]:
    """The validation pictures of a world."""
    return [
        Captioned(Image.open(io.BytesIO(data)).convert("RGB"), captions, questions, scene)
        for data, captions, questions, scene in read_world(world, "validation", limit)
    ]


def update_report(path: str | Path, values: dict[str, Any]) -> dict[str, Any]:
    """Merge values into a report: `seconds` and `vllm` key by key, the rest section by section.

    Returns:
        The whole report, as written.
    """
    path = Path(path)
    report: dict[str, Any] = {}
    if path.exists():
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); remove it and run again") from error
    for key, value in values.items():
        if key in ("seconds", "vllm") and isinstance(report.get(key), dict):
            report[key] = {**report[key], **value}
        elif key == "peak_rss_bytes":
            report[key] = max(value, report.get(key, 0))
        else:
            report[key] = value
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, or of one of its finished children."""
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * max(resource.getrusage(kind).ru_maxrss for kind in kinds)


# --- the sections ---------------------------------------------------------------------------------


def _reconstruction(run: _Run, pictures: Sequence[Captioned]) -> dict[str, Score]:
    processor = run.model.processor
    originals = [p.image for p in pictures]
    results: list[Image.Image] = []
    codes: list[Any] = []
    with run.stage("reconstruction", len(pictures)) as advance:
        for chunk in _chunks(originals):
            found = processor.encode_images(chunk)
            codes += found.tolist()
            results += processor.decode_codes(found)
            advance(len(chunk))
    scenes = _scenes(pictures)
    verdicts: Sequence[bool | None] = [None] * len(pictures)
    if scenes is not None:
        verdicts = agreements(results, scenes)
    run.samples["reconstructions"] = _some(
        [
            {"original": a, "reconstruction": b, "psnr": psnr(a, b), "fulfilled": verdict}
            for a, b, verdict in zip(originals, results, verdicts, strict=True)
        ]
    )
    return score_reconstruction(originals, results, codes, scenes)


def _captions(run: _Run, pictures: Sequence[Captioned], level: Level | None) -> dict[str, Any]:
    sections: dict[str, Any] = {"caption": _caption(run, "captions", pictures)}
    if level is not None:
        side = pictures[0].image.width
        rng = random.Random(f"{run.settings.seed}-captions-held-out")
        unseen = [sample_scene(rng, level, None, "only") for _ in pictures]
        sections["caption_held_out"] = _caption(
            run, "captions_held_out", [Captioned(render(s, side), (), (), s) for s in unseen]
        )
    asked = [(p, question, answer) for p in pictures for question, answer in p.questions[:1]]
    if asked:
        sections["answers"] = _answers(run, asked)
    return sections


def _caption(run: _Run, name: str, pictures: Sequence[Captioned]) -> dict[str, Score]:
    texts: list[str] = []
    with run.stage(name, len(pictures)) as advance:
        for chunk in _chunks(pictures):
            texts += run.model.caption([p.image for p in chunk])
            advance(len(chunk))
    scenes = _scenes(pictures)
    if scenes is not None:
        right = [caption_is_exact(text, scene) for text, scene in zip(texts, scenes, strict=True)]
    else:
        right = [
            _plain(text) in map(_plain, p.captions) for text, p in zip(texts, pictures, strict=True)
        ]
    run.samples[name] = _some(
        [
            {
                "picture": p.image,
                "caption": text,
                "reference": p.captions[0] if p.captions else _in_words(p.scene),
                "fulfilled": verdict,
            }
            for p, text, verdict in zip(pictures, texts, right, strict=True)
        ]
    )
    return score_captions(texts, scenes) if scenes is not None else {"exact": share(right)}


def _answers(run: _Run, asked: Sequence[tuple[Captioned, str, str]]) -> Score:
    answers: list[str] = []
    with run.stage("answers", len(asked)) as advance:
        for chunk in _chunks(asked):
            conversations = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": p.image},
                            {"type": "text", "text": question},
                        ],
                    }
                ]
                for p, question, _ in chunk
            ]
            replies = run.model.chat(conversations, images="never", max_new_tokens=_ANSWER_TOKENS)
            answers += [reply.text for reply in replies]
            advance(len(chunk))
    expected = [answer for *_, answer in asked]
    run.samples["answers"] = _some(
        [
            {
                "picture": p.image,
                "caption": f"{question} – {text}",
                "reference": answer,
                "fulfilled": score_answers([text], [answer])["score"] == 1,
            }
            for (p, question, answer), text in zip(asked, answers, strict=True)
        ]
    )
    return score_answers(answers, expected)


def _drawings(
    run: _Run,
    pictures: Sequence[Captioned],
    level: Level | None,
    train_pictures: Iterable[Captioned] | None,
) -> dict[str, Any]:
    settings = run.settings
    if level is None:
        captioned = [p for p in pictures if p.captions]
        texts = [p.captions[0] for p in captioned[: settings.n]]
        drawn, _ = _draw(run, "drawings", [Prompt(text, Requirement(()), "") for text in texts])
        return _retrieval(run, captioned, drawn, train_pictures)
    sections: dict[str, Any] = {}
    for held_out in (False, True):
        name = "drawings_held_out" if held_out else "drawings"
        plan = [
            prompt
            for category in CATEGORIES
            for prompt in prompts(
                category, settings.n, settings.seed, level=level, held_out=held_out
            )
        ]
        _, verdicts = _draw(run, name, plan)
        sections["draw_held_out" if held_out else "draw"] = {
            category: share(
                [v for v, p in zip(verdicts, plan, strict=True) if p.category == category]
            )
            for category in CATEGORIES
        }
    return sections


def _dialogues(run: _Run, level: Level | None) -> dict[str, Any]:
    """Draw, then ask about what was drawn, in one conversation.

    ``drawing``: share of first replies that fulfil their prompt. ``answers``: share of right
    answers, judged by what the parser sees in the model's own drawing; n counts answers, and
    drawings that nobody can read are not asked about.
    """
    if level is None:
        return {}
    settings = run.settings
    plan = prompts("caption", settings.dialogues, settings.seed + 1, level=level)
    talks = [list(run.model.processor.draw_messages(prompt.text)) for prompt in plan]
    with run.stage("dialogues", len(plan)) as advance:
        drawn = _draw_in_dialogues(run, talks)
        rng = random.Random(f"{settings.seed}-dialogues")
        asked = [_questions_about(picture, rng) for picture in drawn]
        rows: list[dict[str, Any]] = []
        for turn in range(_DIALOGUE_QUESTIONS):
            going = [i for i, pairs in enumerate(asked) if turn < len(pairs)]
            for i in going:
                talks[i].append({"role": "user", "content": asked[i][turn][0]})
            for i, text in zip(
                going, _answer_in_dialogues(run, [talks[i] for i in going]), strict=True
            ):
                question, answer = asked[i][turn]
                row: dict[str, Any] = {"picture": drawn[i], "reference": answer, "answer": text}
                rows.append({**row, "caption": f"{plan[i].text} – {question} – {text}"})
        advance(len(plan))
    answers = score_answers([r["answer"] for r in rows], [r["reference"] for r in rows])
    for row in rows:
        row["fulfilled"] = score_answers([row.pop("answer")], [row["reference"]])["score"] == 1
    run.samples["dialogues"] = _some(rows)
    return {"dialogue": {"drawing": share(judge_drawings(drawn, plan)), "answers": answers}}


def _draw_in_dialogues(run: _Run, talks: list[list[Any]]) -> list[Image.Image]:
    """Let the model draw its turn of every conversation; the turns are appended."""
    settings, model = run.settings, run.model
    drawn: list[Image.Image] = []
    for chunk in _chunks(talks):
        replies = model.chat(
            chunk,
            images="force",
            seed=settings.seed + len(drawn),
            guidance=settings.guidance,
            image_temperature=settings.temperature,
            image_top_k=settings.top_k,
            max_new_tokens=model.processor.vocabulary.span_length() + _ANSWER_TOKENS,
        )
        for talk, reply in zip(chunk, replies, strict=True):
            talk.append(reply.message)
            drawn.append(reply.images[0])
    return drawn


def _answer_in_dialogues(run: _Run, talks: list[list[Any]]) -> list[str]:
    """Let the model answer in every conversation; the turns are appended."""
    texts = []
    for chunk in _chunks(talks):
        replies = run.model.chat(chunk, images="never", max_new_tokens=_ANSWER_TOKENS)
        for talk, reply in zip(chunk, replies, strict=True):
            talk.append(reply.message)
            texts.append(reply.text)
    return texts


def _questions_about(picture: Image.Image, rng: random.Random) -> list[tuple[str, str]]:
    scene = parse_picture(picture)
    if scene is None or not 0 < len(scene.objects) < len(NUMBERS):  # an untrained model's scribble
        return []
    return questions(scene, rng, _DIALOGUE_QUESTIONS)


def _note(ids: list[list[int]], row: int, token_id: int) -> None:
    ids[row].append(token_id)


def _draw(run: _Run, name: str, plan: Sequence[Prompt]) -> tuple[list[Image.Image], list[bool]]:
    """The drawings and the parser's verdicts."""
    settings, model = run.settings, run.model
    drawn: list[Image.Image] = []
    each = settings.candidates or 1
    grammar = ImageSpanGrammar(model.processor.vocabulary)
    with run.stage(name, len(plan)) as advance:
        for chunk in _chunks(plan):
            first, texts = len(drawn), [prompt.text for prompt in chunk]
            done = run.finished.find(name, first, texts)
            if done is None:
                ids: list[list[int]] = [[] for _ in range(len(chunk) * each)]
                pictures = model.draw(
                    texts,
                    seed=settings.seed + first,
                    guidance=settings.guidance,
                    temperature=settings.temperature,
                    top_k=settings.top_k,
                    candidates=each,
                    on_token=partial(_note, ids),
                )
                done = pictures, _count_spans(grammar, ids)
                run.finished.add(name, first, texts, *done)
            drawn += done[0]
            for what, count in done[1].items():
                run.spans[what] += count
            advance(len(chunk))
    known = any(prompt.requirement.objects for prompt in plan)
    verdicts = judge_drawings(drawn, plan) if known else [False] * len(plan)
    rows = [
        {
            "prompt": prompt.text,
            "category": prompt.category,
            "picture": picture,
            "fulfilled": verdict if known else None,
            "seen": _in_words(parse_picture(picture)) if known else "",
        }
        for prompt, picture, verdict in zip(plan, drawn, verdicts, strict=True)
    ]
    kinds = dict.fromkeys(prompt.category for prompt in plan)
    run.samples[name] = [
        row for kind in kinds for row in _some([r for r in rows if r["category"] == kind])
    ]
    return drawn, verdicts


def _count_spans(grammar: ImageSpanGrammar, ids: list[list[int]]) -> dict[str, int]:
    found = [span for row in ids for span in grammar.find_spans(row)]
    malformed = sum(span.problem is not None for span in found)
    return {"generated": len(found), "malformed": malformed}


def _retrieval(
    run: _Run,
    captioned: Sequence[Captioned],
    drawn: Sequence[Image.Image],
    train_pictures: Iterable[Captioned] | None,
) -> dict[str, Any]:
    with run.stage("retrieval", len(captioned)) as advance:
        scores = score_by_both(
            run.model,
            [(p.image, p.captions) for p in captioned],
            drawn,
            None if train_pictures is None else ((p.image, p.captions) for p in train_pictures),
            run.settings.seed,
        )
        advance(len(captioned))
    return {"retrieval": scores} if scores else {}


def _text(run: _Run, base_llm: str | Path, text_files: Sequence[str | Path]) -> dict[str, Score]:
    model, processor = run.model, run.model.processor
    rows = list(_read_texts(text_files, run.settings.texts))
    sequences = [
        processor.tokenizer(row)["input_ids"]
        if isinstance(row, str)
        else processor.render(row).input_ids
        for row in rows
    ]
    base = _load_base(base_llm).to(model.model.device).eval()
    with run.stage("text", len(sequences)) as advance:
        scores = score_text(
            base,
            model.model,
            sequences,
            min(processor.vocabulary.new_token_ids),
            pad_token_id=processor.tokenizer.pad_token_id or 0,
        )
        advance(len(sequences))
    return scores


def _load_base(base_llm: str | Path) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(resolve(str(base_llm)), use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"the base LLM {base_llm} cannot be loaded: {reason}; expected the folder or hub id of "
            "the text LLM that was merged"
        ) from error


def _read_texts(files: Sequence[str | Path], limit: int) -> Iterator[Any]:
    """Texts and text-only conversations, as many of each file."""
    for file in files:
        try:
            with Path(file).open(encoding="utf-8") as stream:
                lines = list(stream)  # str.splitlines would also break at U+2028 within a text
        except OSError as error:
            raise DataError(f"no held-out text at {file}: {error.strerror}") from error
        for number, line in enumerate(lines[: max(1, limit // len(files))], start=1):
            try:
                row = json.loads(line)
                yield row["messages"] if "messages" in row else row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f'{file}:{number}: {error!r}; expected {{"text": …}} or {{"messages": […]}}'
                ) from error


# --- small things ---------------------------------------------------------------------------------


def _chunks(items: Sequence[Any]) -> Iterator[Any]:
    for first in range(0, len(items), _CHUNK):
        yield items[first : first + _CHUNK]


def _scenes(pictures: Sequence[Captioned]) -> list[Scene] | None:
    scenes = [p.scene for p in pictures if p.scene is not None]
    return scenes if len(scenes) == len(pictures) else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def _in_words(scene: Scene | None) -> str:
    """What the parser saw."""
    if scene is None:
        return "nothing readable"
    if not scene.objects:
        return f"nothing on {scene.background}"
    text, _ = list_objects(
        [ObjectRequirement(o.shape, o.colour, o.size) for o in scene.objects[:3]]
    )
    more = f" and {len(scene.objects) - 3} more" if len(scene.objects) > 3 else ""
    return f"{text}{more} on {scene.background}"


def _some(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first rows and, among the others, the first failures; pictures as PNG data URIs."""
    shown = list(rows[:_SHOWN])
    shown += [row for row in rows[_SHOWN:] if row["fulfilled"] is False][:_SHOWN]
    return [
        {
            key: data_uri(value) if isinstance(value, Image.Image) else value
            for key, value in row.items()
        }
        for row in shown
    ]


def data_uri(picture: Image.Image) -> str:
    """A picture as a PNG data URI."""
    return "data:image/png;base64," + png_base64(picture)
