"""The released layout and ours are one another's images, and a checkpoint that does not fit is refused by name."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtml.checkpoint.inkling import sink
from jaxtml.checkpoint.inkling.config import config_from_inkling, inkling_config
from jaxtml.checkpoint.inkling.mapping import released_tensors
from jaxtml.checkpoint.inkling.safetensors_file import read_header
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.inkling.vision_folds import default_folds
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.source import InMemorySource
from jaxtml.config import load
from jaxtml.convert.conversion import write_checkpoint
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import count_parameters, flatten

ROOT = Path(__file__).parents[3]
TOOL = runpy.run_path(str(ROOT / "tools" / "goldens" / "make_backbone_golden.py"), run_name="golden")
DESCRIBED = TOOL["CASES"]["text"]
CONFIG = config_from_inkling(DESCRIBED)

INKLING_SMALL = {
    "text_config": {
        "vocab_size": 201024,
        "unpadded_vocab_size": 200058,
        "hidden_size": 4096,
        "num_hidden_layers": 42,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "swa_num_attention_heads": 32,
        "swa_num_key_value_heads": 8,
        "swa_head_dim": 128,
        "sliding_window_size": 512,
        "d_rel": 16,
        "rel_extent": 1024,
        "log_scaling_n_floor": 128000,
        "log_scaling_alpha": 0.1,
        "rms_norm_eps": 1e-6,
        "use_embed_norm": True,
        "sconv_kernel_size": 4,
        "dense_mlp_idx": 2,
        "dense_intermediate_size": 16384,
        "intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "route_scale": 8.0,
        "logits_mup_width_multiplier": 16.0,
        "local_layer_ids": [i for i in range(42) if (i + 1) % 6 and i != 41],
        "model_max_length": 1048576,
    },
    "audio_config": {"n_mel_bins": 80, "mel_vocab_size": 16},
    "vision_config": {"n_layers": 4, "patch_size": 40, "temporal_patch_size": 2},
    "mtp_config": {"num_nextn_predict_layers": 8, "local_layer_ids": [0, 2, 4, 5, 6, 7]},
}


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DESCRIBED))
    save_file(TOOL["released_weights"](CONFIG), tmp_path / "model.safetensors")
    return tmp_path


def test_inkling_small_has_the_published_number_of_parameters():
    config = config_from_inkling(INKLING_SMALL)
    table = InteractionModel(config).specs()
    heads, _ = count_parameters(table.pop("mtp"))
    assert heads == pytest.approx(2.23e9, rel=0.005)
    released = {path: spec for path, spec in flatten(table) if spec.released is not None}
    total, _ = count_parameters(released)
    assert 263.7e9 <= total <= 264.0e9
    assert (config.backbone.mtp_heads, config.backbone.mtp_global) == (8, (1, 3))
    assert config.backbone.global_layers == (5, 11, 17, 23, 29, 35, 41)
    assert config.backbone.n_dense == 2 and config.duplex.control_base == 200058


def test_names_are_one_to_one_and_every_layout_turns_back():
    seen = set()
    for place in released_tensors(CONFIG):
        released = place.spec.released
        assert place.name not in seen
        seen.add(place.name)
        tensor = np.arange(np.prod(released.shape)).reshape(released.shape)
        ours = released.load(tensor)
        assert ours.shape == place.spec.shape[place.spec.stacked :]
        np.testing.assert_array_equal(ours.transpose(released.order).reshape(released.shape), tensor)


def test_every_parameter_of_the_backbone_and_its_towers_is_in_the_released_layout():
    ours = {path.split("/")[0] for path, spec in flatten(InteractionModel(CONFIG).specs()) if spec.released is None}
    assert ours == {"clock", "own", "flow", "vocoder"}


def test_gate_and_up_rows_alternate_in_released_weights():
    place = next(p for p in released_tensors(CONFIG) if p.name.endswith("w13_dn.weight"))
    ours = place.spec.released.load(np.arange(np.prod(place.spec.released.shape)).reshape(place.spec.released.shape))
    width = place.spec.released.shape[1]
    np.testing.assert_array_equal(ours[:, 0, :3].T, np.arange(width) + 2 * width * np.arange(3)[:, None])
    np.testing.assert_array_equal(ours[:, 1, :3].T, np.arange(width) + 2 * width * np.arange(3)[:, None] + width)


def test_saving_what_was_loaded_gives_the_same_tensors(checkpoint, tmp_path):
    config, params = read_checkpoint(checkpoint)
    write_checkpoint(InMemorySource(config, params), tmp_path / "again", "memory", "hf", "float32")
    first, again = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "again"))
    assert first.keys() == again.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)


def test_a_sharded_bfloat16_checkpoint_loads(checkpoint, tmp_path, monkeypatch):
    config, params = read_checkpoint(checkpoint)
    monkeypatch.setattr(sink, "SHARD_BYTES", 200_000)
    write_checkpoint(InMemorySource(config, params), tmp_path / "shards", "memory", "hf", "bfloat16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same, rounded = read_checkpoint(tmp_path / "shards")
    assert same.backbone == config.backbone
    for (path, a), (_, b) in zip(flatten(params), flatten(rounded), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-8, err_msg=path)


def test_the_router_bias_stays_float32_in_a_bfloat16_checkpoint(checkpoint, tmp_path):
    config, params = read_checkpoint(checkpoint)
    write_checkpoint(InMemorySource(config, params), tmp_path / "bf16", "memory", "hf", "bfloat16")
    _, again = read_checkpoint(tmp_path / "bf16")
    for path in ("router_bias", "global_scale"):
        a, b = (p["layers"]["block0"]["run1"]["mlp"][path] for p in (params, again))
        np.testing.assert_array_equal(a, b)


def test_the_config_survives_the_way_there_and_back():
    again = config_from_inkling(json.loads(json.dumps(inkling_config(CONFIG))), CONFIG.name)
    assert again == CONFIG


def test_a_vision_tower_of_its_own_widths_survives_too():
    tiny = load("tiny")
    assert config_from_inkling(inkling_config(tiny)).vision == tiny.vision


def test_folds_are_planned_as_released():
    assert default_folds(4) == ((1, 5, 128), (1, 2, 320), (1, 4, 4800), (2, 1, 0))
    assert default_folds(2) == ((1, 10, 320), (2, 4, 0))


def test_what_inkling_lacks_starts_neutral_and_the_same_for_a_seed(checkpoint):
    first, again, other = (ReleasedCheckpoint(checkpoint, seed) for seed in (7, 7, 8))
    everything = (slice(None), slice(None))
    assert not first.read("own", everything[:1]).any() and not first.read("clock/weight", everything).any()
    drawn = [source.read("flow/w_in", everything) for source in (first, again, other)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def _refusal(checkpoint) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _change(checkpoint, edit) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    edit(weights)
    save_file(weights, checkpoint / "model.safetensors")


def test_a_missing_tensor_is_named(checkpoint):
    _change(checkpoint, lambda w: w.pop("model.llm.layers.2.attn.wq_du.weight"))
    assert "1 missing tensors: model.llm.layers.2.attn.wq_du.weight" in _refusal(checkpoint)


def test_an_unknown_tensor_is_named(checkpoint):
    _change(checkpoint, lambda w: w.update({"model.llm.layers.2.attn.wx.weight": np.zeros(3)}))
    assert "1 unknown tensors: model.llm.layers.2.attn.wx.weight" in _refusal(checkpoint)


def test_a_misshapen_tensor_is_named_with_both_shapes(checkpoint):
    _change(checkpoint, lambda w: w.update({"model.llm.norm.weight": np.zeros(3, np.float32)}))
    assert "model.llm.norm.weight is (3,), not (48,)" in _refusal(checkpoint)


def test_a_quantised_tensor_is_refused(checkpoint):
    _change(checkpoint, lambda w: w.update({"model.llm.norm.weight": np.zeros(48, np.uint8)}))
    assert "model.llm.norm.weight is U8" in _refusal(checkpoint)


def test_prediction_heads_that_the_config_does_not_know_are_named(checkpoint):
    _change(checkpoint, lambda w: w.update({"model.mtp.layers.0.hidden_norm.weight": np.zeros(3, np.float32)}))
    assert "1 unknown tensors: model.mtp.layers.0.hidden_norm.weight" in _refusal(checkpoint)


def test_a_missing_shard_is_named(checkpoint, tmp_path, monkeypatch):
    config, params = read_checkpoint(checkpoint)
    monkeypatch.setattr(sink, "SHARD_BYTES", 200_000)
    write_checkpoint(InMemorySource(config, params), tmp_path / "shards", "memory", "hf", "bfloat16")
    next((tmp_path / "shards").glob("model-00002-*.safetensors")).unlink()
    assert "no model-00002-of-" in _refusal(tmp_path / "shards")


def test_a_tensor_in_two_shards_or_another_than_the_index_says_is_refused(checkpoint, tmp_path, monkeypatch):
    config, params = read_checkpoint(checkpoint)
    monkeypatch.setattr(sink, "SHARD_BYTES", 200_000)
    write_checkpoint(InMemorySource(config, params), tmp_path / "shards", "memory", "hf", "float32")
    second, *_, first = sorted((tmp_path / "shards").glob("*.safetensors"), key=lambda file: len(read_header(file)))
    names = sorted(read_header(first))
    index = tmp_path / "shards" / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace(f'"{names[0]}": "{first.name}"', f'"{names[0]}": "{second.name}"'))
    assert f"has {names[0]} in {first.name} and by the index in {second.name}" in _refusal(tmp_path / "shards")
    index.write_text(good)
    kept = second.read_bytes()
    save_file(load_file(second) | {names[0]: np.zeros(3, np.float32)}, second)
    assert f"has {names[0]} in {second.name} and" in _refusal(tmp_path / "shards")
    second.write_bytes(kept)
    save_file({names[0]: np.zeros(3, np.float32)}, tmp_path / "shards" / "mtp.safetensors")
    assert f"has {names[0]} in mtp.safetensors and" in _refusal(tmp_path / "shards")


def test_a_truncated_file_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "not a readable safetensors file" in _refusal(checkpoint)


def test_a_directory_without_a_config_is_refused(tmp_path):
    assert "no config.json" in _refusal(tmp_path)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("text_config", "hidden_act", "gelu"), ("text_config", "d_rel", None), ("audio_config", "mel_vocab_size", 256)],
)
def test_another_architecture_is_refused_by_the_field_that_differs(checkpoint, part, field, value):
    changed = DESCRIBED | {part: DESCRIBED[part] | {field: value}}
    (checkpoint / "config.json").write_text(json.dumps(changed))
    assert field in _refusal(checkpoint)


def test_a_text_model_alone_is_refused(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(DESCRIBED["text_config"]))
    assert "no text_config" in _refusal(checkpoint)
