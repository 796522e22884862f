"""What a dataset is, and how a config names one.

The trainer, the row cache and `jaxtml data` know datasets by the protocols below and by nothing else. `data.dataset` in
the config is the name of one; `open_dataset` turns the name into the object.

How to add a dataset:

1. Write a module beside this one with a class that has `row` and `digest`. Nothing has to be inherited.
   `jaxtml.data.conversations` is an example. To make a row from a two-channel recording, fill a
   `jaxtml.stream.conversation.Conversation`, encode it with `jaxtml.stream.encoding.encode`, to which you pass the
   fields of `DataConfig` that it takes, and bring it to the fixed shapes with `jaxtml.data.rows.pad`.
2. Add its name to `_KINDS` below, with three functions: one makes what the dataset needs on disk (`jaxtml data` calls
   it), one says what is missing there (for `jaxtml data --no-build`), and one opens the dataset. For a dataset that
   needs nothing on disk, the first does nothing and the second returns None. If rows depend on the tokenizer, `digest`
   must depend on it too: hash the token ids of a few texts.
3. Build and train with the same override: `jaxtml data CONFIG --out DIR --set data.dataset=NAME` and
   `jaxtml train CONFIG --workdir RUN --data DIR --set data.dataset=NAME`. The folder of `--data` also has to hold a
   `tokenizer.json`: `jaxtml.data.tokenizer` says which one it gets.
4. Test that rows have the shapes of `row_shapes`, that a pickled copy gives the same rows, and that the digest changes
   with whatever changes a row. `tests/data/test_dataset.py` has these tests for the generated conversations.

A class that also has `conversation` and `encoded` (`ConversationDataset`) can do more. `jaxtml data` shows and caches
its rows. During training the trainer opens its split "test" and lets the model answer some of those conversations.

A patch takes 38 kB of every row, so rows should not have room for more patches than needed. If your class knows how
many patches its fullest row has, give it a property `max_patches` (`CountsPatches`), and pass this number to `pad`.
Otherwise pass `data.max_patches` of the config to `encode`: with this field the user limits the patches of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtml.config import Config
from jaxtml.data import conversations
from jaxtml.data.rows import Row
from jaxtml.errors import InputError
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.layout import EncodedConversation
from jaxtml.stream.text import TextCodec


class Dataset(Protocol):
    """Rows of training data, addressed by their index.

    `row(index)` is a pure function: the same index gives the same bytes in every process, at any time and in any order.
    The trainer relies on nothing else, and gains three things from it:

    - Any number of hosts. Row `r` of step `s` has the index `s * batch + r`, and each host makes the rows of its own
      devices.
    - Any number of worker processes. The dataset is pickled and sent to each of them. Leave open files out of the
      pickled state (`__getstate__`), as `jaxtml.data.cache.CachedRows` does.
    - A run resumes from one integer, the number of steps that are done.

    Indices count from 0 without end. A finite dataset repeats itself: `CachedRows` does so in a new order each epoch.
    """

    @property
    def digest(self) -> str:
        """A text that identifies the rows: two datasets that differ in any row have different digests.

        It is the same in every process and after every restart. A training run stores it and refuses to resume on other
        data. A row cache (`jaxtml.data.cache`) stores it, and a run with another dataset refuses the cache. Make it
        from everything that decides a row: the content of files, the config, the tokenizer.
        """
        ...

    def row(self, index: int, /) -> Row:
        """Returns the arrays of row `index`, without a batch axis, in the shapes of `jaxtml.data.rows.row_shapes`."""
        ...


@runtime_checkable
class ConversationDataset(Dataset, Protocol):
    """A dataset whose rows are encoded conversations. Its rows can be shown and cached."""

    def conversation(self, index: int, /) -> Conversation:
        """Returns the conversation behind row `index`."""
        ...

    def encoded(self, index: int, /) -> EncodedConversation:
        """Returns the conversation of row `index`, encoded but not padded."""
        ...


@runtime_checkable
class CountsPatches(Protocol):
    """A dataset that knows how many patches its fullest row has. Its rows take no memory for more."""

    @property
    def max_patches(self) -> int:
        """Patches of the fullest row, at most `jaxtml.data.rows.max_patches`. Every row is padded to this number."""
        ...


class _Kind(NamedTuple):
    """The functions behind the name of a dataset (see `build_dataset`, `missing_data` and `open_dataset`)."""

    build: Callable[[Config, Path, int], None]
    missing: Callable[[Config, Path], str | None]
    open: Callable[[Config, TextCodec, Path, str], Dataset]


_KINDS = {
    "conversations": _Kind(conversations.build, conversations.missing, conversations.GeneratedConversations.open),
}


def build_dataset(config: Config, folder: Path, workers: int) -> None:
    """Makes what the dataset of `config` needs on disk, with `workers` processes. Finishes a build that was stopped.

    Raises:
      InputError: `config` names no dataset that exists, or the build cannot run.
    """
    _kind(config).build(config, folder, workers)


def missing_data(config: Config, folder: Path) -> str | None:
    """Returns in words what `build_dataset` would still make in `folder`; None if everything is there.

    Raises:
      InputError: `config` names no dataset that exists, nothing of it is in `folder`, or files there are damaged.
    """
    return _kind(config).missing(config, folder)


def open_dataset(config: Config, codec: TextCodec, folder: Path, split: str = "train") -> Dataset:
    """Opens the dataset that `config.data.dataset` names.

    Args:
      config: the resolved config.
      codec: turns text into token ids.
      folder: what `jaxtml data` wrote (its `--out`).
      split: "train", or "test" for what training never reads.

    Raises:
      InputError: `config` names no dataset that exists, or `folder` does not hold what the dataset needs.
    """
    return _kind(config).open(config, codec, folder, split)


def _kind(config: Config) -> _Kind:
    name = config.data.dataset
    if name not in _KINDS:
        raise InputError(f"data.dataset {name!r}: there is no such dataset; give {' or '.join(sorted(_KINDS))}")
    return _KINDS[name]
