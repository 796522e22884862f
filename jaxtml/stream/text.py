"""Text to token ids and back: a thin face over a `tokenizers` file that travels with the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxtml.errors import InputError


class TextCodec:
    """Encodes words to ids and decodes ids to text. Ids stay below `size`; control tokens lie above it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()

    @classmethod
    def load(cls, path: str | Path) -> TextCodec:
        """Raises `InputError` where there is no readable tokenizer."""
        if not Path(path).is_file():
            raise InputError(f"no tokenizer at {path}: a checkpoint has tokenizer.json beside config.json")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception on malformed files
            raise InputError(f"{path} is not a tokenizer file: {error}") from error

    @classmethod
    def train(cls, corpus: Iterable[str], size: int) -> TextCodec:
        """Byte-level BPE (every byte is a token, so any text can be written) with `size` entries at most."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        self._tokenizer.save(str(path))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids outside the vocabulary are left out."""
        return self._tokenizer.decode([i for i in ids if 0 <= i < self.size], skip_special_tokens=False)
