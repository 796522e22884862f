"""Every figure, on hand-made sessions whose figures are known."""

import pytest

from jaxtml.data.tasks.scenarios import reply_to
from jaxtml.evals import thresholds as bars
from jaxtml.evals.events import Heard, ObservedSession, ObservedUserTurn, Stretch, intent_of
from jaxtml.evals.outcomes import outcomes, uninterrupted, word_results
from jaxtml.stream.conversation import Word

WORD_S = 0.4


def turn(text: str, start_s: float, pause_s: float = 0.0, scene: str = "exchange") -> ObservedUserTurn:
    """Each word 0.4 s without a gap, but for `pause_s` behind the first."""
    words, at = [], start_s
    for k, word in enumerate(text.split()):
        words.append(Word(word, at, at + WORD_S))
        at += WORD_S + (pause_s if k == 0 else 0.0)
    pauses = ((words[0].end_s, words[1].start_s),) if pause_s else ()
    expected = reply_to(text.split())
    return ObservedUserTurn(start_s, words[-1].end_s, scene, intent_of(text.split()), expected, tuple(words), pauses)


def said(open_s: float, close_s: float, text: str, understood: str | None = None) -> Stretch:
    """Audible from 50 ms after it opens until it closes."""
    return Stretch(open_s, close_s, open_s + 0.05, close_s, text, understood)


def session(turns=(), heard="", stretches=(), heard_late_s: float = 0.2, **fields) -> ObservedSession:
    """`heard`: a word per true word, "-" for none, each there `heard_late_s` after its true end; "+word" is added."""
    true = [word for t in turns for word in t.words]
    written, at = [], 0
    for word in heard.split():
        if word.startswith("+"):
            written.append(Heard(word[1:], true[at - 1].end_s + heard_late_s))
            continue
        if word != "-":
            written.append(Heard(word, true[at].end_s + heard_late_s))
        at += 1
    fields = {"id": "x-0000", "set": "human", "voice": "human:a", "seconds": 30.0, "step_ms": 1.0, **fields}
    return ObservedSession(turns=tuple(turns), heard=tuple(written), stretches=tuple(stretches), **fields)


def rows(*sessions: ObservedSession) -> dict[str, bars.Row]:
    return {row.name: row for row in bars.rows_of(sessions, "human")}


def test_wilsons_interval_is_that_of_the_textbook():
    low, high = bars.wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert bars.wilson(0, 10)[0] == 0.0 and bars.wilson(10, 10)[1] == pytest.approx(1.0)


def test_heard_words_count_hits_and_added_words_apart():
    found = rows(session([turn("three nine one", 1.0), turn("alpha bravo", 6.0)], "three five one +two alpha -"))
    assert (found["heard_words"].count, found["heard_words"].of) == (3, 5)
    assert (found["inserted_words"].count, found["inserted_words"].of) == (1, 5)
    assert found["heard_words"].met is True  # exactly 60 %


def test_a_word_written_down_long_after_or_before_it_was_said_was_not_heard():
    late = session([turn("three nine one", 1.0)], "three nine one", heard_late_s=2.5)
    results, added = word_results(late)
    assert not any(word.true == word.heard for word in results)
    early = session([turn("three nine one", 5.0)], "three nine one", heard_late_s=-1.7)
    assert rows(early)["heard_words"].count == 0 and word_results(early)[1] + added > 0


@pytest.mark.parametrize(
    ("open_s", "taken"), [(2.2, True), (2.6, True), (3.8, True), (3.81, False), (2.0, False), (5.1, False)]
)
def test_taking_over_is_opening_within_the_window_and_before_the_user_goes_on(open_s, taken):
    turns = [turn("three nine one", 1.0), turn("hello", 5.0)]  # the first ends at 2.2 s
    first, _ = outcomes(session(turns, stretches=[said(open_s, open_s + 0.6, "x")]))
    assert (first.reply is not None) == taken


def test_no_take_over_is_left_when_the_user_speaks_on_first():
    turns = [turn("three nine one", 1.0), turn("hello", 2.9)]
    first, second = outcomes(session(turns, stretches=[said(3.0, 3.6, "x")]))
    assert first.reply is None and not second.cut_in


def test_latency_is_from_the_acoustic_end_to_the_first_audible_sample():
    a = session([turn("three nine one", 1.0)], stretches=[said(2.4, 3.0, "three nine one")])
    b = session([turn("three nine one", 1.0)], stretches=[Stretch(2.6, 3.0, None, None, "three nine one")])
    found = rows(a, b)
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
def test_a_gate_that_opens_in_a_pause_breaks_it_and_anywhere_before_the_end_cuts_in(open_s, broken, cut):
    talk = session([turn("three nine one", 1.0, 1.0)], stretches=[said(open_s, 4.0, "x")])
    assert talk.turns[0].pauses == ((pytest.approx(1.4), pytest.approx(2.4)),) and talk.turns[0].end_s == pytest.approx(
        3.2
    )
    (outcome,) = outcomes(talk)
    assert outcome.broken == (broken,)
    assert outcome.cut_in == cut


def test_an_answer_is_right_for_what_was_heard_or_for_what_was_said():
    right = session([turn("three plus four", 1.0)], "three plus four", [said(2.6, 3.2, "it is seven")])
    misheard = session([turn("three plus four", 1.0)], "three plus five", [said(2.6, 3.2, "it is eight")])
    wrong = session([turn("three plus four", 1.0)], "three plus four", [said(2.6, 3.2, "it is nine")])
    lucky = session([turn("three plus four", 1.0)], "three plus five", [said(2.6, 3.2, "it is seven")])
    none = session([turn("three plus four", 1.0)], "three plus four")
    found = rows(right, misheard, wrong, lucky, none)
    assert (found["right_to_heard"].count, found["right_to_heard"].of) == (2, 4)
    assert (found["right_to_said"].count, found["right_to_said"].of) == (2, 5)


def test_an_answer_to_a_jumble_of_words_is_counted_apart_from_one_to_a_sentence():
    jumble = session([turn("is zero more than four", 1.0)], "is a cow month animal", [said(3.4, 4.0, "i see")])
    sentence = session([turn("three nine one", 1.0)], "three nine one", [said(2.4, 3.0, "three nine")])
    found = rows(jumble, sentence)
    assert (found["right_to_heard"].count, found["right_to_heard"].of) == (1, 2)
    assert (found["right_to_heard_sentence"].count, found["right_to_heard_sentence"].of) == (0, 1)


def test_i_see_is_no_right_answer_to_nothing():
    found = rows(session([turn("today is monday", 1.0)], "", [said(2.6, 3.2, "i see")]))
    assert found["right_to_heard"].count == 0 and found["right_to_said"].count == 1


def test_what_is_heard_after_the_reply_began_did_not_lead_to_it():
    late = session([turn("three plus four", 1.0)], "three plus four", [said(2.4, 3.2, "it is seven")], heard_late_s=0.3)
    (outcome,) = outcomes(late)
    assert outcome.heard == ("three", "plus") and not outcome.right_to_heard


def test_a_reply_said_in_two_breaths_is_one_answer_and_more_than_the_answer_is_wrong():
    breaths = [said(2.6, 3.0, "it is"), said(3.2, 3.6, "seven")]
    (outcome,) = outcomes(session([turn("three plus four", 1.0)], "three plus four", breaths))
    assert outcome.right_to_said and outcome.right_to_heard
    twice = [said(2.6, 3.0, "it is seven"), said(4.2, 4.6, "it is seven")]
    (outcome,) = outcomes(session([turn("three plus four", 1.0)], "three plus four", twice))
    assert not outcome.right_to_said


def test_an_interrupted_reply_is_not_judged_but_its_stop_is_timed():
    turns = [turn("three nine one", 1.0), turn("hello", 3.0, scene="barge_in")]
    talk = session(turns, "three nine one hello", [said(2.4, 3.3, "three nine"), said(3.8, 4.2, "hello")])
    first, second = outcomes(talk)
    assert first.interrupted and second.stop_s == pytest.approx(0.3) and first.stop_s is None
    found = rows(talk)
    assert (found["right_to_said"].count, found["right_to_said"].of) == (1, 1)
    assert found["stops within 0.4 s"].value == 1.0
    assert uninterrupted(talk) == [1]


def test_silence_is_kept_only_where_nothing_at_all_is_said():
    quiet, loud = session(), session(stretches=[said(2.4, 3.0, "hello")])
    assert (rows(quiet, loud)["silence_kept"].count, rows(quiet, loud)["silence_kept"].of) == (1, 2)
    assert rows(quiet, loud)["unasked_per_minute"].value == pytest.approx(1.0)


def test_openings_that_answer_a_turn_or_cut_into_one_are_not_unasked():
    talk = session(
        [turn("three nine one", 1.0)],
        stretches=[said(1.6, 1.8, "a"), said(2.4, 3.0, "b"), said(9.0, 9.4, "c")],
        seconds=60.0,
    )
    assert rows(talk)["unasked_per_minute"].value == pytest.approx(1.0)


def test_the_listeners_errors_are_counted_where_it_listened():
    heard = said(2.6, 3.2, "it is seven", "It is 11.")
    found = rows(session([turn("three plus four", 1.0)], stretches=[heard, said(8.0, 9.0, "one two", None)]))
    assert (found["own_voice_word_errors"].count, found["own_voice_word_errors"].of) == (1, 3)


def test_a_turn_that_is_no_sentence_is_asked_for_its_words_alone():
    bare = turn("forty two", 1.0)
    bare = ObservedUserTurn(bare.start_s, bare.end_s, bare.scene, bare.intent, "", bare.words, ())
    found = rows(session([bare], "forty two"))
    assert found["heard_words"].value == 1.0
    assert found["takes_over"].of == found["right_to_said"].of == 0


def test_figures_that_nothing_was_counted_for_have_no_value_and_meet_no_bar():
    for row in rows(session()).values():
        if row.of == 0:
            assert row.value is None and row.met is None


def test_scores_are_broken_down_by_intent_and_by_voice():
    one = session([turn("three nine one", 1.0)], "three - one", [said(2.4, 3.0, "three one")], voice="flite:a")
    two = session([turn("three plus four", 1.0)], "three plus four", [said(2.4, 3.0, "it is seven")], voice="kokoro:b")
    figures = bars.score([one, two])["sets"]["human"]
    assert figures["intents"]["number"]["heard_words"] == [round(2 / 3, 4), 3]
    assert figures["voices"]["kokoro:b"]["right_to_said"] == [1.0, 1]
    assert figures["engines"]["flite"]["right_to_said"] == [0.0, 1]
    assert figures["words"] == {"nine": [1, 0, {"": 1}]}
