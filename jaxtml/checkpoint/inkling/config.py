"""The released Inkling `config.json` <-> our config tree. Called by the source and the sink beside it.

Two spellings are read: the released one (`dense_mlp_idx`, `local_layer_ids`, `dense_intermediate_size` ...) and what
`transformers` writes (`mlp_layer_types`, `layer_types`, `moe_intermediate_size` ...). The second is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from absl import logging

from jaxtml.checkpoint.inkling.config_section import ConfigSection, short
from jaxtml.checkpoint.inkling.vision_folds import default_folds
from jaxtml.config import AttentionConfig, BackboneConfig, Config, DuplexConfig, FlowConfig, VisionConfig, validate
from jaxtml.errors import InputError
from jaxtml.stream.timebase import N_BINS, N_MELS
from jaxtml.stream.tokens import CONTROLS

# What our model does not vary: another value means another architecture.
_FIXED_TEXT = {
    **{"hidden_act": "silu", "shared_expert_sink": True, "use_embed_norm": True, "attention_dropout": 0.0},
    "tie_word_embeddings": False,
}
_FIXED_AUDIO = {"n_mel_bins": N_MELS, "mel_vocab_size": N_BINS, "rms_norm_eps": 1e-6}
_FIXED_MTP = {"chain_hidden_post_norm": False, "mtp_hidden_states_first": True}
_FIXED_VISION = {"patch_size": 40, "temporal_patch_size": 2, "num_channels": 3, "rms_norm_eps": 1e-6}

# What changes no number of the reference's forward pass; of a vision tower, sizes that Inkling's does not have.
_IDLE = (
    *("model_type", "initializer_range", "number_of_conv_states", "pad_token_id", "bos_token_id", "eos_token_id"),
    *(
        "rms_norm_eps_moe_gate",
        "use_cache",
        "dtype",
        "torch_dtype",
        "architectures",
        "text_hidden_size",
        "hidden_size",
        "num_attention_heads",
    ),
)
_DERIVED = ("text_config", "audio_config", "vision_config", "mtp_config", "quantization_config")
_DERIVED += ("dtype", "torch_dtype", "transformers_version")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_MOST_LAYERS = 4096


def config_from_inkling(released: dict[str, Any], name: str = "inkling") -> Config:
    """The config tree of a released checkpoint, from the content of its `config.json`.

    Parts that Inkling lacks get sizes that follow from the backbone's width: control tokens in the vocabulary's unused
    tail, a flow head as wide as the model (at most 2,048). Fields that are not known here are named in the log.

    Raises:
      InputError: a field is missing, is no number where one belongs, or has a value that this backbone does not have.
    """
    text, audio, vision = (ConfigSection(released, part) for part in ("text_config", "audio_config", "vision_config"))
    heads, local_heads = _mtp(released, text)
    text.fixed(_FIXED_TEXT)
    audio.fixed(_FIXED_AUDIO)
    vision.fixed(_FIXED_VISION)

    layers = text.whole("num_hidden_layers", most=_MOST_LAYERS)
    vocab = text.whole("vocab_size")
    dense_width, expert_width = _widths(text)
    window = text.whole("sliding_window_size", "sliding_window")
    backbone = BackboneConfig(
        vocab_size=vocab,
        d_model=text.whole("hidden_size"),
        n_layers=layers,
        n_dense=_dense_layers(text, layers),
        global_layers=_global_layers(text, layers),
        sliding=AttentionConfig(
            n_heads=text.whole("swa_num_attention_heads"),
            n_kv_heads=text.whole("swa_num_key_value_heads"),
            head_dim=text.whole("swa_head_dim"),
            window=window,
            rel_extent=window,
        ),
        global_=AttentionConfig(
            n_heads=text.whole("num_attention_heads"),
            n_kv_heads=text.whole("num_key_value_heads"),
            head_dim=text.whole("head_dim"),
            window=text.whole("model_max_length", "max_position_embeddings"),
            rel_extent=text.whole("rel_extent"),
        ),
        d_ff_dense=dense_width,
        d_ff_expert=expert_width,
        n_experts=text.whole("n_routed_experts"),
        experts_per_token=text.whole("num_experts_per_tok"),
        n_shared_experts=text.whole("n_shared_experts"),
        logits_divisor=text.number("logits_mup_width_multiplier"),
        unpadded_vocab_size=text.whole("unpadded_vocab_size", default=0, most=vocab) or None,
        d_rel=text.whole("d_rel"),
        route_scale=text.number("route_scale", default=8.0),
        conv_kernel=text.whole("conv_kernel_size", "sconv_kernel_size"),
        norm_eps=text.number("rms_norm_eps", default=1e-6),
        log_scaling_floor=text.whole("log_scaling_n_floor", default=0) or None,
        log_scaling_alpha=text.number("log_scaling_alpha", default=0.1),
        init_std=text.number("initializer_range", default=0.02),
        mtp_heads=heads,
        mtp_global=tuple(i for i in range(heads) if i not in local_heads),
    )
    free = backbone.unpadded_vocab_size if backbone.unpadded_vocab_size is not None else vocab
    config = Config(
        name=name,
        backbone=backbone,
        # Without a tail that is long enough, the last rows of the vocabulary serve.
        duplex=DuplexConfig(control_base=max(0, min(free, vocab - CONTROLS))),
        flow=FlowConfig(width=min(backbone.d_model, 2048), depth=3),
        vision=VisionConfig(_vision_folds(vision)),
    )
    validate(config)
    for section in (text, audio, vision):
        section.tell_unread(_IDLE)
    return config


def inkling_config(config: Config, said: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The `config.json` that `transformers` reads for this backbone (`InklingForConditionalGeneration`).

    `said` is the one that the model came with: what it says that is not of the model's shape (ids of placeholders and
    of special tokens, whatever else it has beside its sections) is said again. Pinned tokens and a window on global
    layers have no word there: the reference sees everything.

    Raises:
      InputError: the backbone is none that Inkling's config can describe.
    """
    b = config.backbone
    if b.sliding.rel_extent != b.sliding.window:
        sizes = f"{b.sliding.rel_extent} of {b.sliding.window}"
        raise InputError(f"backbone.sliding: Inkling's relative extent is its window, not {sizes}")
    vision: dict[str, Any] = {"model_type": "inkling_vision", "text_hidden_size": b.d_model, **_FIXED_VISION}
    depth = len(config.vision.folds)
    vision |= {"num_hidden_layers": depth, "n_layers": depth}
    if config.vision.folds != default_folds(depth):
        # transformers computes the widths itself and has no field for others
        logging.warning("Inkling has vision widths of its own: transformers will read all but the vision tower")
        vision["folds"] = [list(fold) for fold in config.vision.folds]
    text: dict[str, Any] = {
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
    mtp = {
        "num_nextn_predict_layers": b.mtp_heads,
        "local_layer_ids": [i for i in range(b.mtp_heads) if i not in b.mtp_global],
        **_FIXED_MTP,
    }
    ours = {
        **({"mtp_config": mtp} if b.mtp_heads else {}),
        "architectures": ["InklingForConditionalGeneration"],
        "model_type": "inkling_mm_model",
        "text_config": text,
        "audio_config": {"model_type": "inkling_audio", "text_hidden_size": b.d_model, **_FIXED_AUDIO},
        "vision_config": vision,
    }
    said_text = said.get("text_config")
    if isinstance(said_text, dict):
        text |= {name: said_text[name] for name in _TOKENS if name in said_text}
    return ours | {key: value for key, value in said.items() if key not in {*ours, *_DERIVED}}


def _mtp(released: dict[str, Any], text: ConfigSection) -> tuple[int, list[int]]:
    """How many prediction heads there are, none where the config has none, and which are local. `transformers` moves
    them into the text section."""
    heads = text.whole("num_mtp_layers", default=0, most=_MOST_LAYERS)
    local = text.indices("mtp_local_layer_ids", heads)
    text.fixed(_FIXED_MTP)
    if released.get("mtp_config") is not None:
        given = ConfigSection(released, "mtp_config")
        given.fixed(_FIXED_MTP)
        heads = given.whole("num_nextn_predict_layers", default=heads, most=_MOST_LAYERS)
        local = given.indices("local_layer_ids", heads) or local
        given.tell_unread(_IDLE)
    return heads, local or []


def _widths(text: ConfigSection) -> tuple[int, int]:
    """Feed-forward widths (dense, expert). Beside `dense_intermediate_size`, `intermediate_size` is the experts'."""
    if text.get("dense_intermediate_size") is not None:
        return text.whole("dense_intermediate_size"), text.whole("intermediate_size")
    return text.whole("intermediate_size"), text.whole("moe_intermediate_size")


def _dense_layers(text: ConfigSection, layers: int) -> int:
    first = text.whole("dense_mlp_idx", default=0, most=layers)
    kinds = text.kinds("mlp_layer_types", ("dense", "sparse"), layers)
    if kinds is None:
        return first
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise InputError("config.json: mlp_layer_types must be dense layers first, then sparse ones")
    return dense


def _global_layers(text: ConfigSection, layers: int) -> tuple[int, ...]:
    local = text.indices("local_layer_ids", layers)
    kinds = text.kinds("layer_types", ("hybrid", "hybrid_sliding"), layers)
    if kinds is not None:
        return tuple(i for i, kind in enumerate(kinds) if kind == "hybrid")
    if local is None:
        return tuple(i for i in range(layers) if (i + 1) % 6 == 0)
    return tuple(i for i in range(layers) if i not in set(local))


def _vision_folds(vision: ConfigSection) -> tuple[tuple[int, int, int], ...]:
    depth = vision.whole("n_layers", "num_hidden_layers", most=_MOST_LAYERS)
    given = vision.get("folds")
    if given is None:
        return default_folds(depth)
    if not isinstance(given, list) or any(
        not isinstance(fold, list) or len(fold) != 3 or any(type(n) is not int for n in fold) for fold in given
    ):
        raise InputError(f"config.json: folds is {short(given)}, not a list of [time, side, width]")
    return tuple((time, side, width) for time, side, width in given)
