"""A batch is a function of seed and step: workers, hosts and restarts change nothing."""

import dataclasses
import itertools

import numpy as np
import pytest
from tones import ToneBank

from jaxtml import config as configs
from jaxtml.data import pipeline
from jaxtml.data.pipeline import Rows, Share
from jaxtml.data.talks.mix import Speakers
from jaxtml.data.tasks import scenarios
from jaxtml.stream.layout import decode, encode
from jaxtml.stream.text import TextCodec
from jaxtml.stream.tokens import PositionKind, Term

BATCH = 4


@pytest.fixture(scope="module")
def rows() -> Rows:
    config = configs.load("tiny", ["data.turns=50", "data.tokens=384"])
    return Rows(config, TextCodec.train(scenarios.corpus(500), 512), Speakers.of(ToneBank.made()))


def taken(rows: Rows, count: int, **options) -> list[dict]:
    steps = pipeline.batches(rows, BATCH, **options)
    got = list(itertools.islice(steps, count))
    steps.close()
    return got


def same(left: list[dict], right: list[dict]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
        for a, b in zip(left, right, strict=True)
    )


def test_shapes_are_fixed_and_padding_says_nothing(rows):
    for step in taken(rows, 2):
        assert step["kind"].shape == step["ids"].shape == step["target"].shape == step["term"].shape == (BATCH, 384)
        assert step["bins"].shape == (BATCH, 384, 80)
        assert step["speech"].shape == (BATCH, step["speech_at"].shape[1], 400)
        assert step["patches"].shape[:2] == (BATCH, 0)
        padding = step["kind"] == PositionKind.PAD
        assert padding.any() and (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding is at the end"
        assert (step["term"][padding] == Term.NONE).all()
        assert step["speech_valid"].any(axis=1).sum() >= BATCH - 1


def test_own_speech_targets_belong_to_own_speech_positions(rows):
    step = taken(rows, 1)[0]
    for row in range(BATCH):
        at = step["speech_at"][row][step["speech_valid"][row]]
        assert (step["kind"][row, at] == PositionKind.OWN).all()
        assert len(at) == (step["kind"][row] == PositionKind.OWN).sum()


def test_a_row_tells_its_conversation(rows):
    talk = next(talk for talk in map(rows.conversation, range(20)) if len(talk.speech) > 1)
    decoded = decode(encode(talk, rows.codec, rows.config.duplex), rows.codec, rows.config.duplex)
    heard = " ".join(word.text for word in decoded.heard)
    assert " ".join(word.text for word in talk.user_words).startswith(heard)
    assert [s.start_turn for s in decoded.speech] == [s.start_turn for s in talk.speech]


def test_starting_at_a_step_equals_skipping_to_it(rows):
    assert same(taken(rows, 2, start=3), taken(rows, 5)[3:])


def test_any_number_of_workers_gives_the_same_bytes(rows):
    alone = taken(rows, 4, start=1)
    assert same(alone, taken(rows, 4, start=1, workers=2))


def test_hosts_share_the_batch_without_changing_it(rows):
    whole = taken(rows, 2)
    shares = ((0,), tuple(range(1, len(whole[0]["kind"]))))
    parts = [taken(rows, 2, share=Share(own)) for own in shares]
    joined = [{name: np.concatenate([p[step][name] for p in parts]) for name in whole[step]} for step in range(2)]
    assert same(whole, joined)


def test_the_rows_of_a_host_need_not_lie_together(rows):
    batch = [next(pipeline.batches(rows, 5, start=step)) for step in range(2)]
    feed = pipeline.batches(rows, 5, share=Share((0, 3)))
    for step in range(2):
        assert same([next(feed)], [{name: values[[0, 3]] for name, values in batch[step].items()}])


def test_another_seed_gives_other_rows(rows):
    data = dataclasses.replace(rows.config.data, seed=rows.config.data.seed + 1)
    other = dataclasses.replace(rows, config=dataclasses.replace(rows.config, data=data))
    assert not same(taken(rows, 1), taken(other, 1))


def test_a_misheard_row_differs_in_heard_words_of_the_past_alone_and_trains_no_text(rows):
    base = rows.config.duplex.control_base
    strict, loose = (
        dataclasses.replace(rows, config=configs.override(rows.config, f"data.misheard={share}"))
        for share in (0.0, 1.0)
    )
    changed = heard = 0
    for index in range(12):
        true, wrong = strict.sequence(index), loose.sequence(index)
        for name in ("kind", "bins", "turn", "target", "speech_at", "speech"):
            np.testing.assert_array_equal(getattr(true, name), getattr(wrong, name))
        differs = np.flatnonzero(true.ids != wrong.ids)
        assert (true.term[differs - 1] == Term.HEARD).all() and (true.ids[differs] < base).all()
        changed += len(differs)
        heard += ((true.term == Term.HEARD) & (true.target < base)).sum()
        if len(differs):
            assert not (wrong.term == Term.TEXT).any()
            kept = true.term != Term.TEXT
            np.testing.assert_array_equal(true.term[kept], wrong.term[kept])
    assert 0.1 < changed / heard < 0.4
