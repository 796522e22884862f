"""A release whose tensors do not fit its config is refused, and the message names the tensor."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxtml.checkpoint.inkling import sink
from jaxtml.checkpoint.inkling.safetensors_file import read_header
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.source import InMemorySource
from jaxtml.convert.conversion import write_checkpoint


def test_what_inkling_lacks_starts_neutral_and_depends_on_the_seed_alone(checkpoint):
    first, again, other = (ReleasedCheckpoint(checkpoint, seed) for seed in (7, 7, 8))
    everything = (slice(None), slice(None))
    assert not first.read("own", everything[:1]).any() and not first.read("clock/weight", everything).any()
    drawn = [source.read("flow/w_in", everything) for source in (first, again, other)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def _change(checkpoint, edit) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    edit(weights)
    save_file(weights, checkpoint / "model.safetensors")


def test_a_missing_tensor_is_named(checkpoint, refusal):
    _change(checkpoint, lambda w: w.pop("model.llm.layers.2.attn.wq_du.weight"))
    assert "1 missing tensors: model.llm.layers.2.attn.wq_du.weight" in refusal(checkpoint)


def test_an_unknown_tensor_is_named(checkpoint, refusal):
    _change(checkpoint, lambda w: w.update({"model.llm.layers.2.attn.wx.weight": np.zeros(3)}))
    assert "1 unknown tensors: model.llm.layers.2.attn.wx.weight" in refusal(checkpoint)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(checkpoint, refusal):
    _change(checkpoint, lambda w: w.update({"model.llm.norm.weight": np.zeros(3, np.float32)}))
    assert "model.llm.norm.weight is (3,), not (48,)" in refusal(checkpoint)


def test_a_quantised_tensor_that_is_no_expert_is_refused(checkpoint, refusal):
    _change(checkpoint, lambda w: w.update({"model.llm.norm.weight": np.zeros(48, np.uint8)}))
    assert "model.llm.norm.weight is U8" in refusal(checkpoint)


def test_prediction_heads_that_the_config_does_not_know_are_named(checkpoint, refusal):
    _change(checkpoint, lambda w: w.update({"model.mtp.layers.0.hidden_norm.weight": np.zeros(3, np.float32)}))
    assert "1 unknown tensors: model.mtp.layers.0.hidden_norm.weight" in refusal(checkpoint)


def test_a_missing_shard_is_named(checkpoint, tmp_path, monkeypatch, refusal):
    config, params = read_checkpoint(checkpoint)
    monkeypatch.setattr(sink, "SHARD_BYTES", 200_000)
    write_checkpoint(InMemorySource(config, params), tmp_path / "shards", "memory", "hf", "bfloat16")
    next((tmp_path / "shards").glob("model-00002-*.safetensors")).unlink()
    assert "no model-00002-of-" in refusal(tmp_path / "shards")


def test_a_tensor_in_two_shards_or_not_in_the_shard_of_the_index_is_refused(checkpoint, tmp_path, monkeypatch, refusal):
    config, params = read_checkpoint(checkpoint)
    monkeypatch.setattr(sink, "SHARD_BYTES", 200_000)
    write_checkpoint(InMemorySource(config, params), tmp_path / "shards", "memory", "hf", "float32")
    second, *_, first = sorted((tmp_path / "shards").glob("*.safetensors"), key=lambda file: len(read_header(file)))
    names = sorted(read_header(first))
    index = tmp_path / "shards" / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace(f'"{names[0]}": "{first.name}"', f'"{names[0]}": "{second.name}"'))
    assert f"has {names[0]} in {first.name}, but its index says {second.name}" in refusal(tmp_path / "shards")
    index.write_text(good)
    kept = second.read_bytes()
    save_file(load_file(second) | {names[0]: np.zeros(3, np.float32)}, second)
    assert f"has {names[0]} in {second.name} and" in refusal(tmp_path / "shards")
    second.write_bytes(kept)
    save_file({names[0]: np.zeros(3, np.float32)}, tmp_path / "shards" / "mtp.safetensors")
    assert f"has {names[0]} in mtp.safetensors and" in refusal(tmp_path / "shards")


def test_a_truncated_file_is_refused(checkpoint, refusal):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "not a readable safetensors file" in refusal(checkpoint)
