"""Inkling's config and ours translate into each other. The refusal of another architecture names the field."""

from __future__ import annotations

import json

import pytest

from jaxtml.checkpoint.inkling.config import config_from_inkling, inkling_config
from jaxtml.checkpoint.inkling.vision_folds import default_folds
from jaxtml.config import load
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import count_parameters, flatten

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


def test_inkling_small_has_the_published_number_of_parameters():
    config = config_from_inkling(INKLING_SMALL)
    specs = InteractionModel(config).specs()
    heads, _ = count_parameters(specs.pop("mtp"))
    assert heads == pytest.approx(2.23e9, rel=0.005)
    released = {path: spec for path, spec in flatten(specs) if spec.released is not None}
    total, _ = count_parameters(released)
    assert 263.7e9 <= total <= 264.0e9
    assert (config.backbone.mtp_heads, config.backbone.mtp_global) == (8, (1, 3))
    assert config.backbone.global_layers == (5, 11, 17, 23, 29, 35, 41)
    assert config.backbone.n_dense == 2 and config.duplex.control_base == 200058


def test_a_config_is_the_same_after_the_way_there_and_back(config):
    assert config_from_inkling(json.loads(json.dumps(inkling_config(config))), config.name) == config


def test_a_vision_tower_with_widths_of_its_own_is_kept():
    tiny = load("tiny")
    assert config_from_inkling(inkling_config(tiny)).vision == tiny.vision


def test_the_default_folds_are_those_of_the_release():
    assert default_folds(4) == ((1, 5, 128), (1, 2, 320), (1, 4, 4800), (2, 1, 0))
    assert default_folds(2) == ((1, 10, 320), (2, 4, 0))


def test_a_directory_without_a_config_is_refused(tmp_path, refusal):
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("text_config", "hidden_act", "gelu"), ("text_config", "d_rel", None), ("audio_config", "mel_vocab_size", 256)],
)
def test_another_architecture_is_refused_and_the_field_that_differs_is_named(
    checkpoint, described, part, field, value, refusal
):
    changed = described | {part: described[part] | {field: value}}
    (checkpoint / "config.json").write_text(json.dumps(changed))
    assert field in refusal(checkpoint)


def test_a_model_of_text_alone_is_refused(checkpoint, described, refusal):
    (checkpoint / "config.json").write_text(json.dumps(described["text_config"]))
    assert "holds inkling_text (model_type and architectures in its config.json), the text model" in refusal(checkpoint)
    del described["text_config"]["model_type"]
    (checkpoint / "config.json").write_text(json.dumps(described["text_config"]))
    assert "no text_config" in refusal(checkpoint)
