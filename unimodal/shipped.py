"""The small trained models that come inside the package, for the embedded world of shapes.

::

    shipped/image_tokenizer   pictures of 64 x 64 pixels <-> 16 codes
    shipped/text_model        a text LLM that knows the world in words and has never seen a code
    shipped/model             the finished unified model: sees, draws, answers

How each was made, and what it scores: docs/shipped_models.md.
"""

from pathlib import Path

from tokenizer_hf.errors import CheckpointError

FOLDER = Path(__file__).parent / "shipped"
NAMES = ("image_tokenizer", "text_model", "model")
PREFIX = "shipped:"


def resolve(name: str) -> str:
    """Turn "shipped:model" into the folder of that name; leave any other name as it is.

    Raises:
        CheckpointError: there is no shipped model of that name.
    """
    if not name.startswith(PREFIX):
        return name
    short = name.removeprefix(PREFIX)
    if short not in NAMES or not (FOLDER / short).is_dir():
        known = ", ".join(PREFIX + one for one in NAMES)
        raise CheckpointError(f"{name!r} does not come with this package; expected one of {known}")
    return str(FOLDER / short)
