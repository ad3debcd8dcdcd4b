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

# --- serving --------------------------------------------------------------------------------------

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
