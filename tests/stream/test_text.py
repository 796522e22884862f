"""Any text can be encoded, ids stay below the control tokens, and a bad file is named in one clear line."""

import json

import pytest

from jaxtml.errors import InputError
from jaxtml.stream.text import TextCodec

TEXTS = ("hello there", "the number is forty two", "café naïve", "日本語 ok", "a\nb\tc", "42 + 1 = 43!", "🙂")


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_decoded_as_it_was_encoded(codec, text):
    ids = codec.encode(text)
    assert codec.decode(ids).strip() == text
    assert all(0 <= i < codec.size for i in ids)


def test_the_ids_of_a_text_are_those_of_its_words(codec):
    text = "the number is forty two"
    assert [i for word in text.split() for i in codec.encode(word)] == codec.encode(text)


def test_each_word_starts_with_a_space_so_that_text_can_be_split_into_words(codec):
    for word in ("two", "café", "a"):
        first, *rest = codec.encode(word)
        assert codec.decode([first]).startswith(" ")
        assert not any(codec.decode([i]).startswith(" ") for i in rest)


def test_a_word_of_the_corpus_has_fewer_tokens_than_letters(codec):
    assert len(codec.encode("number")) < len(" number")


def test_empty_text_has_no_ids_and_ids_outside_the_vocabulary_are_left_out(codec):
    assert codec.encode("") == [] and codec.decode([]) == ""
    ids = codec.encode("two")
    assert codec.decode([-1, *ids, codec.size, 10**6]) == codec.decode(ids)


def test_training_gives_the_same_tokenizer_for_the_same_corpus_and_keeps_to_its_size(tmp_path):
    corpus = ["say red green blue"] * 5
    first, second = TextCodec.train(corpus, 262), TextCodec.train(corpus, 262)
    assert first.size == second.size == 262
    assert first.encode("say red or blue") == second.encode("say red or blue")


def test_a_saved_tokenizer_reads_the_same(codec, tmp_path):
    codec.save(tmp_path / "tokenizer.json")
    loaded = TextCodec.load(tmp_path / "tokenizer.json")
    assert loaded.size == codec.size
    for text in TEXTS:
        assert loaded.encode(text) == codec.encode(text)


def test_a_missing_or_broken_tokenizer_is_named_in_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="no tokenizer at .*missing.json"):
        TextCodec.load(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match="broken.json is not a tokenizer file") as caught:
        TextCodec.load(tmp_path / "broken.json")
    assert "\n" not in str(caught.value)


def test_ids_follow_from_the_text_alone_whatever_the_file_asks_for(codec, tmp_path):
    codec.save(tmp_path / "odd.json")
    content = json.loads((tmp_path / "odd.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    content["padding"] |= {"pad_type_id": 0, "pad_token": "a"}
    content["model"]["dropout"] = 0.9
    (tmp_path / "odd.json").write_text(json.dumps(content))
    odd = TextCodec.load(tmp_path / "odd.json")
    assert all(odd.encode("what comes next") == codec.encode("what comes next") for _ in range(5))
