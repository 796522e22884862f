"""The short-answer task as text: what users say, and the one right reply to the words that were heard.

The shipped model `tiny` is trained on the short-answer task. The user says a greeting, words to repeat, a number, a sum
or a question with the answer yes or no. The assistant answers in a few words. A sentence of the task is a text after
which the user may be done (`is_complete`). This file handles no audio and keeps no state.

`sample_user_text` draws what a user says. `reply_to` gives the right reply to a sequence of heard words.
`assistant_texts` lists every reply that training needs, so that each is synthesised once, as a whole, in the model's
one voice. `corpus` is what the tokenizer is trained on. Called by `jaxtml.data.bank_plan` (what to synthesise),
`jaxtml.data.talks` (what to say and answer), `jaxtml.evals` (which reply is right) and `jaxtml data`.

To change the task, change `sample_user_text`, `reply_to` and `assistant_texts` together: the tests check that the reply
to every drawn text is among the listed replies.

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

from jaxtml.strict_json import dumps

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
"""The names of each kind, for questions like "is july a month"."""

_NAMES = frozenset((*PHONETIC, *DAYS, *MONTHS, *COLOURS, *ANIMALS))
_ARTICLES = {"day": "a", "month": "a", "colour": "a", "animal": "an"}

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
"""The reply to each greeting."""

YES, NO, I_SEE = "yes it is", "no it is not", "i see"

# Longest first, so that the first one that matches is the one that was meant.
_REPEAT_REQUESTS = (("repeat", "after", "me"), ("please", "repeat"), ("please", "say"), ("repeat",), ("say",))
_OWNERS = ("the", "my")
_MAX_OPERAND = 12  # the largest number in a sum
_MAX_COMPARED = 20  # the largest number in "is A more than B"

INTENT_WEIGHTS = {"greet": 0.08, "repeat": 0.30, "number": 0.22, "sum": 0.17, "yes_no": 0.16, "other": 0.07}
"""Share of the user turns of each intent; they add up to 1."""


# --- numbers, and the fixed set of texts that the assistant says


def number_words(value: int) -> str:
    """Returns a number from 0 to 99 in words, the tens and the ones apart: 42 -> "forty two"."""
    if value < 20:
        return _TO_NINETEEN[value]
    tens, ones = divmod(value, 10)
    return _TENS[tens - 2] + (f" {DIGITS[ones]}" if ones else "")


@cache
def _number_values() -> dict[tuple[str, ...], int]:
    return {tuple(number_words(value).split()): value for value in range(100)}


def _first_by_hash(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """Returns a fixed choice of `count` texts, spread over all of them.

    The choice follows sha256 digests, so a new version of a random generator cannot change it.
    """
    return tuple(sorted(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]))


@cache
def codes() -> tuple[str, ...]:
    """Returns the 250 three-digit codes that the assistant says back, in training and in evaluation alike."""
    return _first_by_hash([f"{a} {b} {c}" for a in DIGITS for b in DIGITS for c in DIGITS], 250)


@cache
def lists() -> tuple[str, ...]:
    """Returns the lists of two or three different names of one kind that the assistant says back."""
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
    """Returns every reply that training and evaluation need, each once (fewer than 700)."""
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


# --- the right reply to what was heard


def _words_to_repeat(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the words that follow "say", "repeat after me" and the like.

    Returns None if the words begin with no such request, and () if nothing follows it yet.
    """
    for request in _REPEAT_REQUESTS:
        if words[: len(request)] == request:
            return words[len(request) :]
    return None


def _stated_number(words: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """Returns "number" or "code", and the words that follow, for "my number is ..." and "the code is ...".

    Returns None for any other opening.
    """
    if len(words) >= 3 and words[0] in _OWNERS and words[1] in ("number", "code") and words[2] == "is":
        return words[1], words[3:]
    return None


def _answer_to_sum(words: tuple[str, ...]) -> str | None:
    """Returns "it is seven" for "what is three plus four" or "nine minus two"; None for what is no sum."""
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


def _answer_to_yes_no(words: tuple[str, ...]) -> str | None:
    """Returns `YES` or `NO` for "is four more than two" or "is july a month"; None for what is no such question."""
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
    """Returns the one right reply to a user turn, from the words that were heard (lower case).

    Every text has a reply, not only those that `sample_user_text` draws. So the answer to a misheard user turn can be
    judged too. Names and numbers are said back as they were heard.
    """
    words = tuple(words)
    greeting = GREETINGS.get(" ".join(words))
    if greeting is not None:
        return greeting
    to_repeat = _words_to_repeat(words)
    if to_repeat is not None:
        return " ".join(to_repeat) if to_repeat else I_SEE
    stated = _stated_number(words)
    if stated is not None:
        _, value = stated
        return " ".join(value) if value and _NUMBER_WORDS.issuperset(value) else I_SEE
    for answer in (_answer_to_sum(words), _answer_to_yes_no(words)):
        if answer is not None:
            return answer
    if len(words) >= 2 and (_NAMES | _NUMBER_WORDS).issuperset(words):
        return " ".join(words)
    return I_SEE


def is_complete(words: Sequence[str]) -> bool:
    """Returns whether these words are a complete sentence of the task, so that the user may be done after them."""
    words = tuple(words)
    text = " ".join(words)
    if text in GREETINGS or text in _other_texts():
        return True
    three_digits = len(words) == 3 and set(DIGITS).issuperset(words)
    to_repeat, stated = _words_to_repeat(words), _stated_number(words)
    if to_repeat is not None:
        return bool(to_repeat) and (_NAMES.issuperset(to_repeat) or _NUMBER_WORDS.issuperset(to_repeat))
    if stated is not None:
        what, value = stated
        return value in _number_values() if what == "number" else len(value) == 3 and set(DIGITS).issuperset(value)
    if _answer_to_sum(words) is not None or _answer_to_yes_no(words) is not None or three_digits:
        return True
    return len(words) in (2, 3) and _NAMES.issuperset(words)


def incomplete_after(words: Sequence[str], k: int) -> bool:
    """Returns whether the sentence is open (not complete) after its first `k` words.

    The assistant must not begin to speak in a pause there.
    """
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
    return f"{' '.join(_REPEAT_REQUESTS[int(rng.integers(len(_REPEAT_REQUESTS)))])} {said}"


def _number_text(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < 0.4:
        return _pick(rng, codes())
    what, value = ("code", _pick(rng, codes())) if kind < 0.65 else ("number", number_words(int(rng.integers(100))))
    return f"{_pick(rng, _OWNERS)} {what} is {value}"


def _sum_text(rng: np.random.Generator) -> str:
    left, right = sorted(rng.integers(_MAX_OPERAND + 1, size=2).tolist())
    plus = rng.random() < 0.6
    if not plus or rng.random() < 0.5:  # A smaller number is taken from a larger one. Sums have either order.
        left, right = right, left
    opening = "what is " if rng.random() < 0.5 else ""
    return f"{opening}{number_words(left)} {'plus' if plus else 'minus'} {number_words(right)}"


def _yes_no_text(rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        left, right = rng.integers(_MAX_COMPARED + 1, size=2).tolist()
        return f"is {number_words(left)} {_pick(rng, ('more', 'less'))} than {number_words(right)}"
    own_kind, other_kind = _pick(rng, list(KINDS)), _pick(rng, list(KINDS))
    name = _pick(rng, KINDS[own_kind])
    asked = own_kind if rng.random() < 0.4 else other_kind  # so "yes" is right for about half of the questions
    return f"is {'a ' if own_kind == 'animal' else ''}{name} {_ARTICLES[asked]} {asked}"


def sample_user_text(rng: np.random.Generator) -> tuple[str, str]:
    """Draws `(intent, text)` of one user turn. The reply to the text is always among `assistant_texts`."""
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


def draw_bare_list(rng: np.random.Generator) -> str:
    """Draws a list of names, or a code, without a request such as "say" before it.

    About half of the user turns that are joined from single recorded words have such a text.
    """
    return _pick(rng, lists() if rng.random() < 0.55 else codes())


@cache
def _openings() -> frozenset[tuple[str, ...]]:
    """Returns the first two words of each sentence of the task, from 20,000 drawn ones."""
    rng = np.random.default_rng(0)
    return frozenset(tuple(sample_user_text(rng)[1].split()[:2]) for _ in range(20_000))


def is_nonsense(words: Sequence[str]) -> bool:
    """Returns whether the words are no beginning of a sentence of the task, and the reply to the words is `I_SEE`.

    Two words or more are needed: the first two are compared with those of the task's sentences. No further words can
    turn nonsense into a sentence, so the assistant need not wait for more.
    """
    return tuple(words[:2]) not in _openings() and reply_to(words) == I_SEE


def draw_nonsense(rng: np.random.Generator, words_said: Sequence[str] | None = None) -> str:
    """Draws two to four words of the task for which `is_nonsense` holds: of `words_said`, or of all words."""
    while True:
        words = [_pick(rng, words_said or VOCABULARY) for _ in range(int(rng.integers(2, 5)))]
        if is_nonsense(words):
            return " ".join(words)


VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        _NUMBER_WORDS
        | _NAMES
        | set(KINDS)
        | {word for text in (*GREETINGS, *_other_texts()) for word in text.split()}
        | {word for request in _REPEAT_REQUESTS for word in request}
        | {"the", "my", "number", "code", "is", "what", "plus", "minus", "more", "less", "than", "a", "an"}
    )
)
"""Every word of the task, in alphabetical order."""


def corpus(user_texts: int = 5000) -> Iterator[str]:
    """Yields example texts for training a tokenizer: words, replies, user turns. They are the same at every call."""
    yield from VOCABULARY
    yield from assistant_texts()
    rng = np.random.default_rng(0)
    for _ in range(user_texts):
        yield sample_user_text(rng)[1]


@cache
def fingerprint() -> str:
    """Returns a sha256 that changes with the texts of the task: what users say, the replies, what is complete.

    It is taken over the lists of texts and over 2,000 drawn texts. Part of the digest of a dataset.
    """
    rng = np.random.default_rng(0)
    drawn = [sample_user_text(rng)[1] for _ in range(2000)]
    texts = [
        VOCABULARY,
        assistant_texts(),
        sorted(GREETINGS.items()),
        _other_texts(),
        [draw_bare_list(rng) for _ in range(500)],
        [(text, reply_to(text.split()), _open_places(text)) for text in drawn],
    ]
    return hashlib.sha256(dumps(texts).encode()).hexdigest()


def _open_places(text: str) -> list[int]:
    words = text.split()
    return [k for k in range(len(words)) if incomplete_after(words, k)]
