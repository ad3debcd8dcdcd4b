"""The small trained models that come inside the package, for the embedded world of shapes.

::

    shipped/image_tokenizer   pictures of 64 x 64 pixels <-> 16 codes
    shipped/text_model        a text LLM that knows the world in words and has never seen a code
    shipped/model             the finished unified model: sees, draws, answers
    shipped/free_text_model   that text LLM, once it knows pictures of level `free` in words
    shipped/free_model        the finished model of that level, 64 codes a picture

How each was made, and what it scores: docs/shipped_models.md.
"""

from pathlib import Path

from tokenizer_hf.errors import CheckpointError, ConfigurationError

FOLDER = Path(__file__).parent / "shipped"
NAMES = ("image_tokenizer", "text_model", "model", "free_text_model", "free_model")
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


def require_not_shipped(name: str | Path, remedy: str) -> None:
    """Refuse to write into a model that comes with this package.

    Args:
        name: what would be written into.
        remedy: what to do instead; the end of the message.

    Raises:
        ConfigurationError: it is one of :data:`NAMES`, by name or by folder.
    """
    inside = Path(name).resolve().is_relative_to(FOLDER.resolve())
    if str(name).startswith(PREFIX) or inside:
        raise ConfigurationError(f"{name} comes with this package and stays as it is; {remedy}")
