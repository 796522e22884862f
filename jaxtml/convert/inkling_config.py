"""The released Inkling `config.json` <-> our config tree. Called by `convert.released` and `convert.export`.

Two spellings are read: the released one (`dense_mlp_idx`, `local_layer_ids`, `dense_intermediate_size` ...) and what
`transformers` writes (`mlp_layer_types`, `layer_types`, `moe_intermediate_size` ...). The second is written.
"""

from __future__ import annotations

import math
from typing import Any

from absl import logging

from jaxtml.config import AttentionConfig, BackboneConfig, Config, DuplexConfig, FlowConfig, VisionConfig, validate
from jaxtml.errors import InputError
from jaxtml.stream.timebase import N_BINS, N_MELS
from jaxtml.stream.tokens import CONTROLS

# What our model does not vary: another value means another architecture.
_FIXED_TEXT = {"hidden_act": "silu", "shared_expert_sink": True, "use_embed_norm": True, "attention_dropout": 0.0}
_FIXED_AUDIO = {"n_mel_bins": N_MELS, "mel_vocab_size": N_BINS}
_FIXED_MTP = {"chain_hidden_post_norm": False}
_FIXED_VISION = {"patch_size": 40, "temporal_patch_size": 2, "num_channels": 3}


def config_from_inkling(released: dict[str, Any], name: str = "inkling") -> Config:
    """The config tree of a released checkpoint, from the content of its `config.json`.

    Parts that Inkling lacks get sizes that follow from the backbone's width: control tokens in the vocabulary's unused
    tail, a flow head as wide as the model (at most 2,048).

    Raises:
      InputError: a field is missing, or has a value that this backbone does not have.
    """
    text = _section(released, "text_config")
    audio = _section(released, "audio_config")
    vision = _section(released, "vision_config")
    mtp = _mtp(released, text)
    sections = ((text, _FIXED_TEXT), (audio, _FIXED_AUDIO), (vision, _FIXED_VISION), (mtp, _FIXED_MTP))
    for section, fixed in sections:
        for key, value in fixed.items():
            if section.get(key, value) != value:
                raise InputError(f"config.json: {key} is {section[key]!r}; this backbone has {value!r} alone")

    layers = _need(text, "num_hidden_layers")
    vocab = _need(text, "vocab_size")
    dense_width, expert_width = _widths(text)
    window = _first(text, "sliding_window_size", "sliding_window")
    backbone = BackboneConfig(
        vocab_size=vocab,
        d_model=_need(text, "hidden_size"),
        n_layers=layers,
        n_dense=_dense_layers(text, layers),
        global_layers=_global_layers(text, layers),
        sliding=AttentionConfig(
            n_heads=_need(text, "swa_num_attention_heads"),
            n_kv_heads=_need(text, "swa_num_key_value_heads"),
            head_dim=_need(text, "swa_head_dim"),
            window=window,
            rel_extent=window,
        ),
        global_=AttentionConfig(
            n_heads=_need(text, "num_attention_heads"),
            n_kv_heads=_need(text, "num_key_value_heads"),
            head_dim=_need(text, "head_dim"),
            window=_first(text, "model_max_length", "max_position_embeddings"),
            rel_extent=_need(text, "rel_extent"),
        ),
        d_ff_dense=dense_width,
        d_ff_expert=expert_width,
        n_experts=_need(text, "n_routed_experts"),
        experts_per_token=_need(text, "num_experts_per_tok"),
        n_shared_experts=_need(text, "n_shared_experts"),
        logits_divisor=float(_need(text, "logits_mup_width_multiplier")),
        unpadded_vocab_size=text.get("unpadded_vocab_size"),
        d_rel=_need(text, "d_rel"),
        route_scale=float(text.get("route_scale", 8.0)),
        conv_kernel=_first(text, "conv_kernel_size", "sconv_kernel_size"),
        norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        log_scaling_floor=text.get("log_scaling_n_floor"),
        log_scaling_alpha=float(text.get("log_scaling_alpha", 0.1)),
        init_std=float(text.get("initializer_range", 0.02)),
        mtp_heads=mtp["num_nextn_predict_layers"],
        mtp_global=tuple(i for i in range(mtp["num_nextn_predict_layers"]) if i not in mtp["local_layer_ids"]),
    )
    free = backbone.unpadded_vocab_size if backbone.unpadded_vocab_size is not None else vocab
    config = Config(
        name=name,
        backbone=backbone,
        # Without a tail that is long enough, the last rows of the vocabulary serve.
        duplex=DuplexConfig(control_base=min(free, vocab - CONTROLS)),
        flow=FlowConfig(width=min(backbone.d_model, 2048), depth=3),
        vision=VisionConfig(_vision_folds(vision)),
    )
    validate(config)
    return config


def inkling_config(config: Config) -> dict[str, Any]:
    """The `config.json` that `transformers` reads for this backbone (`InklingForConditionalGeneration`).

    Pinned tokens and a window on global layers have no word there: the reference sees everything.

    Raises:
      InputError: the backbone is none that Inkling's config can describe.
    """
    b = config.backbone
    if b.sliding.rel_extent != b.sliding.window:
        sizes = f"{b.sliding.rel_extent} of {b.sliding.window}"
        raise InputError(f"backbone.sliding: Inkling's relative extent is its window, not {sizes}")
    vision: dict[str, Any] = {"model_type": "inkling_vision", "text_hidden_size": b.d_model, **_FIXED_VISION}
    depth = len(config.vision.folds)
    vision |= {"num_hidden_layers": depth, "n_layers": depth, "rms_norm_eps": 1e-6}
    if config.vision.folds != planned_folds(depth):
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
    return {
        **({"mtp_config": mtp} if b.mtp_heads else {}),
        "architectures": ["InklingForConditionalGeneration"],
        "model_type": "inkling_mm_model",
        "text_config": text,
        "audio_config": {"model_type": "inkling_audio", "text_hidden_size": b.d_model, **_FIXED_AUDIO},
        "vision_config": vision,
    }


def _section(released: dict[str, Any], key: str) -> dict[str, Any]:
    section = released.get(key)
    if not isinstance(section, dict):
        raise InputError(f"config.json has no {key}: this is no multimodal Inkling checkpoint")
    return section


def _mtp(released: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Of the prediction heads: how many, which are local; none where the config has none. `transformers` moves them."""
    given = released.get("mtp_config") or {}
    if not isinstance(given, dict):
        raise InputError(f"config.json: mtp_config is {given!r}, not an object")
    heads = given.get("num_nextn_predict_layers", text.get("num_mtp_layers")) or 0
    local = given.get("local_layer_ids", text.get("mtp_local_layer_ids")) or []
    if type(heads) is not int or heads < 0:
        raise InputError(f"config.json: num_nextn_predict_layers is {heads!r}, not a number of heads")
    if not isinstance(local, list) or any(type(i) is not int or not 0 <= i < heads for i in local):
        raise InputError(f"config.json: mtp_config's local_layer_ids {local!r} are no list of some of {heads} heads")
    return {
        "num_nextn_predict_layers": heads,
        "local_layer_ids": local,
        "chain_hidden_post_norm": given.get("chain_hidden_post_norm", text.get("chain_hidden_post_norm", False)),
    }


def _need(section: dict[str, Any], key: str) -> Any:
    if section.get(key) is None:
        raise InputError(f"config.json has no {key}")
    return section[key]


def _first(section: dict[str, Any], *keys: str) -> Any:
    """The value of the first key that is there: one field, several spellings."""
    for key in keys:
        if section.get(key) is not None:
            return section[key]
    raise InputError(f"config.json has no {keys[0]}")


def _widths(text: dict[str, Any]) -> tuple[int, int]:
    """Feed-forward widths (dense, expert). Beside `dense_intermediate_size`, `intermediate_size` is the experts'."""
    if text.get("dense_intermediate_size") is not None:
        return text["dense_intermediate_size"], _need(text, "intermediate_size")
    return _need(text, "intermediate_size"), _need(text, "moe_intermediate_size")


def _dense_layers(text: dict[str, Any], layers: int) -> int:
    kinds = text.get("mlp_layer_types")
    if kinds is None:
        return text.get("dense_mlp_idx", 0)
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise InputError("config.json: mlp_layer_types must be dense layers first, then sparse ones")
    return dense


def _global_layers(text: dict[str, Any], layers: int) -> tuple[int, ...]:
    if text.get("layer_types") is not None:
        return tuple(i for i, kind in enumerate(text["layer_types"]) if kind == "hybrid")
    local = text.get("local_layer_ids")
    if local is None:
        return tuple(i for i in range(layers) if (i + 1) % 6 == 0)
    return tuple(i for i in range(layers) if i not in set(local))


def _vision_folds(vision: dict[str, Any]) -> tuple[tuple[int, int, int], ...]:
    if "folds" in vision:
        return tuple((t, s, width) for t, s, width in vision["folds"])
    return planned_folds(_first(vision, "n_layers", "num_hidden_layers"))


def planned_folds(depth: int) -> tuple[tuple[int, int, int], ...]:
    """Inkling's own plan of `depth` folds of 2 x 40 x 40 x 3 pixels: `(time, side, width)` each, the last width 0.

    The sides grow by prime factors, then time; widths are the pixels seen, rounded up to 64. `depth` of these six
    stages are kept: the ones whose logarithms lie nearest to even steps, the first and the last always.
    """
    stages = [(1, 1, 3), (1, 5, 128), (1, 10, 320), (1, 20, 1216), (1, 40, 4800), (2, 40, 9600)]
    if not 1 <= depth < len(stages):
        raise InputError(f"config.json: a vision tower of {depth} layers is not supported; Inkling's has 4")
    total = math.log(2 * 40 * 40 * 3)
    cost = [[abs(total * i / depth - math.log(t * side * side)) for t, side, _ in stages] for i in range(depth + 1)]
    # Both rows and columns rise, so a cheapest assignment never crosses: best[j] = cheapest with row i on stage <= j.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(stages) + 1)
    for i in range(depth + 1):
        row: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for j in range(len(stages)):
            before, chosen = best[j]
            row.append(min(row[-1], (before + cost[i][j], (*chosen, j))))
        best = row
    chosen = (0, *best[-1][1][1:-1], len(stages) - 1)
    kept = [stages[j] for j in chosen]
    folds = [(b[0] // a[0], b[1] // a[1], b[2]) for a, b in zip(kept[:-1], kept[1:], strict=True)]
    return (*folds[:-1], (*folds[-1][:2], 0))
