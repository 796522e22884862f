"""Every number in the config has a rule, and every field accepts the same values as ever."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from jaxtml import config as configs
from jaxtml.config import Config
from jaxtml.config.rules import rules_of
from jaxtml.errors import InputError

# Which of the values below each field accepts.
GOLDEN = Path(__file__).parents[1] / "golden" / "config_values.txt"

INTS = (-1, 0, 1, 2, 64, 512, 513, 4096, 4097, 10**6, 10**6 + 1, 2**31 - 1, 2**31)
FLOATS = (-0.5, 0.0, 1e-9, 0.5, 1.0, 1.5, 1e9, math.inf, math.nan)
TEXTS = ("", "float32", "bfloat16", "float16", "none", "outputs", "full", "replicated", "ring", "ragged")
VALUES: dict[Any, tuple[Any, ...]] = {
    bool: (False, True),
    str: TEXTS,
    int: INTS,
    float: FLOATS,
    int | None: (None, *INTS),
    float | None: (None, *FLOATS),
}


def replaced(node: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(node, **{name: replaced(getattr(node, name), tuple(rest), value) if rest else value})


def accepts(config: Config, path: tuple[str, ...], value: Any) -> bool:
    try:
        configs.validate(replaced(config, path, value))
    except InputError:
        return False
    return True


def field_types(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and type, with its rules, of every field that is not itself a dataclass."""
    for name, hint in get_type_hints(type(node), include_extras=True).items():
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            yield from field_types(value, (*path, name))
        else:
            yield (*path, name), hint


def plain_types(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and type, without its rules, of every field that is not itself a dataclass."""
    for name, hint in get_type_hints(type(node)).items():
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            yield from plain_types(value, (*path, name))
        else:
            yield (*path, name), hint


def test_every_field_accepts_the_values_that_it_always_accepted():
    tiny = configs.load("tiny")
    lines = []
    for path, hint in plain_types(tiny):
        if hint in VALUES:
            accepted = " ".join(repr(value) for value in VALUES[hint] if accepts(tiny, path, value))
            lines.append(f"{'.'.join(path)}: {accepted}\n")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text("".join(lines))
    assert "".join(lines) == GOLDEN.read_text()


def test_every_number_has_a_rule_beside_its_field():
    tiny = configs.load("tiny")
    plain = dict(plain_types(tiny))
    numbers = {int, float, int | None, float | None}
    missing = [path for path, hint in field_types(tiny) if plain[path] in numbers and not rules_of(hint)]
    assert not missing


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["backbone.sliding.n_heads=3"],
            "backbone.sliding.n_heads 3: give a multiple of backbone.sliding.n_kv_heads, 2",
        ),
        (["backbone.global_.n_kv_heads=0"], "backbone.global_.n_kv_heads 0"),
        (["backbone.sliding.window=0"], "backbone.sliding.window 0: give at least 1"),
        (["backbone.global_.pinned=-1"], "backbone.global_.pinned -1"),
        (["backbone.sliding.retained=5"], "backbone.sliding.retained 5: give 0, only global layers retain"),
        (
            ["backbone.global_.retained=9", "backbone.global_.window=100"],
            "backbone.global_.rel_extent 256: .* with backbone.global_.retained give at most .*window, 100",
        ),
        (
            ["backbone.global_.retained=9", "backbone.global_.rel_extent=9", "backbone.global_.window=20"],
            r"backbone.global_.window 20: a micro-turn has up to \d+ tokens, and all must",
        ),
        (["backbone.global_.retained=9", "backbone.global_layers=[]"], "backbone.global_.retained 9: no layer is glob"),
        (["backbone.global_layers=[2,99]"], r"layers are 0\.\.5"),
        (["backbone.n_layers=0", "backbone.global_layers=[]"], "backbone.n_layers 0"),
        (["backbone.n_dense=-1"], "backbone.n_dense -1"),
        (["backbone.d_model=-256"], "backbone.d_model -256"),
        (["backbone.experts_per_token=9"], "backbone.experts_per_token 9: there are 8 experts"),
        (["backbone.experts_per_token=0"], "backbone.experts_per_token 0"),
        (["backbone.logits_divisor=0"], "backbone.logits_divisor 0.0"),
        (["duplex.control_base=1010"], "duplex.control_base 1010: 16 control ids do not fit"),
        (["duplex.control_base=-1"], "duplex.control_base -1"),
        (["duplex.max_text=-1"], "duplex.max_text -1"),
        (["duplex.temperature=-0.5"], "duplex.temperature -0.5"),
        (["duplex.top_p=0"], "duplex.top_p 0.0: give more than 0"),
        (["duplex.gate_threshold=1.5"], "duplex.gate_threshold 1.5: give at most 1"),
        (["train.learning_rate=NaN"], "train.learning_rate nan: give a finite number"),
        (["train.clip_norm=Infinity"], "train.clip_norm inf: give a finite number"),
        (["flow.steps=0"], "flow.steps 0"),
        (["flow.draws=0"], "flow.draws 0"),
        (["vocoder.depth=0"], "vocoder.depth 0"),
        (["vision.folds=[[1,5,32],[2,8,100]]"], "vision.folds: the last layer always has the width of the model"),
        (["vision.folds=[[1,5,32],[2,4,0]]"], "vision.folds cover 2 frames of 20 x 20, not 2 of 40 x 40"),
        (["data.turns=0"], "data.turns 0"),
        (["data.tokens=0"], "data.tokens 0"),
        (["train.batch=0"], "train.batch 0"),
        (["train.steps=-5"], "train.steps -5"),
        (["train.checkpoint_every=0"], "train.checkpoint_every 0"),
        (["train.compute_dtype=float33"], "train.compute_dtype 'float33': give float32 or bfloat16"),
    ],
)
def test_fields_that_contradict_each_other_or_reality_are_named(overrides, message, refused):
    refused(message, configs.load, "tiny", overrides)
