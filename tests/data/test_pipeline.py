"""A batch is a function of the dataset and the step: workers, hosts and restarts change nothing."""

import dataclasses
import itertools

import numpy as np
import pytest
from tones import ToneBank

from jaxtml import config as configs
from jaxtml.data import pipeline
from jaxtml.data.conversations import GeneratedConversations
from jaxtml.data.pipeline import Batch, HostRows
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.tasks import scenarios
from jaxtml.stream.text import TextCodec
from jaxtml.stream.tokens import PositionKind, Term

BATCH = 4


@pytest.fixture(scope="module")
def dataset() -> GeneratedConversations:
    config = configs.load("tiny", ["data.turns=50", "data.tokens=384"])
    return GeneratedConversations(config, TextCodec.train(scenarios.corpus(500), 512), Speakers.of(ToneBank.made()))


def first_batches(dataset: GeneratedConversations, count: int, **options) -> list[Batch]:
    steps = pipeline.batches(dataset, BATCH, **options)
    batches = list(itertools.islice(steps, count))
    steps.close()
    return batches


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
        for a, b in zip(left, right, strict=True)
    )


def test_shapes_are_fixed_and_padding_predicts_nothing(dataset):
    for step in first_batches(dataset, 2):
        assert step["kind"].shape == step["ids"].shape == step["target"].shape == step["term"].shape == (BATCH, 384)
        assert step["bins"].shape == (BATCH, 384, 80)
        assert step["speech"].shape == (BATCH, step["speech_at"].shape[1], 400)
        assert step["patches"].shape[:2] == (BATCH, 0)
        padding = step["kind"] == PositionKind.PAD
        assert padding.any() and (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding is at the end"
        assert (step["term"][padding] == Term.NONE).all()
        assert step["speech_valid"].any(axis=1).sum() >= BATCH - 1


def test_own_speech_targets_belong_to_own_speech_positions(dataset):
    step = first_batches(dataset, 1)[0]
    for row in range(BATCH):
        at = step["speech_at"][row][step["speech_valid"][row]]
        assert (step["kind"][row, at] == PositionKind.OWN).all()
        assert len(at) == (step["kind"][row] == PositionKind.OWN).sum()


def test_starting_at_a_step_equals_skipping_to_it(dataset):
    assert same(first_batches(dataset, 2, start=3), first_batches(dataset, 5)[3:])


def test_any_number_of_workers_gives_the_same_bytes(dataset):
    in_this_process = first_batches(dataset, 4, start=1)
    assert same(in_this_process, first_batches(dataset, 4, start=1, workers=2))


def test_the_rows_of_all_hosts_together_are_the_global_batch(dataset):
    global_batches = first_batches(dataset, 2)
    positions_of_hosts = ((0,), tuple(range(1, BATCH)))
    hosts = [first_batches(dataset, 2, host_rows=HostRows(positions)) for positions in positions_of_hosts]
    together = [
        {name: np.concatenate([host[step][name] for host in hosts]) for name in global_batches[step]}
        for step in range(2)
    ]
    assert same(global_batches, together)


def test_the_rows_of_a_host_need_not_be_neighbours(dataset):
    global_batches = [next(pipeline.batches(dataset, 5, start=step)) for step in range(2)]
    host_batches = pipeline.batches(dataset, 5, host_rows=HostRows((0, 3)))
    for step in range(2):
        expected = {name: array[[0, 3]] for name, array in global_batches[step].items()}
        assert same([next(host_batches)], [expected])


def test_another_seed_gives_other_batches(dataset):
    data = dataclasses.replace(dataset.config.data, seed=dataset.config.data.seed + 1)
    other = dataclasses.replace(dataset, config=dataclasses.replace(dataset.config, data=data))
    assert not same(first_batches(dataset, 1), first_batches(other, 1))
