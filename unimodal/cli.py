"""The command line, ``unimodal COMMAND``: the roof, the only file that sees all four packages.

Every command imports what it needs inside itself, so that ``unimodal --help`` answers at once.
A mistake of the user ends in one line on standard error and exit code 2 (``--debug`` shows the
traceback), Ctrl-C in exit code 130.
"""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="unimodal",
    help="Any discrete image tokenizer + any Hugging Face text LLM = one model that sees and "
    "draws.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class _Notes(logging.Handler):
    """Shows what trainings and evaluations say of themselves, such as what they go on from."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(record.getMessage(), err=True)


_NOTES = _Notes()


@app.callback()
def _options(debug: Debug = False) -> None:
    if debug:
        os.environ["UNIMODAL_DEBUG"] = "1"
    for package in ("training", "eval"):
        notes = logging.getLogger(package)
        notes.setLevel(logging.INFO)
        notes.addHandler(_NOTES)


# --- image tokenizer ------------------------------------------------------------------------------


@app.command("train-tokenizer")
def train_tokenizer(
    config: Annotated[Path, typer.Option(metavar="RECIPE", help="A YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a field; as often as you like."),
    ] = None,
) -> None:
    """Train an image tokenizer on pictures, or go on with a training that was stopped.

    The recipe names the pictures (`data`: picture folders, Parquet, hub ids), the folder to write
    (`output_dir`), the tokenizer (`tokenizer`: fields of its config.json) and how long to train
    (`max_steps`, `batch_size`, `learning_rate`, ...). Under `training/` of the folder lie
    checkpoints, TensorBoard logs and sheets of pictures over their reconstructions.

    With `loss_weights.contrastive` above 0 the codes also learn to tell the pictures' captions;
    `metrics.json` then has `caption_retrieval`, of held-out pictures, beside what guessing gives.

    **Examples**

    `unimodal train-tokenizer --config tokenizer.yaml`

    `unimodal train-tokenizer --config tokenizer.yaml --set tokenizer.patch_local=true`

    `unimodal train-tokenizer --config tokenizer.yaml --set loss_weights.contrastive=0.3`
    """
    from training.image_tokenizer import TokenizerRecipe, train_image_tokenizer
    from training.recipes import load_recipe

    folder = train_image_tokenizer(load_recipe(TokenizerRecipe, config, overrides or ()))
    typer.echo((folder / "metrics.json").read_text(), nl=False)
    typer.echo(str(folder))


@app.command()
def reconstruct(
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURE...", help="PNG, JPEG, WebP, GIF, ...")
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            "--image-tokenizer",
            "-t",
            metavar="DIR",
            help="A folder, or a hub id. A merged model keeps its tokenizer in image_tokenizer/.",
        ),
    ],
    num_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Use only the first codes, where the tokenizer is nested."),
    ] = None,
    out: Annotated[Path, typer.Option(help="A folder for the PNG files.")] = Path(
        "reconstructions"
    ),
) -> None:
    """Turn pictures into codes and back: see what a tokenizer keeps.

    Each PNG shows what the tokenizer was given on the left and what it made of it on the right; the
    line printed for it is `FILE<tab>PSNR in dB<tab>CODES`.

    **Examples**

    `unimodal reconstruct --image-tokenizer my-tokenizer cat.png`

    `unimodal reconstruct -t my-tokenizer photos/*.jpg --num-tokens 16 --out few-codes`
    """
    import numpy as np
    from PIL import Image
    from transformers.utils.logging import disable_progress_bar

    from tokenizer_hf.files import atomic_write
    from tokenizer_hf.image_processing_image_tokenizer import open_image
    from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
    from unimodal.shipped import resolve

    disable_progress_bar()
    for picture in pictures:
        open_image(picture)  # a bad picture is told before the model is loaded
    model = ImageTokenizer.from_pretrained(resolve(tokenizer))
    taken: set[Path] = set()
    for picture in pictures:
        given = np.asarray(model.image_processor.fit(picture))
        codes = model.encode(model.image_processor([given])["pixel_values"], num_tokens)
        made = np.asarray(model.image_processor.postprocess(model.decode(codes))[0])
        error = np.square(given.astype(float) - made).mean()
        psnr = 10 * np.log10(255**2 / error) if error else float("inf")
        path = out / f"{picture.stem}.png"
        while path in taken or path.resolve() == picture.resolve():
            path = path.with_name(f"{path.stem}_.png")
        taken.add(path)
        with atomic_write(path) as temporary:
            Image.fromarray(np.concatenate([given, made], axis=1)).save(temporary, "PNG")
        typer.echo(f"{path}\t{psnr:.2f}\t{' '.join(map(str, codes[0].tolist()))}")


# --- vocabulary and merge -------------------------------------------------------------------------


@app.command()
def export_vocabulary(
    image_tokenizer: Annotated[
        str, typer.Argument(metavar="DIR", help="An image tokenizer: a folder, or a hub id.")
    ],
    text_tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Also extend this text tokenizer: a folder, hub id or SentencePiece `.model`.",
        ),
    ] = None,
    vocab_mode: Annotated[
        str,
        typer.Option(
            help="`added`: codes are added special tokens. `base`: codes are written into the BPE "
            "vocabulary; loads fast at 64k codes, and no text can spell one."
        ),
    ] = "added",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write. Default: beside the image tokenizer."),
    ] = None,
    row_ends: Annotated[
        int, typer.Option(min=0, help="As in `unimodal merge --row-ends`; a number.")
    ] = 0,
) -> None:
    """Write the words that an image tokenizer needs in a text vocabulary.

    `vocabulary_extension.json` belongs to the image tokenizer and fits any language model. With
    `--text-tokenizer`, `--out` also gets that tokenizer, extended, and `image_vocabulary.json` with
    the ids.

    **Examples**

    `unimodal export-vocabulary my-image-tokenizer`

    `unimodal export-vocabulary my-image-tokenizer --text-tokenizer Qwen/Qwen3-0.6B --out extended`
    """
    from tokenizer_hf.errors import ConfigurationError
    from unimodal.merge import export_vocabulary as export

    if text_tokenizer is not None and out is None:
        raise ConfigurationError("--text-tokenizer without --out; give the folder to write")
    for line in export(image_tokenizer, out, text_tokenizer, vocab_mode, row_ends):
        typer.echo(line)


@app.command()
def train_text_tokenizer(
    texts: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="`.txt`: each line a text. `.jsonl`: the `text` of a line, or its `messages`.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    vocab_size: Annotated[
        int, typer.Option(min=261, help="All ids: pieces, 256 bytes, 4 special ones.")
    ] = 1024,
) -> None:
    """Train a small SentencePiece text tokenizer: frequent words become one piece.

    The folder loads with `AutoTokenizer`, reads every text back exactly, and has a ChatML chat
    template. It is meant for small models that are trained from scratch, as `unimodal demo --config
    demo-from-scratch` does; a published language model keeps its own.

    **Example:** `unimodal train-text-tokenizer world/text/*.jsonl --vocab-size 512 --out words`
    """
    from tokenizer_hf.sentencepiece_vocabulary import read_texts, train_sentencepiece

    folder = train_sentencepiece(read_texts(texts), out, vocab_size)
    typer.echo(f"{vocab_size} ids in {folder}")


@app.command()
def merge(
    llm: Annotated[
        str, typer.Option(metavar="DIR", help="A causal language model: a folder, or a hub id.")
    ],
    image_tokenizer: Annotated[
        str, typer.Option(metavar="DIR", help="An image tokenizer: a folder, or a hub id.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    vocab_mode: Annotated[
        str,
        typer.Option(
            help="`added`: codes are added special tokens, up to about 16k. `base`: codes are "
            "written into the BPE vocabulary; loads fast at 64k, and no text can spell one."
        ),
    ] = "added",
    row_init: Annotated[
        str,
        typer.Option(
            help="How the new rows start. `mean_cov`: like random text rows. `normal`: noise. "
            "`codebook`: similar codes get similar rows. `meaning`: codes start near the caption "
            "words that they occur with (needs `--pairs`)."
        ),
    ] = "mean_cov",
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A code cache with captions, for `--row-init meaning`."),
    ] = None,
    row_ends: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|auto",
            help="How many end-of-row words stand between the rows of a picture's codes: models "
            "learn left and right from them. `auto`: as many as make a row as long as a period of "
            "the model's rotary positions. For codes on a grid.",
        ),
    ] = "0",
    dtype: Annotated[
        str | None,
        typer.Option(help="`float32`, `bfloat16`, `float16`. Default: as the weights are."),
    ] = None,
    pad_to: Annotated[
        int, typer.Option(min=1, help="Rows of the embedding: a multiple of this.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Of the new rows.")] = 0,
    caption_instruction: Annotated[
        str | None, typer.Option(help="What asks for a caption. Default: “Describe the picture.”")
    ] = None,
    draw_instruction: Annotated[
        str | None, typer.Option(help="What asks for a drawing. Default: “Draw: {prompt}”")
    ] = None,
) -> None:
    """Join a language model and an image tokenizer into one folder, still a plain causal LM.

    Weights are copied shard by shard, so the model never has to fit into memory. Ids, rows and
    logits of text stay what they were. The image words are untrained afterwards: `unimodal train`
    teaches them.

    **Examples**

    `unimodal merge --llm Qwen/Qwen3-0.6B --image-tokenizer my-image-tokenizer --out my-model`

    `unimodal merge --llm ./llama --image-tokenizer ./vq64k --vocab-mode base --out my-model`
    """
    from tokenizer_hf.errors import ConfigurationError
    from unimodal.merge import merge as run

    if row_ends != "auto" and not row_ends.isdecimal():
        raise ConfigurationError(f"--row-ends is {row_ends!r}; expected a whole number, or auto")

    wording = {"caption_instruction": caption_instruction, "draw_instruction": draw_instruction}
    folder = run(
        llm,
        image_tokenizer,
        out,
        vocab_mode=vocab_mode,
        row_init=row_init,
        row_ends="auto" if row_ends == "auto" else int(row_ends),
        pairs=pairs,
        dtype=dtype,
        pad_to=pad_to,
        seed=seed,
        **{key: value for key, value in wording.items() if value is not None},
    )
    typer.echo(folder)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A merged model, or its hub id.")],
    scheme: Annotated[
        str,
        typer.Option(
            help="`W8A8`: int8 weights and activations. `W4A16`: int4 weights, a quarter as large."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    group_size: Annotated[
        int | None,
        typer.Option(help="Of W4A16: 128, 64 or 32 inputs share a scale. Default: what fits."),
    ] = None,
) -> None:
    """Write a quantized copy of a model, for vLLM and transformers (compressed-tensors' format).

    Weights of the linear layers are rounded to the nearest step; embedding, head, tokenizer and
    image tokenizer stay as they are. `unimodal evaluate` says what it costs, docs/deployment.md
    what to expect.

    **Example:** `unimodal quantize my-model --scheme W8A8 --out my-model-w8a8`
    """
    from unimodal.quantize import quantize as run

    typer.echo(run(model, out, scheme, group_size=group_size))


# --- caption, draw, chat --------------------------------------------------------------------------

SHIPPED = "shipped:model"
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="DIR",
        help="A merged model: a folder, or a hub id. Default: the small one that comes with us.",
        show_default=False,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="A PEFT adapter that was trained on the model."),
]
Device = Annotated[
    str | None, typer.Option(help="`cpu`, `cuda`, `cuda:1`. Default: CUDA where there is one.")
]
Dtype = Annotated[
    str | None, typer.Option(help="`float32`, `bfloat16`. Default: as the weights were saved.")
]


@app.command()
def caption(
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURE...", help="PNG, JPEG, WebP, GIF, ...")
    ],
    model: Model = SHIPPED,
    instruction: Annotated[
        str | None,
        typer.Option("--ask", help="Ask this instead of the model's own “Describe the picture.”"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: always the likeliest word. Above: more varied.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Choose among this many likeliest words.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Picture i draws its words with seed + i.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, in tokens.")] = 128,
    adapter: Adapter = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Say what pictures show: one line `PICTURE<tab>CAPTION` for each.

    A picture of any size or kind is brought to the tokenizer's size first: upright (EXIF),
    transparency over white, the first frame of an animation.

    **Examples**

    `unimodal caption --model my-model cat.png`

    `unimodal caption --model my-model photos/*.jpg > captions.tsv`

    `unimodal caption --model my-model --ask "What colour is the circle?" scene.png`
    """
    from tokenizer_hf.image_processing_image_tokenizer import open_image

    for picture in pictures:
        open_image(picture)  # a bad picture is told before the model is loaded
    unimodal = _load(model, adapter, device, dtype)

    from unimodal.terminal import printable

    captions = unimodal.caption(
        list(pictures),
        instruction=instruction,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    for picture, text in zip(pictures, captions, strict=True):
        typer.echo(f"{picture}\t{printable(' '.join(text.split()))}")


@app.command()
def draw(
    model: Model = SHIPPED,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help='JSONL: {"prompt": ...} and settings on each line.'
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="What draws the prompts of a file: `transformers` or `vllm`.")
    ] = "transformers",
    vllm_args: Annotated[
        str, typer.Option(metavar="FLAGS", help="For vLLM's engine, as one quoted string.")
    ] = "",
    n: Annotated[int, typer.Option("--n", min=1, help="Pictures of each prompt.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Picture i has seed + i; the same seed draws the same. Default: a new one."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="1: off. 2 to 5: follow the prompt more closely, vary less. Default: the model's.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Below 1: safer. Above: wilder. 0: the likeliest picture. Default: the model's.",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Choose among this many likeliest codes.")
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Draw each picture so often; keep the one that the model itself judges best. "
            "Default: the model's.",
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, help="Codes of a picture, where its tokenizer is nested: fewer, faster."
        ),
    ] = None,
    negative: Annotated[str, typer.Option(help="What guidance leads away from.")] = "",
    out: Annotated[
        Path, typer.Option(help="A folder, or for one picture a file that ends in .png.")
    ] = Path("drawings"),
    adapter: Adapter = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw prompts as PNG files; print their paths.

    Each file says in its metadata how it was made (text chunks `prompt` and `unimodal`), so the
    same picture can be drawn again.

    **Examples**

    `unimodal draw --model my-model "a red circle above a blue square"`

    `unimodal draw --model my-model "three green stars" --n 4 --seed 7 --guidance 4 --out stars`

    `unimodal draw --model my-model "a ring" --negative "black background" --out ring.png`

    `unimodal draw --model my-model --backend vllm --prompts prompts.jsonl --out drawings`

    A file's lines may set `id`, `n`, `seed`, `guidance`, `temperature`, `top_k`, `candidates`,
    `budget` and `negative_prompt`; the options are their defaults. `manifest.jsonl` in the folder
    lists what was drawn, with codes. The same command again goes on where it was stopped; see
    docs/deployment.md.
    """
    import secrets

    from tqdm import tqdm

    from tokenizer_hf.errors import ConfigurationError, MessageError
    from unimodal.processing_unimodal import read_draw_settings
    from unimodal.shipped import resolve

    model = resolve(model)
    own = read_draw_settings(model)
    guidance = own["guidance"] if guidance is None else guidance
    temperature = own["temperature"] if temperature is None else temperature
    top_k = own["top_k"] if top_k is None else top_k
    if candidates is None:  # beside an adapter vLLM cannot judge them
        candidates = 1 if backend == "vllm" and adapter else own["candidates"]
    if file is not None:
        if prompts:
            raise ConfigurationError(f"prompts came both as words and as --prompts {file}")
        defaults = {
            "n": n,
            "seed": seed or 0,
            "guidance": guidance,
            "temperature": temperature,
            "top_k": top_k,
            "candidates": candidates,
            "budget": budget,
            "negative_prompt": negative,
        }
        where = {"adapter": adapter, "device": device, "dtype": dtype}
        return _draw_file(file, defaults, model, out, backend, vllm_args, **where)
    if not prompts:
        raise ConfigurationError("nothing to draw; give a PROMPT, or a file with --prompts")
    if backend != "transformers":
        raise ConfigurationError(f"--backend {backend} draws files; give one with --prompts")
    number = n * len(prompts)
    if out.suffix.lower() == ".png" and number > 1:
        raise ConfigurationError(f"--out {out} is one file, but {number} pictures; give a folder")
    if not all(prompt.strip() for prompt in prompts):
        raise MessageError("the prompt is empty; expected some words")
    seed = secrets.randbits(31) if seed is None else seed
    unimodal = _load(model, adapter, device, dtype)

    from unimodal.terminal import picture_escape, picture_path, save_png, terminal_protocol

    vocabulary = unimodal.processor.vocabulary
    ids = vocabulary.span_length(budget)
    settings = {
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "candidates": candidates,
        "budget": budget,
        "negative_prompt": negative,
    }
    total = number * candidates * ids
    with tqdm(total=total, unit="id", desc="drawing", disable=None, leave=False) as bar:
        pictures = unimodal.draw(
            prompts, n=n, seed=seed, on_token=lambda row, token_id: bar.update(), **settings
        )
    about = {"model": model, "adapter": adapter, "image_tokenizer": vocabulary.fingerprint}
    for index, picture in enumerate(pictures):
        prompt = prompts[index // n]
        path = out if out.suffix.lower() == ".png" else picture_path(out, prompt, seed + index)
        save_png(picture, path, {"prompt": prompt, "seed": seed + index, **settings, **about})
        typer.echo(f"{picture_escape(picture, terminal_protocol())}{path}")


def _draw_file(
    file: Path,
    defaults: dict[str, Any],
    model: str,
    out: Path,
    backend: str,
    vllm_args: str,
    **where: str | None,
) -> None:
    """`unimodal draw --prompts`: one code path, two things that draw."""
    import asyncio
    import gc
    import shlex

    from tokenizer_hf.errors import ConfigurationError
    from unimodal.batch_drawing import (
        Defaults,
        Summary,
        TransformersBackend,
        check_budgets,
        draw_all,
        read_prompts,
    )

    if backend not in ("transformers", "vllm"):
        raise ConfigurationError(f"--backend {backend}; expected transformers or vllm")
    if backend == "transformers" and vllm_args:
        raise ConfigurationError("--vllm-args came without --backend vllm")
    if backend == "vllm" and where["device"]:
        raise ConfigurationError("--device came with --backend vllm, which takes its own device")
    drawings = read_prompts(file, Defaults(**defaults))
    if backend == "vllm" and where["adapter"] and any(one.candidates > 1 for one in drawings):
        raise ConfigurationError(
            "candidates came with --backend vllm and an adapter, beside which vLLM cannot judge "
            "them; merge the adapter first (unimodal merge-adapter), or give --candidates 1"
        )
    adapter = where["adapter"]
    about = {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "adapter": str(Path(adapter).resolve()) if adapter and Path(adapter).is_dir() else adapter,
    }

    def checked(processor: Any) -> dict[str, Any]:
        check_budgets(drawings, processor.vocabulary)
        return {**about, "image_tokenizer": processor.vocabulary.fingerprint}

    async def with_vllm() -> Summary:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported
        from unimodal.processing_unimodal import UnimodalProcessor
        from unimodal.serving.serve import require_vllm

        require_vllm()
        processor = UnimodalProcessor.from_pretrained(model)
        facts = checked(processor)
        from unimodal.serving.offline import running_backend

        flags = shlex.split(vllm_args)
        flags += ["--dtype", where["dtype"]] if where["dtype"] else []
        with running_backend(model, processor, flags, adapter) as vllm:
            return await draw_all(drawings, vllm, processor, out, facts)

    async def with_transformers() -> Summary:
        unimodal = _load(model, **where)
        facts = checked(unimodal.processor)
        engine = TransformersBackend(unimodal)
        return await draw_all(drawings, engine, unimodal.processor, out, facts)

    done = asyncio.run(with_vllm() if backend == "vllm" else with_transformers())
    gc.collect()  # an engine that is collected at the very end of Python complains
    typer.echo(f"{out}: {done.drawn} drawn, {done.skipped} were there, {done.failed} failed")
    if done.failed:
        raise typer.Exit(1)


@app.command()
def chat(
    model: Model = SHIPPED,
    images: Annotated[
        str,
        typer.Option(
            "--draw",
            help="`auto`: the model decides. `on`: each reply begins with a picture. `off`.",
        ),
    ] = "auto",
    system: Annotated[
        str | None, typer.Option(help="A system message, if the model's template has room for one.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the words; 0: always the likeliest.")
    ] = 0.7,
    top_k: Annotated[int | None, typer.Option(min=1, help="Of the words.")] = 50,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Of the pictures; 1: off. Default: the model's.")
    ] = None,
    image_temperature: Annotated[
        float | None, typer.Option(min=0, help="Of the pictures. Default: the model's own.")
    ] = None,
    image_top_k: Annotated[int | None, typer.Option(min=1, help="Of the pictures.")] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Codes of a picture, where its tokenizer is nested.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the first reply; counts up. Default: a new one.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest reply, in tokens, codes of pictures included."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where pictures are written.")] = Path("drawings"),
    adapter: Adapter = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Chat in the terminal, with pictures in both directions.

    `/image PATH` puts a picture into your next message; the model's pictures are written as files,
    their paths are printed, and kitty, iTerm2 and colour terminals show them. `/help` lists the
    commands, `/quit` or Ctrl-D leaves. Lines may also come from a pipe; then the first error ends
    it.

    **Examples**

    `unimodal chat --model my-model`

    `printf '/image cat.png\nWhat is this?\n' | unimodal chat --model my-model --temperature 0`
    """
    import secrets

    from tokenizer_hf.errors import ConfigurationError

    modes = {"auto": "auto", "on": "force", "off": "never"}
    if images not in modes:
        raise ConfigurationError(f"--draw {images}; expected auto, on or off")
    unimodal = _load(model, adapter, device, dtype)

    from unimodal.terminal import Chat, read_lines, terminal_protocol

    session = Chat(
        unimodal,
        out=out,
        options={
            "temperature": temperature,
            "top_k": top_k,
            "guidance": guidance,
            "image_temperature": image_temperature,
            "image_top_k": image_top_k,
            "budget": budget,
            "max_new_tokens": max_new_tokens,
        },
        images=modes[images],  # type: ignore[arg-type]
        seed=secrets.randbits(31) if seed is None else seed,
        system=system,
        protocol=terminal_protocol(),
    )
    if sys.stdin.isatty():
        typer.echo(f"{model}: write a message, or /help.")
    session.run(read_lines(), stop_at_error=not sys.stdin.isatty())


def _load(model: str, adapter: str | None, device: str | None, dtype: str | None) -> Any:
    """The model, with transformers' own messages turned off."""
    from rich.console import Console

    with Console(stderr=True).status(f"loading {model}"):
        import torch
        from transformers.utils import logging

        from tokenizer_hf.errors import ConfigurationError
        from unimodal.pipeline import Unimodal

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigurationError(f"--dtype {dtype}; expected float32, bfloat16 or float16")
        try:
            where = torch.device(device) if device else None
            if where is not None:
                torch.empty(0, device=where)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(f"--device {device} cannot be used: {reason}") from error
        return Unimodal.from_pretrained(model, device=where, dtype=dtype, adapter=adapter)


# --- data and training ----------------------------------------------------------------------------

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Override a field, e.g. `optimizer.learning_rate=1e-4`."
    ),
]
Resume = Annotated[
    str,
    typer.Option(
        help="`auto`: go on from the last checkpoint in output_dir. `never`: start over, and "
        "remove the earlier run."
    ),
]


@app.command()
def encode(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with metadata.jsonl, Parquet, a chat .jsonl, or a hub data set's id."
        ),
    ],
    image_tokenizer: Annotated[
        str,
        typer.Option(metavar="DIR", help="An image tokenizer, or a merged model that holds one."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The code cache to write.")],
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=THEIRS", help="Name a column, e.g. `image=jpg` or `captions=txt`."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures encoded at once.")] = 64,
    bf16: Annotated[
        bool, typer.Option(help="Encode in bfloat16: faster on a GPU, a few codes differ.")
    ] = False,
    device: Device = None,
) -> None:
    """Encode captioned pictures once, for training: the code cache.

    Rows that cannot be used are named, counted and listed in `skipped.jsonl`. A build that was
    stopped goes on when the same command runs again. docs/data_formats.md shows the formats.

        unimodal encode my-pictures --image-tokenizer my-model --out runs/codes
    """
    import torch

    from tokenizer_hf.errors import ConfigurationError
    from training.data.code_cache import build_cache
    from training.data.sources import open_source

    columns = dict(pair.split("=", 1) for pair in column or [] if "=" in pair)
    if len(columns) != len(column or []):
        raise ConfigurationError(f"--column takes ours=theirs, got {column}")
    cache = build_cache(
        open_source(source, split=split, columns=columns),
        image_tokenizer,
        out,
        batch_size=batch_size,
        bf16=bf16,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    print(f"{out}: {len(cache)} rows, {cache.manifest.skipped} skipped")


@app.command()
def train(
    config: Annotated[Path, typer.Option(metavar="YAML", help="The recipe.")],
    settings: Settings = None,
    resume: Resume = "auto",
) -> None:
    """Teach a merged model both directions, by LoRA, QLoRA or full tuning.

    Recipes to start from are in training/recipes/. The result is an ordinary PEFT adapter (in mode
    full a model folder); losses by direction are in `metrics.jsonl` and TensorBoard. Ctrl-C saves;
    the same command goes on.

        unimodal train --config training/recipes/lora.yaml --set model=my-model
    """
    from training.language_model import train as run
    from training.recipes import LanguageModelRecipe, load_recipe

    recipe = load_recipe(LanguageModelRecipe, config, settings or ())
    print(run(recipe, resume=_resumes(resume)))


@app.command()
def train_text_model(
    config: Annotated[Path, typer.Option(metavar="YAML", help="The recipe.")],
    settings: Settings = None,
    resume: Resume = "auto",
) -> None:
    """Train a small text LLM, to be merged with an image tokenizer: from scratch, or (`start`) from
    another one on.

    unimodal train-text-model --config training/recipes/text_model.yaml
    """
    from training.recipes import TextModelRecipe, load_recipe
    from training.text_model import train_text_model as run

    recipe = load_recipe(TextModelRecipe, config, settings or ())
    print(run(recipe, resume=_resumes(resume)))


@app.command()
def merge_adapter(
    adapter: Annotated[Path, typer.Argument(help="The output_dir of `unimodal train`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The plain model folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The merged base, if it is not where the adapter says."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the saved weights: `auto` (the base's), `float32`, `bfloat16`.")
    ] = "auto",
) -> None:
    """Fold an adapter into a plain model folder, and check that it is the same model.

    An adapter of mode qlora is folded into the unquantised base, which is not quite what it was
    trained on: evaluate the result.

        unimodal merge-adapter runs/lora --out my-tuned-model
    """
    from training.adapters import merge_adapter as run

    result = run(adapter, out, base=base, dtype=dtype)
    print(
        f"{result.folder}: logits differ by at most {result.max_logit_difference:.1e} "
        f"(largest logit {result.max_logit:.1f})"
    )


@app.command()
def estimate(
    config: Annotated[
        str, typer.Option(metavar="RECIPE", help="A YAML file of any training, or a demo's name.")
    ],
    settings: Settings = None,
    peak: Annotated[
        str | None,
        typer.Option(
            metavar="TFLOPS",
            help="Of the device it is for: a number, or `H100`, `H200`, `A100`, `L4`, `RTX 4090` "
            "(published, bfloat16). Default: this machine's.",
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.001, max=1, help="Of the peak, that is likely to be reached.")
    ] = 0.3,
) -> None:
    """Say what the trainings of a recipe will cost: parameters, FLOPs, time, memory.

    Nothing is trained. The model and the data of `train` must be there, as for the training itself;
    of a demo, a miniature is made in a temporary folder. It warns where the memory of this machine
    is too small. docs/scale_up.md says what is counted.

        unimodal estimate --config gpu --peak H100

        unimodal estimate --config training/recipes/lora.yaml --set model=my-model
    """
    from training.estimate import estimate_recipe, wording

    for line in wording(estimate_recipe(config, settings or ()), peak, share):
        typer.echo(line)


def _resumes(resume: str) -> bool:
    from tokenizer_hf.errors import ConfigurationError

    if resume not in ("auto", "never"):
        raise ConfigurationError(f"--resume takes auto or never, got {resume!r}")
    return resume == "auto"


# --- evaluation and report ------------------------------------------------------------------------


@app.command()
def shapes(
    folder: Annotated[Path, typer.Argument(help="Where to write the world; replaced as a whole.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of training pictures.")] = 20_000,
    level: Annotated[
        str, typer.Option(help="`board`: objects on a 4×4 board. `free`: anywhere.")
    ] = "board",
    seed: Annotated[int, typer.Option(help="The same seed writes the same bytes.")] = 0,
    validation: Annotated[
        int | None, typer.Option(help="Number of validation pictures (default: n/20, 200 to 1000).")
    ] = None,
    captions: Annotated[int, typer.Option(min=2, help="Captions per picture.")] = 4,
    chats: Annotated[
        int | None, typer.Option(min=1, help="Number of training chats (default: n).")
    ] = None,
    picture_size: Annotated[
        int, typer.Option(help="Pixels along a picture: 64, 128, 192, ...")
    ] = 64,
) -> None:
    """Write the embedded world: captioned pictures of coloured shapes, questions, text.

    `FOLDER/train` and `FOLDER/validation` hold Parquet that `datasets.load_dataset("parquet",
    data_dir=FOLDER)` reads; `FOLDER/text` and `FOLDER/chat` hold JSON lines about the same world in
    words only.

    **Example:** `unimodal shapes runs/world --n 20000 --seed 1`
    """
    from typing import cast

    from eval.shapes.scene import Level
    from eval.shapes.world import write_world

    write_world(folder, n, seed, cast(Level, level), captions, validation, chats, picture_size)
    typer.echo(f"{n} training pictures of level {level} in {folder}")


@app.command()
def emoji(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder; an older one of this kind is replaced.")
    ] = Path("data/emoji"),
    font: Annotated[
        Path | None, typer.Option(metavar="FILE", help="NotoColorEmoji.ttf. Default: Debian's.")
    ] = None,
    cldr: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder `common` of CLDR. Default: Debian's."),
    ] = None,
    validation: Annotated[
        int, typer.Option(min=1, help="Emoji held out, with all their variants.")
    ] = 120,
) -> None:
    """Write a data set of pictures that nobody here drew: a colour font's emoji, 64 × 64.

    Captions are names and keywords of Unicode and CLDR. Needs Debian's packages
    `fonts-noto-color-emoji` and, for keywords and sequences, `unicode-cldr-core`. docs/emoji.md
    shows the files.

    **Examples**

    `unimodal emoji`

    `unimodal demo --config emoji`
    """
    from training.emoji import write_emoji

    found = write_emoji(out, font=font, cldr=cldr, validation=validation)
    typer.echo(f"{found['train']} training and {found['validation']} validation pictures in {out}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="A merged and trained model: folder or hub id.")],
    base_llm: Annotated[str, typer.Option(help="The text LLM before the merge.")],
    world: Annotated[
        str,
        typer.Option(help="A world of `unimodal shapes`; or any captioned held-out pictures."),
    ],
    out: Annotated[Path, typer.Option(help="The report's JSON; samples.json comes beside it.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Drawings of each category.")] = 100,
    pictures: Annotated[
        int, typer.Option(min=1, help="Held-out pictures to reconstruct and caption.")
    ] = 200,
    texts: Annotated[int, typer.Option(min=1, help="Held-out texts for perplexity and KL.")] = 400,
    text: Annotated[
        list[str] | None,
        typer.Option(help="JSONL of held-out text (default: the world's); may come several times."),
    ] = None,
    train_pictures: Annotated[
        str | None,
        typer.Option(
            help="The captioned training pictures, where the held-out ones are no world: a small "
            "classifier learns from them which caption fits a drawing."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts and the drawings.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="Of the drawings; 1 is off. Default: the model's own.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the image codes; 0 is greedy. Default: the model's.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep the likeliest codes only. Default: the model's own.")
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1, help="Drawings, of which the model keeps the best. Default: the model's own."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Measure a model: reconstruction, drawing by category, captions, answers, text, spans.

    Every score comes with the number of things it was measured on and a 95 % interval. Drawings are
    judged from their pixels by an exact parser where they come from a world, else by which of 20
    captions fits them best. docs/report_schema.md describes the JSON; `unimodal report` makes a
    page of it. An evaluation that was killed goes on behind the drawings that it had finished.

    **Example:** `unimodal evaluate --model runs/demo/model --base-llm shipped:text_model
    --world runs/demo/world --out runs/demo/report.json`
    """
    from itertools import islice

    from eval.evaluate import Captioned, EvaluationSettings
    from eval.evaluate import evaluate as run
    from eval.report import percent
    from eval.shapes.world import MANIFEST
    from training.data.sources import Source, open_source

    settings = EvaluationSettings(
        n=n,
        pictures=pictures,
        texts=texts,
        seed=seed,
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        candidates=candidates,
    )

    def captioned(source: Source) -> Iterator[Captioned]:
        for row in source:
            if row.image is not None:
                yield Captioned(row.image, row.captions, row.questions)

    held_out: str | list[Captioned] = world
    if not (Path(world) / MANIFEST).exists():
        source = open_source(world, split="validation")
        held_out = list(islice(captioned(source), settings.pictures))
    train = None if train_pictures is None else captioned(open_source(train_pictures))
    report = run(
        model,
        base_llm,
        held_out,
        out,
        settings=settings,
        text_files=text,
        train_pictures=train,
        device=device,
    )
    for name, score in report.get("draw", {}).items():
        typer.echo(f"draw {name:<9} {100 * (score['score'] or 0):5.1f} %  n = {score['n']}")
    for judge, found in report.get("retrieval", {}).items():
        for shown in ("drawings", "pictures"):
            if shown in found:
                first = percent(found[shown]["first"])
                typer.echo(f"retrieval by {judge}, {shown}: the true caption first {first}")
    typer.echo(f"written: {out}")


@app.command("choose-sampling")
def choose_sampling_command(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A merged and trained model.")],
    level: Annotated[str, typer.Option(help="Of the embedded world: `board` or `free`.")] = "board",
    guidance: Annotated[
        list[float] | None, typer.Option(help="To try; may come several times. [1 1.5 2 3]")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="To try; may come several times. [0.3 0.5 0.7 1]")
    ] = None,
    top_k: Annotated[
        list[int] | None,
        typer.Option(min=0, help="To try; may come several times; 0 keeps all codes. [0]"),
    ] = None,
    candidates: Annotated[
        list[int] | None,
        typer.Option(min=1, help="To try; may come several times. Each costs its number. [1]"),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts of each category.")] = 24,
    seed: Annotated[int, typer.Option(help="Of prompts and drawings.")] = 0,
) -> None:
    """Find the sampling settings at which a model draws best; write them into it.

    For models of the embedded world of shapes: the prompts are of the kinds that `unimodal
    evaluate` scores there, but never the same, and a parser of that world judges the drawings.
    Every way to draw (`unimodal draw`, `chat`, `serve`) then starts from these settings. For a
    model of other pictures, write them into `draw_settings` of its `processor_config.json`.

    **Example:** `unimodal choose-sampling runs/demo/model --guidance 1 --guidance 2`
    """
    from typing import cast

    from eval.choose_sampling import SamplingGrid, choose_sampling, line
    from eval.shapes.scene import Level

    usual = SamplingGrid()
    grid = SamplingGrid(
        guidance=guidance or usual.guidance,
        temperature=temperature or usual.temperature,
        top_k=[k or None for k in top_k] if top_k else usual.top_k,
        candidates=candidates or usual.candidates,
    )
    for one in choose_sampling(model, cast(Level, level), grid=grid, n=n, seed=seed):
        typer.echo(line(one))


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="Holds the report.json of `unimodal evaluate`.")],
) -> None:
    """Make report.md and one self-contained report.html of a report.json.

    The losses of every training below the folder are drawn too.

    **Example:** `unimodal report runs/demo`
    """
    from eval.report import write_report

    for path in write_report(folder):
        typer.echo(path)


@app.command()
def sheet(
    folder: Annotated[Path, typer.Argument(help="Holds the samples.json of `unimodal evaluate`.")],
    out: Annotated[Path | None, typer.Option(help="The PNG. Default: FOLDER/sheet.png.")] = None,
) -> None:
    """Make one PNG of a report's samples: reconstructions, captions, drawings.

    **Example:** `unimodal sheet runs/emoji --out docs/emoji_sheet.png`
    """
    from eval.sheet import write_sheet

    typer.echo(write_sheet(folder, out or folder / "sheet.png"))


# --- serving --------------------------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A merged model: a folder, or a hub id of one.")
    ],
    vllm_help: Annotated[
        str | None,
        typer.Option(metavar="TOPIC", help="Show vLLM's own flags: `all`, a section or a flag."),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(
            min=0,
            help="Requests that may wait beyond --max-num-seqs; more are answered 429.",
            envvar="UNIMODAL_MAX_QUEUE",
            rich_help_panel="Limits",
        ),
    ] = 256,
    max_body_mib: Annotated[
        float,
        typer.Option(
            min=0,
            help="Largest request body, MiB; larger ones are answered 413.",
            envvar="UNIMODAL_MAX_BODY_MIB",
            rich_help_panel="Limits",
        ),
    ] = 64,
    request_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds until a request is ended; 0 for no limit.",
            envvar="UNIMODAL_REQUEST_TIMEOUT",
            rich_help_panel="Limits",
        ),
    ] = 600,
    reader_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that a client may leave an answer unread; 0 for no limit.",
            envvar="UNIMODAL_READER_TIMEOUT",
            rich_help_panel="Limits",
        ),
    ] = 60,
    max_images: Annotated[
        int,
        typer.Option(
            min=0,
            help="Images in one request, history included.",
            envvar="UNIMODAL_MAX_IMAGES",
            rich_help_panel="Limits",
        ),
    ] = 32,
    max_image_pixels: Annotated[
        int,
        typer.Option(
            min=0,
            help="Pixels of one image, before it is decoded; 0 takes the model's own limit.",
            envvar="UNIMODAL_MAX_IMAGE_PIXELS",
            rich_help_panel="Limits",
        ),
    ] = 0,
    max_prompt_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Ids of one prompt, images included; 0 leaves it to --max-model-len.",
            envvar="UNIMODAL_MAX_PROMPT_TOKENS",
            rich_help_panel="Limits",
        ),
    ] = 0,
    max_image_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Image ids that one request may have drawn; 0 for no limit.",
            envvar="UNIMODAL_MAX_IMAGE_TOKENS",
            rich_help_panel="Limits",
        ),
    ] = 16384,
    image_hosts: Annotated[
        str,
        typer.Option(
            metavar="HOSTS",
            help="Hosts that images may be fetched from, with commas: host, host:port, *.domain.",
            envvar="UNIMODAL_IMAGE_HOSTS",
            rich_help_panel="Limits",
        ),
    ] = "",
    image_fetch_mib: Annotated[
        float,
        typer.Option(
            min=0,
            help="Largest fetched image, MiB.",
            envvar="UNIMODAL_IMAGE_FETCH_MIB",
            rich_help_panel="Limits",
        ),
    ] = 20,
    image_fetch_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds for fetching one image, redirects included.",
            envvar="UNIMODAL_IMAGE_FETCH_TIMEOUT",
            rich_help_panel="Limits",
        ),
    ] = 10,
    allow_http_images: Annotated[
        bool,
        typer.Option(
            "--allow-http-images",
            help="Fetch images over plain http too.",
            envvar="UNIMODAL_ALLOW_HTTP_IMAGES",
            rich_help_panel="Limits",
        ),
    ] = False,
    request_log: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Where the JSON line per request goes: `-` standard error, `off`, or a file.",
            envvar="UNIMODAL_REQUEST_LOG",
            rich_help_panel="Limits",
        ),
    ] = "-",
) -> None:
    """Serve a merged model with vLLM: images in, images out, OpenAI's HTTP interface.

    Every flag of `vllm serve` may follow: `--port 8000 --api-key KEY --tensor-parallel-size 2`.

        unimodal serve my-model --port 8000

        unimodal serve my-model --vllm-help all

    On a CPU these are set unless you give them: `--enforce-eager`, `--max-model-len auto`,
    `--dtype float32` (for float32 checkpoints) and `VLLM_CPU_KVCACHE_SPACE=1` (GiB); everywhere
    `--shutdown-timeout 30`, the seconds that requests at work have after SIGTERM.

    Then, with any OpenAI client: `/v1/chat/completions` takes `image_url` parts with data URIs, and
    answers with an image where `modalities` holds `"image"`; `/v1/images/generations` draws. See
    docs/serving.md.
    """
    from unimodal.serving.limits import Limits
    from unimodal.serving.serve import serve as run
    from unimodal.serving.serve import show_flags

    if vllm_help is not None:
        show_flags(vllm_help)
        return
    limits = Limits(
        max_queue=max_queue,
        max_body_mib=max_body_mib,
        request_timeout=request_timeout,
        reader_timeout=reader_timeout,
        max_images=max_images,
        max_image_pixels=max_image_pixels,
        max_prompt_tokens=max_prompt_tokens,
        max_image_tokens=max_image_tokens,
        image_hosts=image_hosts,
        image_fetch_mib=image_fetch_mib,
        image_fetch_timeout=image_fetch_timeout,
        allow_http_images=allow_http_images,
        request_log=request_log,
    )
    run(folder, context.args, limits)


@app.command()
def ui(
    url: Annotated[str, typer.Option(help="The server, with `/v1`.")] = "http://127.0.0.1:8000/v1",
    host: Annotated[
        str, typer.Option(help="Where the page listens; other machines reach it only if changed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 7860,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="UNIMODAL_API_KEY", help="The server's key. The page never shows it."),
    ] = None,
) -> None:
    """Chat with a server in the browser: pictures in both directions, with previews.

    Needs `pip install 'unimodal[ui]'`; neither torch nor vLLM, so it can run on another machine
    than the server. See docs/chat_page.md.

    **Examples**

    `unimodal serve my-model --port 8000`, and in another terminal `unimodal ui`

    `UNIMODAL_API_KEY=... unimodal ui --url http://gpu-machine:8000/v1 --port 7861`
    """
    from unimodal.serving.ui import run_page

    run_page(url, host=host, port=port, api_key=api_key)


@app.command()
def serve_check(
    model: Annotated[str, typer.Option(metavar="DIR", help="A merged model.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the result as JSON; the drawing beside it as .png.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A drawing prompt; may be given several times.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture to caption; may be given several times.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance of the drawings; 1 is off.")] = 1.0,
) -> None:
    """Start a real vLLM server and count the replies whose token ids equal those of transformers.

    Everything is greedy. Without `--image`, the drawings of the prompts are what is captioned.
    """
    import json

    from unimodal.serving.check import check_identical
    from unimodal.shipped import resolve

    result = check_identical(
        resolve(model),
        prompt or ["a red circle", "a blue square"],
        image,
        guidance=guidance,
        drawing=out.with_suffix(".png") if out else None,
        out=out,
    )
    print(json.dumps(result, indent=2))


# --- demo and bench -------------------------------------------------------------------------------


@app.command()
def demo(
    config: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="The walk's recipe: a YAML file, or `demo`, `demo-from-scratch`, `emoji`, `free`, "
            "`gpu`, `shipped`, `shipped-free`.",
        ),
    ] = "demo",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write. Default: `runs/<config>`.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the world, the trainings, the drawings.")
    ] = 0,
    stop_after: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop when this stage is done.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only a miniature of every stage in a temporary folder, then the estimates.",
        ),
    ] = False,
) -> None:
    """The whole job on this machine: pictures with captions in, a model that sees and draws out.

    Writes a world of coloured shapes, takes the image tokenizer and the text model that come with
    us (`--config demo-from-scratch` trains both), makes the image codes words of the model, tunes
    it by LoRA to caption and to draw, measures it, draws, captions, serves it through vLLM, and
    writes a report. Each stage prints the command that does the same alone. Killed, and started
    again, it goes on where it stopped.

    **Examples**

    `unimodal demo`

    `unimodal demo --seed 1 --out runs/seed1`

    `unimodal demo --config gpu --dry-run`
    """
    from training.demo import load_demo_recipe, run_demo

    if dry_run:
        from training.demo import dry_run as try_out
        from training.estimate import wording

        estimates = try_out(load_demo_recipe(config), seed=seed, stop_after=stop_after)
        typer.echo("\nthe miniature went through; the whole walk:\n")
        for line in wording(estimates):
            typer.echo(line)
        return
    folder = run_demo(
        load_demo_recipe(config),
        out or Path("runs") / Path(config).stem,
        seed=seed,
        stop_after=stop_after,
    )
    if stop_after is None:
        typer.echo(f"\n{(folder / 'report.md').read_text(encoding='utf-8')}")
        typer.echo(f"pictures  {folder / 'drawings'}")
        typer.echo(f"report    {folder / 'report.html'}")


bench = typer.Typer(
    name="bench", help="Measure what things cost on this machine.", no_args_is_help=True
)
app.add_typer(bench)


@bench.command("guidance")
def bench_guidance(
    model: Annotated[str, typer.Option(help="A merged model: folder or hub id.")],
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Pictures at once; may be given several times. [1 16]")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Pairs of drawings that are timed.")] = 15,
    guidance: Annotated[float, typer.Option(help="The guidance that is timed.")] = 3.0,
    threads: Annotated[int | None, typer.Option(help="Processor threads; all by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Time guided against unguided drawing, in turn, in one run; print JSON.

    `ratio` is the median over the rounds of guided by unguided seconds, `target` what
    docs/performance.md promises. Run it on an idle machine.
    """
    import json

    import torch

    from tokenizer_hf.files import atomic_write
    from unimodal.generation.benchmark import measure_guidance
    from unimodal.pipeline import Unimodal

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = Unimodal.from_pretrained(model, device=device)
    result = measure_guidance(
        loaded.model,
        loaded.processor,
        batch_sizes=batch or (1, 16),
        rounds=rounds,
        guidance=guidance,
    )
    text = json.dumps(result, indent=2)
    if out is not None:
        with atomic_write(out) as path:
            path.write_text(text + "\n", encoding="utf-8")
    print(text)


@bench.command("masking")
def bench_masking(
    model: Annotated[str, typer.Option(help="A merged model: folder or hub id.")],
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Rows in a batch; may be given several times. [1 16 64]"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Steps that are timed.")] = 31,
    temperature: Annotated[float, typer.Option(help="Of the image rows; 0 is greedy.")] = 1.0,
    threads: Annotated[int | None, typer.Option(help="Processor threads; all by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Time vLLM's part of our grammar and guidance beside a decode step of the model; print JSON.

    `ratio` is the median over the rounds of the logits processor's time by a step's, for batches of
    images, guided pairs, texts, and all of them. Run it on an idle machine. Needs vLLM.
    """
    import json

    import torch

    from tokenizer_hf.files import atomic_write
    from unimodal.pipeline import Unimodal
    from unimodal.serving.serve import require_vllm

    require_vllm()
    from unimodal.serving.masking_benchmark import measure_masking
    from unimodal.shipped import resolve

    model = resolve(model)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = Unimodal.from_pretrained(model, device=device)
    result = measure_masking(
        model,
        loaded.model,
        loaded.processor.vocabulary,
        batch_sizes=batch or (1, 16, 64),
        rounds=rounds,
        temperature=temperature,
    )
    text = json.dumps(result, indent=2)
    if out is not None:
        with atomic_write(out) as path:
            path.write_text(text + "\n", encoding="utf-8")
    print(text)


@bench.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="A merged model. Default: a random one.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A folder for what is found.")] = Path(
        "runs/bench"
    ),
    random_model: Annotated[
        int,
        typer.Option(metavar="CODES", help="Without --model: codes a picture, 16, 64 or 256."),
    ] = 16,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A part: cells, guidance, arrivals, preview, text_cost, startup; may be given "
            "several times. [all]"
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of each cell, about.")] = 10,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(help="Requests at once; may be given several times. [1 4 16 64]"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of what is compared pairwise.")] = 5,
    max_batch: Annotated[int, typer.Option(help="Most rows of a batch, on both sides.")] = 128,
    threads: Annotated[
        int | None,
        typer.Option(help="Compute threads of vLLM and of transformers. [half of the cores]"),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Of the guided drawings.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of the requests and their arrivals.")] = 0,
) -> None:
    """Measure a server under load, and transformers' `generate` in the same run.

    Starts `unimodal serve` itself and asks it from another process: captions, drawings, guided
    drawings and all of them mixed, at each concurrency; mixed requests that arrive at random; text
    requests in turn with the same vLLM without our plugin; starts with and without it. Writes
    `serve.json`, `serve.md` and `serve.png`. Flags of `vllm serve` may follow. Run it on an idle
    machine; docs/serving_performance.md says how to read it.

    **Examples**

    `unimodal bench serve --model runs/demo/model`

    `unimodal bench serve --model runs/demo/model --only arrivals --seconds 30`
    """
    from unimodal.serving.bench import PARTS, BenchSettings
    from unimodal.serving.bench import bench_serve as run

    settings = BenchSettings(
        seconds=seconds,
        concurrency=tuple(concurrency or (1, 4, 16, 64)),
        threads=threads,
        rounds=rounds,
        max_batch=max_batch,
        guidance=guidance,
        seed=seed,
        vllm_args=tuple(context.args),
        parts=tuple(only or PARTS),
    )
    run(model, out, settings, random_codes=random_model, say=typer.echo)
    typer.echo((out / "serve.md").read_text(encoding="utf-8"))


@bench.command("soak")
def bench_soak(
    model: Annotated[str, typer.Option(help="A merged model: folder or hub id.")],
    requests: Annotated[int, typer.Option(min=1, help="Requests, at least.")] = 2000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    minutes: Annotated[float, typer.Option(min=0, help="Go on for that long.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here.")] = None,
    log: Annotated[Path | None, typer.Option(help="Write the server's output here.")] = None,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    serve: Annotated[
        list[str] | None,
        typer.Option(metavar="FLAG", help="A flag for `unimodal serve`; may be given again."),
    ] = None,
) -> None:
    """Serve a model and send it mixed traffic: captions, questions, drawings, guided drawings,
    streams, malformed and abandoned requests.

    Reports errors, malformed images, restarts of guided pairs, what still runs at the end, and the
    memory of all server processes over time. Ends with 1 if anything of it is wrong: an error, more
    than 5 % restarts, memory that grew by more than 5 %.

        unimodal bench soak --model my-model --serve=--max-num-seqs=64
    """
    from unimodal.serving.soak import require_flat, run_soak

    flags = tuple(serve or ())
    result = run_soak(
        model, requests, concurrency, minutes, seed=seed, vllm_args=flags, out=out, log=log
    )
    typer.echo(result["summary"])
    require_flat(result)


def main() -> None:
    """Run the command line. Errors are one line and an exit code; ``--debug`` shows the traceback.

    Exit codes: 0 done; 2 a mistake in the input, which the line explains; 1 anything else; 130
    interrupted.
    """
    import warnings

    from tokenizer_hf.errors import UnimodalError

    if "--debug" in sys.argv:  # before or behind the command, as it comes to mind
        sys.argv.remove("--debug")
        os.environ["UNIMODAL_DEBUG"] = "1"
    debug = bool(os.environ.get("UNIMODAL_DEBUG"))
    if not debug:
        warnings.formatwarning = lambda message, *_, **__: f"warning: {_one_line(message)}\n"
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):  # a mistake in the command line
            message, code = error.format_message(), error.exit_code  # type: ignore[attr-defined]
        elif isinstance(error, UnimodalError | OSError):
            message, code = str(error), 2
        else:
            message = f"{type(error).__name__}: {error} (a bug? --debug shows where)"
            code = 1
        if message.strip():
            print(f"error: {_one_line(message)}", file=sys.stderr)
    if code == 130:
        print("error: interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


if __name__ == "__main__":
    main()
