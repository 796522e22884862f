"""A result is verified before it is renamed to its destination, and can be verified again later."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import psutil
import pytest

from jaxtml.checkpoint.chunks import parameter_bytes
from jaxtml.checkpoint.inkling.safetensors_file import read_header, write_at
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.checkpoint.orbax.sink import OrbaxSink
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint
from jaxtml.checkpoint.source import InMemorySource, spec_table
from jaxtml.convert import conversion, verification
from jaxtml.convert.conversion import convert, write_checkpoint
from jaxtml.convert.inspection import verify_manifest
from jaxtml.convert.verification import compare_tensors
from jaxtml.errors import InputError

pytestmark = pytest.mark.usefixtures("many_chunks")


def test_verification_names_the_tensor_that_differs(release, tmp_path):
    convert(release, tmp_path / "ours")
    source = ReleasedCheckpoint(release)
    result, specs = OrbaxCheckpoint(tmp_path / "ours"), spec_table(source.config)
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert compare_tensors(source, result, specs) == len(manifest["tensors"])

    shutil.copytree(release, tmp_path / "changed")
    name = "model.llm.layers.3.attn.wq_du.weight"
    stored = read_header(tmp_path / "changed" / "model.safetensors")[name]
    values = np.array(stored.mapped())
    values[2, 3] += 1
    write_at(stored, 0, values)
    path, (repeat, layer) = next(key for key, tensor in source.tensors.items() if tensor.name == name)
    with pytest.raises(InputError, match=f"from its source in 1 of .* tensors, first in {path}/{repeat}/{layer}"):
        compare_tensors(ReleasedCheckpoint(tmp_path / "changed"), result, specs)


@pytest.mark.parametrize("result", ["orbax", "hf"], indirect=True)
def test_only_the_conversion_that_made_a_result_can_verify_it_again(result, full_release, ours, damage):
    to = "hf" if (result / "model.safetensors").is_file() else "orbax"
    source = ours if to == "hf" else full_release
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
    damage(result)
    with pytest.raises(InputError, match="differs from its source in 1 of"):
        convert(source, result, to=to, verify=True)
    assert result.is_dir()


@pytest.mark.parametrize("result", ["orbax", "hf"], indirect=True)
def test_a_source_that_differs_from_its_own_manifest_is_not_verified(result, tmp_path, damage, caplog):
    name = damage(result)
    for destination in ("first", "again"):
        with pytest.raises(verification.VerificationFailed, match=f"result is damaged or was changed: {name} differ"):
            convert(result, tmp_path / destination, verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result"]
    convert(result, tmp_path / "unverified")
    (result / "manifest.json").write_text("[]")  # of another program
    assert "tensors equal" in convert(result, tmp_path / "foreign", verify=True)
    assert "the values of the source are not compared with it" in caplog.text


def test_a_result_that_differs_is_not_put_at_its_destination_and_the_next_conversion_begins_anew(
    release, tmp_path, monkeypatch
):
    write = OrbaxSink.write

    def write_one_tensor_wrong(self, path, index, values):
        return write(self, path, index, values + 1 if path == "norm/weight" else values)

    with monkeypatch.context() as patched:
        patched.setattr(OrbaxSink, "write", write_one_tensor_wrong)
        with pytest.raises(InputError, match="in 1 of .* in norm/weight; the result is in .*.out.converting"):
            convert(release, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == [".out.converting"]
    assert "tensors equal" in convert(release, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_after_a_verification_that_could_not_read_the_source_no_chunk_is_written_again(release, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise InputError("the source is gone")

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "verify_conversion", fail)
        with pytest.raises(InputError, match="the source is gone"):
            convert(release, tmp_path / "out", verify=True)
    written: list[str] = []
    monkeypatch.setattr(OrbaxSink, "write", lambda self, path, *_: written.append(path))
    assert "tensors equal" in convert(release, tmp_path / "out", verify=True)
    assert not written


def test_a_model_whose_logits_are_all_zero_is_verified_too(releasable, lively, tmp_path):
    params = lively(releasable)
    params["norm"]["weight"] = np.zeros_like(params["norm"]["weight"])
    write_checkpoint(InMemorySource(releasable, params), tmp_path / "source", "memory")
    assert "logits of 64 tokens too" in convert(tmp_path / "source", tmp_path / "out", verify=True)


def test_values_that_are_not_finite_are_named_and_never_verified(release, tmp_path, caplog):
    source, name = tmp_path / "source", "model.llm.layers.3.attn.wq_du.weight"
    shutil.copytree(release, source)
    stored = read_header(source / "model.safetensors")[name]
    values = np.array(stored.mapped())
    values[2, 3] = np.nan
    write_at(stored, 0, values)
    (source / "manifest.json").unlink()  # with it, the source would be refused, because its checksums differ
    with pytest.raises(InputError, match=f"tensors are equal, and 1 of .* have NaN or infinite values, .*: {name};"):
        convert(source, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
    caplog.clear()
    convert(source, tmp_path / "out")
    assert re.search(rf"out has NaN or infinite values in 1 of \d+ tensors, as its source has: {name}\n", caplog.text)
    with pytest.raises(InputError, match="is as it was written, and 1 of .* tensors have NaN .*: layers/.*/attn/wq/"):
        verify_manifest(tmp_path / "out")


def test_finite_tensors_whose_logits_are_not_finite_are_not_verified(release, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "text_logits", lambda *_: np.full((1, 64, 3), np.nan, np.float32))
    with pytest.raises(InputError, match="are equal and finite, and the logits of both models have NaN"):
        convert(release, tmp_path / "out", verify=True)


def test_equal_tensors_with_other_logits_fail(release, tmp_path, monkeypatch):
    logits = iter([np.ones((1, 64, 3), np.float32), np.ones((1, 64, 3), np.float32) * 1.01])
    monkeypatch.setattr(verification, "text_logits", lambda *_: next(logits))
    with pytest.raises(InputError, match="all tensors are equal, and the logits differ by 1.00e-02"):
        convert(release, tmp_path / "out", verify=True)


def test_logits_are_compared_where_memory_allows(release, tmp_path, monkeypatch):
    needed = 2 * parameter_bytes(spec_table(open_checkpoint(release).config), lambda path: np.dtype(np.float32))
    memory = psutil.virtual_memory()
    monkeypatch.setattr(verification.psutil, "virtual_memory", lambda: memory._replace(available=needed - 1))
    summary = convert(release, tmp_path / "out", verify=True)
    assert "tensors equal, logits not compared: that takes" in summary
    monkeypatch.setattr(verification.psutil, "virtual_memory", lambda: memory._replace(available=needed))
    monkeypatch.setattr(verification, "CGROUP", tmp_path / "group")
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "memory.current").write_text("1000\n")
    (tmp_path / "group" / "memory.max").write_text(f"{needed + 999}\n")
    assert "logits not compared" in convert(release, tmp_path / "out", verify=True)
    (tmp_path / "group" / "memory.max").write_text("max\n")
    assert "logits of 64 tokens too" in convert(release, tmp_path / "out", verify=True)
