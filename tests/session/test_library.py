"""The library as a Python program uses it: sessions step by step and whole, and refusals that say what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

import jaxtml
from jaxtml.session.converse import replies
from jaxtml.session.library import NOON_MS, Model
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES

SAMPLES = 10 * MICRO_TURN_SAMPLES + 123
LONG_TEXT = "forty two is the number"


@pytest.fixture(scope="module")
def model(engine) -> Model:
    return Model(engine)


@pytest.fixture(scope="module")
def recording() -> np.ndarray:
    return (0.1 * np.random.default_rng(4).standard_normal(SAMPLES)).astype(np.float32)


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((2, 2, 40, 40, 3)).astype(np.float32)


def test_a_session_step_by_step_is_to_the_bit_what_converse_gives(model, recording, patches):
    reply = model.converse(recording, seed=3, typed=[(1, "the"), (1, LONG_TEXT), (3, "a sky")], patches=[None, patches])
    session = model.session(seed=3)
    padded = np.pad(recording, (0, -len(recording) % MICRO_TURN_SAMPLES))
    assert {turn.gate for turn in reply.turns} == {"speak", "listen"}, (
        "the test needs a session in which the model speaks and listens"
    )
    for i, turn in enumerate(reply.turns):
        assert session.t_ms == turn.t_ms
        chunk = padded[i * MICRO_TURN_SAMPLES : (i + 1) * MICRO_TURN_SAMPLES]
        typed = {1: ["the", LONG_TEXT], 3: "a sky"}.get(i, ())
        stepped = session.step(chunk, typed=typed, patches=patches if i == 1 else None)
        assert {**stepped.event(), "step_ms": 0} == {**turn.event(), "step_ms": 0}
        np.testing.assert_array_equal(stepped.wave, turn.wave)
        assert stepped.wave.shape == (3200,) and stepped.wave.dtype == np.float32
    assert reply.wave.shape == recording.shape


def test_converse_gives_to_the_bit_what_the_evaluations_get(engine, recording):
    model, typed = Model(engine), [(1, LONG_TEXT)]
    ours = model.converse(recording, seed=3, typed=typed, week_ms=0)
    (theirs,) = replies(engine, [recording], seed=3, typed=[typed])
    np.testing.assert_array_equal(ours.wave, theirs.wave)
    assert [t.p_speak for t in ours.turns] == [t.p_speak for t in theirs.turns]
    assert [t.p_speak for t in ours.turns] != [t.p_speak for t in model.converse(recording, seed=3, week_ms=0).turns]


def test_sessions_of_one_model_do_not_share_anything_and_compile_once(model, recording, compilations):
    chunk = recording[:MICRO_TURN_SAMPLES]
    alone = model.session(seed=1)
    expected = [alone.step(chunk).p_speak for _ in range(4)]
    before = len(compilations)
    one, other = model.session(seed=1), model.session(seed=1)
    both = [(one.step(chunk).p_speak, other.step(chunk * 0.1).p_speak) for _ in range(4)]
    assert [ours for ours, _ in both] == expected != [theirs for _, theirs in both]
    assert len(compilations) == before


def test_background_text_is_told_apart_from_typed_text_and_follows_it(model):
    silence = np.zeros(MICRO_TURN_SAMPLES, np.float32)

    def p_speak(**text: str) -> list[float]:
        session = model.session()
        return [session.step(silence, **(text if i == 0 else {})).p_speak for i in range(3)]

    quiet, typed, background = p_speak(), p_speak(typed="the"), p_speak(background="the")
    assert len({tuple(p) for p in (quiet, typed, background)}) == 3
    both = p_speak(typed="the", background="the")
    assert both[0] == typed[0] and both[1] != typed[1]


def test_a_conversation_is_encoded_and_read_back(model, talk):
    conversation = talk(3)
    sequence = model.encode(conversation)
    decoded = model.decode(sequence)
    assert len(decoded.user_log_mel) == 4 * (len(conversation.user) // MICRO_TURN_SAMPLES)
    assert {word.text for word in decoded.heard} <= {word.text for word in conversation.user_words}
    with pytest.raises(jaxtml.InputError, match="cannot be encoded: waveforms of"):
        model.encode(jaxtml.Conversation(user=conversation.user, assistant=conversation.assistant[1:]))


GOOD = np.zeros(MICRO_TURN_SAMPLES, np.float32)
BAD_SAMPLES: dict[str, tuple[object, str]] = {
    "a list": ([0.0] * 3200, "is a list: give a NumPy array"),
    "two channels": (np.zeros((3200, 2), np.float32), r"has shape \[3200, 2\]: give one channel"),
    "float64": (np.zeros(3200), r"dtype float64: give float32 .* \w+.astype\(numpy.float32\)$"),
    "int16": (np.zeros(3200, np.int16), r"dtype int16: .* \w+.astype\(numpy.float32\) / 32768"),
    "NaN": (np.where(np.arange(3200) == 7, np.nan, GOOD).astype(np.float32), "NaN or infinite samples: replace them"),
    "integers in floats": (GOOD + 12000, "reaches 12000 where full scale is 1: divide it"),
    "too few": (GOOD[:-1], "has 3199 samples"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_samples_that_cannot_be_used_are_refused_and_change_nothing(model, case):
    samples, message = BAD_SAMPLES[case]
    session, untouched = model.session(), model.session()
    with pytest.raises(jaxtml.InputError, match=f"chunk .*{message}|chunk {message}"):
        session.step(samples, typed="the")  # pyright: ignore[reportArgumentType]
    with pytest.raises(jaxtml.InputError, match=f"wave .*{message}|wave {message}"):
        model.converse(samples)  # pyright: ignore[reportArgumentType]
    assert session.step(GOOD).p_speak == untouched.step(GOOD).p_speak


BAD_CALLS: dict[str, tuple[Callable[[Model], object], str]] = {
    "a longer chunk": (lambda m: m.session().step(np.zeros(6400, np.float32)), "6400 samples: give 3200"),
    "seed": (lambda m: m.session(seed=-1), "seed -1: give an integer from 0 to 4294967295"),
    "seed of a fraction": (lambda m: m.session(seed=1.5), "seed 1.5: give an integer"),  # pyright: ignore[reportArgumentType]
    "clock": (lambda m: m.session(week_ms=604_800_000), "week_ms 604800000: give milliseconds since Monday"),
    "late text": (lambda m: m.converse(GOOD, typed=[(1, "the")]), "micro-turn 1: the recording has micro-turns 0 to 0"),
    "late video": (lambda m: m.converse(GOOD, patches=[None, None]), "2 entries, wave has 1 micro-turns"),
    "uint8 video": (
        lambda m: m.session().step(GOOD, patches=np.zeros((1, 2, 40, 40, 3), np.uint8)),
        r"uint8 \[1, 2, 40, 40, 3\]: give float32",
    ),
    "a whole picture": (
        lambda m: m.session().step(GOOD, patches=np.zeros((2, 80, 80, 3), np.float32)),
        r"float32 \[2, 80, 80, 3\]: give float32 \[P, 2, 40, 40, 3\]",
    ),
    "too many patches": (
        lambda m: m.session().step(GOOD, patches=np.zeros((3, 2, 40, 40, 3), np.float32)),
        "3 patches, the model 'small_test' takes 2",
    ),
    "NaN in video": (
        lambda m: m.session().step(GOOD, patches=np.full((1, 2, 40, 40, 3), np.nan, np.float32)),
        "patches has NaN",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_that_cannot_work_are_refused_with_a_remedy(model, case):
    call, message = BAD_CALLS[case]
    with pytest.raises(jaxtml.InputError, match=message):
        call(model)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(jaxtml.InputError, match="no checkpoint directory"):
        jaxtml.load(tmp_path / "missing")


def test_the_default_clock_is_monday_noon():
    assert NOON_MS == 12 * 3600 * 1000


def test_importing_the_package_imports_no_jax_and_using_a_name_does():
    code = (
        "import sys, jaxtml; assert not {'jax', 'numpy'} & set(sys.modules), sys.modules.keys();"
        "assert set(jaxtml.__all__) <= set(dir(jaxtml)); jaxtml.MicroTurn; assert 'jax' not in sys.modules;"
        "jaxtml.Model; from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_others_are_not():
    for name in jaxtml.__all__:
        assert getattr(jaxtml, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxtml.nothing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
