"""A jaxtml checkpoint gives back what was saved, and each way in which it can be wrong has one clear message."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.checkpoint.orbax.source import OrbaxCheckpoint, load_checkpoint
from jaxtml.checkpoint.source import read_parameters
from jaxtml.config import load, to_json
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import flatten, init_params

CONFIG = load("tiny", ["backbone.d_model=32", "backbone.vocab_size=300", "duplex.control_base=280", "flow.width=32"])


@pytest.fixture(scope="module")
def params():
    return init_params(InteractionModel(CONFIG).specs(), 3)


@pytest.fixture
def checkpoint(params, tmp_path):
    save_checkpoint(tmp_path / "ck", CONFIG, params)
    return tmp_path / "ck"


def test_a_checkpoint_gives_back_its_config_and_parameters(checkpoint, params):
    config, loaded = load_checkpoint(checkpoint)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_saving_in_bfloat16_rounds_each_parameter_once(params, tmp_path):
    save_checkpoint(tmp_path / "ck", CONFIG, params, dtype="bfloat16")
    _, loaded = load_checkpoint(tmp_path / "ck")
    for (path, ours), (_, saved) in zip(flatten(loaded), flatten(params), strict=True):
        assert ours.dtype == jnp.float32, path
        np.testing.assert_array_equal(ours, saved.astype(jnp.bfloat16).astype(jnp.float32), err_msg=path)


def test_the_tokenizer_is_saved_with_the_checkpoint(params, tmp_path):
    (tmp_path / "t.json").write_text("{}")
    save_checkpoint(tmp_path / "ck", CONFIG, params, tokenizer_path=tmp_path / "t.json")
    assert (tmp_path / "ck" / "tokenizer.json").read_text() == "{}"


def test_saving_over_a_checkpoint_replaces_it_and_leaves_nothing_beside_it(checkpoint, params):
    save_checkpoint(checkpoint, CONFIG, jax.tree.map(lambda a: a + 1, params))
    _, loaded = load_checkpoint(checkpoint)
    np.testing.assert_array_equal(loaded["own"], params["own"] + 1)
    assert [p.name for p in checkpoint.parent.iterdir()] == ["ck"]


def test_a_save_that_fails_leaves_the_old_checkpoint(checkpoint, params, tmp_path):
    with pytest.raises(FileNotFoundError):
        save_checkpoint(checkpoint, CONFIG, jax.tree.map(lambda a: a + 1, params), tokenizer_path=tmp_path / "none")
    _, loaded = load_checkpoint(checkpoint)
    np.testing.assert_array_equal(loaded["own"], params["own"])
    assert [p.name for p in checkpoint.parent.iterdir()] == ["ck"]


def _refusal(checkpoint) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(checkpoint)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_directory_is_named(tmp_path):
    assert "no checkpoint directory" in _refusal(tmp_path / "nowhere")


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    assert "has no config.json" in _refusal(tmp_path)


def test_the_config_of_another_program_is_refused(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    assert "not the config of a jaxtml checkpoint" in _refusal(checkpoint)


def test_a_checkpoint_without_parameters_is_refused(checkpoint):
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "incomplete" in _refusal(checkpoint)


def test_a_checkpoint_of_another_size_names_the_parameter_and_both_shapes(checkpoint):
    wider = dataclasses.replace(CONFIG, flow=dataclasses.replace(CONFIG.flow, width=48))
    (checkpoint / "config.json").write_text(to_json(wider))
    message = _refusal(checkpoint)
    assert "flow/down_0" in message and "(64, 32)" in message and "(96, 48)" in message


def test_a_checkpoint_of_fewer_layers_names_the_parameter(checkpoint):
    deeper = dataclasses.replace(CONFIG, flow=dataclasses.replace(CONFIG.flow, depth=4))
    (checkpoint / "config.json").write_text(to_json(deeper))
    assert "flow/down_3 is missing in the checkpoint, and (64, 32) in the config" in _refusal(checkpoint)


def test_a_truncated_data_file_is_refused(checkpoint):
    files = [p for p in (checkpoint / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert "is damaged or incomplete" in _refusal(checkpoint)


def test_a_checkpoint_of_version_0_1_is_refused_for_use_and_can_start_training(params, tmp_path):
    """Such a checkpoint has no drafter, and its flow head reads no frame before."""
    older = {**params, "flow": {k: v for k, v in params["flow"].items() if k != "w_before"}}
    del older["draft"]
    save_checkpoint(tmp_path / "older", CONFIG, older)
    with pytest.raises(InputError, match="was trained by jaxtml 0.1, .* train it further with `jaxtml train"):
        OrbaxCheckpoint(tmp_path / "older")
    source = OrbaxCheckpoint(tmp_path / "older", may_be_older=True)
    lacking = {path for path in source.specs if not source.holds(path)}
    assert lacking == {"flow/w_before"} | {path for path in source.specs if path.startswith("draft/")}
    read = dict(flatten(read_parameters(source)))
    np.testing.assert_array_equal(read["flow/w_in"], params["flow"]["w_in"])
    assert np.abs(read["flow/w_before"]).max() > 0
