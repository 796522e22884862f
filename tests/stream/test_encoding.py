"""An encoded conversation: what stands where, which position predicts which, and what can be read back."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np
import pytest

from jaxtml.stream.clock import clock_features, week_ms
from jaxtml.stream.conversation import Conversation, Speech, Word
from jaxtml.stream.decoding import decode
from jaxtml.stream.dmel import SILENT_BINS, DmelStream, fine_log_mel, log_mel, quantise, to_16_bits
from jaxtml.stream.encoding import encode
from jaxtml.stream.images import image_patches
from jaxtml.stream.layout import EncodedConversation
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control, PositionKind, Term

SEEDS = range(25)
DELAY_MS, LEAD_MS = 120, 200


@pytest.fixture(scope="module")
def limits(small):
    return small.duplex


@pytest.fixture(scope="module")
def encoded(talk, codec, limits) -> list[tuple[Conversation, EncodedConversation]]:
    talks = [talk(seed) for seed in SEEDS]
    return [(t, encode(t, codec, limits, heard_delay_ms=DELAY_MS, lead_ms=LEAD_MS)) for t in talks]


def silence(micro_turns: int, **known) -> Conversation:
    wave = np.zeros(micro_turns * MICRO_TURN_SAMPLES, np.float32)
    return Conversation(wave, wave, **known)


def positions(sequence: EncodedConversation) -> Iterator[tuple[int, int, int]]:
    """Yields kind, token and micro-turn of each position."""
    return zip(sequence.kind.tolist(), sequence.ids.tolist(), sequence.micro_turn.tolist(), strict=True)


def letters_of(sequence: EncodedConversation, base: int) -> list[str]:
    """Returns each micro-turn as a string with one letter per position.

    T turn, Y typed, x text, p patch, u user frame, H heard, S say, o own frame.
    """
    controls = {Control.TYPED: "Y", Control.HEARD: "H", Control.SAY: "S"}
    kinds = {PositionKind.TURN: "T", PositionKind.PATCH: "p", PositionKind.USER: "u", PositionKind.OWN: "o"}
    micro_turns = [""] * (int(sequence.micro_turn[-1]) + 1 if len(sequence.micro_turn) else 0)
    for kind, token, micro_turn in positions(sequence):
        text = controls[Control(token - base)] if kind == PositionKind.TEXT and token >= base else "x"
        micro_turns[micro_turn] += kinds.get(PositionKind(kind), text)
    return micro_turns


def tokens_after(sequence: EncodedConversation, base: int, control: Control) -> list[list[int]]:
    """Returns for each micro-turn the text tokens that follow `control`."""
    micro_turns: list[list[int]] = [[] for _ in range(int(sequence.micro_turn[-1]) + 1)]
    inside = False
    for kind, token, micro_turn in positions(sequence):
        if kind != PositionKind.TEXT or token >= base:
            inside = kind == PositionKind.TEXT and token == base + control
        elif inside:
            micro_turns[micro_turn].append(token)
    return micro_turns


def test_every_micro_turn_keeps_the_order_of_its_parts(encoded, limits):
    for talk, sequence in encoded:
        micro_turns = letters_of(sequence, limits.control_base)
        assert len(micro_turns) == len(talk.user) // MICRO_TURN_SAMPLES
        for letters in micro_turns:
            assert re.fullmatch("T(Yx{1,3})?p{0,2}u{4}(Hx{1,3})?(Sx{1,3})?(o{4})?", letters), letters


def test_own_speech_stands_where_the_conversation_speaks(encoded, limits):
    for talk, sequence in encoded:
        speaks = {i for speech in talk.speech for i in range(speech.start_micro_turn, speech.end_micro_turn)}
        assert {i for i, letters in enumerate(letters_of(sequence, limits.control_base)) if "o" in letters} == speaks


def test_each_generated_token_is_the_target_of_the_position_before_it_and_nothing_else_is(encoded, limits):
    base = limits.control_base
    for _, sequence in encoded:
        letters = "".join(letters_of(sequence, base))
        term = Term.NONE
        for i, letter in enumerate(letters):
            if letter in "TYpu":
                term = Term.NONE
            term = {"H": Term.HEARD, "S": Term.TEXT}.get(letter, term)
            following = letters[i + 1 : i + 2]
            if letter in "uHSx" and following in ("", "T", "o"):  # the micro-turn's last position before its gate
                assert sequence.term[i] == Term.GATE
                assert sequence.target[i] == base + (Control.SPEAK if following == "o" else Control.LISTEN)
            if letter in "HS" or (letter == "x" and term != Term.NONE):
                assert sequence.term[i - 1] == term
                assert sequence.target[i - 1] == sequence.ids[i]
                assert sequence.micro_turn[i - 1] == sequence.micro_turn[i]
            elif i and sequence.term[i - 1] != Term.GATE:
                assert sequence.term[i - 1] == Term.NONE and sequence.target[i - 1] == 0
        gates = (sequence.term == Term.GATE).sum()
        assert gates == letters.count("T")


def test_own_speech_predicts_what_is_heard_one_micro_turn_later(encoded):
    for talk, sequence in encoded:
        assert (np.flatnonzero(sequence.kind == PositionKind.OWN) == sequence.speech_at).all()
        coarse = np.concatenate([log_mel(talk.assistant), log_mel(np.zeros(MICRO_TURN_SAMPLES, np.float32))])
        fine = np.concatenate([fine_log_mel(talk.assistant), fine_log_mel(np.zeros(MICRO_TURN_SAMPLES, np.float32))])
        for order, (at, target) in enumerate(zip(sequence.speech_at, sequence.speech, strict=True)):
            heard = 4 * (int(sequence.micro_turn[at]) + 1) + order % 4
            # The output of the last micro-turn is heard after the recording, so its targets are not compared.
            if heard < 4 * len(talk.user) // MICRO_TURN_SAMPLES:
                np.testing.assert_array_equal(target[:80], coarse[heard])
                np.testing.assert_array_equal(target[80:].reshape(4, 80), fine[4 * heard : 4 * heard + 4])


def test_own_positions_hold_the_frames_of_the_micro_turn_before_or_silence(encoded, limits):
    starts = goes_on = 0
    for talk, sequence in encoded:
        micro_turns = letters_of(sequence, limits.control_base)
        coarse = log_mel(talk.assistant)
        for order, at in enumerate(sequence.speech_at):
            i = int(sequence.micro_turn[at])
            if i and "o" in micro_turns[i - 1]:  # the output of micro-turn i - 1 is heard in micro-turn i
                np.testing.assert_array_equal(sequence.bins[at], quantise(coarse[4 * i + order % 4]))
                goes_on += 1
            else:
                assert (sequence.bins[at] == SILENT_BINS).all()
                starts += 1
    assert starts > 40 and goes_on > 40


def test_user_frames_read_back_within_half_a_quantisation_step(encoded, codec, limits):
    for talk, sequence in encoded:
        read = decode(sequence, codec, limits).user_log_mel
        heard = log_mel(to_16_bits(talk.user))
        assert np.abs(read - heard).max() <= 0.3 + 1e-6
        np.testing.assert_array_equal(quantise(read), quantise(heard))


def test_training_hears_what_a_session_hears_also_of_sound_that_was_never_16_bits(codec, limits):
    rng = np.random.default_rng(0)
    call = np.fft.irfft(np.fft.rfft(rng.normal(0, 0.05, 3 * MICRO_TURN_SAMPLES))[:2000], 3 * MICRO_TURN_SAMPLES)
    call = call.astype(np.float32)  # nothing above 3.3 kHz, as after resampling
    sequence = encode(Conversation(call, np.zeros_like(call)), codec, limits)
    stream, heard = DmelStream(), []
    for samples in call.reshape(-1, MICRO_TURN_SAMPLES):
        stream, bins = stream.step(samples)
        heard.append(bins)
    np.testing.assert_array_equal(sequence.bins[sequence.kind == PositionKind.USER], np.concatenate(heard))
    assert (sequence.bins[sequence.kind == PositionKind.USER] != quantise(log_mel(call))).mean() > 0.1


def test_heard_words_read_back_in_order_and_late_only_where_a_micro_turn_was_full(encoded, codec, limits):
    lost = kept = 0
    for talk, sequence in encoded:
        words = decode(sequence, codec, limits).heard
        assert [w.text for w in words] == [w.text for w in talk.user_words[: len(words)]]
        used = [len(tokens) for tokens in tokens_after(sequence, limits.control_base, Control.HEARD)]
        for said, read in zip(talk.user_words, words, strict=False):
            due, at = int((said.end_s * 1000 + DELAY_MS) // 200), round(read.start_s / 0.2)
            assert at >= due and all(n == limits.max_heard for n in used[due:at])
        lost, kept = lost + len(talk.user_words) - len(words), kept + len(words)
        for word in talk.user_words[len(words) :][:1]:  # The first lost word did not fit before the end.
            due = int((word.end_s * 1000 + DELAY_MS) // 200)
            assert sum(limits.max_heard - n for n in used[due:]) < len(codec.encode(word.text))
    assert lost and kept > 5 * lost


def test_said_words_read_back_inside_their_stretch_and_before_their_sound(encoded, codec, limits):
    late = 0
    for talk, sequence in encoded:
        decoded = decode(sequence, codec, limits).speech
        used = [len(tokens) for tokens in tokens_after(sequence, limits.control_base, Control.SAY)]
        edges = [(s.start_micro_turn, s.end_micro_turn) for s in talk.speech]
        merged: list[list[int]] = []
        for start, end in edges:
            if merged and merged[-1][1] == start:
                merged[-1][1] = end
            else:
                merged.append([start, end])
        assert [[s.start_micro_turn, s.end_micro_turn] for s in decoded] == merged
        words = [word for speech in decoded for word in speech.words]
        for speech in talk.speech:
            start, end = speech.start_micro_turn, speech.end_micro_turn
            inside = [word for word in words if start <= round(word.start_s / 0.2) < end]
            assert [w.text for w in inside] == [w.text for w in speech.words[: len(inside)]]
            for said, read in zip(speech.words, inside, strict=False):
                due = max(start, int((said.start_s * 1000 - 200 - LEAD_MS) // 200))
                at = round(read.start_s / 0.2)
                assert at >= due and all(n == limits.max_text for n in used[due:at])
                late += at > due
        assert all(n == 0 or any(a <= i < b for a, b in edges) for i, n in enumerate(used))
    assert late


def test_a_word_that_does_not_fit_before_the_end_is_left_out_uncut(codec, limits):
    talk = silence(4, user_words=(Word("xy", 0.0, 0.3), Word("abcdefg", 0.3, 0.4)))
    sequence = encode(talk, codec, limits)
    assert [w.text for w in decode(sequence, codec, limits).heard] == ["xy"]
    speech = Speech(0, 2, (Word("xy", 0.2, 0.3), Word("abcdefg", 0.4, 0.5)))
    decoded = decode(encode(silence(4, speech=(speech,)), codec, limits), codec, limits)
    assert [[w.text for w in s.words] for s in decoded.speech] == [["xy"]]


def test_nothing_is_heard_before_it_was_said(codec, limits):
    talk = silence(10, user_words=(Word("hi", 0.5, 0.79),))
    for delay, micro_turn in ((0, 3), (9, 3), (10, 4), (120, 4), (211, 5)):
        sequence = encode(talk, codec, limits, heard_delay_ms=delay)
        assert [w.start_s / 0.2 for w in decode(sequence, codec, limits).heard] == [pytest.approx(micro_turn)]


def test_a_config_without_transcript_has_none(codec, limits):
    talk = silence(10, user_words=(Word("hi", 0.5, 0.79),))
    sequence = encode(talk, codec, dataclasses.replace(limits, heard=False))
    assert set(letters_of(sequence, limits.control_base)) == {"Tuuuu"}


def test_typed_text_and_frames_stand_in_their_micro_turn(encoded, codec, limits):
    for talk, sequence in encoded:
        typed = tokens_after(sequence, limits.control_base, Control.TYPED)
        assert {i: codec.decode(t).strip() for i, t in enumerate(typed) if t} == dict(talk.typed)
        patches = [image_patches(pair) for _, pair in sorted(talk.frames, key=lambda f: f[0])]
        where = sequence.micro_turn[sequence.kind == PositionKind.PATCH]
        assert where.tolist() == sorted(t for t, pair in talk.frames for _ in image_patches(pair))
        if patches:
            np.testing.assert_array_equal(sequence.patches, np.concatenate(patches))


def test_typed_text_without_room_continues_in_the_next_micro_turn(codec, limits):
    ids, room = codec.encode("too long to type"), limits.max_typed - 1
    assert len(ids) > room
    sequence = encode(silence(-(-len(ids) // room) + 2, typed=((1, "too long to type"),)), codec, limits)
    typed = tokens_after(sequence, limits.control_base, Control.TYPED)
    full, rest = divmod(len(ids), room)
    assert [len(tokens) for tokens in typed] == [0, *([room] * full), *([rest] * (rest > 0)), 0]
    assert [token for tokens in typed for token in tokens] == ids
    cut = encode(silence(2, typed=((1, "too long to type"),)), codec, limits)
    assert tokens_after(cut, limits.control_base, Control.TYPED) == [[], ids[:room]], "the rest finds no room"
    twice = encode(silence(9, typed=((1, "a"), (1, "b"))), codec, limits)
    typed = tokens_after(twice, limits.control_base, Control.TYPED)
    assert [token for t in typed for token in t] == codec.encode("a") + codec.encode("b")


def test_the_clock_has_the_age_of_the_session_and_the_time_of_the_week(encoded):
    for talk, sequence in encoded:
        count = np.arange(len(talk.user) // MICRO_TURN_SAMPLES)
        expected = clock_features(round(talk.clock_s * 5) + count, week_ms(talk.wall_clock_s) + 200 * count)
        np.testing.assert_array_equal(sequence.clock, expected)


def test_of_a_long_silence_only_the_ends_are_encoded_and_the_clock_jumps(codec, limits):
    """Words at the micro-turns 2 and 40, typed text at 60, one hundred micro-turns, of which the last are silent."""
    words = (Word("the", 0.41, 0.55), Word("sky", 8.1, 8.15))
    conversation = silence(100, user_words=words, typed=((60, "a"),), clock_s=50.0, wall_clock_s=1.7e9)
    whole = encode(conversation, codec, limits)
    short = encode(conversation, codec, limits, longest_silence=7)
    left = sorted(set(short.micro_turn.tolist()))
    text = sorted({micro_turn for kind, _, micro_turn in positions(whole) if kind == PositionKind.TEXT})
    busy = sorted({2, 40, *text})
    assert 60 in text and set(busy) <= set(left)
    gaps = [(a, b) for a, b in itertools.pairwise([-1, *busy, 100]) if b - a > 1]
    for before, after in gaps:
        silent = [m for m in left if before < m < after]
        if after - before - 1 <= 7:
            assert silent == list(range(before + 1, after))
        else:
            assert silent == [*range(before + 1, before + 5), *range(after - 3, after)]
    for name in ("kind", "ids", "bins", "target", "term", "micro_turn"):
        np.testing.assert_array_equal(getattr(short, name), getattr(whole, name)[np.isin(whole.micro_turn, left)])
    np.testing.assert_array_equal(short.clock[short.micro_turn], whole.clock[short.micro_turn])


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_falls_on_a_micro_turn_edge_and_keeps_all_that_fits(talk, codec, limits, seed):
    uncut = encode(talk(seed), codec, limits)
    ends = np.append(np.flatnonzero(np.diff(uncut.micro_turn)) + 1, len(uncut.kind))
    spoken = np.array([(uncut.speech_at < end).sum() for end in ends])
    shown = np.array([(uncut.kind[:end] == PositionKind.PATCH).sum() for end in ends])
    limitless = 10**6
    for most in ((0,), (40,), (77,), (ends[3],), (None, 0), (None, 7), (100, 8), (None, None, 0), (None, None, 3)):
        tokens, speech, patches = (*most, None, None)[:3]
        cut = encode(talk(seed), codec, limits, max_tokens=tokens, max_speech=speech, max_patches=patches)
        most_tokens, most_speech, most_shown = (
            limitless if limit is None else limit for limit in (tokens, speech, patches)
        )
        fits = ends[(ends <= most_tokens) & (spoken <= most_speech) & (shown <= most_shown)]
        length = int(fits[-1]) if len(fits) else 0
        for name in ("kind", "ids", "bins", "micro_turn", "target", "term"):
            np.testing.assert_array_equal(getattr(cut, name), getattr(uncut, name)[:length])
        np.testing.assert_array_equal(cut.speech_at, uncut.speech_at[uncut.speech_at < length])
        np.testing.assert_array_equal(cut.speech, uncut.speech[: len(cut.speech_at)])
        assert len(cut.patches) == (cut.kind == PositionKind.PATCH).sum()
        assert len(cut.clock) == (cut.micro_turn[-1] + 1 if length else 0)


def test_text_continues_behind_a_delegation_and_unknown_controls_are_skipped(codec, limits):
    said = encode(silence(3, speech=(Speech(0, 2, (Word("a", 0.3, 0.4),)),)), codec, limits, lead_ms=2000)
    at = int(np.flatnonzero(said.ids == limits.control_base + Control.SAY)[0])
    base, (red, blue) = limits.control_base, (codec.encode(word) for word in ("x", "b"))
    more = [base + Control.DELEGATE, *red, base + Control.END, *blue, base + 12]
    behind = at + 1 + len(codec.encode("a"))
    longer = dataclasses.replace(
        said,
        kind=np.insert(said.kind, [behind] * len(more), PositionKind.TEXT),
        ids=np.insert(said.ids, [behind] * len(more), more),
        micro_turn=np.insert(said.micro_turn, [behind] * len(more), said.micro_turn[at]),
        bins=np.insert(said.bins, [behind] * len(more), 0, axis=0),
    )
    (speech,) = decode(longer, codec, limits).speech
    assert [word.text for word in speech.words] == ["a", "b"]


def test_an_empty_conversation_is_an_empty_sequence(codec, limits):
    sequence = encode(silence(0), codec, limits)
    assert len(sequence.kind) == len(sequence.clock) == len(sequence.speech) == 0
    assert decode(sequence, codec, limits).speech == ()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: Conversation(np.zeros(3200, np.float32), np.zeros(6400, np.float32)), "3200 and 6400 samples"),
        (lambda: Conversation(np.zeros(3300, np.float32), np.zeros(3300, np.float32)), "whole number of micro-turns"),
        (lambda: silence(4, speech=(Speech(0, 2, ()), Speech(1, 3, ()))), r"speech in micro-turns 1\.\.3 overlaps"),
        (lambda: silence(4, speech=(Speech(2, 2, ()),)), r"speech in micro-turns 2\.\.2"),
        (lambda: silence(4, speech=(Speech(2, 5, ()),)), "leaves the recording"),
        (lambda: silence(4, frames=((2, np.zeros((80, 80, 3), np.uint8)),)), "micro-turn 2: 6 patches, at most 2"),
    ],
)
def test_a_conversation_that_cannot_be_encoded_is_refused_with_a_clear_message(codec, limits, broken, message):
    with pytest.raises(ValueError, match=message):
        encode(broken(), codec, limits)
