"""The config tree: frozen, typed dataclasses, one per part; the only place where sizes and rates are named.

A named config is a Python file in `configs/` with `get_config() -> Config`. `load` resolves a name or a path,
`override` applies `--set a.b=c`, `to_json` and `from_json` carry the resolved config beside a checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import operator
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtml.errors import InputError


@dataclass(frozen=True)
class AttentionConfig:
    """One kind of attention layer.

    `window` counts the query itself: a key is visible at distances `[0, window)`. The first `pinned` tokens of the
    session stay visible at any distance. `rel_extent` is the distance beyond which the relative bias is zero.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int
    rel_extent: int
    pinned: int = 0


@dataclass(frozen=True)
class BackboneConfig:
    """The Inkling decoder (see `jaxtml.model.backbone`). The `n_dense` first layers have a dense feed-forward part.

    `mtp_heads` predict further ahead in training (`jaxtml.model.mtp`), with global attention those in `mtp_global`.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_dense: int
    global_layers: tuple[int, ...]
    sliding: AttentionConfig
    global_: AttentionConfig
    d_ff_dense: int
    d_ff_expert: int
    n_experts: int
    experts_per_token: int
    n_shared_experts: int
    logits_divisor: float
    unpadded_vocab_size: int | None = None
    d_rel: int = 16
    route_scale: float = 8.0
    conv_kernel: int = 4
    norm_eps: float = 1e-6
    log_scaling_floor: int | None = None
    log_scaling_alpha: float = 0.1
    init_std: float = 0.02
    mtp_heads: int = 0
    mtp_global: tuple[int, ...] = ()


@dataclass(frozen=True)
class VisionConfig:
    """hMLP tower: `folds` is `(time, side, width)` per layer; the last width is the model's."""

    folds: tuple[tuple[int, int, int], ...] = ((1, 5, 128), (1, 2, 320), (1, 4, 4800), (2, 1, 0))


@dataclass(frozen=True)
class DuplexConfig:
    """What one micro-turn can hold, and how it is sampled.

    `control_base` is the first of the control-token ids (`jaxtml.stream.tokens.Control`), in the vocabulary's unused
    tail. Limits are tokens per micro-turn. `temperature` 0 is greedy; the gate opens where P(speak) exceeds
    `gate_threshold`.
    """

    control_base: int
    max_typed: int = 8
    max_patches: int = 0
    max_heard: int = 6
    max_text: int = 8
    heard: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    gate_threshold: float = 0.5


@dataclass(frozen=True)
class FlowConfig:
    """Flow head: hidden state -> 50 ms of speech (80 coarse and 4 x 80 fine log-mels).

    `history_noise` (bins) and `history_dropout` (share of frames, 1 and more is all): what training does to the speech
    that is fed back, at most (see `train.step.spoilt_history`).
    """

    width: int
    depth: int
    draws: int = 4
    steps: int = 4
    temperature: float = 0.6
    history_noise: float = 0.15
    history_dropout: float = 0.0


@dataclass(frozen=True)
class VocoderConfig:
    """Causal ConvNeXt vocoder (see `jaxtml.model.speech.vocoder`)."""

    width: int = 192
    depth: int = 6
    expansion: int = 3
    kernel: int = 7


@dataclass(frozen=True)
class DataConfig:
    """What training sees: a speech bank mixed into sessions of `turns` micro-turns, cut at `tokens` tokens a row.

    `dataset` names the rows that training reads; `jaxtml.data.dataset` opens them and lists the names.
    `misheard` is the share of rows in which some heard words are others than were said (see `data.pipeline`).
    `text_lead_ms`: text is written so long before its sound, at the earliest in the micro-turn that opens the gate.
    """

    seed: int = 1
    turns: int = 100
    tokens: int = 768
    heard_delay_ms: int = 120
    text_lead_ms: int = 2000
    misheard: float = 0.3
    dataset: str = "conversations"


@dataclass(frozen=True)
class TrainConfig:
    """The training run. `weights` of the loss terms; learning rate warms up, stays, and falls to zero over `decay`.

    Gradients are clipped at `clip_norm`; a step whose norm is above `norm_limit` is skipped. `param_dtype` is that of
    the master copy, `moment_dtype` of the first moment (the second has the master's). `remat` says what the backward
    pass computes again: "none" of it, a layer but for its "outputs" of attention and feed-forward, or the layer in
    "full". A batch is cut into `accumulate` parts that follow each other. `transport` and `capacity` are those of the
    experts (`jaxtml.model.experts.moe`). On a mesh of `data` or `expert`, "none" keeps every layer's gathered weights,
    and gradients are summed over both in `compute_dtype`.
    """

    steps: int = 1000
    batch: int = 8
    learning_rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.3
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    norm_limit: float = 1000.0
    beta2: float = 0.98
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    moment_dtype: str = "float32"
    remat: str = "none"
    accumulate: int = 1
    transport: str = "ring"
    capacity: float | None = None
    seed: int = 0
    bias_rate: float = 0.001
    z_loss: float = 1e-4
    flow_weight: float = 1.0
    gate_weight: float = 1.0
    heard_weight: float = 1.0
    text_weight: float = 1.0
    mtp_weight: float = 0.1
    checkpoint_every: int = 500
    sample_every: int = 1000


@dataclass(frozen=True)
class ServeConfig:
    """How sessions are served. With `int8_experts` the routed experts are held as int8 and a scale per column. On a
    mesh tokens reach their experts by `transport` (`model.experts.moe`). `sessions` side by side are what is planned
    with; a server is told how many.
    """

    sessions: int = 8
    compute_dtype: str = "float32"
    int8_experts: bool = False
    transport: str = "ring"


@dataclass(frozen=True)
class Config:
    """A whole model with its training."""

    name: str
    backbone: BackboneConfig
    duplex: DuplexConfig
    flow: FlowConfig
    vision: VisionConfig = field(default_factory=VisionConfig)
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


def names() -> list[str]:
    """The named configs."""
    return sorted(path.stem for path in CONFIG_DIR.glob("[!_]*.py"))


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Resolves `name` (a file in `configs/`, a path to a .py, or a checkpoint's config.json) and applies overrides.

    Raises:
      InputError: no such config, it does not evaluate to a `Config`, or an override does not fit.
    """
    path = Path(name)
    if path.suffix not in {".py", ".json"}:
        path = CONFIG_DIR / f"{name}.py"
    if not path.is_file():
        raise InputError(f"no config {name!r}: give one of {', '.join(names())}, or a path to a .py or .json file")
    config = from_json(path.read_text(errors="replace")) if path.suffix == ".json" else _evaluate(path)
    for text in overrides:
        config = override(config, text)
    validate(config)
    return config


def _evaluate(path: Path) -> Config:
    spec = importlib.util.spec_from_file_location(f"jaxtml_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # a user's file may fail in any way
        said = " ".join(str(error).split())
        raise InputError(f"config {path} does not evaluate: {type(error).__name__}: {said}") from error
    if not isinstance(config, Config):
        raise InputError(f"config {path}: get_config() returned {type(config).__name__}, not a jaxtml.config.Config")
    return config


def override(config: Config, text: str) -> Config:
    """`config` with the field named in `text` (`"train.steps=10"`) replaced; values are JSON or bare strings."""
    key, separator, raw = text.partition("=")
    if not separator:
        raise InputError(f"--set {text!r}: write it as path.to.field=value")
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = raw
    return _replace(config, key.split("."), value, key)


def _replace(node: Any, path: list[str], value: Any, key: str) -> Any:
    names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
    if path[0] not in names:
        raise InputError(f"--set {key}: no field {path[0]!r}" + (f"; there are {', '.join(names)}" if names else ""))
    child = getattr(node, path[0])
    if len(path) > 1:
        new = _replace(child, path[1:], value, key)
    else:
        new = _typed(typing.get_type_hints(type(node))[path[0]], value, key)
    return dataclasses.replace(node, **{path[0]: new})  # pyright: ignore[reportArgumentType]


def _typed(hint: Any, value: Any, key: str) -> Any:
    """Converts a JSON value to the field's type, or raises `InputError` naming the field."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _typed(next(o for o in options if o is not type(None)), value, key)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise InputError(f"config field {key}.{unknown[0]} is unknown; there are {', '.join(hints)}")
        try:
            return hint(**{name: _typed(hints[name], item, f"{key}.{name}") for name, item in value.items()})  # type: ignore[operator]
        except TypeError as error:
            raise InputError(f"config field {key}: {error}") from error
    if origin is tuple and isinstance(value, list | tuple):
        kinds = typing.get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(_typed(kind, item, key) for kind, item in zip(kinds, value, strict=True))
    if hint is float and (type(value) is float or (type(value) is int and abs(value) <= _LARGEST)):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    raise InputError(f"config field {key}: {value!r:.60} is not {getattr(hint, '__name__', hint)}")


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Inverse of `to_json`. Raises `InputError` on malformed JSON, unknown or missing fields and wrong types."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"config is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError("config is not a JSON object")
    train = value.get("train")
    if isinstance(train, dict) and isinstance(train.get("remat"), bool):  # until 2026-11-24
        train["remat"] = "full" if train["remat"] else "none"
    return _typed(Config, value, "config")


_MAY_BE_ZERO = (
    *(
        "n_dense",
        "mtp_heads",
        "pinned",
        "control_base",
        "max_typed",
        "max_patches",
        "max_heard",
        "max_text",
    ),
    *("seed", "heard_delay_ms", "text_lead_ms", "warmup"),
)
_POSITIVE = ("route_scale", "logits_divisor", "norm_eps", "top_p", "clip_norm", "norm_limit", "capacity")
_AT_MOST = {
    **{"batch": 10**6, "sessions": 10**6, "pinned": 512},  # pinned: a block of `model.attention.blocks`
    **{"n_layers": 4096, "mtp_heads": 4096, "depth": 4096},
}
_LARGEST = 2**31 - 1  # of all other whole numbers
_AT_MOST_1 = ("top_p", "gate_threshold", "decay", "beta2", "misheard")


_DTYPES = ("float32", "bfloat16")
_CHOICES = {
    "train.compute_dtype": _DTYPES,
    "train.param_dtype": _DTYPES,
    "train.moment_dtype": _DTYPES,
    "train.remat": ("none", "outputs", "full"),
    "train.transport": ("ring", "ragged"),
    "serve.compute_dtype": _DTYPES,
    "serve.transport": ("replicated", "ring"),
}


def _check_ranges(node: Any, prefix: str = "") -> None:
    """Numbers are finite and not negative, and integers count something unless they may be zero."""
    for f in dataclasses.fields(node):
        value, path = getattr(node, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{path}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            least = 0 if f.name in _MAY_BE_ZERO else 1
            if value < least:
                raise InputError(f"{path} {value}: give at least {least}")
            most = _AT_MOST.get(f.name, _LARGEST)
            if value > most:
                raise InputError(f"{path} is too large: give at most {most}")
        elif isinstance(value, float):
            if not 0 <= value < math.inf or (value == 0 and f.name in _POSITIVE):
                raise InputError(f"{path} {value}: give {'more than' if f.name in _POSITIVE else 'at least'} 0")
            if value > 1 and f.name in _AT_MOST_1:
                raise InputError(f"{path} {value}: give at most 1")


def validate(config: Config) -> None:
    """Raises `InputError` where a field is out of range or fields contradict each other; the message names it."""
    _check_ranges(config)
    b = config.backbone
    for name, attention in (("sliding", b.sliding), ("global_", b.global_)):
        if attention.n_heads % attention.n_kv_heads:
            raise InputError(
                f"backbone.{name}: {attention.n_heads} heads do not divide by {attention.n_kv_heads} kv heads"
            )
    if b.n_dense > b.n_layers:
        raise InputError(f"backbone.n_dense {b.n_dense}: there are {b.n_layers} layers")
    if config.duplex.max_patches and not config.vision.folds:
        raise InputError(f"duplex.max_patches {config.duplex.max_patches}: vision.folds has no tower for them")
    if any(not 0 <= layer < b.n_layers for layer in b.global_layers):
        raise InputError(f"backbone.global_layers {b.global_layers}: layers are 0..{b.n_layers - 1}")
    if any(not 0 <= head < b.mtp_heads for head in b.mtp_global):
        raise InputError(f"backbone.mtp_global {b.mtp_global}: there are {b.mtp_heads} heads (backbone.mtp_heads)")
    if b.experts_per_token > b.n_experts:
        raise InputError(f"backbone.experts_per_token {b.experts_per_token}: there are {b.n_experts} experts")
    if config.duplex.control_base + 16 > b.vocab_size:
        raise InputError(f"duplex.control_base {config.duplex.control_base}: 16 control ids do not fit the vocabulary")
    if config.vision.folds and config.vision.folds[-1][2] not in (0, b.d_model):
        raise InputError("vision.folds: the last width is the model's, write 0")
    for name, choices in _CHOICES.items():
        value = operator.attrgetter(name)(config)
        if value not in choices:
            raise InputError(f"{name} {value!r}: {' or '.join(choices)}")
    side = time = 1
    for t, s, _ in config.vision.folds:
        time, side = time * t, side * s
    if config.vision.folds and (time, side) != (2, 40):
        raise InputError(f"vision.folds cover {time} frames of {side} x {side}, not 2 of 40 x 40")
