"""`jaxtml info` describes a checkpoint without reading its weights, and compares it with its manifest."""

from __future__ import annotations

import json
import shutil
import zlib

import pytest
from safetensors import safe_open

from jaxtml.checkpoint.inkling.safetensors_file import read_header
from jaxtml.checkpoint.source import spec_table
from jaxtml.commands.main import run
from jaxtml.convert.conversion import convert
from jaxtml.convert.inspection import describe_checkpoint, verify_manifest
from jaxtml.errors import InputError
from jaxtml.model.spec import count_parameters

pytestmark = pytest.mark.usefixtures("many_chunks")


@pytest.mark.parametrize("result", ["orbax", "hf"], indirect=True)
def test_an_unchanged_checkpoint_passes_and_a_changed_bit_or_file_is_named(result, damage):
    assert verify_manifest(result) == len(json.loads((result / "manifest.json").read_text())["tensors"])
    name = damage(result)
    with pytest.raises(InputError, match=f"has changed since it was converted, convert again: {name} differ"):
        verify_manifest(result)
    (result / "config.json").write_text((result / "config.json").read_text() + " ")
    with pytest.raises(InputError, match=f"config.json, {name} differ"):
        verify_manifest(result)


def test_the_checksums_of_a_release_are_those_of_the_bytes_of_its_tensors(ours, tmp_path):
    convert(ours, tmp_path / "hf", to="hf")
    manifest = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    stored = read_header(tmp_path / "hf" / "model.safetensors")
    assert manifest["tensors"].keys() == stored.keys()
    raw = (tmp_path / "hf" / "model.safetensors").read_bytes()
    for name, tensor in stored.items():
        checksum = zlib.crc32(raw[tensor.start : tensor.start + tensor.nbytes])
        record = {"dtype": tensor.dtype, "shape": list(tensor.shape), "crc32": f"{checksum:08x}"}
        assert manifest["tensors"][name] == record, name
    with safe_open(tmp_path / "hf" / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == stored.keys()
    config = (tmp_path / "hf" / "config.json").read_bytes()
    assert manifest["files"]["config.json"] == f"{zlib.crc32(config):08x}"


def test_a_changed_dtype_is_a_difference(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "ck")
    file = tmp_path / "ck" / "state" / "norm.weight" / "zarr.json"
    file.write_text(file.read_text().replace('"bfloat16"', '"float16"'))
    with pytest.raises(InputError, match="norm/weight differ"):
        verify_manifest(tmp_path / "ck")


def test_all_missing_tensors_and_changed_files_are_named(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "ck")
    for name in ("embed.weight", "norm.weight"):
        shutil.rmtree(tmp_path / "ck" / "state" / name / "c")
    (tmp_path / "ck" / "released" / "LICENSE").write_text("none")
    with pytest.raises(InputError, match="released/LICENSE, embed/weight, norm/weight differ"):
        verify_manifest(tmp_path / "ck")


@pytest.mark.parametrize("text", ["{}", "[1]", "{", "null", '{"version": 1, "source": "", "tensors": 3, "files": {}}'])
def test_a_bad_or_missing_manifest_is_refused(text, ours, tmp_path):
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


def test_info_verifies_a_checkpoint_and_refuses_to_verify_a_config(ours, capsys):
    for args, status in ((["info", str(ours), "--verify"], 0), (["info", "tiny", "--verify"], 2)):
        with pytest.raises(SystemExit) as exit_:
            run(["jaxtml", *args])
        assert exit_.value.code == status
    printed = capsys.readouterr()
    assert "tensors are as they were written" in printed.out
    assert "tiny is not a checkpoint: --verify needs" in printed.err


def test_a_description_counts_what_the_checkpoint_has(full_release, ours, tmp_path):
    description = describe_checkpoint(full_release)
    release_specs, our_specs = description.specs, describe_checkpoint(ours).specs
    declared_specs = spec_table(description.config)
    in_release, in_ours, declared = (count_parameters(s)[0] for s in (release_specs, our_specs, declared_specs))
    assert sum(description.dtypes.values()) == in_release < in_ours == declared
    assert {path.split("/")[0] for path in our_specs.keys() - release_specs.keys()} == {
        "clock",
        "draft",
        "own",
        "flow",
        "vocoder",
    }
    assert description.uses == ["logits", "convert", "train --start-from"]
    assert "has no tokenizer.json, which converse, serve and training need, only vocab.tiktoken" in description.lacks[0]
    shutil.copytree(full_release, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert describe_checkpoint(tmp_path / "hf").uses[-2:] == ["converse", "serve"]
