"""Configs: one frozen tree, golden texts of every named one, and one clear line for each way to get one wrong."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtml import config as configs
from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import count

NAMES = configs.names()
GOLDEN = Path(__file__).parent / "golden" / "configs"


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def refused(message: str, make, *args) -> None:
    """Calls and expects one clear line that matches."""
    with pytest.raises(InputError, match=message) as caught:
        make(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", NAMES)
def test_a_named_config_resolves_to_its_golden_text(name):
    text = "".join(f"{path} = {value!r}\n" for path, value in leaves(configs.load(name)))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"no golden text of {name}: run UPDATE_GOLDEN=1 pytest tests/test_config.py"
    assert text == path.read_text(), "the config changed: if it was meant to, run with UPDATE_GOLDEN=1 and commit"


def test_every_golden_text_has_its_config():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_json_carries_a_config_whole(name):
    config = configs.load(name)
    assert configs.from_json(configs.to_json(config)) == config


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_what_it_is_and_carries_its_name(name):
    assert configs.load(name).name == name
    assert (configs.CONFIG_DIR / f"{name}.py").read_text().startswith('"""`' + name + "`")


def test_there_are_at_most_a_hundred_fields():
    assert len(list(leaves(configs.load("tiny")))) <= 100


def test_tiny_has_at_most_twelve_million_parameters():
    total, active = count(InteractionModel(configs.load("tiny")).specs())
    assert active < total <= 12_000_000


def test_a_config_loads_from_a_path_of_python_or_of_json(tmp_path):
    tiny = configs.load("tiny")
    assert configs.load(str(configs.CONFIG_DIR / "tiny.py")) == tiny
    (tmp_path / "config.json").write_text(configs.to_json(tiny))
    assert configs.load(str(tmp_path / "config.json")) == tiny


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs.load("tiny").backbone.d_model = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "read", "value"),
    [
        ("train.steps=10", lambda c: c.train.steps, 10),
        ("train.learning_rate=1", lambda c: c.train.learning_rate, 1.0),
        ("train.learning_rate=1e-4", lambda c: c.train.learning_rate, 1e-4),
        ("duplex.heard=false", lambda c: c.duplex.heard, False),
        ("train.compute_dtype=bfloat16", lambda c: c.train.compute_dtype, "bfloat16"),
        ("name=mine", lambda c: c.name, "mine"),
        ('name="12"', lambda c: c.name, "12"),
        ("backbone.global_layers=[0,3]", lambda c: c.backbone.global_layers, (0, 3)),
        ("backbone.log_scaling_floor=null", lambda c: c.backbone.log_scaling_floor, None),
        ("backbone.log_scaling_floor=4096", lambda c: c.backbone.log_scaling_floor, 4096),
        ("backbone.sliding.window=32", lambda c: c.backbone.sliding.window, 32),
        ("vision.folds=[[2,40,0]]", lambda c: c.vision.folds, ((2, 40, 0),)),
    ],
)
def test_an_override_sets_its_field_and_no_other(text, read, value):
    tiny = configs.load("tiny")
    changed = configs.load("tiny", [text])
    assert read(changed) == value and type(read(changed)) is type(value)
    key = text.partition("=")[0]
    assert dict(leaves(changed)) == {**dict(leaves(tiny)), key: value}


def test_later_overrides_win():
    assert configs.load("tiny", ["train.steps=10", "train.steps=20"]).train.steps == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.steps", "write it as path.to.field=value"),
        ("train.step=10", "no field 'step'; there are steps, batch"),
        ("trian.steps=10", "no field 'trian'; there are name, backbone"),
        ("train.steps.more=10", "train.steps.more: no field 'more'"),
        ("train.steps=ten", "train.steps: 'ten' is not int"),
        ("train.steps=1.5", "train.steps: 1.5 is not int"),
        ("train.steps=true", "train.steps: True is not int"),
        ("train.steps=", "train.steps: '' is not int"),
        ("train.learning_rate=fast", "train.learning_rate: 'fast' is not float"),
        ("duplex.heard=1", "duplex.heard: 1 is not bool"),
        ("name=12", "name: 12 is not str"),
        ("train=10", "train: 10 is not TrainConfig"),
        ("backbone.global_layers=3", "backbone.global_layers: 3 is not tuple"),
        ("backbone.log_scaling_floor=deep", "backbone.log_scaling_floor: 'deep' is not int"),
        ("vision.folds=[[1,5]]", "vision.folds"),
        ("=3", "no field ''"),
    ],
)
def test_an_override_that_does_not_fit_is_one_clear_line(text, message):
    refused(message, configs.load, "tiny", [text])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.sliding.n_heads=3"], "backbone.sliding: 3 heads do not divide by 2 kv heads"),
        (["backbone.global_.n_kv_heads=0"], "backbone.global_.n_kv_heads 0"),
        (["backbone.sliding.window=0"], "backbone.sliding.window 0: give at least 1"),
        (["backbone.global_.pinned=-1"], "backbone.global_.pinned -1"),
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
        (["train.learning_rate=NaN"], "train.learning_rate nan"),
        (["train.clip_norm=Infinity"], "train.clip_norm inf"),
        (["flow.steps=0"], "flow.steps 0"),
        (["flow.draws=0"], "flow.draws 0"),
        (["vocoder.depth=0"], "vocoder.depth 0"),
        (["vision.folds=[[1,5,32],[2,8,100]]"], "vision.folds: the last width is the model's"),
        (["vision.folds=[[1,5,32],[2,4,0]]"], "vision.folds cover 2 frames of 20 x 20, not 2 of 40 x 40"),
        (["data.turns=0"], "data.turns 0"),
        (["data.tokens=0"], "data.tokens 0"),
        (["train.batch=0"], "train.batch 0"),
        (["train.steps=-5"], "train.steps -5"),
        (["train.checkpoint_every=0"], "train.checkpoint_every 0"),
        (["train.compute_dtype=float33"], "train.compute_dtype 'float33': float32 or bfloat16"),
    ],
)
def test_fields_that_contradict_each_other_or_reality_are_named(overrides, message):
    refused(message, configs.load, "tiny", overrides)


def test_an_unknown_name_lists_the_known_ones():
    refused("no config 'tinny': give one of .*tiny", configs.load, "tinny")
    refused("no config '/no/such/file.py'", configs.load, "/no/such/file.py")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(): return 3", "returned int, not a jaxtml.config.Config"),
        ("def get_config(): return 1 / 0", "does not evaluate: ZeroDivisionError: division by zero"),
        ("def get_config(: pass", "does not evaluate: SyntaxError"),
        ("x = 3", "has no attribute 'get_config'"),
        ("raise ValueError('two\\nlines')", "does not evaluate: ValueError: two"),
    ],
)
def test_a_python_config_that_fails_is_one_clear_line(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    refused(message, configs.load, str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config is not JSON"),
        (b"[1]", "config is not a JSON object"),
        (b"{}", "missing .* required"),
        (b'{"name": "x", "colour": 3}', "config.colour is unknown; there are name"),
        (b"\xff\xfe\x00", "config is not JSON"),
    ],
)
def test_a_json_config_that_is_none_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    refused(message, configs.load, str(path))


def test_json_with_a_field_of_another_type_names_it():
    text = configs.to_json(configs.load("tiny", ["backbone.d_model=123"])).replace(
        '"d_model": 123', '"d_model": "wide"'
    )
    refused(r"config.backbone.d_model: 'wide' is not int", configs.from_json, text)


def test_a_config_needs_no_more_than_its_parts():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields == {"name", "backbone", "duplex", "flow", "vision", "vocoder", "data", "train", "serve"}
