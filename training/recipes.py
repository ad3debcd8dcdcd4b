"""Recipes: a training run as one YAML file, read into nested dataclasses.

Order of precedence: the defaults of the dataclasses < the YAML file < ``--set a.b=value``. The
resolved recipe is written into the run's folder, so that a run can be repeated and a resumed run
can be compared with what it resumes.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.files import atomic_write

R = TypeVar("R")

DIRECTIONS = ("draw", "caption", "question", "dialogue", "text", "chat")


@dataclass(kw_only=True)
class CurriculumRecipe:
    """Weights to begin with, e.g. captions before drawings."""

    steps: int
    """In so many steps the weights move, in equal parts, to ``data.weights``."""
    weights: dict[str, float]
    """Share of the loss tokens of each direction at step 0; 0 for those that are not named."""

    def __post_init__(self) -> None:
        _check_weights("data.curriculum.weights", self.weights)
        _at_least("data.curriculum.steps", self.steps, 1)


@dataclass(kw_only=True)
class DataRecipe:
    """What a language model learns from, and in which proportion."""

    caches: list[str] = field(default_factory=list)
    """Code cache folders (`unimodal encode` writes them)."""
    text: list[str] = field(default_factory=list)
    """JSONL files with {"text": ...} or text-only {"messages": [...]} lines: the text replay."""
    weights: dict[str, float] = field(
        default_factory=lambda: {
            "draw": 5.0,
            "caption": 3.0,
            "question": 1.0,
            "dialogue": 1.0,
            "text": 2.0,
            "chat": 1.0,
        }
    )
    """Share of the *loss tokens* of each direction. A direction without data is left out."""
    curriculum: CurriculumRecipe | None = None
    """Other weights at the start. None: ``weights`` all along."""
    prompt_dropout: float = 0.1
    """Share of drawing examples with an empty prompt: the unconditional side of guidance."""
    questions: int = 1
    """Most questions that a question example asks of its picture, one after the other. Each more
    costs its own words only, where an example of its own costs the picture too."""
    dialogue_questions: int = 2
    """Most questions that follow the picture in a dialogue."""
    max_length: int = 1024
    """Tokens an example may have. Plain text is cut into pieces of this length; a longer picture
    or chat example is left out, counted and reported. The examples of one optimizer step are sorted
    by length and then cut into its micro-batches, so gradient_accumulation_steps > 1 saves padding
    and never changes the mix of a step."""
    packing: bool | int = False
    """Lay the examples of a micro-batch one behind the other into rows, none seeing another,
    instead of padding each one to the longest. true: rows of up to 1.5 times the longest example. A
    number: rows of up to that many tokens, or as many as the longest example has. With
    flash_attention_2 only true, which then is a single row. Losses and gradients stay what they are
    without it."""

    def __post_init__(self) -> None:
        _check_weights("data.weights", self.weights)
        _in_range("data.prompt_dropout", self.prompt_dropout, 0, 1)
        _at_least("data.questions", self.questions, 1)
        _at_least("data.dialogue_questions", self.dialogue_questions, 1)
        _at_least("data.max_length", self.max_length, 8)


@dataclass(kw_only=True)
class LoraRecipe:
    """The adapter of modes ``lora`` and ``qlora``."""

    rank: int = 32
    alpha: float | None = None
    """LoRA's scale is alpha / rank. None: alpha = rank, so that the rank can be changed alone."""
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    """Linear layers that get a LoRA; "all-linear" leaves the head out, as PEFT does."""
    rows: Literal["free", "factored", "none"] = "free"
    """How the rows of the image words are trained. "free": every code has a row of its own.
    "factored": codes that share a factor (an FSQ level, a part of a product code) share a trained
    row for it, so that combinations compose; see `training.factored_rows`. "none": not at all, for
    one of several adapters on a model whose rows are trained already; vLLM then swaps them per
    request (it cannot swap rows)."""
    fold: bool | None = None
    """Compute W + B·A once a step instead of a second path through every layer: the same function
    and the same saved adapter, faster where a batch has many more tokens than the layers are wide,
    dearer in memory. None: on a CPU yes, elsewhere no. Only with dropout 0, never with qlora."""

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 1)
        _in_range("lora.dropout", self.dropout, 0, 0.99)


@dataclass(kw_only=True)
class OptimizerRecipe:
    """One optimizer, three groups of parameters, each with its learning rate.

    That norms alone can adapt a frozen transformer is Lu et al. 2021, "Pretrained Transformers as
    Universal Computation Engines" (arXiv 2103.05247, §2.2); here they may join the LoRA.
    """

    name: Literal["adamw", "muon"] = "adamw"
    """With "muon": Muon for hidden 2-D weights, scaled to AdamW's step size; AdamW for the rest."""
    learning_rate: float = 1e-3
    """The hidden weights; in modes lora and qlora the LoRA matrices."""
    rows_learning_rate: float | None = None
    """The new rows; in mode full the embedding and the head. None: 1.5 × learning_rate."""
    norms_learning_rate: float | None = None
    """Norms (and in mode full biases). None: in mode full ``learning_rate``; in modes lora and
    qlora norms are not trained. An adapter with norms can be merged, but vLLM cannot swap it."""
    rows_first_steps: int = 0
    """Steps at the start in which only the new rows are trained."""
    weight_decay: float = 0.0
    """Of hidden 2-D weights. Rows, norms and biases never decay."""
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "rows_learning_rate", "norms_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and rate <= 0:
                raise ConfigurationError(f"optimizer.{name} must be positive, got {rate}")
        _at_least("optimizer.rows_first_steps", self.rows_first_steps, 0)


@dataclass(kw_only=True)
class LossRecipe:
    """How the directions are weighed in the loss."""

    weights: dict[str, float] = field(default_factory=dict)
    """Factor on every loss token of a direction; 1 where none is given."""
    text_kl: float = 0.0
    """Weight of KL(base || tuned) over the text vocabulary, at the loss positions of text rows. The
    base is the same model with its adapter off, so modes lora and qlora only."""

    def __post_init__(self) -> None:
        _no_unknown_names("loss.weights", self.weights, DIRECTIONS)
        if self.text_kl < 0:
            raise ConfigurationError(f"loss.text_kl must not be negative, got {self.text_kl}")


@dataclass(kw_only=True)
class LanguageModelRecipe:
    """`unimodal train`: teach a merged model both directions."""

    model: str
    """Folder (or hub id) that `unimodal merge` wrote."""
    output_dir: str
    mode: Literal["lora", "qlora", "full"] = "lora"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """"auto": eager on a CPU (1.45× faster than SDPA on short sequences), SDPA elsewhere."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format in which the base's weights are held. "auto": bfloat16 for an adapter on a GPU, else
    float32. What is trained is float32 in any case of an adapter."""
    bf16: bool | None = None
    """bfloat16 autocast. None: where it is faster on this machine (measured at the start)."""
    compile: bool = False
    """``torch.compile`` for the layers (not for the head). The first step takes a minute longer,
    the others less: 1.4 times as fast on a CPU. Needs a C++ compiler there. Not with qlora."""
    data: DataRecipe = field(default_factory=DataRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    training: dict[str, Any] = field(default_factory=dict)
    """Passed on to transformers.TrainingArguments as it is: max_steps, per_device_train_batch_size,
    gradient_accumulation_steps, lr_scheduler_type, warmup_steps, save_steps, logging_steps, seed,
    ... max_steps is the only one that is needed."""

    def __post_init__(self) -> None:
        if self.mode == "full" and self.loss.text_kl:
            raise ConfigurationError(
                "loss.text_kl needs mode lora or qlora: with mode full there is no base left to "
                "compare with; set loss.text_kl to 0"
            )
        _check_packing("data.packing", self.data.packing, self.attention)
        if self.mode == "qlora" and self.compile:
            raise ConfigurationError(
                "compile does not go with mode qlora: 4-bit layers are not compiled; set it to "
                "false, or use mode lora"
            )
        if self.mode == "qlora" and self.lora.fold:
            raise ConfigurationError("lora.fold needs a base that is not quantised; use mode lora")
        if self.lora.fold and self.lora.dropout:
            raise ConfigurationError("lora.fold needs lora.dropout 0")
        if self.mode != "full" and self.lora.rows == "none" and self.optimizer.rows_first_steps:
            raise ConfigurationError("optimizer.rows_first_steps needs lora.rows free or factored")


@dataclass(kw_only=True)
class TextModelRecipe:
    """`unimodal train-text-model`: a small causal LM, the base of a later merge."""

    output_dir: str
    tokenizer: str | None = None
    """Folder of the text tokenizer; a copy of it goes into the result. None: that of ``start``."""
    start: str | None = None
    """Folder or hub id of a causal LM to go on from, or "shipped:text_model", in place of
    ``model_type`` and ``config``. None: start from random weights."""
    text: list[str] = field(default_factory=list)
    """JSONL files with {"text": ...} or text-only {"messages": [...]} lines."""
    model_type: str = "qwen3"
    """Without ``start``: any causal LM that transformers knows: qwen3, llama, gemma3_text, ..."""
    config: dict[str, Any] = field(default_factory=dict)
    """Passed on to that model's configuration class: hidden_size, num_hidden_layers, ..."""
    max_length: int = 256
    """Tokens an example may have; longer texts are cut into pieces."""
    assistant_only: float = 0.0
    """Share of the chats of which only the assistant's turns are learnt (0 to 1). What is asked
    about long texts is a small part of their tokens: learnt as a whole, it hardly counts."""
    packing: bool | int = False
    """As ``data.packing`` in `DataRecipe`."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    bf16: bool | None = None
    compile: bool = False
    """As in `LanguageModelRecipe`."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_packing("packing", self.packing, self.attention)
        if not 0 <= self.assistant_only <= 1:
            raise ConfigurationError(
                f"assistant_only is {self.assistant_only}; expected a share, 0 to 1"
            )
        if self.tokenizer is None and self.start is None:
            raise ConfigurationError("give a tokenizer, or a text model to start from")
        if self.start is not None and (self.tokenizer is not None or self.config):
            raise ConfigurationError(
                "start has a tokenizer and a config of its own; leave tokenizer and config out"
            )


def load_recipe(kind: type[R], path: str | Path, overrides: Iterable[str] = ()) -> R:
    """Read a recipe.

    Args:
        kind: the recipe's dataclass.
        path: YAML file.
        overrides: "a.b=value" strings; the value is read as YAML.

    Raises:
        ConfigurationError: no such file, not YAML, an unknown or missing field, a value of the
            wrong type or out of range; the message names the field and the nearest known one.
    """
    return build_recipe(kind, load_content(path, overrides, kind))


def load_content(
    path: str | Path, overrides: Iterable[str] = (), kind: Any = None
) -> dict[str, Any]:
    """Read a recipe's fields without checking them; raises ConfigurationError as `load_recipe`.

    Args:
        kind: the recipe's dataclass. Known, an override of one key of a mapping that the file does
            not give (``data.weights.text=4``) leaves the mapping's other defaults as they are.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"no recipe at {path}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{path} must hold a mapping of fields, got {type(content).__name__}"
        )
    for override in overrides:
        _apply(content, override, kind)
    return content


def build_recipe(kind: type[R], content: Mapping[str, Any]) -> R:
    """Make a recipe from nested mappings; raises ConfigurationError as `load_recipe`."""
    return _build(kind, content, "")


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """Return the recipe as plain JSON and YAML values."""
    return _plain(dataclasses.asdict(recipe))


def save_recipe(recipe: Any, path: str | Path) -> None:
    """Write the resolved recipe, atomically; `load_recipe` reads it back to an equal one."""
    with atomic_write(path) as temporary:
        temporary.write_text(
            yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the fields in which two recipes differ, as "a.b: here 1, there 2"."""
    found: list[str] = []
    for name in sorted({*ours, *theirs}):
        here, there = ours.get(name), theirs.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += differences(here, there, f"{prefix}{name}.")
        elif here != there:
            found.append(f"{prefix}{name}: now {here!r}, there {there!r}")
    return found


def _apply(content: dict[str, Any], override: str, kind: Any) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigurationError(f"--set takes name=value, got {override!r}")
    *parents, last = name.strip().split(".")
    for parent in parents:
        default, kind = _inside(kind, parent)
        content = content.setdefault(parent, default)
        if not isinstance(content, dict):
            raise ConfigurationError(
                f"--set {override}: {parent} is a value, not a group of fields"
            )
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--set {override}: the value is not valid YAML") from error


def _inside(kind: Any, name: str) -> tuple[dict[str, Any], Any]:
    """Return a field's default if it is a mapping, else {}; and its dataclass if it is a group."""
    if not dataclasses.is_dataclass(kind):
        return {}, None
    for found in dataclasses.fields(kind):
        if found.name == name:
            hint = typing.get_type_hints(kind)[name]
            groups = [
                one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)
            ]
            if not groups and found.default_factory is not dataclasses.MISSING:
                return dict(found.default_factory()), None
            return {}, groups[0] if groups else None
    return {}, None


def _build(kind: Any, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise ConfigurationError(
            f"{where or 'the recipe'} must be a group of fields, got {content!r}"
        )
    hints = typing.get_type_hints(kind)
    _no_unknown_names(where or "the recipe", content, list(hints))
    values = {
        name: _convert(hints[name], value, f"{where}.{name}".lstrip("."))
        for name, value in content.items()
    }
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in values
    ]
    if missing:
        raise ConfigurationError(
            f"{where or 'the recipe'} lacks {', '.join(missing)}; add it to the file or use --set"
        )
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check ``value`` against a type annotation; YAML's "1e-3" (a string to it) becomes a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:  # its message says more than ours below
            return _convert(options[0], value, where)
        for option in options:
            try:
                return _convert(option, value, where)
            except ConfigurationError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
        raise ConfigurationError(f"{where} must be one of {', '.join(arguments)}; got {value!r}")
    elif origin is dict and isinstance(value, Mapping):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif origin is list and isinstance(value, (list, tuple)):
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(_convert(a, v, where) for a, v in zip(arguments, value, strict=True))
    elif hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    name = hint.__name__ if isinstance(hint, type) and not arguments else str(hint)
    raise ConfigurationError(f"{where} must be {name}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _no_unknown_names(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ConfigurationError(f"{where} has no field {name!r}{hint}")


def _check_weights(name: str, weights: Mapping[str, float]) -> None:
    _no_unknown_names(name, weights, DIRECTIONS)
    if any(weight < 0 for weight in weights.values()):
        raise ConfigurationError(f"{name} must not be negative, got {weights}")


def _check_packing(where: str, packing: bool | int, attention: str) -> None:
    if isinstance(packing, bool):
        return
    _at_least(where, packing, 8)
    if attention == "flash_attention_2":
        raise ConfigurationError(
            f"{where}: flash_attention_2 takes packed examples as a single row, of any length; set "
            f"it to true, got {packing}"
        )


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigurationError(f"{name} must lie in [{low}, {high}], got {value}")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigurationError(f"{name} must be at least {low}, got {value}")
