"""A cache of rows gives what the mixer would have given, survives a kill, and refuses what it was not made from."""

import dataclasses
import itertools

import numpy as np
import pytest
from tones import ToneBank

from jaxtml import config as configs
from jaxtml.data import cache, pipeline
from jaxtml.data.pipeline import Rows
from jaxtml.data.talks.mix import Speakers, Weights
from jaxtml.data.tasks import scenarios
from jaxtml.errors import InputError
from jaxtml.stream.text import TextCodec

COUNT = 2 * cache.SHARD_ROWS


@pytest.fixture(scope="module")
def rows() -> Rows:
    config = configs.load("tiny", ["data.turns=15", "data.tokens=128"])
    return Rows(config, TextCodec.train(scenarios.corpus(500), 512), Speakers.of(ToneBank.made()))


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    cache.build(rows, folder, COUNT, workers=1)
    return folder


def bytes_of(row: dict) -> bytes:
    return b"".join(row[name].tobytes() for name in sorted(row))


def test_an_epoch_is_every_mixed_row_once_in_an_order_of_its_own(rows, folder):
    cached = cache.CachedRows.open(rows.config, folder, rows)
    mixed = sorted(bytes_of(rows(index)) for index in range(COUNT))
    first, second = ([bytes_of(cached(epoch * COUNT + n)) for n in range(COUNT)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == mixed
    assert first != second


def test_batches_from_a_cache_start_at_any_step(rows, folder):
    cached = cache.CachedRows.open(rows.config, folder)
    whole = list(itertools.islice(pipeline.batches(cached, 4), 4))
    later = next(pipeline.batches(cached, 4, start=3))
    assert all(np.array_equal(whole[3][name], later[name]) for name in later)


def test_a_build_that_was_killed_goes_on_where_it_stopped(rows, folder):
    lost = cache._shard_path(folder, 1, 2)
    kept = cache._shard_path(folder, 0, 2)
    before, untouched = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    with pytest.raises(InputError, match="lacks 1 of 2"):
        cache.CachedRows.open(rows.config, folder)
    cache.build(rows, folder, COUNT, workers=1)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == untouched


def test_a_cache_of_other_rows_is_refused(rows, folder):
    other = dataclasses.replace(rows, weights=Weights(silence=0.5))
    with pytest.raises(InputError, match="another bank"):
        cache.CachedRows.open(rows.config, folder, other)
    with pytest.raises(InputError, match="other rows"):
        cache.build(other, folder, COUNT, workers=1)


def test_the_digest_of_rows_is_that_of_caches_made_before(rows):
    """Caches and training runs of earlier versions hold this digest: another one would refuse them all."""
    assert cache.digest(rows) == "aeee12d0036a897b1ce192063af41afd30ff81add62cd5c0ace0b861f1a6111b"


def test_a_folder_without_a_cache_is_refused(rows, tmp_path):
    with pytest.raises(InputError, match="holds no cache"):
        cache.CachedRows.open(rows.config, tmp_path)
