"""The short-answer task: replies are right and listed, and complete sentences are told from open ones."""

import numpy as np
import pytest

from jaxtml.data.tasks import scenarios


@pytest.mark.parametrize(
    ("heard", "reply"),
    [
        ("hi there", "hello"),
        ("good evening", "good evening"),
        ("say red green", "red green"),
        ("repeat after me monday", "monday"),
        ("please say alpha bravo", "alpha bravo"),
        ("july may", "july may"),
        ("the number is forty two", "forty two"),
        ("my code is three nine one", "three nine one"),
        ("three nine one", "three nine one"),
        ("what is three plus four", "it is seven"),
        ("nine minus two", "it is seven"),
        ("twelve plus twelve", "it is twenty four"),
        ("is four more than two", "yes it is"),
        ("is seven less than three", "no it is not"),
        ("is four more than four", "no it is not"),
        ("is monday a day", "yes it is"),
        ("is a cat an animal", "yes it is"),
        ("is a cat a colour", "no it is not"),
        ("is november a month", "yes it is"),
        ("i have a dog", "i see"),
        ("what is plus four", "i see"),
        ("repeat after me", "i see"),
        ("", "i see"),
    ],
)
def test_reply_is_the_right_answer_to_what_was_heard(heard, reply):
    assert scenarios.reply_to(heard.split()) == reply


def test_a_misheard_list_is_said_back_as_it_was_heard():
    assert scenarios.reply_to(["monday", "alpha"]) == "monday alpha"
    assert scenarios.reply_to(["my", "code", "is", "three", "nine"]) == "three nine"


def test_every_reply_to_a_sampled_user_turn_is_listed_and_short():
    rng = np.random.default_rng(1)
    texts = scenarios.assistant_texts()
    assert len(texts) == len(set(texts)) <= 700
    for _ in range(4000):
        _, text = scenarios.sample_user_text(rng)
        reply = scenarios.reply_to(text.split())
        assert reply in texts
        assert 1 <= len(reply.split()) <= 5
        assert set(text.split()) <= set(scenarios.VOCABULARY)


def test_every_intent_is_drawn_by_its_weight_and_only_the_intent_other_gets_i_see():
    rng = np.random.default_rng(2)
    drawn = [scenarios.sample_user_text(rng) for _ in range(4000)]
    for intent, weight in scenarios.INTENT_WEIGHTS.items():
        assert abs(sum(d[0] == intent for d in drawn) / len(drawn) - weight) < 0.03
    for intent, text in drawn:
        assert (scenarios.reply_to(text.split()) == scenarios.I_SEE) == (intent == "other")


def test_yes_and_no_are_about_equally_often_right():
    rng = np.random.default_rng(3)
    drawn = [scenarios.sample_user_text(rng) for _ in range(6000)]
    replies = [scenarios.reply_to(text.split()) for intent, text in drawn if intent == "yes_no"]
    assert 0.35 < replies.count(scenarios.YES) / len(replies) < 0.65


def test_sampled_user_turns_are_complete_sentences():
    rng = np.random.default_rng(4)
    for _ in range(2000):
        _, text = scenarios.sample_user_text(rng)
        assert scenarios.is_complete(text.split()), text


@pytest.mark.parametrize(
    ("text", "open_after"),
    [
        ("what is three plus four", {1, 2, 3, 4}),
        ("my code is three nine one", {1, 2, 3, 4, 5}),
        ("the number is forty two", {1, 2, 3}),  # "the number is forty" is complete
        ("three nine one", {1, 2}),
        ("alpha bravo charlie", {1}),  # "alpha bravo" is complete
        ("say red green", {1}),
        ("good morning", {1}),
        ("is a cat an animal", {1, 2, 3, 4}),
        ("hi there", set()),
    ],
)
def test_a_pause_leaves_the_sentence_open_only_where_more_must_follow(text, open_after):
    words = text.split()
    assert {k for k in range(len(words) + 1) if scenarios.incomplete_after(words, k)} == open_after


def test_the_corpus_covers_the_vocabulary_and_is_the_same_at_every_call():
    first = list(scenarios.corpus(500))
    assert first == list(scenarios.corpus(500))
    assert set(scenarios.VOCABULARY) <= {word for text in first for word in text.split()}
    assert 115 <= len(scenarios.VOCABULARY) <= 150


def test_nonsense_begins_no_sentence_and_gets_i_see():
    rng = np.random.default_rng(5)
    drawn = [scenarios.draw_nonsense(rng).split() for _ in range(300)]
    assert len({" ".join(words) for words in drawn}) > 290
    openings = {tuple(scenarios.sample_user_text(rng)[1].split()[:2]) for _ in range(3000)}
    for words in drawn:
        assert set(words) <= set(scenarios.VOCABULARY) and scenarios.reply_to(words) == "i see"
        assert tuple(words[:2]) not in openings and not scenarios.is_complete(words)
