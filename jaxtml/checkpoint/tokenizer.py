"""The tokenizer of a checkpoint: `tokenizer.json`, and what to do where a checkpoint lacks this file.

A release may have its tokenizer in other files. They do not say everything that `tokenizer.json` says, for example how
a text is split before its parts are encoded. So they are not read, and the message says how to make `tokenizer.json`.
Called by `session.engine`, `serve`, `train`, `convert` and `jaxtml info`.
"""

from __future__ import annotations

from pathlib import Path

from jaxtml.checkpoint.files import RELEASE_FILES, TOKENIZER, check_not_pointer
from jaxtml.errors import InputError, join_names
from jaxtml.stream.text import TextCodec

# The files of other kinds of tokenizers: of SentencePiece, tiktoken, byte-level BPE, WordPiece, Mistral.
_OTHER_KINDS = ("*.model", "*.tiktoken", "tiktoken*", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")


def load_tokenizer(directory: str | Path) -> TextCodec:
    """Reads the tokenizer of a checkpoint, or of a training run.

    Raises:
      InputError: the directory has no `tokenizer.json`, or the file is no tokenizer.
    """
    directory = Path(directory)
    missing = missing_tokenizer(directory)
    if missing is not None:
        raise InputError(missing)
    check_not_pointer(directory / TOKENIZER)
    return TextCodec.load(directory / TOKENIZER)


def missing_tokenizer(directory: Path) -> str | None:
    """Returns a line for a checkpoint that has no `tokenizer.json`: what cannot be done, and the remedy. Else None."""
    if (directory / TOKENIZER).is_file():
        return None
    begin = f"{directory} has no {TOKENIZER}, which converse, serve and training need"
    for folder in (directory, directory / RELEASE_FILES):
        found = sorted({file.name for pattern in _OTHER_KINDS for file in folder.glob(pattern) if file.is_file()})
        if found:
            return (
                f"{begin}, only {join_names(found)}: write it with transformers, "
                f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{directory}")'
            )
    return f"{begin}: copy the {TOKENIZER} that the model was trained with into this directory"
