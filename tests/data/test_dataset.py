"""A config names its dataset. Any class with rows by index and a digest can be trained on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tones
from tones import ToneBank

from jaxtml import config as configs
from jaxtml.config import Config
from jaxtml.data import bank, pipeline
from jaxtml.data.cache import CachedRows
from jaxtml.data.conversations import GeneratedConversations
from jaxtml.data.dataset import ConversationDataset, Dataset, open_dataset
from jaxtml.data.rows import Row, pad, row_shapes
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.tasks import scenarios
from jaxtml.errors import InputError
from jaxtml.stream.text import TextCodec


@pytest.fixture(scope="module")
def config() -> Config:
    return configs.load("tiny", ["data.turns=15", "data.tokens=128"])


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.train(scenarios.corpus(500), 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a bank, as `jaxtml data` writes one, spoken in tones."""
    folder = tmp_path_factory.mktemp("data")
    users = [
        bank.PlannedUtterance("user", split, voice, text)
        for split, voice in (("train", "tone:low"), ("test", "tone:unseen"))
        for text in tones.USER_TEXTS
    ]
    replies = [bank.PlannedUtterance("assistant", "train", "tone:own", text) for text in scenarios.assistant_texts()]
    bank.build(folder / "bank", [users, replies], 1, tones.speak)
    return folder


@dataclass(frozen=True)
class CountingRows:
    """The smallest dataset: every array of row `i` is filled with `i`."""

    config: Config
    digest: str = "counting"

    def row(self, index: int) -> Row:
        return {name: np.full(shape, index % 7, dtype) for name, (shape, dtype) in row_shapes(self.config).items()}


def test_a_config_opens_the_dataset_that_it_names(config, codec, folder):
    dataset = open_dataset(config, codec, folder)
    assert isinstance(dataset, GeneratedConversations)
    assert {name: (array.shape, array.dtype) for name, array in dataset.row(0).items()} == {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in row_shapes(config).items()
    }


def test_the_test_split_has_voices_that_the_training_split_does_not_have(config, codec, folder):
    splits = [open_dataset(config, codec, folder, split) for split in ("train", "test")]
    voices = [set(dataset.speakers.by_voice) for dataset in splits if isinstance(dataset, GeneratedConversations)]
    assert voices == [{"tone:low"}, {"tone:unseen"}]


def test_rows_of_generated_conversations_take_no_memory_for_pictures(config, codec, folder):
    """Such memory would be large: the pictures of a row of `tml_interaction_small` once took 157 MB of zeros."""
    shows = configs.override(config, "duplex.max_patches=12")
    dataset = open_dataset(shows, codec, folder)
    assert dataset.row(0)["patches"].nbytes == 0
    assert row_shapes(shows)["patches"][0][0] == 128, "as many as positions"
    bounded = configs.override(shows, "data.max_patches=5")
    assert row_shapes(bounded)["patches"][0][0] == 5
    assert open_dataset(bounded, codec, folder).digest == dataset.digest


def test_a_conversation_with_too_many_patches_is_no_row(config, codec, folder):
    dataset = open_dataset(configs.override(config, "duplex.max_patches=12"), codec, folder)
    assert isinstance(dataset, GeneratedConversations)
    seen = dataclasses.replace(dataset.encoded(0), patches=np.ones((3, 2, 40, 40, 3), np.float32))
    assert pad(seen, dataset.config, 4)["patches"][:, 0, 0, 0, 0].tolist() == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="3 patches: a row has room for 2"):
        pad(seen, dataset.config, 2)


def test_an_unknown_dataset_is_refused_with_the_names_that_exist(config, codec, folder):
    other = configs.override(config, "data.dataset=recordings")
    with pytest.raises(InputError, match="no such dataset; give conversations") as caught:
        open_dataset(other, codec, folder)
    assert "\n" not in str(caught.value)


def test_only_a_dataset_with_conversations_can_be_shown_or_cached(config, codec, folder):
    assert isinstance(open_dataset(config, codec, folder), ConversationDataset)
    assert not isinstance(CountingRows(config), ConversationDataset)
    assert not isinstance(CachedRows(config, folder, 64, ""), ConversationDataset)


def test_a_class_with_rows_and_a_digest_makes_batches_without_inheriting_anything(config):
    dataset: Dataset = CountingRows(config)
    steps = list(itertools.islice(pipeline.batches(dataset, 4, start=1), 2))
    assert [step["kind"][:, 0].tolist() for step in steps] == [[4, 5, 6, 0], [1, 2, 3, 4]]


def test_a_pickled_dataset_makes_the_same_rows(config, codec, folder):
    dataset = open_dataset(config, codec, folder)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.digest == dataset.digest
    assert all(np.array_equal(copy.row(3)[name], array) for name, array in dataset.row(3).items())


def test_the_digest_of_the_tone_bank_is_pinned(config, codec):
    """Caches and training runs hold this digest. A change of rows changes it, by `_FORMAT` at the latest."""
    dataset = GeneratedConversations(config, codec, Speakers.of(ToneBank.made()))
    assert dataset.digest == "3f8cae750d5dfddd545ebc6c722ffd09725f51c55adb2c085ad3744123e04dbf"


@pytest.mark.parametrize(
    "change", ["data.seed=2", "data.tokens=129", "data.misheard=0.1", "duplex.max_heard=3", "data.longest_silence=9"]
)
def test_the_digest_changes_with_whatever_changes_a_row(config, codec, folder, change):
    other = configs.override(config, change)
    assert open_dataset(other, codec, folder).digest != open_dataset(config, codec, folder).digest


def test_the_digest_changes_with_the_texts_of_the_task(config, codec, folder, monkeypatch):
    """Nobody has to remember to change a number when a text is added, or gets another reply."""
    original = open_dataset(config, codec, folder).digest
    digests = set()
    for text, reply in (("hi", "good morning"), ("good day", "hello"), ("hi", "hello")):
        monkeypatch.setitem(scenarios.GREETINGS, text, reply)
        scenarios.fingerprint.cache_clear()
        digests.add(open_dataset(config, codec, folder).digest)
    monkeypatch.undo()
    scenarios.fingerprint.cache_clear()
    assert len(digests) == 3 and original not in digests
    assert open_dataset(config, codec, folder).digest == original


def test_a_bank_that_lacks_replies_is_used_with_a_warning(config, codec, folder, monkeypatch, caplog):
    monkeypatch.setitem(scenarios.GREETINGS, "good day", "good day")
    with caplog.at_level("WARNING"):
        open_dataset(config, codec, folder)
    assert "1 replies, the first is 'good day'" in caplog.text


def test_a_config_file_that_names_no_dataset_has_the_generated_conversations(config):
    """A checkpoint of an earlier version has a config.json without the field."""
    tree = json.loads(configs.to_json(config))
    del tree["data"]["dataset"]
    assert configs.from_json(json.dumps(tree)) == config
    assert dataclasses.asdict(config)["data"]["dataset"] == "conversations"
