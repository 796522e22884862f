"""Every metric, on hand-made sessions with known answers."""

import pytest

from jaxtml.data.tasks.scenarios import reply_to
from jaxtml.evals import metrics
from jaxtml.evals.observation import intent_of
from jaxtml.evals.outcomes import turn_outcomes, uninterrupted_stretches, word_outcomes
from jaxtml.evals.record import HeardWord, ObservedSession, ObservedUserTurn, Stretch
from jaxtml.evals.scores import score
from jaxtml.stream.conversation import Word

WORD_S = 0.4


def turn(text: str, start_s: float, pause_s: float = 0.0, scene: str = "exchange") -> ObservedUserTurn:
    """A user turn whose words take 0.4 s each, without gaps except `pause_s` after the first."""
    words, at = [], start_s
    for k, word in enumerate(text.split()):
        words.append(Word(word, at, at + WORD_S))
        at += WORD_S + (pause_s if k == 0 else 0.0)
    pauses = ((words[0].end_s, words[1].start_s),) if pause_s else ()
    expected = reply_to(text.split())
    return ObservedUserTurn(start_s, words[-1].end_s, scene, intent_of(text.split()), expected, tuple(words), pauses)


def speech(open_s: float, close_s: float, text: str, understood: str | None = None) -> Stretch:
    """A stretch of speech that is audible from 50 ms after the gate opens until it closes."""
    return Stretch(open_s, close_s, open_s + 0.05, close_s, text, understood)


def session(turns=(), heard="", stretches=(), heard_late_s: float = 0.2, **fields) -> ObservedSession:
    """A session. `heard` is the model's transcript: for each word that the user says, the word heard, or "-" for none.
    "+word" is a word that the user did not say. The model writes each word `heard_late_s` after the end of the user's
    word."""
    true = [word for t in turns for word in t.words]
    written, at = [], 0
    for word in heard.split():
        if word.startswith("+"):
            written.append(HeardWord(word[1:], true[at - 1].end_s + heard_late_s))
            continue
        if word != "-":
            written.append(HeardWord(word, true[at].end_s + heard_late_s))
        at += 1
    fields = {"id": "x-0000", "set": "human", "voice": "human:a", "seconds": 30.0, "step_ms": 1.0, **fields}
    return ObservedSession(turns=tuple(turns), heard=tuple(written), stretches=tuple(stretches), **fields)


def metrics_by_name(*sessions: ObservedSession) -> dict[str, metrics.Metric]:
    return {metric.name: metric for metric in metrics.metrics_of_set(sessions, "human")}


def test_wilsons_interval_is_that_of_the_textbook():
    low, high = metrics.wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert metrics.wilson(0, 10)[0] == 0.0 and metrics.wilson(10, 10)[1] == pytest.approx(1.0)


def test_hits_and_inserted_words_are_counted_apart():
    found = metrics_by_name(
        session([turn("three nine one", 1.0), turn("alpha bravo", 6.0)], "three five one +two alpha -")
    )
    assert (found["heard_words"].count, found["heard_words"].of) == (3, 5)
    assert (found["inserted_words"].count, found["inserted_words"].of) == (1, 5)
    assert found["heard_words"].met is True  # exactly 60 %


def test_a_word_written_down_long_after_or_before_it_was_said_was_not_heard():
    late = session([turn("three nine one", 1.0)], "three nine one", heard_late_s=2.5)
    words, inserted = word_outcomes(late)
    assert not any(word.true == word.heard for word in words)
    early = session([turn("three nine one", 5.0)], "three nine one", heard_late_s=-1.7)
    assert metrics_by_name(early)["heard_words"].count == 0 and word_outcomes(early)[1] + inserted > 0


@pytest.mark.parametrize(
    ("open_s", "taken"), [(2.2, True), (2.6, True), (3.8, True), (3.81, False), (2.0, False), (5.1, False)]
)
def test_a_take_over_is_an_opening_within_the_window_and_before_the_next_user_turn(open_s, taken):
    turns = [turn("three nine one", 1.0), turn("hello", 5.0)]  # the first ends at 2.2 s
    first, _ = turn_outcomes(session(turns, stretches=[speech(open_s, open_s + 0.6, "x")]))
    assert (first.reply is not None) == taken


def test_an_opening_after_the_next_user_turn_began_takes_over_nothing():
    turns = [turn("three nine one", 1.0), turn("hello", 2.9)]
    first, second = turn_outcomes(session(turns, stretches=[speech(3.0, 3.6, "x")]))
    assert first.reply is None and not second.cut_in


def test_latency_is_from_the_acoustic_end_to_the_first_audible_sample():
    a = session([turn("three nine one", 1.0)], stretches=[speech(2.4, 3.0, "three nine one")])
    b = session([turn("three nine one", 1.0)], stretches=[Stretch(2.6, 3.0, None, None, "three nine one")])
    found = metrics_by_name(a, b)
    assert found["gate_latency_s"].value == pytest.approx(0.25)
    assert (found["gate_latency_s"].of, found["gate_latency_s"].met) == (1, True)
    assert found["gate_opens_s"].value == pytest.approx(0.3)
    assert found["takes_over"].count == 2


@pytest.mark.parametrize(
    ("open_s", "broken", "cut"),
    [
        (1.1, False, False),  # 0.1 s after the start: decided before the voice was heard
        (1.3, False, True),
        (1.4, True, True),
        (2.2, True, True),
        (2.5, True, True),  # less than a micro-turn after the pause
        (2.7, False, True),
        (3.4, False, False),
    ],
)
def test_an_opening_in_a_pause_breaks_the_pause_and_any_opening_before_the_end_cuts_in(open_s, broken, cut):
    talk = session([turn("three nine one", 1.0, 1.0)], stretches=[speech(open_s, 4.0, "x")])
    assert talk.turns[0].pauses == ((pytest.approx(1.4), pytest.approx(2.4)),) and talk.turns[0].end_s == pytest.approx(
        3.2
    )
    (outcome,) = turn_outcomes(talk)
    assert outcome.broken == (broken,)
    assert outcome.cut_in == cut


def test_an_answer_is_right_for_what_was_heard_or_for_what_was_said():
    right = session([turn("three plus four", 1.0)], "three plus four", [speech(2.6, 3.2, "it is seven")])
    misheard = session([turn("three plus four", 1.0)], "three plus five", [speech(2.6, 3.2, "it is eight")])
    wrong = session([turn("three plus four", 1.0)], "three plus four", [speech(2.6, 3.2, "it is nine")])
    lucky = session([turn("three plus four", 1.0)], "three plus five", [speech(2.6, 3.2, "it is seven")])
    none = session([turn("three plus four", 1.0)], "three plus four")
    found = metrics_by_name(right, misheard, wrong, lucky, none)
    assert (found["right_to_heard"].count, found["right_to_heard"].of) == (2, 4)
    assert (found["right_to_said"].count, found["right_to_said"].of) == (2, 5)


def test_an_answer_to_a_jumble_of_words_is_counted_apart_from_one_to_a_sentence():
    jumble = session([turn("is zero more than four", 1.0)], "is a cow month animal", [speech(3.4, 4.0, "i see")])
    sentence = session([turn("three nine one", 1.0)], "three nine one", [speech(2.4, 3.0, "three nine")])
    found = metrics_by_name(jumble, sentence)
    assert (found["right_to_heard"].count, found["right_to_heard"].of) == (1, 2)
    assert (found["right_to_heard_sentence"].count, found["right_to_heard_sentence"].of) == (0, 1)


def test_i_see_is_no_right_answer_to_nothing():
    found = metrics_by_name(session([turn("today is monday", 1.0)], "", [speech(2.6, 3.2, "i see")]))
    assert found["right_to_heard"].count == 0 and found["right_to_said"].count == 1


def test_words_heard_after_the_reply_began_do_not_count_for_the_reply():
    late = session(
        [turn("three plus four", 1.0)], "three plus four", [speech(2.4, 3.2, "it is seven")], heard_late_s=0.3
    )
    (outcome,) = turn_outcomes(late)
    assert outcome.heard == ("three", "plus") and not outcome.right_to_heard


def test_a_reply_in_two_stretches_is_one_answer_and_more_than_the_answer_is_wrong():
    two = [speech(2.6, 3.0, "it is"), speech(3.2, 3.6, "seven")]
    (outcome,) = turn_outcomes(session([turn("three plus four", 1.0)], "three plus four", two))
    assert outcome.right_to_said and outcome.right_to_heard
    twice = [speech(2.6, 3.0, "it is seven"), speech(4.2, 4.6, "it is seven")]
    (outcome,) = turn_outcomes(session([turn("three plus four", 1.0)], "three plus four", twice))
    assert not outcome.right_to_said


def test_an_interrupted_reply_is_not_judged_but_its_stop_is_timed():
    turns = [turn("three nine one", 1.0), turn("hello", 3.0, scene="barge_in")]
    talk = session(turns, "three nine one hello", [speech(2.4, 3.3, "three nine"), speech(3.8, 4.2, "hello")])
    first, second = turn_outcomes(talk)
    assert first.interrupted and second.stop_s == pytest.approx(0.3) and first.stop_s is None
    found = metrics_by_name(talk)
    assert (found["right_to_said"].count, found["right_to_said"].of) == (1, 1)
    assert found["stops within 0.4 s"].value == 1.0
    assert uninterrupted_stretches(talk) == [1]


def test_silence_is_kept_only_where_the_gate_never_opens():
    quiet, loud = session(), session(stretches=[speech(2.4, 3.0, "hello")])
    assert (metrics_by_name(quiet, loud)["silence_kept"].count, metrics_by_name(quiet, loud)["silence_kept"].of) == (
        1,
        2,
    )
    assert metrics_by_name(quiet, loud)["unasked_per_minute"].value == pytest.approx(1.0)


def test_openings_that_answer_a_turn_or_cut_into_one_are_not_unasked():
    talk = session(
        [turn("three nine one", 1.0)],
        stretches=[speech(1.6, 1.8, "a"), speech(2.4, 3.0, "b"), speech(9.0, 9.4, "c")],
        seconds=60.0,
    )
    assert metrics_by_name(talk)["unasked_per_minute"].value == pytest.approx(1.0)


def test_word_errors_are_counted_where_the_judge_was_asked():
    heard = speech(2.6, 3.2, "it is seven", "It is 11.")
    found = metrics_by_name(
        session([turn("three plus four", 1.0)], stretches=[heard, speech(8.0, 9.0, "one two", None)])
    )
    assert (found["own_voice_word_errors"].count, found["own_voice_word_errors"].of) == (1, 3)


def test_a_turn_that_is_no_sentence_counts_for_heard_words_alone():
    bare = turn("forty two", 1.0)
    bare = ObservedUserTurn(bare.start_s, bare.end_s, bare.scene, bare.intent, "", bare.words, ())
    found = metrics_by_name(session([bare], "forty two"))
    assert found["heard_words"].value == 1.0
    assert found["takes_over"].of == found["right_to_said"].of == 0


def test_metrics_without_anything_counted_have_no_value_and_meet_no_threshold():
    for metric in metrics_by_name(session()).values():
        if metric.of == 0:
            assert metric.value is None and metric.met is None


def test_scores_are_broken_down_by_intent_and_by_voice():
    one = session([turn("three nine one", 1.0)], "three - one", [speech(2.4, 3.0, "three one")], voice="flite:a")
    two = session(
        [turn("three plus four", 1.0)], "three plus four", [speech(2.4, 3.0, "it is seven")], voice="kokoro:b"
    )
    figures = score([one, two])["sets"]["human"]
    assert figures["intents"]["number"]["heard_words"] == [round(2 / 3, 4), 3]
    assert figures["voices"]["kokoro:b"]["right_to_said"] == [1.0, 1]
    assert figures["engines"]["flite"]["right_to_said"] == [0.0, 1]
    assert figures["words"] == {"nine": [1, 0, {"": 1}]}
