"""A cache has the rows that its dataset makes, survives a killed build, and is refused for another dataset."""

import dataclasses
import itertools

import numpy as np
import pytest
from tones import ToneBank

from jaxtml import config as configs
from jaxtml.data import cache, pipeline
from jaxtml.data.conversations import GeneratedConversations
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.talks.weights import ScenarioWeights
from jaxtml.data.tasks import scenarios
from jaxtml.errors import InputError
from jaxtml.stream.text import TextCodec

COUNT = 2 * cache.SHARD_ROWS


@pytest.fixture(scope="module")
def dataset() -> GeneratedConversations:
    config = configs.load("tiny", ["data.turns=15", "data.tokens=128"])
    return GeneratedConversations(config, TextCodec.train(scenarios.corpus(500), 512), Speakers.of(ToneBank.made()))


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    cache.build(dataset, folder, COUNT, workers=1)
    return folder


def bytes_of(row: dict) -> bytes:
    return b"".join(row[name].tobytes() for name in sorted(row))


def test_an_epoch_has_every_row_of_the_dataset_once_in_an_order_of_its_own(dataset, folder):
    cached = cache.CachedRows.open(dataset.config, folder, dataset)
    original = sorted(bytes_of(dataset.row(index)) for index in range(COUNT))
    first, second = ([bytes_of(cached.row(epoch * COUNT + n)) for n in range(COUNT)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == original
    assert first != second


def test_rows_of_a_cache_have_the_patches_of_its_dataset(dataset, folder):
    shows = configs.override(dataset.config, "duplex.max_patches=12")
    assert len(cache.CachedRows.open(shows, folder, dataset).row(0)["patches"]) == dataset.max_patches == 0
    assert len(cache.CachedRows.open(shows, folder).row(0)["patches"]) == 128, "as many as the config allows"


def test_batches_from_a_cache_start_at_any_step(dataset, folder):
    cached = cache.CachedRows.open(dataset.config, folder)
    from_the_start = list(itertools.islice(pipeline.batches(cached, 4), 4))
    from_step_3 = next(pipeline.batches(cached, 4, start=3))
    assert all(np.array_equal(from_the_start[3][name], array) for name, array in from_step_3.items())


def test_a_build_that_was_killed_continues_where_it_stopped(dataset, folder):
    lost = cache._shard_path(folder, 1, 2)
    kept = cache._shard_path(folder, 0, 2)
    before, untouched = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    with pytest.raises(InputError, match="lacks 1 of 2"):
        cache.CachedRows.open(dataset.config, folder)
    cache.build(dataset, folder, COUNT, workers=1)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == untouched


def test_a_cache_of_other_rows_is_refused(dataset, folder):
    other = dataclasses.replace(dataset, weights=ScenarioWeights(silence=0.5))
    with pytest.raises(InputError, match="another bank"):
        cache.CachedRows.open(dataset.config, folder, other)
    with pytest.raises(InputError, match="rows of another bank"):
        cache.build(other, folder, COUNT, workers=1)


def test_the_digest_of_a_cache_is_that_of_its_dataset_and_its_number_of_rows(dataset, folder):
    """A training run compares this text, so it stays as earlier versions wrote it."""
    assert cache.CachedRows.open(dataset.config, folder).digest == f"{dataset.digest} cache of {COUNT}"


def test_a_folder_without_a_cache_is_refused(dataset, tmp_path):
    with pytest.raises(InputError, match="holds no cache"):
        cache.CachedRows.open(dataset.config, tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"digest": "", "rows": "many"}'])
def test_a_damaged_cache_json_is_named(tmp_path, text):
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(InputError, match=r"cache.json is damaged: remove the folder and build"):
        cache.check_count(tmp_path, 64)
