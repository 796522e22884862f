"""The first task as text: what users say, and the one right reply to what was heard. Pure: no audio, no state.

`sample_user_text` draws what a user says, `reply_to` is the answer that is right for a sequence of heard words, and
`assistant_texts` lists every reply that training needs, so that each is synthesised once, as a whole utterance, in the
one model voice. Called by `jaxtml.data.voices.registry` (what to synthesise), `jaxtml.data.talks.mix` (what to answer),
`jaxtml.evals` (which answer is right) and the trainer of the tokenizer (`corpus`).

| intent | the user says | the reply |
|---|---|---|
| greet | good morning | good morning |
| repeat | repeat after me monday; say red green; alpha bravo | the words named |
| number | my number is forty two; the code is three nine one; three nine one | the number, the digits |
| sum | what is three plus four; nine minus two | it is seven |
| yes_no | is four more than two; is july a month; is a cat a colour | yes it is; no it is not |
| other | i have a dog; plus monday the | i see |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TO_NINETEEN = (*DIGITS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
                "eighteen", "nineteen")  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBER_WORDS = frozenset((*_TO_NINETEEN, *_TENS))

PHONETIC = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima",
            "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey",
            "xray", "yankee", "zulu")  # fmt: skip
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
          "december")  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "black", "white", "brown")
ANIMALS = ("cat", "dog", "cow", "horse", "pig", "bird", "fish", "mouse")

KINDS = {"day": DAYS, "month": MONTHS, "colour": COLOURS, "animal": ANIMALS}
_NAMES = frozenset((*PHONETIC, *DAYS, *MONTHS, *COLOURS, *ANIMALS))
_ARTICLE = {"day": "a", "month": "a", "colour": "a", "animal": "an"}

GREETINGS = {
    "hello": "hello",
    "hello there": "hello",
    "hi": "hello",
    "hi there": "hello",
    "hey": "hello",
    "hey there": "hello",
    "good morning": "good morning",
    "good afternoon": "good afternoon",
    "good evening": "good evening",
    "thank you": "you are welcome",
    "goodbye": "goodbye",
}
YES, NO, I_SEE = "yes it is", "no it is not", "i see"

# Longest first: the first carrier that opens the sentence is the one that was meant.
_SAY = (("repeat", "after", "me"), ("please", "repeat"), ("please", "say"), ("repeat",), ("say",))
_OWNERS = ("the", "my")
_MAX_OPERAND = 12  # of sums
_MAX_COMPARED = 20

INTENT_WEIGHTS = {"greet": 0.08, "repeat": 0.30, "number": 0.22, "sum": 0.17, "yes_no": 0.16, "other": 0.07}


# --- numbers and the closed set of things that get said back


def number_words(value: int) -> str:
    """0..99 in words, the tens and the ones apart: 42 -> "forty two"."""
    if value < 20:
        return _TO_NINETEEN[value]
    tens, ones = divmod(value, 10)
    return _TENS[tens - 2] + (f" {DIGITS[ones]}" if ones else "")


@cache
def _number_values() -> dict[tuple[str, ...], int]:
    return {tuple(number_words(value).split()): value for value in range(100)}


def _first_by_hash(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """A fixed, evenly mixed choice of `count` texts that no library's random stream can change."""
    return tuple(sorted(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]))


@cache
def codes() -> tuple[str, ...]:
    """The 250 three-digit codes that are spoken back, in training and in evaluation alike."""
    return _first_by_hash([f"{a} {b} {c}" for a in DIGITS for b in DIGITS for c in DIGITS], 250)


@cache
def lists() -> tuple[str, ...]:
    """The lists of two or three different names of one kind that are spoken back."""
    chosen: list[str] = []
    for names, pairs, triples in (
        (PHONETIC, 90, 30),
        (MONTHS, 40, 8),
        (DAYS, 20, 4),
        (COLOURS, 20, 4),
        (ANIMALS, 20, 4),
    ):
        two = [f"{a} {b}" for a in names for b in names if a != b]
        three = [f"{pair} {c}" for pair in two for c in names if c not in pair.split()]
        chosen += [*_first_by_hash(two, pairs), *_first_by_hash(three, triples)]
    return tuple(chosen)


@cache
def _other_texts() -> tuple[str, ...]:
    return (
        *(f"i like {colour}" for colour in COLOURS),
        *(f"i have a {animal}" for animal in ANIMALS),
        *(f"my {animal} is {colour}" for animal in ANIMALS for colour in COLOURS),
        *(f"today is {day}" for day in DAYS),
        *(f"it is {month} now" for month in MONTHS),
    )


def assistant_texts() -> list[str]:
    """Every reply that training and evaluation need, each once (under 700)."""
    texts = [
        *GREETINGS.values(),
        *sorted(_NAMES),
        *lists(),
        *(number_words(value) for value in range(100)),
        *codes(),
        *(f"it is {number_words(value)}" for value in range(2 * _MAX_OPERAND + 1)),
        YES,
        NO,
        I_SEE,
    ]
    return list(dict.fromkeys(texts))


# --- what was heard -> the right reply


def _said_after_carrier(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """What "say", "repeat after me" ... asks to be said; None without such an opening; () while nothing follows it."""
    for carrier in _SAY:
        if words[: len(carrier)] == carrier:
            return words[len(carrier) :]
    return None


def _told(words: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """("number" | "code", the words told) of "my number is ...", "the code is ..."."""
    if len(words) >= 3 and words[0] in _OWNERS and words[1] in ("number", "code") and words[2] == "is":
        return words[1], words[3:]
    return None


def _sum(words: tuple[str, ...]) -> str | None:
    if words[:2] == ("what", "is"):
        words = words[2:]
    for sign, name in ((1, "plus"), (-1, "minus")):
        if words.count(name) == 1:
            at = words.index(name)
            left, right = _number_values().get(words[:at]), _number_values().get(words[at + 1 :])
            if left is None or right is None:
                return None
            value = left + sign * right
            return f"it is {'minus ' if value < 0 else ''}{number_words(abs(value))}" if abs(value) < 100 else None
    return None


def _yes_no(words: tuple[str, ...]) -> str | None:
    if words[:1] != ("is",):
        return None
    for name, sign in (("more", 1), ("less", -1)):
        if words.count(name) == 1:
            at = words.index(name)
            left, right = _number_values().get(words[1:at]), _number_values().get(words[at + 2 :])
            if words[at + 1 : at + 2] != ("than",) or left is None or right is None:
                return None
            return YES if sign * (left - right) > 0 else NO
    rest = words[2:] if words[1:2] in (("a",), ("an",)) else words[1:]
    if len(rest) == 3 and rest[1] in ("a", "an") and rest[2] in KINDS and rest[0] in _NAMES | _NUMBER_WORDS:
        return YES if rest[0] in KINDS[rest[2]] else NO
    return None


def reply_to(words: Sequence[str]) -> str:
    """The one right reply to a user's turn, from its heard words (lower case).

    Wider than what `sample_user_text` draws, so that it also judges an answer to a mishearing: whatever naming words
    were heard are the ones to say back.
    """
    words = tuple(words)
    greeting = GREETINGS.get(" ".join(words))
    if greeting is not None:
        return greeting
    asked = _said_after_carrier(words)
    if asked is not None:
        return " ".join(asked) if asked else I_SEE
    told = _told(words)
    if told is not None:
        return " ".join(told[1]) if told[1] and _NUMBER_WORDS.issuperset(told[1]) else I_SEE
    for answer in (_sum(words), _yes_no(words)):
        if answer is not None:
            return answer
    if len(words) >= 2 and (_NAMES | _NUMBER_WORDS).issuperset(words):
        return " ".join(words)
    return I_SEE


def is_complete(words: Sequence[str]) -> bool:
    """Whether a user may be done after these words: they are a sentence of the grammar as they stand."""
    words = tuple(words)
    text = " ".join(words)
    if text in GREETINGS or text in _other_texts():
        return True
    three_digits = len(words) == 3 and set(DIGITS).issuperset(words)
    asked, told = _said_after_carrier(words), _told(words)
    if asked is not None:
        return bool(asked) and (_NAMES.issuperset(asked) or _NUMBER_WORDS.issuperset(asked))
    if told is not None:
        what, said = told
        return said in _number_values() if what == "number" else len(said) == 3 and set(DIGITS).issuperset(said)
    if _sum(words) is not None or _yes_no(words) is not None or three_digits:
        return True
    return len(words) in (2, 3) and _NAMES.issuperset(words)


def incomplete_after(words: Sequence[str], k: int) -> bool:
    """Whether a pause after the first `k` of `words` leaves the sentence open, so that nobody may take over there."""
    return 0 < k < len(words) and not is_complete(words[:k])


# --- what users say


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _repeat_text(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.35:
        return _pick(rng, lists())
    if kind < 0.65:
        said = _pick(rng, lists())
    elif kind < 0.85:
        said = _pick(rng, sorted(_NAMES))
    else:
        said = number_words(int(rng.integers(100)))
    return f"{' '.join(_SAY[int(rng.integers(len(_SAY)))])} {said}"


def _number_text(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.4:
        return _pick(rng, codes())
    what, value = ("code", _pick(rng, codes())) if kind < 0.65 else ("number", number_words(int(rng.integers(100))))
    return f"{_pick(rng, _OWNERS)} {what} is {value}"


def _sum_text(rng: np.random.Generator) -> str:
    left, right = sorted(rng.integers(_MAX_OPERAND + 1, size=2).tolist())
    plus = rng.random() < 0.6
    if not plus or rng.random() < 0.5:  # take away the smaller from the larger; add in either order
        left, right = right, left
    question = "what is " if rng.random() < 0.5 else ""
    return f"{question}{number_words(left)} {'plus' if plus else 'minus'} {number_words(right)}"


def _yes_no_text(rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        left, right = rng.integers(_MAX_COMPARED + 1, size=2).tolist()
        return f"is {number_words(left)} {_pick(rng, ('more', 'less'))} than {number_words(right)}"
    own, other = _pick(rng, list(KINDS)), _pick(rng, list(KINDS))
    name = _pick(rng, KINDS[own])
    asked = own if rng.random() < 0.4 else other  # near one half of the questions is true
    return f"is {'a ' if own == 'animal' else ''}{name} {_ARTICLE[asked]} {asked}"


def sample_user_text(rng: np.random.Generator) -> tuple[str, str]:
    """Draw `(intent, text)` of one user turn; its `reply_to` is always among `assistant_texts`."""
    intent = list(INTENT_WEIGHTS)[int(rng.choice(len(INTENT_WEIGHTS), p=list(INTENT_WEIGHTS.values())))]
    draw = {
        "greet": lambda: _pick(rng, list(GREETINGS)),
        "repeat": lambda: _repeat_text(rng),
        "number": lambda: _number_text(rng),
        "sum": lambda: _sum_text(rng),
        "yes_no": lambda: _yes_no_text(rng),
        "other": lambda: _pick(rng, _other_texts()),
    }
    return intent, draw[intent]()


def bare_list(rng: np.random.Generator) -> str:
    """A list of names, or a code, without a carrier: what single recorded words can be joined into."""
    return _pick(rng, lists() if rng.random() < 0.55 else codes())


@cache
def _openings() -> frozenset[tuple[str, ...]]:
    """The two words that sentences of the grammar begin with."""
    rng = np.random.default_rng(0)
    return frozenset(tuple(sample_user_text(rng)[1].split()[:2]) for _ in range(20_000))


def is_nonsense(words: Sequence[str]) -> bool:
    """Whether these two or more words begin no sentence: there is no rest to wait for, and the reply is `I_SEE`."""
    return tuple(words[:2]) not in _openings() and reply_to(words) == I_SEE


def nonsense(rng: np.random.Generator) -> str:
    """Two to four words of the task that are `is_nonsense`."""
    while True:
        words = [_pick(rng, VOCABULARY) for _ in range(int(rng.integers(2, 5)))]
        if is_nonsense(words):
            return " ".join(words)


VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        _NUMBER_WORDS
        | _NAMES
        | set(KINDS)
        | {word for text in (*GREETINGS, *_other_texts()) for word in text.split()}
        | {word for carrier in _SAY for word in carrier}
        | {"the", "my", "number", "code", "is", "what", "plus", "minus", "more", "less", "than", "a", "an"}
    )
)


def corpus(user_texts: int = 5000) -> Iterator[str]:
    """Example texts of both sides for training a tokenizer, the same at every call: words, replies, user turns."""
    yield from VOCABULARY
    yield from assistant_texts()
    rng = np.random.default_rng(0)
    for _ in range(user_texts):
        yield sample_user_text(rng)[1]
