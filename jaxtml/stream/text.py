"""Turns text into token ids and back, with the `tokenizers` file that lies beside every checkpoint.

`jaxtml data` gives its folder a tokenizer; the data, the training and the server read it. Another tokenizer changes the
meaning of every id that a checkpoint knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxtml.errors import InputError


class TextCodec:
    """Encodes text to ids and decodes ids to text.

    Attributes:
      size: the largest id, plus one. Control tokens lie at or above it. A tokenizer may leave ids below it unused.
    """

    def __init__(self, tokenizer: Tokenizer):
        # Files of other projects may cut or pad texts, or split words at random. Here ids follow from the text alone.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.model.dropout = None
        self._tokenizer = tokenizer
        self.size = max(tokenizer.get_vocab().values(), default=-1) + 1
        # The tokenizers of many released models put no space before the first word of a text. Words are encoded one by
        # one and joined later, so each needs its space.
        self._space = "" if self.decode(self._encode("a")).startswith(" ") else " "

    @classmethod
    def load(cls, path: str | Path) -> TextCodec:
        """Reads a tokenizer file.

        Raises:
          InputError: there is no such file, or it is no tokenizer.
        """
        if not Path(path).is_file():
            raise InputError(
                f"no tokenizer at {path}: a checkpoint has tokenizer.json beside config.json, and `jaxtml data` writes "
                "it beside the bank"
            )
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # The library raises a bare Exception on malformed files.
            raise InputError(f"{path} is not a tokenizer file: {error}; copy it again from where it came") from error

    @classmethod
    def train(cls, corpus: Iterable[str], size: int) -> TextCodec:
        """Trains a byte-level BPE tokenizer with at most `size` entries.

        Every byte is a token, so any text can be encoded.
        """
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer file."""
        self._tokenizer.save(str(path))

    def to_json(self) -> bytes:
        """Returns the content of the tokenizer file."""
        return self._tokenizer.to_str(pretty=True).encode()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text. Each word's first token begins with a space."""
        return self._encode(text if not text or text[0].isspace() else self._space + text)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids. Ids outside the vocabulary are left out."""
        return self._tokenizer.decode([i for i in ids if 0 <= i < self.size], skip_special_tokens=False)
