"""When each scenario's user turn and reply are heard. All timing rules of the training data are in this file.

A scenario is a function `(rng, draft, user) -> bool`. It writes one event into the draft of a session, or returns False
and writes nothing where the event finds no room. `jaxtml.data.talks.mix` draws scenarios and calls them.

- **Takeover.** The gate is the model's decision to speak or to listen in a micro-turn. The user's sound ends in
  micro-turn `i`, and the gate opens in micro-turn `i + 1`. The model has then heard 200 to 400 ms without the user. The
  reply is heard from sample `3200 (i + 2)`, 200 to 400 ms after the end of the user's sound.
- **Hesitation.** The user pauses for 0.4 to 1.6 s where the sentence is not complete yet. The assistant waits.
- **Barge-in.** The user starts in micro-turn `j` while the assistant speaks. Micro-turn `j` is the last one in
  which it speaks, so its voice is silent from sample `3200 (j + 2)`, 200 to 400 ms after the user's start. Words that
  the assistant has not finished go to `Speech.unsaid`. Then the assistant answers the new user turn.
- **Typing.** The user types in micro-turn `i` and does not speak. The gate opens in `i`, where the text is known.
- **Aside.** A person says a line that is not for the assistant, as loud as the user or a little softer. The words are
  transcribed as those of the user are, and the gate stays closed.
- **Side talk.** The same, 15 dB or more below the user, at any time. It is not transcribed, as babble is not. A reply
  goes on.
- **Distraction, silence.** The user coughs or knocks, or does nothing at all. There is no reply.
"""

from __future__ import annotations

import numpy as np

from jaxtml.data.talks import edits
from jaxtml.data.talks.background_sounds import cough
from jaxtml.data.talks.edits import Clip
from jaxtml.data.talks.session_draft import SessionDraft
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.talks.user_turns import SessionUser, draw_user_turn, hesitate
from jaxtml.data.talks.vocal_tract import draw_vocal_tract, reshape
from jaxtml.data.tasks.scenarios import reply_to, sample_user_text
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

_MIN_CUT_OFF = 800
"""The fewest samples of a reply that a barge-in cuts off. If it cut off less, it would hardly be an interruption."""


def exchange(rng: np.random.Generator, draft: SessionDraft, user: SessionUser) -> bool:
    """Writes a user turn and its reply. Both sides are silent before the user turn."""
    clip = draw_user_turn(rng, user)
    return clip is not None and _place_exchange(draft, user, clip, _after_a_pause(rng, draft), "exchange")


def hesitation(rng: np.random.Generator, draft: SessionDraft, user: SessionUser) -> bool:
    """Writes a user turn with a pause where its sentence is not complete yet, and the reply."""
    clip = draw_user_turn(rng, user)
    clip = None if clip is None else hesitate(rng, clip)
    return clip is not None and _place_exchange(draft, user, clip, _after_a_pause(rng, draft), "hesitation")


def barge_in(rng: np.random.Generator, draft: SessionDraft, user: SessionUser) -> bool:
    """Writes a user turn that interrupts the newest reply, and the reply to this user turn.

    If no reply is long enough to be interrupted, the user turn becomes an exchange.
    """
    clip = draw_user_turn(rng, user)
    if clip is None:
        return False
    start = _barge_in_start(rng, draft)
    if start is None:
        return _place_exchange(draft, user, clip, _after_a_pause(rng, draft), "exchange")
    return _place_exchange(draft, user, clip, start, "barge_in", interrupts=True)


def distraction(rng: np.random.Generator, draft: SessionDraft, user: SessionUser) -> bool:
    """Writes a cough or a knock. The assistant does not answer."""
    del user  # A cough has no voice.
    return _place_cough(rng, draft)


def aside(rng: np.random.Generator, draft: SessionDraft, user: SessionUser) -> bool:
    """Writes a line that a person says to somebody else. The assistant hears it and does not answer."""
    return _place_aside(rng, draft, user.speakers)


def side_talk(rng: np.random.Generator, draft: SessionDraft, user: SessionUser) -> bool:
    """Writes a line that is said further away, perhaps while the assistant speaks. Nobody transcribes or answers it."""
    clip = user.speakers.draw_line(rng)
    if clip is None:
        return False
    clip = edits.set_level(reshape(clip, draw_vocal_tract(rng)), 10 ** (rng.uniform(-27, -15) / 20))
    start = int(rng.integers(draft.reply_span[0], draft.free + SAMPLE_RATE))
    end = start + len(clip.wave)
    if end > len(draft.user):
        return False
    draft.user[start:end] += clip.wave
    draft.free = max(draft.free, end)
    draft.scenarios.append("side_talk")
    return True


def _place_aside(rng: np.random.Generator, draft: SessionDraft, speakers: Speakers) -> bool:
    clip = speakers.draw_line(rng)
    if clip is None:
        return False
    clip = edits.set_level(reshape(clip, draw_vocal_tract(rng)), 10 ** (rng.uniform(-8, 2) / 20))
    start = _after_a_pause(rng, draft)
    end = start + len(clip.wave)
    if end > len(draft.user):
        return False
    draft.overhear(clip, start)
    draft.scenarios.append("aside")
    return True


def fill_with_silence(rng: np.random.Generator, draft: SessionDraft, speakers: Speakers, overheard: float) -> None:
    """Fills a session in which nobody speaks to the assistant.

    Up to three coughs are heard, each at a random time. With the chance `overheard`, people talk to each other instead.
    """
    if speakers.lines and rng.random() < overheard:
        while _place_aside(rng, draft, speakers):
            pass
    else:
        for _ in range(int(rng.integers(4))):
            draft.free = int(rng.integers(len(draft.user)))
            _place_cough(rng, draft)
    draft.scenarios.insert(0, "silence")


def _place_cough(rng: np.random.Generator, draft: SessionDraft) -> bool:
    """Writes a cough that starts after the newest reply begins, and at most a second after all other sound has ended.

    Returns False and writes nothing where it finds no room.
    """
    sound = cough(rng)
    start = int(rng.integers(draft.reply_span[0], draft.free + SAMPLE_RATE))
    end = start + len(sound)
    if end > len(draft.user):
        return False
    draft.user[start:end] += sound
    draft.free = max(draft.free, end)
    draft.scenarios.append("distraction")
    return True


def fill_with_typing(rng: np.random.Generator, draft: SessionDraft, speakers: Speakers) -> None:
    """Writes typed user turns and their replies, one soon after the other, until the session is full."""
    replies = list(speakers.replies)
    micro_turn = draft.free // MICRO_TURN_SAMPLES
    while True:
        text = sample_user_text(rng)[1]
        # Drawn sentences often have the same reply, such as "yes it is". So half of the texts ask for a reply that is
        # drawn from all replies.
        if rng.random() < 0.5:
            text = f"say {replies[int(rng.integers(len(replies)))]}"
        if reply_to(text.split()) not in speakers.replies:
            continue
        reply = _reply_clip(speakers, text)
        if not draft.has_room_for_reply(reply, micro_turn):
            return
        draft.place_reply(reply, micro_turn)
        draft.place_typed(text, micro_turn)
        draft.scenarios.append("typed")
        micro_turn = draft.speech[-1].end_micro_turn + 1 + int(rng.exponential(1.0))


def _place_exchange(
    draft: SessionDraft, user: SessionUser, clip: Clip, start: int, scenario: str, interrupts: bool = False
) -> bool:
    """Writes a user turn whose first sample is `start`, and its reply.

    Returns False and writes nothing where they find no room.
    """
    gate = (start + len(clip.wave) - 1) // MICRO_TURN_SAMPLES + 1  # the micro-turn after the one of the last sample
    reply = _reply_clip(user.speakers, clip.text)
    if not draft.has_room_for_reply(reply, gate):
        return False
    if interrupts:
        if gate <= start // MICRO_TURN_SAMPLES + 1:
            return False  # The user turn is so short that its reply would follow the interrupted one without a break.
        draft.interrupt_reply(start)
    draft.place_reply(reply, gate)
    draft.place_user_turn(clip, start)
    draft.scenarios.append(scenario)
    return True


def _reply_clip(speakers: Speakers, text: str) -> Clip:
    return speakers.clip(speakers.replies[reply_to(text.split())])


def _after_a_pause(rng: np.random.Generator, draft: SessionDraft) -> int:
    """Draws the first sample of a user turn that follows everything before it."""
    return draft.free + int((0.15 + rng.exponential(0.6)) * SAMPLE_RATE)


def _barge_in_start(rng: np.random.Generator, draft: SessionDraft) -> int | None:
    """Draws the sample at which to interrupt the newest reply. Returns None if the reply is too short for that."""
    start, end = draft.reply_span
    first = start + SAMPLE_RATE // 10
    last_micro_turn = (end - _MIN_CUT_OFF) // MICRO_TURN_SAMPLES - 2
    last = (last_micro_turn + 1) * MICRO_TURN_SAMPLES
    return int(rng.integers(first, last)) if draft.speech and last > first else None
