"""The files beside the weights of a release are copied, to our format and back."""

from __future__ import annotations

import json
import shutil

import pytest

from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.convert.conversion import convert
from jaxtml.convert.inspection import verify_manifest

pytestmark = pytest.mark.usefixtures("many_chunks")


def test_a_release_gets_its_extra_files_and_the_ids_of_its_config_back(
    full_release, ours, extra_files, files_of_weights, token_ids, tmp_path
):
    assert not [name for name in extra_files if (ours / name).exists()], "ours keeps them in a folder of their own"
    convert(ours, tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "hf", to="hf")
    for name, text in extra_files.items():
        assert (tmp_path / "hf" / name).read_text() == text
    assert not [name for name in files_of_weights if (tmp_path / "hf" / name).exists() and name != "manifest.json"]
    assert verify_manifest(tmp_path / "hf"), "the manifest is the new one, not the release's own"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {name: config[name] for name in token_ids} == token_ids
    assert (config["text_config"]["eos_token_id"], config["text_config"]["bos_token_id"]) == (7, None)
    assert open_checkpoint(tmp_path / "hf").config.backbone == open_checkpoint(full_release).config.backbone


def test_a_tokenizer_is_copied_both_ways(release, codec, tmp_path):
    shutil.copytree(release, tmp_path / "source")
    codec.save(tmp_path / "source" / "tokenizer.json")
    convert(tmp_path / "source", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    tokenizer = (tmp_path / "source" / "tokenizer.json").read_bytes()
    for folder in ("ours", "back"):
        assert (tmp_path / folder / "tokenizer.json").read_bytes() == tokenizer
