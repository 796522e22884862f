"""Configs are found by name or path, changed by overrides, and every mistake ends in one clear line."""

from __future__ import annotations

import dataclasses

import pytest

from jaxtml import config as configs
from jaxtml.errors import InputError


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
def test_an_override_sets_its_field_and_no_other(text, read, value, leaves):
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
def test_an_override_that_does_not_fit_is_one_clear_line(text, message, refused):
    refused(message, configs.load, "tiny", [text])


def test_an_unknown_name_lists_the_known_ones(refused):
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
def test_a_python_config_that_fails_is_one_clear_line(tmp_path, source, message, refused):
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
def test_json_that_is_not_a_config_is_refused_in_one_clear_line(tmp_path, content, message, refused):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    refused(message, configs.load, str(path))


def test_json_with_a_field_of_another_type_names_it(refused):
    text = configs.to_json(configs.load("tiny", ["backbone.d_model=123"])).replace(
        '"d_model": 123', '"d_model": "wide"'
    )
    refused(r"config.backbone.d_model: 'wide' is not int", configs.from_json, text)


def test_config_from_before_a_field_was_added_reads_right_and_keeps_its_text():
    """Old checkpoints have no `serve.background_text`. A conversion is resumed only if its config has its old text."""
    config = configs.load("tiny")
    text = configs.to_json(config)
    assert "background_text" not in text and configs.from_json(text) == config and not config.serve.background_text
    reads = configs.load("tiny", ["serve.background_text=true"])
    assert '"background_text": true' in configs.to_json(reads) and configs.from_json(configs.to_json(reads)) == reads


@pytest.mark.parametrize("value", ["nan", "-inf", "Infinity"])
def test_a_number_that_is_not_finite_is_called_so(value):
    with pytest.raises(InputError, match="train.learning_rate.*finite number"):
        configs.load("tiny", [f"train.learning_rate={value}"])
