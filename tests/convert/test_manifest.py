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

from jaxtml.checkpoint.chunks import parameter_bytes
from jaxtml.checkpoint.inkling import sink
from jaxtml.checkpoint.inkling.safetensors_file import read_header, write_at
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.orbax.sink import OrbaxSink
from jaxtml.checkpoint.source import InMemorySource, spec_table
from jaxtml.commands.main import run
from jaxtml.convert import conversion, verification
from jaxtml.convert.conversion import convert, write_checkpoint
from jaxtml.convert.inspection import describe_checkpoint, verify_manifest
from jaxtml.errors import InputError
from jaxtml.model.spec import count_parameters

BESIDE = {
    "generation_config.json": '{"temperature": 0.7}\n',
    "preprocessor_config.json": '{"feature_size": 80}\n',
    "tokenizer_config.json": "{}\n",
    "chat_template.jinja": "{{ messages }}\n",
    "LICENSE": "Apache-2.0\n",
    "vocab.tiktoken": "YQ== 0\n",
}
NOT_CARRIED = {"hf_quant_config.json": "{}", "quantize_config.json": "{}", "manifest.json": "[]", ".cache": ""}
IDS = {"audio_token_id": 17, "image_token_id": 16, "audio_bos_token_id": 19, "image_bos_token_id": 18}


pytestmark = pytest.mark.usefixtures("many_chunks")


@pytest.fixture(scope="module")
def release(config, lively, tmp_path_factory) -> Path:
    """A release with all that lies beside the weights of one."""
    folder = tmp_path_factory.mktemp("release") / "hf"
    write_checkpoint(InMemorySource(config, lively(config)), folder, "memory", "hf", "bfloat16")
    said = json.loads((folder / "config.json").read_text())
    said["text_config"] |= {"eos_token_id": 7, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(said | IDS))
    for name, text in (BESIDE | NOT_CARRIED).items():
        (folder / name).write_text(text)
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
    assert not [name for name in NOT_CARRIED if (tmp_path / "hf" / name).exists() and name != "manifest.json"]
    assert verify_manifest(tmp_path / "hf"), "the release's own manifest is none of ours"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {name: config[name] for name in IDS} == IDS
    assert (config["text_config"]["eos_token_id"], config["text_config"]["bos_token_id"]) == (7, None)
    assert open_checkpoint(tmp_path / "hf").config.backbone == open_checkpoint(release).config.backbone


def test_the_checksums_of_a_release_are_those_of_its_tensors_bytes(ours, tmp_path):
    convert(ours, tmp_path / "hf", to="hf")
    manifest = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    stored = read_header(tmp_path / "hf" / "model.safetensors")
    assert manifest["tensors"].keys() == stored.keys()
    raw = (tmp_path / "hf" / "model.safetensors").read_bytes()
    for name, tensor in stored.items():
        found = zlib.crc32(raw[tensor.start : tensor.start + tensor.nbytes])
        said = {"dtype": tensor.dtype, "shape": list(tensor.shape), "crc32": f"{found:08x}"}
        assert manifest["tensors"][name] == said, name
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
        stored = read_header(folder / "model.safetensors")[name]
        write_at(stored, 5, np.array([stored.mapped().view(np.uint8).reshape(-1)[5] ^ 1], np.uint8))
        return name
    file = next(file for file in (folder / "state" / "embed.weight" / "c").rglob("*") if file.is_file())
    raw = bytearray(file.read_bytes())
    raw[9] ^= 1
    file.write_bytes(raw)
    return "embed/weight"


@pytest.mark.parametrize("result", ["orbax", "hf"], indirect=True)
def test_what_is_as_it_was_written_passes_and_a_changed_bit_or_file_is_named(result):
    assert verify_manifest(result) == len(json.loads((result / "manifest.json").read_text())["tensors"])
    name = _damage(result)
    with pytest.raises(InputError, match=f"has changed since it was converted, convert again: {name} differ"):
        verify_manifest(result)
    (result / "config.json").write_text((result / "config.json").read_text() + " ")
    with pytest.raises(InputError, match=f"config.json, {name} differ"):
        verify_manifest(result)


def test_a_dtype_that_was_changed_is_a_difference(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "ck")
    file = tmp_path / "ck" / "state" / "norm.weight" / "zarr.json"
    file.write_text(file.read_text().replace('"bfloat16"', '"float16"'))
    with pytest.raises(InputError, match="norm/weight differ"):
        verify_manifest(tmp_path / "ck")


def test_all_that_is_lost_is_told(ours, tmp_path, caplog):
    shutil.copytree(ours, tmp_path / "ck")
    for name in ("embed.weight", "norm.weight"):
        shutil.rmtree(tmp_path / "ck" / "state" / name / "c")
    (tmp_path / "ck" / "released" / "LICENSE").write_text("none")
    with pytest.raises(InputError, match="released/LICENSE, embed/weight, norm/weight differ"):
        verify_manifest(tmp_path / "ck")


@pytest.mark.parametrize("text", ["{}", "[1]", "{", "null", '{"version": 1, "source": "", "tensors": 3, "files": {}}'])
def test_a_manifest_that_is_none_is_one_line(text, ours, tmp_path):
    shutil.copytree(ours, tmp_path / "ck")
    (tmp_path / "ck" / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="manifest.json is not a manifest that `jaxtml convert` wrote"):
        verify_manifest(tmp_path / "ck")
    (tmp_path / "ck" / "manifest.json").write_text('{"version": 0}')
    with pytest.raises(InputError, match="another version of jaxtml"):
        verify_manifest(tmp_path / "ck")
    (tmp_path / "ck" / "manifest.json").unlink()
    with pytest.raises(InputError, match="has no manifest.json"):
        verify_manifest(tmp_path / "ck")


def test_info_verifies_a_checkpoint_and_nothing_else(ours, tmp_path, capsys):
    for args, status in ((["info", str(ours), "--verify"], 0), (["info", "tiny", "--verify"], 2)):
        with pytest.raises(SystemExit) as ended:
            run(["jaxtml", *args])
        assert ended.value.code == status
    printed = capsys.readouterr()
    assert "tensors are as they were written" in printed.out
    assert "tiny is not a checkpoint: --verify needs" in printed.err


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
    with pytest.raises(InputError, match="was made by another conversion, or .* has changed since"):
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
        with pytest.raises(InputError, match="in 1 of .* in norm/weight; the result is in .*.out.converting"):
            convert(release, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == [".out.converting"]
    assert "tensors equal" in convert(release, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_cannot_be_read_any_more_costs_no_work(release, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:

        def gone(*_: object) -> None:
            raise InputError("the source is gone")

        patched.setattr(conversion, "verify_conversion", gone)
        with pytest.raises(InputError, match="the source is gone"):
            convert(release, tmp_path / "out", verify=True)
    written: list[str] = []
    monkeypatch.setattr(OrbaxSink, "write", lambda self, path, *_: written.append(path))
    assert "tensors equal" in convert(release, tmp_path / "out", verify=True)
    assert not written


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_numbers_that_give_no_logits_are_verified_all_the_same(value, config, lively, tmp_path):
    params = lively(config)
    params["norm"]["weight"] = np.full_like(params["norm"]["weight"], value)
    write_checkpoint(InMemorySource(config, params), tmp_path / "source", "memory")
    assert "logits of 64 tokens too" in convert(tmp_path / "source", tmp_path / "out", verify=True)


def test_logits_that_are_others_than_the_same_numbers_give_fail(release, tmp_path, monkeypatch):
    given = iter([np.ones((1, 64, 3), np.float32), np.ones((1, 64, 3), np.float32) * 1.01])
    monkeypatch.setattr("jaxtml.convert.verification.text_logits", lambda *_: next(given))
    with pytest.raises(InputError, match="all tensors are equal, and the logits differ by 1.00e-02"):
        convert(release, tmp_path / "out", verify=True)


def test_shards_become_one_file_and_bring_no_index(ours, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sink, "SHARD_BYTES", 200_000)
        convert(ours, tmp_path / "shards", to="hf")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file() and verify_manifest(tmp_path / "shards")
    convert(tmp_path / "shards", tmp_path / "one", to="hf", verify=True)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists() and verify_manifest(tmp_path / "one")


def test_a_model_in_a_hubs_cache_is_not_named_by_its_commit(release, tmp_path):
    folder = tmp_path / "models--thinkingmachines--Inkling-Small" / "snapshots" / "0123abcd"
    shutil.copytree(release, folder)
    assert open_checkpoint(folder).config.name == "Inkling-Small"


def test_logits_are_compared_where_memory_allows(release, tmp_path, monkeypatch):
    needed = 2 * parameter_bytes(spec_table(open_checkpoint(release).config), lambda path: np.dtype(np.float32))
    free = psutil.virtual_memory()
    monkeypatch.setattr(verification.psutil, "virtual_memory", lambda: free._replace(available=needed - 1))
    said = convert(release, tmp_path / "out", verify=True)
    assert "tensors equal, logits not compared: that takes" in said
    monkeypatch.setattr(verification.psutil, "virtual_memory", lambda: free._replace(available=needed))
    monkeypatch.setattr(verification, "CGROUP", tmp_path / "group")
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "memory.current").write_text("1000\n")
    (tmp_path / "group" / "memory.max").write_text(f"{needed + 999}\n")
    assert "logits not compared" in convert(release, tmp_path / "out", verify=True)
    (tmp_path / "group" / "memory.max").write_text("max\n")
    assert "logits of 64 tokens too" in convert(release, tmp_path / "out", verify=True)


def test_info_counts_what_a_checkpoint_holds(release, ours, tmp_path):
    (config, held, said), (_, all_of, _) = describe_checkpoint(release), describe_checkpoint(ours)
    assert said["uses"] == ["logits", "convert", "train --start-from"]
    (tmp_path / "tokenizer.json").write_text("{}")
    shutil.copytree(release, tmp_path / "hf")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "hf")
    assert describe_checkpoint(tmp_path / "hf")[2]["uses"][-1] == "converse"
    present, complete, declared = (count_parameters(table)[0] for table in (held, all_of, spec_table(config)))
    assert sum(said["dtypes"].values()) == present < complete == declared
    assert {path.split("/")[0] for path in all_of.keys() - held.keys()} == {"clock", "own", "flow", "vocoder"}


def test_an_unfinished_download_is_told_as_one(release, tmp_path):
    (tmp_path / "config.json").write_bytes((release / "config.json").read_bytes())
    weight_map = {"model.llm.norm.weight": "model-00001-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="no model-00001-of-00002.safetensors in .*: the checkpoint is incomplete"):
        open_checkpoint(tmp_path)
