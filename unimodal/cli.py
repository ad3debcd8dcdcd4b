"""The command line: ``unimodal COMMAND``. The roof of the house, the only file that sees all four packages.

Every command imports what it needs inside itself, so that ``unimodal --help`` answers at once.
A mistake of the user ends in one line on standard error and exit code 2 (``--debug`` shows the
traceback), Ctrl-C in exit code 130.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="unimodal",
    help="Any discrete image tokenizer + any Hugging Face text LLM = one model that sees and draws.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback()
def _options(debug: Debug = False) -> None:
    if debug:
        os.environ["UNIMODAL_DEBUG"] = "1"


# --- image tokenizer ------------------------------------------------------------------------------

# --- vocabulary and merge -------------------------------------------------------------------------

# --- caption, draw, chat --------------------------------------------------------------------------

# --- data and training ----------------------------------------------------------------------------

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

    write_world(folder, n, seed, cast(Level, level), captions, validation)
    typer.echo(f"{n} training pictures of level {level} in {folder}")


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
) -> None:
    """Serve a merged model with vLLM: images in, images out, OpenAI's HTTP interface.

    Every flag of `vllm serve` may follow: `--port 8000 --api-key KEY --tensor-parallel-size 2`.

        unimodal serve my-model --port 8000

        unimodal serve my-model --vllm-help all

    On a CPU these are set unless you give them: `--enforce-eager`, `--max-model-len auto`,
    `--dtype float32` (for float32 checkpoints) and `VLLM_CPU_KVCACHE_SPACE=1` (GiB).

    Then, with any OpenAI client: `/v1/chat/completions` takes `image_url` parts with data URIs, and
    answers with an image where `modalities` holds `"image"`; `/v1/images/generations` draws. See
    docs/serving.md.
    """
    from unimodal.serving.serve import serve as run
    from unimodal.serving.serve import show_flags

    if vllm_help is not None:
        show_flags(vllm_help)
    else:
        run(folder, context.args)


@app.command()
def serve_check(
    model: Annotated[Path, typer.Option(help="A merged model.")],
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

    result = check_identical(
        model,
        prompt or ["a red circle", "a blue square"],
        image,
        guidance=guidance,
        drawing=out.with_suffix(".png") if out else None,
        out=out,
    )
    print(json.dumps(result, indent=2))


# --- demo and bench -------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; print errors as one line unless ``--debug`` is given."""
    from tokenizer_hf.errors import UnimodalError

    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (UnimodalError, OSError) as error:
        if os.environ.get("UNIMODAL_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
