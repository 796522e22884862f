"""A checkpoint without `tokenizer.json` says so at the first command, with what to do about it."""

from __future__ import annotations

import shutil

import pytest
from absl import logging

from jaxtml.checkpoint.tokenizer import load_tokenizer
from jaxtml.convert.conversion import convert
from jaxtml.errors import InputError
from jaxtml.session.engine import Engine


def test_a_model_does_not_start_without_a_tokenizer(release):
    with pytest.raises(InputError, match="hf has no tokenizer.json, which converse, serve and training need: copy the"):
        Engine.load(release)


@pytest.mark.parametrize("name", ["vocab.tiktoken", "tokenizer.model", "vocab.json"])
def test_a_tokenizer_of_another_kind_is_named_with_the_way_to_make_tokenizer_json(name, tmp_path):
    (tmp_path / "released").mkdir()
    for folder in (tmp_path / "released", tmp_path):
        (folder / name).touch()
        with pytest.raises(InputError) as refused:
            load_tokenizer(tmp_path)
        assert f'only {name}: write it with transformers, AutoTokenizer.from_pretrained("{folder}")' in str(
            refused.value
        )


def test_a_conversion_warns_that_its_result_lacks_the_tokenizer(release, tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    convert(release, tmp_path / "out")
    assert "has no tokenizer.json" in caplog.text and "the result will lack it too" in caplog.text


def test_a_conversion_copies_the_tokenizer_and_a_git_lfs_pointer_is_refused(release, codec, tmp_path):
    shutil.copytree(release, tmp_path / "hf")
    codec.save(tmp_path / "hf" / "tokenizer.json")
    convert(tmp_path / "hf", tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").size == codec.size
    (tmp_path / "hf" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="is a Git LFS pointer"):
        load_tokenizer(tmp_path / "hf")
