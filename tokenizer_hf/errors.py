"""The project's exceptions.

Each one is also the standard exception that a caller would expect, so ``except ValueError`` goes
on working; ``except UnimodalError`` catches everything that we raise on purpose::

    UnimodalError
    ├── ConfigurationError   (ValueError)         a setting, recipe or flag that cannot be right
    ├── ImageError           (ValueError)         a picture that cannot be read or is refused
    ├── CodeError            (ValueError)         codes outside the codebook or of the wrong length
    ├── VocabularyError      (ValueError)         token ids or tokenizers that do not fit
    ├── MessageError         (ValueError)         chat messages that cannot be rendered or parsed
    ├── MismatchError        (ValueError)         two artefacts that do not belong together
    ├── DataError            (ValueError)         a data set or a row that cannot be used
    ├── CheckpointError      (OSError)            a folder that is missing, foreign or half-written
    └── ServingError         (RuntimeError)       the server cannot do what was asked

Every message says what came, what was expected and what to do. The command line prints the message
alone, and the traceback with ``--debug``.
"""


class UnimodalError(Exception):
    """Base of everything that this project raises on purpose."""


class ConfigurationError(UnimodalError, ValueError):
    """A setting, recipe or flag that cannot be right."""


class ImageError(UnimodalError, ValueError):
    """A picture that cannot be read, or that is refused (size, pixel limit)."""


class CodeError(UnimodalError, ValueError):
    """Image codes outside the codebook, or of a length that the tokenizer cannot decode."""


class VocabularyError(UnimodalError, ValueError):
    """Token ids outside their range, or a text tokenizer that cannot be extended."""


class MessageError(UnimodalError, ValueError):
    """Chat messages that cannot be rendered, or token ids that cannot be parsed."""


class MismatchError(UnimodalError, ValueError):
    """Two artefacts that do not belong together, for example a code cache and a tokenizer."""


class DataError(UnimodalError, ValueError):
    """A data set, or a row of one, that cannot be used."""


class CheckpointError(UnimodalError, OSError):
    """A folder that is missing, is not what it should be, or was only half written."""


class ServingError(UnimodalError, RuntimeError):
    """The server cannot do what was asked of it."""
