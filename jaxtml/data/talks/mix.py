"""Two-channel conversations out of single utterances: who speaks when, who stops, and what the microphone hears.

One session is one user (one voice, one room) and several exchanges in sequence. The rules of time are here and nowhere
else. Called by `jaxtml.data.pipeline`, `jaxtml.data.show` and the evaluations.

- **Takeover.** The user's sound ends in micro-turn `i`. The gate opens at `i + 1`, after 200 to 400 ms in which nothing
  more came: the reply is heard from sample `3200 (i + 2)`, 200 to 400 ms after the end.
- **Hesitation.** A pause of 0.4 to 1.6 s where the sentence is still open: the assistant waits.
- **Barge-in.** The user starts in micro-turn `j` while the assistant speaks: micro-turn `j` is the last that speaks, so
  the voice has gone silent at sample `3200 (j + 2)`, 200 to 400 ms after the start. What was not fully said goes to
  `Speech.unsaid`. Then the new utterance is answered.
- **Typing.** The user types in micro-turn `i` and does not speak; the gate opens in `i`, where the text is known.
- **Distraction, silence.** Coughs and knocks, or nothing at all: no reply.

Numpy only; one call is a pure function of the generator and the bank. Axes: N samples of the session.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from jaxtml.data.talks import edits
from jaxtml.data.talks.channel import Channel, apply_channel, draw_channel
from jaxtml.data.talks.edits import Clip
from jaxtml.data.tasks.scenarios import bare_list, incomplete_after, is_complete, nonsense, reply_to, sample_user_text
from jaxtml.data.voices.utterance import Utterance
from jaxtml.errors import InputError
from jaxtml.stream.conversation import Conversation, Speech, Word
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

_FADE_OUT = 160  # samples, 10 ms: how the assistant's voice stops when it is interrupted
_OVERLAP_LEFT = 800  # samples of reply that a barge-in must at least cut off, or it interrupted nothing


class UtteranceSource(Protocol):
    """The part of `jaxtml.data.bank.Bank` that is used here. `digest`: equal digests, equal utterances."""

    @property
    def digest(self) -> str: ...

    def utterance(self, index: int, /) -> Utterance: ...

    def select(self, *, split: str, role: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Speakers:
    """Who can be heard: one split of a bank, indexed by voice, by word and by reply.

    Attributes:
      bank: gives the waves.
      users: `[U]` indices of the users' sentences in the bank.
      by_voice: the indices of each voice; `engines`: engine -> the voice of each of its utterances.
      replies: reply text -> the assistant's utterance.
      singles: voice -> word -> where it is named, a pause behind it, as (utterance, word index).
    """

    bank: UtteranceSource
    users: np.ndarray
    by_voice: dict[str, np.ndarray]
    engines: dict[str, tuple[str, ...]]
    replies: dict[str, int]
    singles: dict[str, dict[str, list[tuple[int, int]]]]

    @staticmethod
    def of(bank: UtteranceSource, split: str = "train") -> Speakers:
        """Index the user's voices of `split` and the replies."""
        users = np.asarray(bank.select(split=split, role="user"), np.int64)
        if not len(users):
            raise InputError(
                f"the utterance bank has no user voices in its split {split!r}: build it with `jaxtml data`"
            )
        by_voice: dict[str, list[int]] = {}
        singles: dict[str, dict[str, list[tuple[int, int]]]] = {}
        engines: dict[str, list[str]] = {}
        for i in users.tolist():
            said = bank.utterance(i)
            engines.setdefault(said.voice.split(":")[0], []).append(said.voice)
            by_voice.setdefault(said.voice, []).append(i)
        for i in np.asarray(bank.select(split=split, role="words"), np.int64).tolist():
            said = bank.utterance(i)
            places = singles.setdefault(said.voice, {})
            for k, word in enumerate(said.words):
                places.setdefault(word.text, []).append((i, k))
        replies = {}
        for i in np.asarray(bank.select(split="train", role="assistant"), np.int64).tolist():
            replies[" ".join(word.text for word in bank.utterance(i).words)] = i
        voices = {voice: np.asarray(indices) for voice, indices in by_voice.items()}
        spread = {engine: tuple(names) for engine, names in engines.items()}
        return Speakers(bank, users, voices, spread, replies, singles)

    def clip(self, i: int) -> Clip:
        said = self.bank.utterance(i)
        return Clip(np.asarray(said.wave, np.float32), tuple(said.words))


@dataclass(frozen=True)
class Weights:
    """How often each scenario is drawn: the first four relative to each other, the others as chances.

    Attributes:
      exchange, hesitation, barge_in, distraction: the next event of a session that is not silent.
      silence: chance that nobody speaks in the whole session.
      typed: chance that the user types instead of speaking, in the whole session. Replies follow each other closely
        there: it is where the model's own voice gets most of its practice.
      joined: chance that a user's turn is put together from single words of that voice.
      nonsense: chance that such a turn is no sentence: what a model mishears is none either, and it has to answer.
      engines: share of the sessions whose user speaks with each engine's voices. Neural voices sound most like people;
        a judge of speech mishears half of eSpeak's words, but no engine has more voices.
    """

    exchange: float = 0.5
    hesitation: float = 0.22
    barge_in: float = 0.2
    distraction: float = 0.08
    silence: float = 0.04
    typed: float = 0.4
    joined: float = 0.4
    nonsense: float = 0.15
    engines: tuple[tuple[str, float], ...] = (("kokoro", 0.45), ("flite", 0.18), ("piper", 0.09), ("espeak", 0.28))


@dataclass
class _Draft:
    """A session while it is filled. `free`: the first sample at which both sides are done."""

    n_turns: int
    voice: np.ndarray
    assistant: np.ndarray
    free: int = 0
    reply_span: tuple[int, int] = (0, 0)
    words: list[Word] = field(default_factory=list)
    speech: list[Speech] = field(default_factory=list)
    typed: list[tuple[int, str]] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    scenes: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)


# --- one turn of the user


def _joined_clip(rng: np.random.Generator, speakers: Speakers, voice: str, odd: bool) -> Clip | None:
    """A turn put together from the words that a voice named, as recordings of single words are; None: some missing."""
    places = speakers.singles.get(voice, {})
    for _ in range(4):
        text = nonsense(rng) if odd else bare_list(rng) if rng.random() < 0.6 else sample_user_text(rng)[1]
        words = text.split()
        if all(word in places for word in words):
            break
    else:
        return None
    pieces = []
    for word in words:
        i, k = places[word][int(rng.integers(len(places[word])))]
        pieces.append(edits.levelled(edits.single_word(speakers.clip(i), k), 1.0))
    # Where the turn might be over already, a gap that swallows a whole micro-turn would look like the end.
    gaps = [
        rng.uniform(0.03, 0.15) if odd or is_complete(words[:k]) else rng.uniform(0.05, 0.35)
        for k in range(1, len(words))
    ]
    return edits.joined(pieces, [int(gap * SAMPLE_RATE) for gap in gaps])


def _turn(rng: np.random.Generator, speakers: Speakers, voice: str, weights: Weights, rate: float) -> Clip | None:
    """One turn of the user at unit level; None: the bank has no reply to it."""
    clip = None
    if rng.random() < weights.joined:
        clip = _joined_clip(rng, speakers, voice, odd=rng.random() < weights.nonsense)
    if clip is None:
        indices = speakers.by_voice[voice]
        clip = speakers.clip(int(indices[int(rng.integers(len(indices)))]))
    if reply_to(clip.text.split()) not in speakers.replies:
        return None
    clip = edits.at_rate(clip, rate * float(rng.uniform(0.97, 1.03)))
    return edits.levelled(clip, 10 ** (rng.uniform(-2, 2) / 20))


def _hesitant(rng: np.random.Generator, clip: Clip) -> Clip | None:
    """The turn with one pause, seldom two, where its sentence is open; None where it is open nowhere, or is none."""
    words = clip.text.split()
    places = [k for k in range(1, len(words)) if incomplete_after(words, k)] if is_complete(words) else []
    for k in rng.permutation(places)[: 1 + (rng.random() < 0.2)].astype(int).tolist():
        clip = edits.with_pause(clip, k, int(rng.uniform(0.4, 1.6) * SAMPLE_RATE))
    return clip if places else None


def _cough(rng: np.random.Generator) -> np.ndarray:
    """`[M]` float32 at unit level: one to three short bursts of coloured noise, a cough, a knock, a rustle."""
    puffs = []
    for _ in range(int(rng.integers(1, 4))):
        n = int(rng.integers(480, 4800))
        spectrum = np.fft.rfft(rng.standard_normal(n, dtype=np.float32))
        freqs = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
        centre, width = rng.uniform(200, 3000), rng.uniform(0.4, 1.5)
        spectrum *= np.exp(-0.5 * (np.log(np.maximum(freqs, 20.0) / centre) / width) ** 2)
        t = np.arange(n) / n
        puff = np.fft.irfft(spectrum, n) * np.minimum(t / rng.uniform(0.01, 0.15), 1.0) * np.exp(-t * rng.uniform(2, 8))
        puffs.append(edits.levelled(Clip(edits.faded(puff), ()), 10 ** (rng.uniform(-12, 3) / 20)).wave)
        puffs.append(np.zeros(int(rng.integers(0, 3200)), np.float32))
    return np.concatenate(puffs)


# --- placing turns on the clock


def _barge_in_start(rng: np.random.Generator, draft: _Draft) -> int | None:
    """A sample at which to interrupt the reply that is being spoken; None: it is too short to be interrupted."""
    start, end = draft.reply_span
    first = start + SAMPLE_RATE // 10
    last_turn = (end - _OVERLAP_LEFT) // MICRO_TURN_SAMPLES - 2
    last = (last_turn + 1) * MICRO_TURN_SAMPLES
    return int(rng.integers(first, last)) if draft.speech and last > first else None


def _interrupt(draft: _Draft, start: int) -> None:
    """Stop the assistant's last stretch because the user began to talk at sample `start`."""
    turn = start // MICRO_TURN_SAMPLES
    cut = (turn + 2) * MICRO_TURN_SAMPLES
    speech = draft.speech[-1]
    said = sum(word.end_s * SAMPLE_RATE <= cut for word in speech.words)
    draft.speech[-1] = replace(speech, end_turn=turn + 1, words=speech.words[:said], unsaid=speech.words[said:])
    draft.assistant[cut - _FADE_OUT : cut] *= np.linspace(1, 0, _FADE_OUT, dtype=np.float32)
    draft.assistant[cut:] = 0


def _place(draft: _Draft, speakers: Speakers, clip: Clip, start: int, scene: str, interrupts: bool) -> bool:
    """Put a turn of the user at `start` and its answer behind it; False, and nothing done, if they do not fit."""
    end = start + len(clip.wave)
    end_turn = (end - 1) // MICRO_TURN_SAMPLES
    gate = end_turn + 1
    reply = _reply(draft, speakers, clip.text, gate)
    if reply is None:
        return False
    if interrupts:
        if (
            gate <= start // MICRO_TURN_SAMPLES + 1
        ):  # too short a word: the assistant would go on without having stopped
            return False
        _interrupt(draft, start)
    _answer(draft, reply, gate)
    draft.voice[start:end] += clip.wave
    draft.words += [_shifted(word, start) for word in clip.words]
    draft.ends_s.append(end / SAMPLE_RATE)
    draft.scenes.append(scene)
    return True


def _reply(draft: _Draft, speakers: Speakers, text: str, gate: int) -> Clip | None:
    """The reply to `text`; None: it would not be over in time if the gate opened in micro-turn `gate`."""
    reply = speakers.clip(speakers.replies[reply_to(text.split())])
    return reply if gate + -(-len(reply.wave) // MICRO_TURN_SAMPLES) + 1 <= draft.n_turns else None


def _answer(draft: _Draft, reply: Clip, gate: int) -> None:
    """Put a reply behind a gate that opens in micro-turn `gate`."""
    heard = (gate + 1) * MICRO_TURN_SAMPLES
    end_turn = gate + -(-len(reply.wave) // MICRO_TURN_SAMPLES)
    draft.assistant[heard : heard + len(reply.wave)] = reply.wave
    draft.speech.append(Speech(gate, end_turn, tuple(_shifted(word, heard) for word in reply.words)))
    draft.replies.append(reply.text)
    draft.reply_span = (heard, heard + int(reply.words[-1].end_s * SAMPLE_RATE))
    draft.free = heard + len(reply.wave)


def _type(rng: np.random.Generator, draft: _Draft, speakers: Speakers) -> None:
    """Typed turns, one soon after the other, until the session is full."""
    replies = list(speakers.replies)
    turn = draft.free // MICRO_TURN_SAMPLES
    while True:
        text = sample_user_text(rng)[1]
        if rng.random() < 0.5:  # every reply equally often: spoken questions ask for few of them
            text = f"say {replies[int(rng.integers(len(replies)))]}"
        if reply_to(text.split()) not in speakers.replies:
            continue
        reply = _reply(draft, speakers, text, turn)
        if reply is None:
            return
        _answer(draft, reply, turn)
        draft.typed.append((turn, text))
        draft.scenes.append("typed")
        turn = draft.speech[-1].end_turn + 1 + int(rng.exponential(1.0))


def _shifted(word: Word, samples: int) -> Word:
    return Word(word.text, word.start_s + samples / SAMPLE_RATE, word.end_s + samples / SAMPLE_RATE)


def _distract(rng: np.random.Generator, draft: _Draft) -> bool:
    """A cough, from when the last reply began to somewhat after it; False if it does not fit."""
    cough = _cough(rng)
    start = int(rng.integers(draft.reply_span[0], draft.free + SAMPLE_RATE))
    if start + len(cough) > len(draft.voice):
        return False
    draft.voice[start : start + len(cough)] += cough
    draft.free = max(draft.free, start + len(cough))
    draft.scenes.append("distraction")
    return True


def _user(rng: np.random.Generator, speakers: Speakers, engines: tuple[tuple[str, float], ...]) -> str:
    """A voice: first the engine by its share (of those that the bank has), then by utterance within it."""
    present = [(engine, share) for engine, share in engines if engine in speakers.engines]
    if not present:
        present = [(engine, 1.0) for engine in speakers.engines]
    shares = np.array([share for _, share in present])
    voices = speakers.engines[present[int(rng.choice(len(present), p=shares / shares.sum()))][0]]
    return voices[int(rng.integers(len(voices)))]


def _fill(rng: np.random.Generator, draft: _Draft, speakers: Speakers, voice: str, weights: Weights) -> None:
    """Events one after the other until several in a row found no room."""
    rate = float(np.exp(rng.uniform(np.log(0.85), np.log(1.18))))
    odds = np.array([weights.exchange, weights.hesitation, weights.barge_in, weights.distraction])
    misses = 0
    while misses < 4:
        kind = ("exchange", "hesitation", "barge_in", "distraction")[int(rng.choice(4, p=odds / odds.sum()))]
        if kind == "distraction":
            misses += not _distract(rng, draft)
            continue
        clip = _turn(rng, speakers, voice, weights, rate)
        if clip is not None and kind == "hesitation":
            clip = _hesitant(rng, clip)
        if clip is None:
            misses += 1
            continue
        start = _barge_in_start(rng, draft) if kind == "barge_in" else None
        interrupts = start is not None
        if start is None:
            start = draft.free + int((0.15 + rng.exponential(0.6)) * SAMPLE_RATE)
        if kind == "barge_in" and not interrupts:
            kind = "exchange"
        misses = 0 if _place(draft, speakers, clip, start, kind, interrupts) else misses + 1


# --- the session


def _babble(rng: np.random.Generator, speakers: Speakers, n: int, talkers: int = 4) -> np.ndarray:
    """`[N]` float32 at unit level: several of the bank's voices talking at once without end."""
    mixed = np.zeros(n, np.float32)
    for _ in range(talkers):
        at = -int(rng.integers(SAMPLE_RATE))
        while at < n:
            wave = edits.levelled(speakers.clip(int(speakers.users[int(rng.integers(len(speakers.users)))])), 1.0).wave
            low, high = max(at, 0), min(at + len(wave), n)
            if high > low:
                mixed[low:high] += wave[low - at : high - at]
            at += len(wave) + int(rng.integers(SAMPLE_RATE // 4))
    return mixed / np.float32(np.sqrt(talkers))


def make_conversation(
    rng: np.random.Generator,
    speakers: Speakers,
    weights: Weights = Weights(),
    n_turns: int = 100,
    channel: Channel | None = None,
) -> Conversation:
    """A session of `n_turns` micro-turns with one user.

    Args:
      rng: everything random comes from it.
      speakers: whose voices.
      weights: how often each scenario.
      n_turns: micro-turns of 200 ms; 100 hold about five exchanges.
      channel: the user's room and line; None draws one, `channel.CLEAN` leaves the voice as it is.

    Returns:
      A conversation of `3200 * n_turns` samples. `scenario` names its events in order, `expected` its replies in
      order, joined by " | " (an interrupted reply in full).
    """
    n = n_turns * MICRO_TURN_SAMPLES
    draft = _Draft(n_turns, np.zeros(n, np.float32), np.zeros(n, np.float32))
    draft.free = int(rng.exponential(0.5) * SAMPLE_RATE) + int(rng.integers(MICRO_TURN_SAMPLES))
    if rng.random() < weights.silence:
        for _ in range(int(rng.integers(4))):
            draft.free = int(rng.integers(n))
            _distract(rng, draft)
        draft.scenes.insert(0, "silence")
    elif rng.random() < weights.typed:
        _type(rng, draft, speakers)
    else:
        _fill(rng, draft, speakers, _user(rng, speakers, weights.engines), weights)
    if channel is None:
        channel = draw_channel(rng)
    babble = _babble(rng, speakers, n) if channel.babble_db is not None else None
    fresh = rng.random() < 0.3
    return Conversation(
        user=apply_channel(rng, channel, draft.voice, draft.assistant, babble),
        assistant=draft.assistant,
        user_words=tuple(draft.words),
        speech=tuple(draft.speech),
        typed=tuple(draft.typed),
        clock_s=0.0 if fresh else float(np.exp(rng.uniform(np.log(1.0), np.log(4 * 3600.0)))),
        wall_clock_s=float(rng.uniform(1.70e9, 2.05e9)),
        scenario=" ".join(draft.scenes),
        expected=" | ".join(draft.replies),
        user_end_s=tuple(draft.ends_s),
    )
