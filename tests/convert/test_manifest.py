"""A result can be held to its manifest later, has its name only once it was verified, and keeps the files beside it."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors import safe_open

from jaxtml.cli import run
from jaxtml.convert import command, streaming
from jaxtml.convert.command import convert, opened, write
from jaxtml.convert.inspect import checked, described
from jaxtml.convert.safetensors_file import headers, write_at
from jaxtml.convert.source import Held, table
from jaxtml.convert.store import OrbaxSink
from jaxtml.errors import InputError
from jaxtml.model.spec import count

BESIDE = {
    "generation_config.json": '{"temperature": 0.7}\n',
    "preprocessor_config.json": '{"feature_size": 80}\n',
    "tokenizer_config.json": "{}\n",
    "chat_template.jinja": "{{ messages }}\n",
    "LICENSE": "Apache-2.0\n",
}
IDS = {"audio_token_id": 17, "image_token_id": 16, "audio_bos_token_id": 19, "image_bos_token_id": 18}


pytestmark = pytest.mark.usefixtures("many_chunks")


@pytest.fixture(scope="module")
def release(config, lively, tmp_path_factory) -> Path:
    """A release with all that lies beside the weights of one."""
    folder = tmp_path_factory.mktemp("release") / "hf"
    write(Held(config, lively(config)), folder, "memory", "hf", "bfloat16")
    said = json.loads((folder / "config.json").read_text())
    said["text_config"] |= {"eos_token_id": 7, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(said | IDS))
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    (folder / "manifest.json").unlink()  # nobody else writes one
    return folder


@pytest.fixture(scope="module")
def ours(release, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "ours"
    convert(release, folder)
    return folder


def test_the_files_of_a_release_come_back_and_so_do_the_ids_of_its_config(release, ours, tmp_path):
    assert not [name for name in BESIDE if (ours / name).exists()], "ours keeps them in a folder of their own"
    convert(ours, tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "hf", to="hf")
    for name, text in BESIDE.items():
        assert (tmp_path / "hf" / name).read_text() == text
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {name: config[name] for name in IDS} == IDS
    assert (config["text_config"]["eos_token_id"], config["text_config"]["bos_token_id"]) == (7, None)
    assert opened(tmp_path / "hf").config.backbone == opened(release).config.backbone


def test_the_checksums_of_a_release_are_those_of_its_tensors_bytes(ours, tmp_path):
    convert(ours, tmp_path / "hf", to="hf")
    manifest = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    stored = headers(tmp_path / "hf" / "model.safetensors")
    assert manifest["tensors"].keys() == stored.keys()
    raw = (tmp_path / "hf" / "model.safetensors").read_bytes()
    for name, tensor in stored.items():
        found = zlib.crc32(raw[tensor.start : tensor.start + tensor.nbytes])
        assert manifest["tensors"][name] == f"{found:08x}", name
    with safe_open(tmp_path / "hf" / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == stored.keys()
    text = (tmp_path / "hf" / "config.json").read_bytes()
    assert manifest["files"]["config.json"] == f"{zlib.crc32(text):08x}"


@pytest.fixture
def result(request, ours, tmp_path) -> Path:
    if request.param == "hf":
        convert(ours, tmp_path / "result", to="hf")
    else:
        shutil.copytree(ours, tmp_path / "result")
    return tmp_path / "result"


def _damage(folder: Path) -> str:
    """Changes one bit of one tensor; returns its name in the manifest."""
    if (folder / "model.safetensors").is_file():
        name = "model.llm.layers.2.attn.wq_du.weight"
        stored = headers(folder / "model.safetensors")[name]
        write_at(stored, 5, np.array([stored.mapped().view(np.uint8).reshape(-1)[5] ^ 1], np.uint8))
        return name
    file = next(file for file in (folder / "state" / "embed.weight" / "c").rglob("*") if file.is_file())
    raw = bytearray(file.read_bytes())
    raw[9] ^= 1
    file.write_bytes(raw)
    return "embed/weight"


@pytest.mark.parametrize("result", ["orbax", "hf"], indirect=True)
def test_what_is_as_it_was_written_passes_and_a_changed_bit_or_file_is_named(result):
    assert checked(result) == len(json.loads((result / "manifest.json").read_text())["tensors"])
    name = _damage(result)
    with pytest.raises(InputError, match=f"is not as it was written: {name} differ"):
        checked(result)
    (result / "config.json").write_text((result / "config.json").read_text() + " ")
    with pytest.raises(InputError, match=f"config.json, {name} differ"):
        checked(result)


@pytest.mark.parametrize("text", ["{}", "[1]", "{", '{"source": "", "tensors": 3, "files": {}}'])
def test_a_manifest_that_is_none_is_one_line(text, ours, tmp_path):
    shutil.copytree(ours, tmp_path / "ck")
    (tmp_path / "ck" / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="manifest.json is damaged"):
        checked(tmp_path / "ck")
    (tmp_path / "ck" / "manifest.json").unlink()
    with pytest.raises(InputError, match="has no manifest.json"):
        checked(tmp_path / "ck")


def test_info_verifies_a_checkpoint_and_nothing_else(ours, tmp_path, capsys):
    for args, status in ((["info", str(ours), "--verify"], 0), (["info", "tiny", "--verify"], 2)):
        with pytest.raises(SystemExit) as ended:
            run(["jaxtml", *args])
        assert ended.value.code == status
    printed = capsys.readouterr()
    assert "tensors are as they were written" in printed.out
    assert "tiny is no checkpoint: there is nothing to --verify" in printed.err


@pytest.mark.parametrize("result", ["orbax", "hf"], indirect=True)
def test_a_result_can_be_verified_again_by_the_same_conversion_alone(result, release, ours, tmp_path):
    to = "hf" if (result / "model.safetensors").is_file() else "orbax"
    source = ours if to == "hf" else release
    if to == "orbax":
        shutil.rmtree(result)
        convert(source, result)
    before = (result / "manifest.json").stat().st_mtime_ns
    assert "tensors equal" in convert(source, result, to=to, verify=True)
    assert (result / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="exists: name a new directory"):
        convert(source, result, to=to)
    with pytest.raises(InputError, match="exists: name a new directory"):
        convert(source, result, to=to, dtype="float32", verify=True)
    _damage(result)
    with pytest.raises(InputError, match="differs from its source in 1 of"):
        convert(source, result, to=to, verify=True)
    assert result.is_dir()


def test_a_result_that_is_not_its_source_gets_no_name_and_the_next_conversion_begins_anew(
    release, tmp_path, monkeypatch
):
    write_ = OrbaxSink.write

    def wrong(self, path, index, values):
        return write_(self, path, index, values + 1 if path == "norm/weight" else values)

    with monkeypatch.context() as patched:
        patched.setattr(OrbaxSink, "write", wrong)
        with pytest.raises(InputError, match="in 1 of .* in norm/weight; the result is left as .*.out.converting"):
            convert(release, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == [".out.converting"]
    assert "tensors equal" in convert(release, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_logits_are_compared_where_memory_allows(release, tmp_path, monkeypatch):
    needed = 2 * streaming.nbytes(table(opened(release).config), lambda path: np.dtype(np.float32))
    free = psutil.virtual_memory()
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: free._replace(available=needed - 1))
    said = convert(release, tmp_path / "out", verify=True)
    assert "tensors equal, logits not compared: that takes" in said
    monkeypatch.setattr(command.psutil, "virtual_memory", lambda: free._replace(available=needed))
    assert "logits of 64 tokens too" in convert(release, tmp_path / "out", verify=True)


def test_info_counts_what_a_checkpoint_holds(release, ours):
    (config, held, said), (_, all_of, _) = described(release), described(ours)
    assert said["uses"] == ["logits", "convert", "train --start-from"]
    assert sum(said["dtypes"].values()) == count(held)[0] < count(all_of)[0] == count(table(config))[0]
    assert {path.split("/")[0] for path in all_of.keys() - held.keys()} == {"clock", "own", "flow", "vocoder"}


def test_an_unfinished_download_is_told_as_one(release, tmp_path):
    (tmp_path / "config.json").write_bytes((release / "config.json").read_bytes())
    weight_map = {"model.llm.norm.weight": "model-00001-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="no model-00001-of-00002.safetensors in .*: the checkpoint is incomplete"):
        opened(tmp_path)
