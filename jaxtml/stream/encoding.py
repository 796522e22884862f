"""Encodes a conversation as one token sequence in the micro-turn layout.

`encode` is called by `jaxtml.data.conversations` for every row of training data, and by `jaxtml.session.library` for
the conversations of users. `jaxtml.stream.layout` describes the result; `jaxtml.stream.decoding` reads it back.

What encoding loses, and by how much:

- **Word times** are rounded to micro-turns. A word of the user appears `heard_delay_ms` after its end. A word of the
  assistant appears `lead_ms` before its sound, but not before the stretch of speech that it belongs to. Both appear
  later if the micro-turn is full.
- **Words** that find no room before the end of the recording, or of their stretch of speech, are dropped
  (`jaxtml.stream.text_plan`). Words that an interruption left unsaid look the same as words that were said.
- **Typed text** that a micro-turn has no room for continues in the next. Text after the last micro-turn is lost.
- **The user's waveform** is rounded to 16 bits and kept as dMel: 16 levels, 0.6 apart in log10 of the magnitude.
- **The assistant's waveform** is kept where the assistant speaks. It is kept twice: as dMel frames that the model
  reads, and as coarse and fine log-mel frames, not quantised, that the model predicts.
- **Own speech**, the speech of the assistant, ends at the edge of a micro-turn. Two stretches without a gap between
  them become one.

Axes: T positions, F dMel frames (4 per micro-turn), S own-speech positions.
"""

from __future__ import annotations

import numpy as np

from jaxtml.config import DuplexConfig
from jaxtml.stream.clock import clock_features, week_ms
from jaxtml.stream.conversation import Conversation, Speech
from jaxtml.stream.dmel import SILENT_BINS, SILENT_FINE, fine_log_mel, log_mel, quantise, user_dmel
from jaxtml.stream.images import image_patches
from jaxtml.stream.layout import SPEECH_DIM, EncodedConversation
from jaxtml.stream.text import TextCodec
from jaxtml.stream.text_plan import MicroTurnText, plan_text, plan_typed
from jaxtml.stream.timebase import (
    DMEL_HOP,
    FINE_PER_FRAME,
    FRAMES_PER_MICRO_TURN,
    MICRO_TURN_MS,
    MICRO_TURN_SAMPLES,
    N_MELS,
)
from jaxtml.stream.tokens import Control, PositionKind, Term


def encode(
    conversation: Conversation,
    codec: TextCodec,
    config: DuplexConfig,
    *,
    heard_delay_ms: int = 120,
    lead_ms: int = 200,
    max_tokens: int | None = None,
    max_speech: int | None = None,
    max_patches: int | None = None,
    longest_silence: int | None = None,
) -> EncodedConversation:
    """Encodes a conversation. It is cut after the last micro-turn that fits completely into all limits.

    Args:
      conversation: both waveforms and what is known about them.
      codec: turns words into token ids.
      config: how many tokens and patches a micro-turn has room for.
      heard_delay_ms: milliseconds between the end of a user's word and the earliest time of its transcript.
      lead_ms: milliseconds by which the assistant's text precedes its sound.
      max_tokens: positions, at most; None for no limit.
      max_speech: own-speech positions, at most; None for no limit.
      max_patches: patches of the whole conversation, at most; None for no limit.
      longest_silence: micro-turns. Of a longer silence, in which nobody says a word, types or shows anything, the
        middle is left out. The clock of the next micro-turn tells how long the silence was. None leaves out nothing.

    Raises:
      ValueError: the waveforms have different lengths or no whole number of micro-turns, stretches of speech overlap,
        or a micro-turn has more patches than the config allows.
    """
    _check(conversation)
    micro_turns = len(conversation.user) // MICRO_TURN_SAMPLES
    texts = plan_text(conversation, codec, config, heard_delay_ms=heard_delay_ms, lead_ms=lead_ms)
    typed = plan_typed(conversation.typed, codec, config, micro_turns)
    patches = {micro_turn: image_patches(pair) for micro_turn, pair in conversation.frames}
    user_bins = user_dmel(conversation.user)
    # The output of micro-turn m is heard one micro-turn later. `own` is the assistant's voice moved one micro-turn
    # earlier, so that the output of micro-turn 0 starts at sample 0.
    own = np.roll(conversation.assistant, -MICRO_TURN_SAMPLES)
    own[-MICRO_TURN_SAMPLES:] = 0
    coarse, fine = _own_log_mels(own, conversation.speech)
    speaks = np.zeros(micro_turns, bool)
    for speech in conversation.speech:
        speaks[speech.start_micro_turn : speech.end_micro_turn] = True
    # Own-speech positions read the frames of the micro-turn before, and silence if the assistant was silent then.
    own_bins = np.where(np.repeat(speaks, FRAMES_PER_MICRO_TURN)[:, None], quantise(coarse), SILENT_BINS)
    silent = np.repeat(SILENT_BINS[None], FRAMES_PER_MICRO_TURN, axis=0)
    bins_before = np.concatenate([silent, own_bins[:-FRAMES_PER_MICRO_TURN]])

    busy = speaks | _says_words(conversation, micro_turns)
    for micro_turn, text in enumerate(texts):
        busy[micro_turn] |= bool(text.heard or text.text or typed[micro_turn]) or micro_turn in patches

    writer = _Writer(config.control_base)
    for micro_turn in _without_long_silences(busy, longest_silence):
        start = writer.length
        writer.begin_micro_turn(micro_turn)
        writer.add_typed(typed[micro_turn])
        if micro_turn in patches:
            if len(patches[micro_turn]) > config.max_patches:
                n = len(patches[micro_turn])
                raise ValueError(f"micro-turn {micro_turn}: {n} patches, at most {config.max_patches} are allowed")
            writer.add_patches(patches[micro_turn])
        frames = range(FRAMES_PER_MICRO_TURN * micro_turn, FRAMES_PER_MICRO_TURN * (micro_turn + 1))
        for frame in frames:
            writer.add_position(PositionKind.USER, bins=user_bins[frame])
        writer.add_generated(texts[micro_turn], bool(speaks[micro_turn]))
        if speaks[micro_turn]:
            for frame in frames:
                writer.add_own_speech(bins_before[frame], np.concatenate([coarse[frame], fine[frame]]))
        sizes = ((writer.length, max_tokens), (len(writer.speech_at), max_speech), (len(writer.patches), max_patches))
        if any(limit is not None and size > limit for size, limit in sizes):
            writer.cut(start)
            break
    return writer.finish(_clock(conversation, writer.micro_turns))


def _says_words(conversation: Conversation, micro_turns: int) -> np.ndarray:
    """Returns in which micro-turns the user says a part of a word, `[micro_turns]` bool."""
    says = np.zeros(micro_turns, bool)
    for word in conversation.user_words:
        first, last = (int(1000 * time_s / MICRO_TURN_MS) for time_s in (word.start_s, word.end_s))
        says[first : last + 1] = True
    return says


def _without_long_silences(busy: np.ndarray, longest: int | None) -> np.ndarray:
    """Returns the numbers of the micro-turns that are encoded.

    A stretch of more than `longest` micro-turns that are not `busy` `[M]` bool loses its middle. `longest` of them
    stay, one half at each end.
    """
    encoded = np.ones(len(busy), bool)
    if longest is not None:
        edges = np.flatnonzero(np.diff(np.pad(~busy, 1).astype(np.int8)))
        for start, stop in edges.reshape(-1, 2):
            if stop - start > longest:
                encoded[start + (longest + 1) // 2 : stop - longest // 2] = False
    return np.flatnonzero(encoded)


def _clock(conversation: Conversation, micro_turns: int) -> np.ndarray:
    """Returns `[micro_turns, CLOCK_FEATURES]`: the clock features of the first `micro_turns` micro-turns."""
    first = round(conversation.clock_s * 1000 / MICRO_TURN_MS)
    count = np.arange(micro_turns)
    return clock_features(first + count, week_ms(conversation.wall_clock_s) + MICRO_TURN_MS * count)


def _own_log_mels(own: np.ndarray, speech: tuple[Speech, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns `log_mel(own)` `[F, 80]` and `fine_log_mel(own)` `[F, 320]`, computed only where the assistant speaks.

    Elsewhere both hold silence. Most of a session is silence, and computing its log-mels would be most of the cost of
    encoding.
    """
    frames = len(own) // DMEL_HOP
    coarse = np.repeat(log_mel(np.zeros(DMEL_HOP, np.float32)), frames, axis=0)
    fine = np.tile(SILENT_FINE, (frames, FINE_PER_FRAME))
    for stretch in speech:
        first = stretch.start_micro_turn * FRAMES_PER_MICRO_TURN
        end = min(stretch.end_micro_turn * FRAMES_PER_MICRO_TURN, frames)
        # The windows of the first frames begin before the stretch, so the segment begins one hop earlier.
        low, high = max(0, first - 1), min(frames, end + 1)
        segment = own[low * DMEL_HOP : high * DMEL_HOP]
        inside = slice(first - low, end - low)
        coarse[first:end] = log_mel(segment)[inside]
        fine[first:end] = fine_log_mel(segment).reshape(-1, FINE_PER_FRAME * N_MELS)[inside]
    return coarse, fine


def _check(conversation: Conversation) -> None:
    n, assistant_n = len(conversation.user), len(conversation.assistant)
    if assistant_n != n or n % MICRO_TURN_SAMPLES:
        raise ValueError(f"waveforms of {n} and {assistant_n} samples: give both the same whole number of micro-turns")
    previous_end = 0
    for speech in conversation.speech:
        start, end = speech.start_micro_turn, speech.end_micro_turn
        if not previous_end <= start < end <= n // MICRO_TURN_SAMPLES:
            raise ValueError(f"speech in micro-turns {start}..{end} overlaps other speech or leaves the recording")
        previous_end = end


class _Writer:
    """Collects positions of a sequence. Every generated token is the target of the position before it.

    The gate is only a target. It gets no position.
    """

    def __init__(self, control_base: int):
        self._control_base = control_base
        self._current = -1  # the micro-turn that is being written
        self.kind: list[int] = []
        self.ids: list[int] = []
        self.bins: list[np.ndarray] = []
        self.micro_turn: list[int] = []
        self.target: list[int] = []
        self.term: list[int] = []
        self.patches: list[np.ndarray] = []
        self.speech_at: list[int] = []
        self.speech: list[np.ndarray] = []
        self._no_bins = np.zeros(N_MELS, np.uint8)

    @property
    def length(self) -> int:
        """Positions so far."""
        return len(self.kind)

    @property
    def micro_turns(self) -> int:
        """Micro-turns so far."""
        return self.micro_turn[-1] + 1 if self.micro_turn else 0

    def add_position(self, kind: PositionKind, token: int = 0, bins: np.ndarray | None = None) -> None:
        self.kind.append(kind)
        self.ids.append(token)
        self.bins.append(self._no_bins if bins is None else bins)
        self.micro_turn.append(self._current)
        self.target.append(0)
        self.term.append(Term.NONE)

    def begin_micro_turn(self, micro_turn: int) -> None:
        self._current = micro_turn
        self.add_position(PositionKind.TURN, self._control_base + Control.TURN)

    def add_typed(self, tokens: tuple[int, ...]) -> None:
        if tokens:
            self.add_position(PositionKind.TEXT, self._control_base + Control.TYPED)
            for token in tokens:
                self.add_position(PositionKind.TEXT, token)

    def add_patches(self, patches: np.ndarray) -> None:
        self.patches.extend(patches)
        for _ in patches:
            self.add_position(PositionKind.PATCH)

    def add_generated(self, text: MicroTurnText, speaks: bool) -> None:
        """Adds the tokens that the model generates, transcript and text, and the gate as the last target."""
        if text.heard:
            self._predict(self._control_base + Control.HEARD, Term.HEARD)
            for token in text.heard:
                self._predict(token, Term.HEARD)
        if text.text:
            self._predict(self._control_base + Control.SAY, Term.TEXT)
            for token in text.text:
                self._predict(token, Term.TEXT)
        self._set_target(self._control_base + (Control.SPEAK if speaks else Control.LISTEN), Term.GATE)

    def _predict(self, token: int, term: Term) -> None:
        """Makes `token` the target of the last position, and adds it as the next position."""
        self._set_target(token, term)
        self.add_position(PositionKind.TEXT, token)

    def _set_target(self, token: int, term: Term) -> None:
        """Makes `token` the target of the last position."""
        self.target[-1] = token
        self.term[-1] = term

    def add_own_speech(self, previous_bins: np.ndarray, target: np.ndarray) -> None:
        """Adds an own-speech position: it reads the previous dMel frame and predicts the frame `target` `[400]`."""
        self.speech_at.append(self.length)
        self.speech.append(target)
        self.add_position(PositionKind.OWN, bins=previous_bins)

    def cut(self, length: int) -> None:
        """Keeps the first `length` positions."""
        patches = sum(kind == PositionKind.PATCH for kind in self.kind[:length])
        speech = sum(position < length for position in self.speech_at)
        del self.patches[patches:], self.speech_at[speech:], self.speech[speech:]
        for column in (self.kind, self.ids, self.bins, self.micro_turn, self.target, self.term):
            del column[length:]

    def finish(self, clock: np.ndarray) -> EncodedConversation:
        return EncodedConversation(
            kind=np.asarray(self.kind, np.uint8),
            ids=np.asarray(self.ids, np.int32),
            bins=np.asarray(self.bins, np.uint8).reshape(-1, N_MELS),
            clock=clock,
            micro_turn=np.asarray(self.micro_turn, np.int32),
            patches=np.asarray(self.patches, np.float32).reshape(-1, 2, 40, 40, 3),
            target=np.asarray(self.target, np.int32),
            term=np.asarray(self.term, np.uint8),
            speech_at=np.asarray(self.speech_at, np.int32),
            speech=np.asarray(self.speech, np.float32).reshape(-1, SPEECH_DIM),
        )
