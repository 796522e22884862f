"""The micro-turn layout: a conversation as one token sequence, and back.

Axes: T positions, F fine frames of a micro-turn's 50 ms (4), S own-speech positions.

One micro-turn, in this order (P patches, N typed tokens, H heard tokens, K text tokens):

    given:      TURN+clock   [TYPED|BACKGROUND text]   patches   user dMel x 4
    generated:  [HEARD words]   [SAY text]   LISTEN
            or  [HEARD words]   [SAY text]   SPEAK   own speech x 4

The last given position predicts the first generated token. SAY separates what was heard from what is said. Each
own-speech position holds the dMel frame of the 50 ms spoken before it; its hidden state predicts the next 50 ms.

What encoding loses, and by how much: word times are kept to the micro-turn (a heard word appears `heard_delay_ms` after
its end, a said word `lead_ms` before its sound or where its stretch begins, both later if the micro-turn is full; which
words an interruption left unsaid is not kept); typed text that a micro-turn has no room for goes on in the next;
waveforms are kept as dMel (16 levels, 0.6 in log10) and fine frames; own speech ends at a micro-turn edge, and
stretches that touch become one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxtml.config import DuplexConfig
from jaxtml.stream.clock import clock_features, week_ms
from jaxtml.stream.conversation import Conversation, Speech, Word
from jaxtml.stream.dmel import SILENT_BINS, SILENT_FINE, dequantise, fine_log_mel, log_mel, quantise
from jaxtml.stream.images import image_patches
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import (
    DMEL_HOP,
    FINE_PER_FRAME,
    FRAMES_PER_MICRO_TURN,
    MICRO_TURN_MS,
    MICRO_TURN_SAMPLES,
    N_MELS,
)
from jaxtml.stream.tokens import Control, PositionKind, Term

SPEECH_DIM = N_MELS * (1 + FINE_PER_FRAME)  # one coarse and four fine log-mels


@dataclass(frozen=True)
class Sequence:
    """An encoded conversation.

    Attributes:
      kind: `[T]` uint8, `PositionKind`.
      ids: `[T]` int32, token id at TEXT and TURN positions, 0 elsewhere.
      bins: `[T, 80]` uint8, the dMel frame at USER and OWN positions, 0 elsewhere.
      clock: `[turns, CLOCK_FEATURES]` float32; `turn` `[T]` int32 is the micro-turn of each position.
      patches: `[P, 2, 40, 40, 3]` float32 in the order of the PATCH positions.
      target: `[T]` int32, the token to predict; meaningful where `term` is not NONE.
      term: `[T]` uint8, `Term` of the prediction made at this position.
      speech_at: `[S]` int32, the OWN positions; `speech` `[S, 400]` float32 log-mels they predict.
    """

    kind: np.ndarray
    ids: np.ndarray
    bins: np.ndarray
    clock: np.ndarray
    turn: np.ndarray
    patches: np.ndarray
    target: np.ndarray
    term: np.ndarray
    speech_at: np.ndarray
    speech: np.ndarray


@dataclass(frozen=True)
class MicroTurnText:
    """Tokens that one micro-turn generates, before the gate."""

    heard: tuple[int, ...]
    text: tuple[int, ...]


def plan_text(
    conversation: Conversation, codec: TextCodec, config: DuplexConfig, *, heard_delay_ms: int, lead_ms: int
) -> list[MicroTurnText]:
    """Which tokens stand in which micro-turn; tokens that do not fit move on to the next one, in order.

    Words that would move past the end of the conversation, or said words past the end of their stretch of speech, are
    dropped: they would be heard or said outside it.
    """
    turns = len(conversation.user) // MICRO_TURN_SAMPLES
    heard = _spread(
        [
            (int((word.end_s * 1000 + heard_delay_ms) // MICRO_TURN_MS), codec.encode(word.text))
            for word in conversation.user_words
        ],
        config.max_heard if config.heard else 0,
        0,
        turns,
    )
    text: list[tuple[int, ...]] = [()] * turns
    for speech in conversation.speech:
        words = [
            (int((word.start_s * 1000 - MICRO_TURN_MS - lead_ms) // MICRO_TURN_MS), codec.encode(word.text))
            for word in (*speech.words, *speech.unsaid)
        ]
        stretch = _spread(words, config.max_text, speech.start_turn, min(speech.end_turn, turns))
        text[speech.start_turn : speech.end_turn] = stretch[speech.start_turn : speech.end_turn]
    return [MicroTurnText(h, t) for h, t in zip(heard, text, strict=True)]


def plan_typed(
    typed: Iterable[tuple[int, str]], codec: TextCodec, config: DuplexConfig, turns: int
) -> list[tuple[int, ...]]:
    """Which typed tokens each of `turns` micro-turns is given; text that it has no room for goes on in the next."""
    texts: dict[int, list[int]] = {}
    for turn, text in typed:
        texts.setdefault(turn, []).extend(codec.encode(text))
    waiting: list[int] = []
    plan: list[tuple[int, ...]] = []
    room = max(config.max_typed - 1, 0)  # TYPED comes first
    for turn in range(turns):
        waiting += texts.get(turn, [])
        plan.append(tuple(waiting[:room]))
        del waiting[:room]
    return plan


def _spread(words: list[tuple[int, list[int]]], limit: int, first: int, end: int) -> list[tuple[int, ...]]:
    """Puts each word's tokens at its micro-turn or the next with room; never before `first`, never from `end` on.

    A word that does not fit whole ends the text: half a word would be heard or said as another one.
    """
    turns: list[list[int]] = [[] for _ in range(end)]
    at = first
    for turn, ids in words:
        at = max(at, turn)
        if len(ids) > sum(limit - len(tokens) for tokens in turns[at:]):
            break
        for token in ids:
            while len(turns[at]) >= limit:
                at += 1
            turns[at].append(token)
    return [tuple(t) for t in turns]


def encode(
    conversation: Conversation,
    codec: TextCodec,
    config: DuplexConfig,
    *,
    heard_delay_ms: int = 120,
    lead_ms: int = 200,
    max_tokens: int | None = None,
    max_speech: int | None = None,
) -> Sequence:
    """Encodes a conversation; it ends with the last micro-turn that fits whole into `max_tokens` positions, of which at
    most `max_speech` are own speech.

    Raises:
      ValueError: waveforms of different length or not whole micro-turns; overlapping stretches of speech; more patches
        in a micro-turn than the config allows.
    """
    _check(conversation)
    turns = len(conversation.user) // MICRO_TURN_SAMPLES
    texts = plan_text(conversation, codec, config, heard_delay_ms=heard_delay_ms, lead_ms=lead_ms)
    user_bins = quantise(log_mel(conversation.user))
    # Output of micro-turn m is heard one micro-turn later: on its own clock it starts at sample 0.
    own = np.concatenate([conversation.assistant[MICRO_TURN_SAMPLES:], np.zeros(MICRO_TURN_SAMPLES, np.float32)])
    coarse, fine = _own_mels(own, conversation.speech)
    before = np.concatenate([SILENT_BINS[None], quantise(coarse)[:-1]])
    speaking = np.zeros(turns, bool)
    for speech in conversation.speech:
        speaking[speech.start_turn : speech.end_turn] = True
    typed = plan_typed(conversation.typed, codec, config, turns)
    frames = {turn: image_patches(pair) for turn, pair in conversation.frames}

    out = _Writer(config.control_base)
    for turn in range(turns):
        start = out.mark()
        out.control(Control.TURN, turn, PositionKind.TURN)
        if typed[turn]:
            out.control(Control.TYPED, turn)
            for token in typed[turn]:
                out.add(PositionKind.TEXT, turn, token)
        if turn in frames:
            if len(frames[turn]) > config.max_patches:
                raise ValueError(f"micro-turn {turn}: {len(frames[turn])} patches, at most {config.max_patches}")
            out.patches.extend(frames[turn])
            for _ in frames[turn]:
                out.add(PositionKind.PATCH, turn)
        rows = slice(FRAMES_PER_MICRO_TURN * turn, FRAMES_PER_MICRO_TURN * (turn + 1))
        for bins in user_bins[rows]:
            out.add(PositionKind.USER, turn, bins=bins)
        out.generated(texts[turn], bool(speaking[turn]), turn)
        if speaking[turn]:
            for i in range(rows.start, rows.stop):
                out.own(turn, before[i], np.concatenate([coarse[i], fine[i]]))
        too_long = max_tokens is not None and out.mark() > max_tokens
        if too_long or (max_speech is not None and len(out.speech_at) > max_speech):
            out.cut(start)
            break
    used = int(out.turn[-1]) + 1 if out.turn else 0
    first = round(conversation.clock_s * 1000 / MICRO_TURN_MS)
    index = np.arange(first, first + used)
    wall = week_ms(conversation.wall_clock_s) + MICRO_TURN_MS * np.arange(used)
    return out.finish(clock_features(index, wall))


def _own_mels(own: np.ndarray, speech: tuple[Speech, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`log_mel(own)` `[N, 80]` and `fine_log_mel(own)` `[N, 320]` where the assistant speaks, silence elsewhere.

    Most of a session is silence, and the front end would be most of the cost of encoding. The frame before a stretch
    is exact too: it is the first that is fed back.
    """
    frames = len(own) // DMEL_HOP
    coarse = np.repeat(log_mel(np.zeros(DMEL_HOP, np.float32)), frames, axis=0)
    fine = np.tile(SILENT_FINE, (frames, FINE_PER_FRAME))
    for stretch in speech:
        first, end = stretch.start_turn * FRAMES_PER_MICRO_TURN, min(stretch.end_turn * FRAMES_PER_MICRO_TURN, frames)
        # Two hops of lead: the causal window of the frame before, and the fine window of the first.
        low, high = max(0, first - 2), min(frames, end + 1)
        segment = own[low * DMEL_HOP : high * DMEL_HOP]
        kept = slice(min(low + 1, first) if low else 0, end)
        inside = slice(kept.start - low, kept.stop - low)
        coarse[kept] = log_mel(segment)[inside]
        fine[kept] = fine_log_mel(segment).reshape(-1, FINE_PER_FRAME * N_MELS)[inside]
    return coarse, fine


def _check(conversation: Conversation) -> None:
    n = len(conversation.user)
    if len(conversation.assistant) != n or n % MICRO_TURN_SAMPLES:
        raise ValueError(
            f"waveforms of {n} and {len(conversation.assistant)} samples: give both one whole number of micro-turns"
        )
    end = 0
    for speech in conversation.speech:
        if not end <= speech.start_turn < speech.end_turn <= n // MICRO_TURN_SAMPLES:
            raise ValueError(f"speech {speech.start_turn}..{speech.end_turn} overlaps another or leaves the recording")
        end = speech.end_turn


class _Writer:
    """Collects positions; each generated token is the target of the position before it."""

    def __init__(self, control_base: int):
        self.base = control_base
        self.kind: list[int] = []
        self.ids: list[int] = []
        self.bins: list[np.ndarray] = []
        self.turn: list[int] = []
        self.target: list[int] = []
        self.term: list[int] = []
        self.patches: list[np.ndarray] = []
        self.speech_at: list[int] = []
        self.speech: list[np.ndarray] = []
        self._empty = np.zeros(N_MELS, np.uint8)

    def mark(self) -> int:
        return len(self.kind)

    def add(self, kind: PositionKind, turn: int, token: int = 0, bins: np.ndarray | None = None) -> None:
        self.kind.append(kind)
        self.ids.append(token)
        self.bins.append(self._empty if bins is None else bins)
        self.turn.append(turn)
        self.target.append(0)
        self.term.append(Term.NONE)

    def control(self, control: Control, turn: int, kind: PositionKind = PositionKind.TEXT) -> None:
        self.add(kind, turn, self.base + control)

    def predict(self, token: int, term: Term, turn: int) -> None:
        """The last position predicts `token`, which then becomes the next position."""
        self.target[-1] = token
        self.term[-1] = term
        self.add(PositionKind.TEXT, turn, token)

    def generated(self, text: MicroTurnText, speaking: bool, turn: int) -> None:
        if text.heard:
            self.predict(self.base + Control.HEARD, Term.HEARD, turn)
            for token in text.heard:
                self.predict(token, Term.HEARD, turn)
        if text.text:
            self.predict(self.base + Control.SAY, Term.TEXT, turn)
            for token in text.text:
                self.predict(token, Term.TEXT, turn)
        self.predict(self.base + (Control.SPEAK if speaking else Control.LISTEN), Term.GATE, turn)

    def own(self, turn: int, before: np.ndarray, target: np.ndarray) -> None:
        self.speech_at.append(self.mark())
        self.speech.append(target)
        self.add(PositionKind.OWN, turn, bins=before)

    def cut(self, length: int) -> None:
        patches = sum(k == PositionKind.PATCH for k in self.kind[:length])
        speech = sum(at < length for at in self.speech_at)
        self.patches, self.speech_at, self.speech = (
            self.patches[:patches],
            self.speech_at[:speech],
            self.speech[:speech],
        )
        for name in ("kind", "ids", "bins", "turn", "target", "term"):
            setattr(self, name, getattr(self, name)[:length])

    def finish(self, clock: np.ndarray) -> Sequence:
        return Sequence(
            kind=np.asarray(self.kind, np.uint8),
            ids=np.asarray(self.ids, np.int32),
            bins=np.asarray(self.bins, np.uint8).reshape(-1, N_MELS),
            clock=clock,
            turn=np.asarray(self.turn, np.int32),
            patches=np.asarray(self.patches, np.float32).reshape(-1, 2, 40, 40, 3),
            target=np.asarray(self.target, np.int32),
            term=np.asarray(self.term, np.uint8),
            speech_at=np.asarray(self.speech_at, np.int32),
            speech=np.asarray(self.speech, np.float32).reshape(-1, SPEECH_DIM),
        )


@dataclass(frozen=True)
class Decoded:
    """What a sequence still tells of its conversation; delegated text and text of micro-turns that listen are left out.

    `heard` and `speech` carry words with the micro-turn edge as their time (see the module docstring for the bound);
    `user_log_mel` is `[4 turns, 80]` to within half a quantisation step (0.3) inside [-7, 2].
    """

    heard: tuple[Word, ...]
    speech: tuple[Speech, ...]
    user_log_mel: np.ndarray


def decode(sequence: Sequence, codec: TextCodec, config: DuplexConfig) -> Decoded:
    """Reads a sequence back; the inverse of `encode` up to what that states as lost."""
    seconds = MICRO_TURN_MS / 1000
    base = config.control_base
    heard: list[tuple[int, list[int]]] = []
    said: list[tuple[int, list[int]]] = []
    speaking: list[int] = []
    into: list[tuple[int, list[int]]] | None = None
    for kind, token, turn in zip(sequence.kind, sequence.ids, sequence.turn, strict=True):
        if kind == PositionKind.TURN:
            into = None
        elif kind == PositionKind.TEXT and token >= base:
            into = {Control.HEARD: heard, Control.SAY: said, Control.END: said}.get(token - base)
            if into is not None:
                into.append((int(turn), []))
            if token - base == Control.SPEAK:
                speaking.append(int(turn))
        elif kind == PositionKind.TEXT and into is not None:
            into[-1][1].append(int(token))
    stretches = _stretches(speaking)
    said_words = _words(said, codec, seconds)
    speech = tuple(
        Speech(a, b, tuple(w for w in said_words if a * seconds <= w.start_s < b * seconds)) for a, b in stretches
    )
    user = sequence.bins[sequence.kind == PositionKind.USER]
    return Decoded(_words(heard, codec, seconds), speech, dequantise(user))


def _stretches(turns: list[int]) -> list[tuple[int, int]]:
    stretches: list[tuple[int, int]] = []
    for turn in turns:
        if stretches and stretches[-1][1] == turn:
            stretches[-1] = (stretches[-1][0], turn + 1)
        else:
            stretches.append((turn, turn + 1))
    return stretches


def _words(tokens: list[tuple[int, list[int]]], codec: TextCodec, seconds: float) -> tuple[Word, ...]:
    """Splits the running text at spaces; a word belongs to the micro-turn of its first token."""
    words: list[tuple[int, list[int]]] = []
    for turn, ids in tokens:
        for token in ids:
            if not words or codec.decode([token]).startswith(" "):
                words.append((turn, [token]))
            else:
                words[-1][1].append(token)
    return tuple(Word(codec.decode(ids).strip(), turn * seconds, (turn + 1) * seconds) for turn, ids in words)
