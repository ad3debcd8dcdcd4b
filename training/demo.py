"""`unimodal demo`: the whole walk, stage by stage, each stage a command that can be run alone.

    pictures with captions -> image tokenizer -> vocabulary extension -> merge with a text LLM
    -> LoRA in both directions -> scores, drawings, captions, a real vLLM server -> report

A finished stage is not run again: kill the demo and start it again, and it goes on from the last
finished stage, and inside a training from its last checkpoint. What is trained, on what and for how
long stands in one YAML file (`training/recipes/demo.yaml`); the same walk over other pictures is
another file (`training/recipes/emoji.yaml`), and no other code.
"""

import dataclasses
import json
import os
import resource
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tokenizer_hf.errors import ConfigurationError, DataError
from tokenizer_hf.files import atomic_write
from unimodal.shipped import resolve

RECIPES = Path(__file__).parent / "recipes"
STATE = "demo.json"
PROMPTS_PER_CATEGORY = 24
SMALL_KV_CACHE = ("--num-gpu-blocks-override", "64")
"""For the comparison: 64 blocks hold its few short requests; vLLM would take 1 GiB."""


@dataclass(kw_only=True)
class DemoRecipe:
    """What a walk consists of. Every block holds the settings of one command."""

    shapes: dict[str, Any] | None = None
    """`unimodal shapes`: write the embedded world. None: take ``pictures`` and ``text``."""
    pictures: dict[str, str] = field(default_factory=dict)
    """{"train": ..., "validation": ...}: imagefolders, Parquet, hub ids."""
    text: dict[str, list[str]] = field(default_factory=dict)
    """{"train": [...], "validation": [...]}: JSONL files of the text model and the text replay."""
    tokenizer: str | None = None
    """Folder or hub id of an image tokenizer, or "shipped:image_tokenizer"; None: train one
    (image_tokenizer)."""
    image_tokenizer: dict[str, Any] = field(default_factory=dict)
    text_tokenizer: dict[str, Any] = field(default_factory=dict)
    text_model: dict[str, Any] = field(default_factory=dict)
    llm: str | None = None
    """Folder or hub id of a text LLM, or "shipped:text_model"; None: train a small one
    (text_tokenizer, text_model), or train on the one that ``text_model`` starts from."""
    merge: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    choose_sampling: dict[str, Any] | None = None
    """Choose the sampling settings on validation prompts (`grid`, `n`); only with ``shapes``.
    None: leave the model's defaults."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    draw: list[str] = field(default_factory=list)
    """Prompts that are drawn at the end, into ``drawings/``."""
    serve_check: dict[str, Any] | None = field(default_factory=dict)
    """The comparison with a real vLLM server. None: leave it out."""

    def __post_init__(self) -> None:
        if self.choose_sampling is not None and self.shapes is None:
            raise ConfigurationError(
                "choose_sampling without shapes; its prompts and its judge know the embedded world "
                "only. Leave the block out and give guidance and temperature in evaluate"
            )


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: its name, the command that does the same alone, and the function."""

    name: str
    command: str
    run: Callable[[], Any]
    flags: Callable[[], str] | None = None
    """More of the command, known only once the stages before have run."""

    def printed(self) -> str:
        """Return the whole command."""
        return self.command if self.flags is None else f"{self.command} {self.flags()}"


def load_demo_recipe(path: str | Path) -> DemoRecipe:
    """Read a recipe, by path or by the name of one that comes with the package.

    Raises:
        ConfigurationError: no such file, or fields that nobody knows.
    """
    from training.recipes import load_recipe

    return load_recipe(DemoRecipe, demo_recipe_file(path))


def demo_recipe_file(path: str | Path) -> Path:
    """Return the file that is meant: a path, or the name of one that comes with the package."""
    own = RECIPES / f"{path}.yaml"
    return own if own.exists() and not Path(path).exists() else Path(path)


def run_demo(
    recipe: DemoRecipe, out: str | Path, *, seed: int = 0, stop_after: str | None = None
) -> Path:
    """Run every stage that has not finished yet.

    Args:
        recipe: what to do.
        out: everything is written here; ``report.html``, ``report.md``, ``report.json`` at last.
        seed: of the world, of every training and of the drawings.
        stop_after: name of the stage to end with.

    Returns:
        ``out``.

    Raises:
        ConfigurationError: ``out`` holds the walk of another recipe or seed.
        UnimodalError, OSError: of the stage that failed; start again to go on there.
    """
    walk = _Walk(recipe, Path(out), seed)
    names = [stage.name for stage in walk.stages()]
    if stop_after is not None and stop_after not in names:
        raise ConfigurationError(f"no stage {stop_after!r}; expected one of {', '.join(names)}")
    with _MemoryWatch() as memory:
        for number, stage in enumerate(walk.stages(), start=1):
            if stage.name not in walk.seconds:
                print(f"\n[{number}/{len(names)}] {stage.name}\n  $ {stage.printed()}", flush=True)
                began = time.monotonic()
                stage.run()
                walk.finish(stage.name, time.monotonic() - began, memory.peak_bytes)
            else:
                print(f"[{number}/{len(names)}] {stage.name}: done before", flush=True)
            if stage.name == stop_after:
                break
    return walk.out


def dry_run(recipe: DemoRecipe, *, seed: int = 0, stop_after: str | None = None) -> list[Any]:
    """Make a miniature of a walk in a temporary folder, and estimate the trainings of the whole.

    Models and settings are the recipe's, so that every key is really used; there are few pictures,
    two steps of a few examples, and no server. Where there is no GPU, bfloat16, ``compile`` and
    4 bits are left out: a CPU takes minutes for them.

    Args:
        stop_after: name of the miniature's last stage; not before "merge".

    Returns:
        a `training.estimate.Estimate` for each training.

    Raises:
        UnimodalError, TypeError: what is wrong with the recipe.
    """
    import tempfile

    from training.estimate import (
        image_tokenizer_estimate,
        language_model_estimate,
        text_model_estimate,
    )
    from training.image_tokenizer import TokenizerRecipe
    from training.recipes import LanguageModelRecipe, TextModelRecipe, build_recipe

    with tempfile.TemporaryDirectory(prefix="unimodal-dry-run-") as folder:
        out = Path(folder) / "walk"
        whole = _Walk(recipe, out, seed)
        tokenizer = text = None
        if recipe.tokenizer is None:
            tokenizer = build_recipe(TokenizerRecipe, whole.image_tokenizer_recipe())
        if recipe.llm is None:
            text = build_recipe(TextModelRecipe, whole.text_model_recipe())
        lora = build_recipe(LanguageModelRecipe, whole.lora_recipe())
        run_demo(_miniature(recipe), out, seed=seed, stop_after=stop_after)
        found: list[Any] = []
        if tokenizer is not None:
            there = tokenizer.count_pictures() if recipe.shapes is None else recipe.shapes["n"]
            there = min(there, tokenizer.num_pictures or there)
            found.append(image_tokenizer_estimate(tokenizer, there))
        if text is not None:
            found.append(text_model_estimate(text))
        found.append(language_model_estimate(lora))
    if recipe.shapes is None:
        return found
    n, chats = recipe.shapes["n"], recipe.shapes.get("chats") or recipe.shapes["n"]
    data = {"text_model": f"{chats:,} chats", "lora": f"{n:,} pictures, {chats:,} chats"}
    return [dataclasses.replace(one, data=data.get(one.stage, one.data)) for one in found]


def _miniature(recipe: DemoRecipe) -> DemoRecipe:
    import torch

    steps = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    on_cpu: dict[str, Any] = {}
    if not torch.cuda.is_available():
        on_cpu = {"bf16": False, "compile": False}

    def trained(block: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return {**block, **changes, "training": {**block.get("training", {}), **steps}}

    lora = dict(on_cpu)
    if on_cpu and recipe.lora.get("mode") == "qlora":
        lora["mode"] = "lora"
    if on_cpu and "dtype" in recipe.lora:
        lora["dtype"] = "float32"
    tokenizer = {**recipe.image_tokenizer, "max_steps": 2, "batch_size": 4, "held_out": 8}
    if on_cpu and "precision" in tokenizer:
        tokenizer["precision"] = "float32"
    small: dict[str, Any] = {"draw": recipe.draw[:1], "serve_check": None}
    if recipe.shapes is not None:
        fewer = {"n": 256, "validation": 16, "chats": 512}
        small["shapes"] = {**recipe.shapes, **fewer}
    if recipe.tokenizer is None:
        small["image_tokenizer"] = tokenizer
    if recipe.llm is None:
        small["text_model"] = trained(recipe.text_model, **on_cpu)
    if recipe.choose_sampling is not None:
        grid = recipe.choose_sampling.get("grid", {})
        first = {name: values[:1] for name, values in grid.items()}
        small["choose_sampling"] = {**recipe.choose_sampling, "n": 1, "grid": first}
    small["lora"] = trained(recipe.lora, **lora)
    counts = {"n": 1, "pictures": 2, "texts": 2, "dialogues": 1}
    small["evaluate"] = {**recipe.evaluate, **counts}
    return dataclasses.replace(recipe, **small)


class _Walk:
    """The folder of a walk: what is where, and which stages are done."""

    def __init__(self, recipe: DemoRecipe, out: Path, seed: int) -> None:
        self.recipe, self.out, self.seed = recipe, out, seed
        identity = {"recipe": dataclasses.asdict(recipe), "seed": seed}
        self.state: dict[str, Any] = {"identity": identity, "seconds": {}, "peak_rss_bytes": 0}
        file = out / STATE
        if file.exists():
            self.state = json.loads(file.read_text(encoding="utf-8"))
            if self.state["identity"] != json.loads(json.dumps(identity)):
                from training.recipes import differences

                told = "; ".join(differences(identity, self.state["identity"])[:4])
                raise ConfigurationError(
                    f"{out} holds a walk with other settings ({told}); "
                    "give another --out, or remove that folder"
                )
        elif out.exists() and any(out.iterdir()):
            raise ConfigurationError(f"{out} is not empty and holds no walk; give another --out")

    @property
    def seconds(self) -> dict[str, float]:
        return self.state["seconds"]

    def finish(self, stage: str, seconds: float, peak_bytes: int) -> None:
        self.seconds[stage] = round(self.seconds.get(stage, 0) + seconds, 1)
        self.state["peak_rss_bytes"] = max(self.state["peak_rss_bytes"], peak_bytes)
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.out / STATE) as temporary:
            temporary.write_text(json.dumps(self.state, indent=2) + "\n", encoding="utf-8")

    def path(self, name: str) -> str:
        return str(self.out / name)

    def recipe_file(self, name: str, content: dict[str, Any]) -> str:
        """Write a stage's recipe where its command finds it."""
        file = self.out / "recipes" / f"{name}.yaml"
        with atomic_write(file) as temporary:
            temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return str(file)

    @property
    def pictures(self) -> dict[str, str]:
        if self.recipe.shapes is None:
            return self.recipe.pictures
        return {split: self.path(f"world/{split}") for split in ("train", "validation")}

    def text(self, split: str) -> list[str]:
        if self.recipe.shapes is None:
            return self.recipe.text[split]
        return [self.path(f"world/chat/{split}.jsonl")]

    @property
    def tokenizer(self) -> str:
        given = self.recipe.tokenizer
        return resolve(given) if given else self.path("image_tokenizer")

    @property
    def llm(self) -> str:
        return resolve(self.recipe.llm) if self.recipe.llm else self.path("text_model")

    @property
    def sampling(self) -> dict[str, Any]:
        """How drawings are sampled: as they are for the scores."""
        names = ("guidance", "temperature", "top_k", "candidates")
        return {name: self.recipe.evaluate[name] for name in names if name in self.recipe.evaluate}

    def stages(self) -> list[Stage]:
        r, p = self.recipe, self.path
        stages = []
        if r.shapes is not None:
            names = {"captions_per_picture": "captions"}
            flags = {names.get(name, name): value for name, value in r.shapes.items()}
            command = f"unimodal shapes {p('world')} {_flags({**flags, 'seed': self.seed})}"
            stages.append(Stage("shapes", command, self.shapes))
        if r.tokenizer is None:
            stages.append(
                self.config_stage("image_tokenizer", "train-tokenizer", self.image_tokenizer)
            )
        command = f"unimodal export-vocabulary {self.tokenizer} --out {p('vocabulary')}"
        stages.append(Stage("export_vocabulary", command, self.export_vocabulary))
        if r.llm is None and r.text_model.get("start") is None:
            size = r.text_tokenizer.get("vocab_size", 1024)
            command = (
                f"unimodal train-text-tokenizer {' '.join(self.text('train'))} "
                f"--vocab-size {size} --out {p('text_tokenizer')}"
            )
            stages.append(Stage("text_tokenizer", command, self.text_tokenizer))
        if r.llm is None:
            stages.append(self.config_stage("text_model", "train-text-model", self.text_model))
        command = (
            f"unimodal encode {self.pictures['train']} --image-tokenizer {self.tokenizer} "
            f"--out {p('codes')}"
        )
        stages.append(Stage("encode", command, self.encode))
        options = " ".join(
            f"--{k.replace('_', '-')} '{v}'" for k, v in self.merge_options().items()
        )
        command = (
            f"unimodal merge --llm {self.llm} --image-tokenizer {self.tokenizer} "
            f"--out {p('merged')} {options}"
        )
        stages.append(Stage("merge", command, self.merge))
        stages.append(self.config_stage("lora", "train", self.lora))
        command = f"unimodal merge-adapter {p('lora')} --out {p('model')}"
        stages.append(Stage("merge_adapter", command, self.merge_adapter))
        return stages + self.measuring_stages()

    def measuring_stages(self) -> list[Stage]:
        p = self.path
        stages: list[Stage] = []
        if self.recipe.choose_sampling is not None:
            command = f"unimodal choose-sampling {p('model')} {self.sampling_flags()}"
            stages.append(Stage("choose_sampling", command, self.choose_sampling))
        held_out = p("world")
        if self.recipe.shapes is None:
            texts = " ".join(f"--text {file}" for file in self.text("validation"))
            train = f"--train-pictures {self.pictures['train']}"
            held_out = f"{self.pictures['validation']} {train} {texts}"
        command = (
            f"unimodal evaluate --model {p('model')} --base-llm {self.llm} "
            f"--world {held_out} --out {p('report.json')} "
            + _flags({"seed": self.seed, **self.recipe.evaluate})
        )
        stages.append(Stage("evaluate", command, self.evaluate))
        if self.recipe.serve_check is not None:
            command = f"unimodal serve-check --model {p('model')} --out {p('vllm.json')}"
            stages.append(Stage("vllm", command, self.vllm, self.serve_flags))
        prompts = " ".join(f'"{prompt}"' for prompt in self.recipe.draw)
        flags = _flags({"seed": 0, **self.sampling})
        command = f"unimodal draw --model {p('model')} --out {p('drawings')} {flags} {prompts}"
        stages.append(Stage("draw", command, self.draw))
        stages.append(Stage("report", f"unimodal report {self.out}", self.report))
        return stages

    def sampling_flags(self) -> str:
        """The settings of the stage choose_sampling, as its command takes them."""
        wanted, shapes = self.recipe.choose_sampling or {}, self.recipe.shapes or {}
        several = [
            _flags({name: value or 0 if name == "top_k" else value})
            for name, values in wanted.get("grid", {}).items()
            for value in values
        ]
        once = {
            "n": wanted.get("n", PROMPTS_PER_CATEGORY),
            "level": shapes.get("level", "board"),
            "seed": self.seed,
        }
        return " ".join([*several, _flags(once)])

    def serve_flags(self) -> str:
        """The prompts of the stage vllm, as its command takes them."""
        return " ".join(f"--prompt {shlex.quote(prompt)}" for prompt in self.serve_prompts())

    def config_stage(self, name: str, command: str, run: Callable[[], Any]) -> Stage:
        file = self.out / "recipes" / f"{name}.yaml"
        return Stage(name, f"unimodal {command} --config {file}", run)

    # --- the stages -------------------------------------------------------------------------------

    def shapes(self) -> None:
        from eval.shapes.world import write_world

        write_world(self.path("world"), seed=self.seed, **(self.recipe.shapes or {}))

    def image_tokenizer_recipe(self) -> dict[str, Any]:
        return {
            "data": [self.pictures["train"]],
            "held_out_data": [self.pictures["validation"]],
            "output_dir": self.path("image_tokenizer"),
            "seed": self.seed,
            **self.recipe.image_tokenizer,
        }

    def image_tokenizer(self) -> None:
        from training.image_tokenizer import TokenizerRecipe, train_image_tokenizer
        from training.recipes import load_recipe

        file = self.recipe_file("image_tokenizer", self.image_tokenizer_recipe())
        train_image_tokenizer(load_recipe(TokenizerRecipe, file))

    def export_vocabulary(self) -> None:
        from unimodal.merge import export_vocabulary

        for line in export_vocabulary(self.tokenizer, self.path("vocabulary"), None, "added"):
            print(f"  {line}")

    def text_tokenizer(self) -> None:
        from tokenizer_hf.sentencepiece_vocabulary import read_texts, train_sentencepiece

        texts = read_texts([Path(file) for file in self.text("train")])
        train_sentencepiece(texts, self.path("text_tokenizer"), **self.recipe.text_tokenizer)

    def text_model_recipe(self) -> dict[str, Any]:
        content = {
            "output_dir": self.path("text_model"),
            "text": self.text("train"),
            **self.recipe.text_model,
        }
        if content.get("start") is None:
            content.setdefault("tokenizer", self.path("text_tokenizer"))
        content["training"] = {"seed": self.seed, **content.get("training", {})}
        return content

    def text_model(self) -> None:
        from training.recipes import TextModelRecipe, load_recipe
        from training.text_model import train_text_model

        file = self.recipe_file("text_model", self.text_model_recipe())
        train_text_model(load_recipe(TextModelRecipe, file))

    def encode(self) -> None:
        import torch

        from training.data.code_cache import build_cache

        device = "cuda" if torch.cuda.is_available() else "cpu"
        build_cache(self.pictures["train"], self.tokenizer, self.path("codes"), device=device)

    def merge_options(self) -> dict[str, Any]:
        options = {"seed": self.seed, **self.recipe.merge}
        if options.get("row_init") == "meaning":
            options["pairs"] = self.path("codes")
        return options

    def merge(self) -> None:
        from unimodal.merge import merge

        merge(self.llm, self.tokenizer, self.path("merged"), **self.merge_options())

    def lora_recipe(self) -> dict[str, Any]:
        content = {
            "model": self.path("merged"),
            "output_dir": self.path("lora"),
            **self.recipe.lora,
        }
        content["data"] = {
            "caches": [self.path("codes")],
            "text": self.text("train"),
            **content.get("data", {}),
        }
        content["training"] = {"seed": self.seed, **content.get("training", {})}
        return content

    def lora(self) -> None:
        from training.language_model import train
        from training.recipes import LanguageModelRecipe, load_recipe

        file = self.recipe_file("lora", self.lora_recipe())
        train(load_recipe(LanguageModelRecipe, file))

    def merge_adapter(self) -> None:
        from training.adapters import merge_adapter

        merged = merge_adapter(self.path("lora"), self.path("model"))
        print(f"  largest logit difference to the adapter: {merged.max_logit_difference:.1e}")

    def choose_sampling(self) -> None:
        from eval.choose_sampling import SamplingGrid, choose_sampling, line

        wanted = dict(self.recipe.choose_sampling or {})
        grid = SamplingGrid(**wanted.pop("grid", {}))
        level = (self.recipe.shapes or {}).get("level", "board")
        try:
            tried = choose_sampling(self.path("model"), level, grid=grid, seed=self.seed, **wanted)
        except DataError as error:
            # A miniature's model draws nothing right; measure it all the same.
            print(f"  left as it was: {error}")
        else:
            print(*(f"  {line(one)}" for one in tried), sep="\n")

    # --- what is measured -------------------------------------------------------------------------

    def evaluate(self) -> None:
        from eval.evaluate import EvaluationSettings, evaluate
        from training.data.sources import open_source

        settings = EvaluationSettings(**{"seed": self.seed, **self.recipe.evaluate})
        held_out: Any = self.path("world")
        train: Any = None
        if self.recipe.shapes is None:
            source = open_source(self.pictures["validation"], split="validation")
            held_out = list(_captioned(source))
            train = _captioned(open_source(self.pictures["train"]))
        evaluate(
            self.path("model"),
            self.llm,
            held_out,
            self.path("report.json"),
            settings=settings,
            text_files=self.text("validation"),
            train_pictures=train,
        )

    def vllm(self) -> None:
        from eval.evaluate import update_report
        from unimodal.serving.check import check_identical

        result = check_identical(
            self.path("model"),
            self.serve_prompts(),
            drawing=self.path("vllm.png"),
            out=self.path("vllm.json"),
            log=self.path("vllm.log"),
            vllm_args=SMALL_KV_CACHE,
        )
        print(f"  {result['identical']} of {result['prompts']} replies identical to transformers'")
        update_report(self.path("report.json"), {"vllm": result})

    def draw(self) -> None:
        from unimodal.pipeline import Unimodal
        from unimodal.terminal import save_png

        model = Unimodal.from_pretrained(self.path("model"))
        pictures = model.draw(self.recipe.draw, seed=0, **self.sampling)
        folder = self.out / "drawings"
        folder.mkdir(exist_ok=True)
        captions = model.caption(pictures)
        for number, (prompt, picture) in enumerate(zip(self.recipe.draw, pictures, strict=True)):
            file = folder / f"{number:02d}.png"
            save_png(picture, file, {"prompt": prompt, "seed": number, **self.sampling})
            print(f'  "{prompt}" -> {file} -> "{captions[number]}"')

    def serve_prompts(self) -> list[str]:
        """Prompts of the validation split: short captions, one a picture."""
        from training.data.sources import open_source

        wanted = (self.recipe.serve_check or {}).get("prompts", 16)
        found: list[str] = []
        for row in open_source(self.pictures["validation"], split="validation"):
            if row.captions:
                found.append(row.captions[0])
            if len(found) == wanted:
                break
        return found

    def report(self) -> None:
        from eval.evaluate import update_report
        from eval.report import write_report

        values = {"seconds": self.seconds, "peak_rss_bytes": self.state["peak_rss_bytes"]}
        update_report(self.path("report.json"), values)
        write_report(self.out)


def _flags(options: dict[str, Any]) -> str:
    """Options as the command line takes them."""
    return " ".join(f"--{name.replace('_', '-')} '{value}'" for name, value in options.items())


def _captioned(rows: Any) -> Any:
    from eval.evaluate import Captioned

    for row in rows:
        if row.image is not None:
            yield Captioned(row.image, row.captions, row.questions)


class _MemoryWatch:
    """Watches the memory of this process and of its children, twice a second."""

    def __enter__(self) -> "_MemoryWatch":
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process(os.getpid())
        while not self._stop.wait(0.5):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
