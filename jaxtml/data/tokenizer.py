"""The tokenizer of a data folder: the one that is there, one that the user names, the shipped one, or a new one.

A tokenizer decides what every id of a checkpoint means. So a folder keeps its tokenizer unless the user asks for
another one, and a new folder gets the tokenizer of the shipped `tiny`. New texts of the task need no new tokenizer:
its tokens include every byte. Called by `jaxtml data`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from absl import logging

from jaxtml.checkpoint.files import SHIPPED, TOKENIZER
from jaxtml.config import Config
from jaxtml.data.tasks import scenarios
from jaxtml.errors import InputError
from jaxtml.stream.text import TextCodec

_SIZE = 640
"""Entries of a new tokenizer, at most."""

_BYTES = 256

_REMEDY = "name another file with --tokenizer, or train a tokenizer with --new-tokenizer"


def choose_tokenizer(config: Config, folder: Path, given: Path | None = None, train: bool = False) -> TextCodec:
    """Returns the tokenizer of a data folder, and writes it to `folder` where it is new there.

    A tokenizer that is replaced stays in the folder under another name.

    Args:
      config: has to have room for the tokenizer's ids below its control tokens.
      folder: the data folder; it exists.
      given: a `tokenizer.json`, or a directory with one, that the folder gets.
      train: whether the folder gets a tokenizer that is trained on the texts of the task.

    Raises:
      InputError: there is no such file, or the tokenizer does not fit the config or the texts of the task.
    """
    path = folder / TOKENIZER
    if given is not None:
        source = given / TOKENIZER if given.is_dir() else given
        if not source.is_file():
            raise InputError(f"--tokenizer {given}: there is no {source}; name a {TOKENIZER}, or a directory with one")
        _check(config, TextCodec.load(source), source)
        _put(source.read_bytes(), path)
    elif train:
        _put(_trained(config), path)
    elif not path.exists():
        shipped = SHIPPED / TOKENIZER
        fits = TextCodec.load(shipped).size <= config.duplex.control_base
        _put(shipped.read_bytes() if fits else _trained(config), path)
    codec = TextCodec.load(path)
    _check(config, codec, path)
    size = config.backbone.unpadded_vocab_size
    if given is None and size is not None and codec.size < size:
        logging.warning(
            "%s has %d ids, the vocabulary of %s has %d: the weights of a release need the release's own tokenizer, "
            "give its directory with --tokenizer", path, codec.size, config.name, size,
        )  # fmt: skip
    return codec


def _trained(config: Config) -> bytes:
    """Returns the file of a tokenizer that is trained on the texts of the task."""
    room = config.duplex.control_base
    if room < _BYTES:
        raise InputError(f"duplex.control_base {room}: a tokenizer has {_BYTES} ids for bytes; give at least {_BYTES}")
    return TextCodec.train(scenarios.corpus(), min(room, _SIZE)).to_json()


def _put(content: bytes, path: Path) -> None:
    """Writes the tokenizer file. A file with other content is kept under another name, and a line says so."""
    if path.exists():
        former = path.read_bytes()
        if former == content:
            return
        kept = path.with_name(f"tokenizer-{hashlib.sha256(former).hexdigest()[:8]}.json")
        path.replace(kept)
        logging.warning(
            "%s is another tokenizer now, the former one is kept as %s: cached rows and checkpoints that were made "
            "with the former do not fit this folder any more", path, kept.name,
        )  # fmt: skip
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def _check(config: Config, codec: TextCodec, path: Path) -> None:
    """Raises `InputError` where the tokenizer's ids meet the control tokens, or it cannot write the task's words."""
    room = config.duplex.control_base
    if codec.size > room:
        raise InputError(
            f"{path} has ids up to {codec.size - 1}, {config.name} has its control tokens from {room} on "
            f"(duplex.control_base): {_REMEDY}"
        )
    words = {word for text in (*scenarios.VOCABULARY, *scenarios.assistant_texts()) for word in text.split()}
    for word in sorted(words):
        ids = codec.encode(word)
        if codec.decode(ids) != f" {word}" or not codec.decode(ids[:1]).startswith(" "):
            raise InputError(
                f"{path} cannot write {word!r}, a word of the task: it gives {codec.decode(ids)!r}, and a word has to "
                f"come back with a space before it; {_REMEDY}"
            )
