"""Translates Inkling's `config.json` to our config tree and back. Called by the source and the sink beside this module.

There are two spellings of `config.json`. The released one has `dense_mlp_idx`, `local_layer_ids`,
`dense_intermediate_size`. The one that `transformers` writes has `mlp_layer_types`, `layer_types`,
`moe_intermediate_size`. Both are read, and the second is written.

The order of the fields in `inkling_config` is the order in the file: converted checkpoints are compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from absl import logging

from jaxtml.checkpoint.inkling.config_section import ConfigSection, short_repr
from jaxtml.checkpoint.inkling.vision_folds import default_folds
from jaxtml.config import AttentionConfig, BackboneConfig, Config, DuplexConfig, FlowConfig, VisionConfig, validate
from jaxtml.errors import InputError
from jaxtml.stream.timebase import N_BINS, N_MELS
from jaxtml.stream.tokens import CONTROLS

# Fields with the only value that our model supports. Another value means another architecture.
_TEXT_CONSTANTS = {
    "hidden_act": "silu",
    "shared_expert_sink": True,
    "use_embed_norm": True,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_AUDIO_CONSTANTS = {"n_mel_bins": N_MELS, "mel_vocab_size": N_BINS, "rms_norm_eps": 1e-6}
_VISION_CONSTANTS = {"patch_size": 40, "temporal_patch_size": 2, "num_channels": 3, "rms_norm_eps": 1e-6}
_MTP_CONSTANTS = {"chain_hidden_post_norm": False, "mtp_hidden_states_first": True}

_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")

# Fields that change nothing in the forward pass of the reference, which is the model in `transformers`. `hidden_size`
# and `num_attention_heads` are for vision sections: `transformers` writes sizes there that Inkling's tower does not
# have.
_UNUSED = (
    *("model_type", "initializer_range", "number_of_conv_states", *_TOKENS),
    *("rms_norm_eps_moe_gate", "use_cache", "dtype", "torch_dtype", "architectures"),
    *("text_hidden_size", "hidden_size", "num_attention_heads"),
)
# Fields of an original `config.json` that a new one does not copy: they follow from the new model.
_NOT_COPIED = (
    *("text_config", "audio_config", "vision_config", "mtp_config", "quantization_config"),
    *("dtype", "torch_dtype", "transformers_version"),
)
_MOST_LAYERS = 4096
_WIDEST_FLOW_HEAD = 2048


def config_from_inkling(released: Mapping[str, Any], name: str = "inkling") -> Config:
    """Returns the config tree of a released checkpoint. `released` is the content of its `config.json`.

    The parts that Inkling lacks follow from its sizes: control tokens stand in the unused tail of the vocabulary, and
    the flow head is as wide as the model (at most 2,048). The log names the fields that jaxtml does not know.

    Raises:
      InputError: a field is missing, is of another kind, or has a value that jaxtml does not support.
    """
    text, audio, vision = (ConfigSection(released, part) for part in ("text_config", "audio_config", "vision_config"))
    mtp_heads, mtp_local = _mtp_heads(released, text)
    text.require(_TEXT_CONSTANTS)
    audio.require(_AUDIO_CONSTANTS)
    vision.require(_VISION_CONSTANTS)
    backbone = _backbone(text, mtp_heads, mtp_local)
    vocab = backbone.vocab_size
    first_unused = vocab if backbone.unpadded_vocab_size is None else backbone.unpadded_vocab_size
    config = Config(
        name=name,
        backbone=backbone,
        # A vocabulary whose unused tail is too short gives its last rows to the control tokens.
        duplex=DuplexConfig(control_base=max(0, min(first_unused, vocab - CONTROLS))),
        flow=FlowConfig(width=min(backbone.d_model, _WIDEST_FLOW_HEAD), depth=3),
        vision=VisionConfig(_vision_folds(vision)),
    )
    validate(config)
    for section in (text, audio, vision):
        section.warn_unread(_UNUSED)
    return config


def _mtp_heads(released: Mapping[str, Any], text: ConfigSection) -> tuple[int, list[int]]:
    """Returns the number of prediction heads (0 by default), and the indices of the heads with local attention.

    The released spelling has them in a section of their own, `transformers` in the text section.
    """
    heads = text.integer("num_mtp_layers", default=0, most=_MOST_LAYERS)
    local = text.indices("mtp_local_layer_ids", heads)
    text.require(_MTP_CONSTANTS)
    if released.get("mtp_config") is not None:
        section = ConfigSection(released, "mtp_config")
        section.require(_MTP_CONSTANTS)
        heads = section.integer("num_nextn_predict_layers", default=heads, most=_MOST_LAYERS)
        local = section.indices("local_layer_ids", heads) or local
        section.warn_unread(_UNUSED)
    return heads, local or []


def _backbone(text: ConfigSection, mtp_heads: int, mtp_local: list[int]) -> BackboneConfig:
    layers = text.integer("num_hidden_layers", most=_MOST_LAYERS)
    vocab = text.integer("vocab_size")
    dense_width, expert_width = _feed_forward_widths(text)
    window = text.integer("sliding_window_size", "sliding_window")
    return BackboneConfig(
        vocab_size=vocab,
        d_model=text.integer("hidden_size"),
        n_layers=layers,
        n_dense=_dense_layers(text, layers),
        global_layers=_global_layers(text, layers),
        sliding=AttentionConfig(
            n_heads=text.integer("swa_num_attention_heads"),
            n_kv_heads=text.integer("swa_num_key_value_heads"),
            head_dim=text.integer("swa_head_dim"),
            window=window,
            rel_extent=window,
        ),
        global_=AttentionConfig(
            n_heads=text.integer("num_attention_heads"),
            n_kv_heads=text.integer("num_key_value_heads"),
            head_dim=text.integer("head_dim"),
            window=text.integer("model_max_length", "max_position_embeddings"),
            rel_extent=text.integer("rel_extent"),
        ),
        d_ff_dense=dense_width,
        d_ff_expert=expert_width,
        n_experts=text.integer("n_routed_experts"),
        experts_per_token=text.integer("num_experts_per_tok"),
        n_shared_experts=text.integer("n_shared_experts"),
        logits_divisor=text.number("logits_mup_width_multiplier"),
        unpadded_vocab_size=text.integer("unpadded_vocab_size", default=0, most=vocab) or None,
        d_rel=text.integer("d_rel"),
        route_scale=text.number("route_scale", default=8.0),
        conv_kernel=text.integer("conv_kernel_size", "sconv_kernel_size"),
        norm_eps=text.number("rms_norm_eps", default=1e-6),
        log_scaling_floor=text.integer("log_scaling_n_floor", default=0) or None,
        log_scaling_alpha=text.number("log_scaling_alpha", default=0.1),
        init_std=text.number("initializer_range", default=0.02),
        mtp_heads=mtp_heads,
        mtp_global=tuple(i for i in range(mtp_heads) if i not in mtp_local),
    )


def _feed_forward_widths(text: ConfigSection) -> tuple[int, int]:
    """Returns the widths of the feed-forward part of a dense layer, and of one expert.

    If the config has `dense_intermediate_size`, `intermediate_size` is the width of an expert. Otherwise it is the
    width of a dense layer.
    """
    if text.value("dense_intermediate_size") is not None:
        return text.integer("dense_intermediate_size"), text.integer("intermediate_size")
    return text.integer("intermediate_size"), text.integer("moe_intermediate_size")


def _dense_layers(text: ConfigSection, layers: int) -> int:
    """Returns how many layers are dense. They come first."""
    count = text.integer("dense_mlp_idx", default=0, most=layers)
    kinds = text.layer_kinds("mlp_layer_types", ("dense", "sparse"), layers)
    if kinds is None:
        return count
    count = kinds.count("dense")
    if kinds != ["dense"] * count + ["sparse"] * (layers - count):
        raise InputError("config.json: jaxtml supports mlp_layer_types with all dense layers before the sparse ones")
    return count


def _global_layers(text: ConfigSection, layers: int) -> tuple[int, ...]:
    """Returns the indices of the layers with global attention. Without a field for them, every sixth layer has it."""
    local = text.indices("local_layer_ids", layers)
    kinds = text.layer_kinds("layer_types", ("hybrid", "hybrid_sliding"), layers)
    if kinds is not None:
        return tuple(i for i, kind in enumerate(kinds) if kind == "hybrid")
    if local is None:
        return tuple(i for i in range(layers) if (i + 1) % 6 == 0)
    return tuple(i for i in range(layers) if i not in set(local))


def _vision_folds(vision: ConfigSection) -> tuple[tuple[int, int, int], ...]:
    """Returns the layers of the vision tower.

    In a release they follow from the number of layers. `inkling_config` writes a field `folds` for any other tower.
    """
    depth = vision.integer("n_layers", "num_hidden_layers", most=_MOST_LAYERS)
    folds = vision.value("folds")
    if folds is None:
        return default_folds(depth)
    if not isinstance(folds, list) or any(
        not isinstance(fold, list) or len(fold) != 3 or any(type(n) is not int for n in fold) for fold in folds
    ):
        raise InputError(f"config.json: folds is {short_repr(folds)}, not a list of [time, side, width]")
    return tuple((time, side, width) for time, side, width in folds)


def inkling_config(config: Config, original: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Returns the `config.json` with which `transformers` reads this backbone (`InklingForConditionalGeneration`).

    Three settings of global layers cannot be expressed: pinned tokens (the first tokens of a session, which stay
    visible at any distance), retained tokens and a window. In `transformers`, global layers see every token.

    Args:
      config: the config of the model.
      original: the `config.json` that the model came with. Fields that do not depend on the sizes of the model are
        copied from it: the ids of placeholders and special tokens, and all fields beside its sections.

    Raises:
      InputError: Inkling's config cannot express the backbone.
    """
    b = config.backbone
    if b.sliding.rel_extent != b.sliding.window:
        raise InputError(
            "backbone.sliding: in Inkling's config the relative extent is the window, and here "
            f"rel_extent is {b.sliding.rel_extent} and window {b.sliding.window}; make them equal"
        )
    text = _text_config(b)
    original_text = original.get("text_config")
    if isinstance(original_text, dict):
        text |= {name: original_text[name] for name in _TOKENS if name in original_text}
    ours = {
        **({"mtp_config": _mtp_config(b)} if b.mtp_heads else {}),
        "architectures": ["InklingForConditionalGeneration"],
        "model_type": "inkling_mm_model",
        "text_config": text,
        "audio_config": {"model_type": "inkling_audio", "text_hidden_size": b.d_model, **_AUDIO_CONSTANTS},
        "vision_config": _vision_config(config),
    }
    return ours | {key: value for key, value in original.items() if key not in {*ours, *_NOT_COPIED}}


def _text_config(b: BackboneConfig) -> dict[str, Any]:
    return {
        "model_type": "inkling_text",
        "vocab_size": b.vocab_size,
        "unpadded_vocab_size": b.unpadded_vocab_size,
        "hidden_size": b.d_model,
        "num_hidden_layers": b.n_layers,
        "num_attention_heads": b.global_.n_heads,
        "num_key_value_heads": b.global_.n_kv_heads,
        "head_dim": b.global_.head_dim,
        "swa_num_attention_heads": b.sliding.n_heads,
        "swa_num_key_value_heads": b.sliding.n_kv_heads,
        "swa_head_dim": b.sliding.head_dim,
        "sliding_window_size": b.sliding.window,
        "d_rel": b.d_rel,
        "rel_extent": b.global_.rel_extent,
        "log_scaling_n_floor": b.log_scaling_floor,
        "log_scaling_alpha": b.log_scaling_alpha,
        "layer_types": ["hybrid" if i in b.global_layers else "hybrid_sliding" for i in range(b.n_layers)],
        "mlp_layer_types": ["dense" if i < b.n_dense else "sparse" for i in range(b.n_layers)],
        "max_position_embeddings": b.global_.window,
        "rms_norm_eps": b.norm_eps,
        "conv_kernel_size": b.conv_kernel,
        "intermediate_size": b.d_ff_dense,
        "moe_intermediate_size": b.d_ff_expert,
        "n_routed_experts": b.n_experts,
        "num_experts_per_tok": b.experts_per_token,
        "n_shared_experts": b.n_shared_experts,
        "route_scale": b.route_scale,
        "logits_mup_width_multiplier": b.logits_divisor,
        "initializer_range": b.init_std,
        "hidden_act": "silu",
        "shared_expert_sink": True,
    }


def _mtp_config(b: BackboneConfig) -> dict[str, Any]:
    return {
        "num_nextn_predict_layers": b.mtp_heads,
        "local_layer_ids": [i for i in range(b.mtp_heads) if i not in b.mtp_global],
        **_MTP_CONSTANTS,
    }


def _vision_config(config: Config) -> dict[str, Any]:
    folds = config.vision.folds
    vision: dict[str, Any] = {
        "model_type": "inkling_vision",
        "text_hidden_size": config.backbone.d_model,
        **_VISION_CONSTANTS,
        "num_hidden_layers": len(folds),
        "n_layers": len(folds),
    }
    if folds != default_folds(len(folds)):
        # `transformers` computes the widths itself and has no field for others.
        logging.warning(
            "this vision tower is not of Inkling's design: transformers can read all parameters but those of the tower"
        )
        vision["folds"] = [list(fold) for fold in folds]
    return vision
