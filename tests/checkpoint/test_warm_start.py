"""A larger model starts with the weights of a smaller one: the same logits on text, and neutral new parts."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtml import config as configs
from jaxtml.checkpoint.inkling.config import config_from_inkling
from jaxtml.checkpoint.inkling.safetensors_file import read_header, write_at
from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.checkpoint.source import full_index, place_parameters, spec_table
from jaxtml.checkpoint.warm_start import LayerPlace, WarmStart
from jaxtml.config import Config, DuplexConfig, FlowConfig
from jaxtml.convert.conversion import convert, write_checkpoint
from jaxtml.convert.logits import text_logits
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import flatten, init_params
from jaxtml.stream.tokens import CONTROLS
from jaxtml.train.parameters import checkpoint_parameters, parameter_shapes

ROOT = Path(__file__).parents[2]
GOLDENS = runpy.run_path(str(ROOT / "tools" / "goldens" / "make_backbone_golden.py"), run_name="golden")
DESCRIBED = GOLDENS["released_config"]()
SMALLER = config_from_inkling(DESCRIBED, "inkling")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "inkling"
    folder.mkdir()
    GOLDENS["write_checkpoint"](folder, DESCRIBED)
    return folder


@pytest.fixture
def larger() -> Config:
    """`SMALLER` with two more layers, other limits of a micro-turn, another flow head, and pinned tokens."""
    b = SMALLER.backbone
    globals_ = dataclasses.replace(b.global_, window=256, pinned=4)
    backbone = dataclasses.replace(b, n_layers=6, global_layers=(2, 5), global_=globals_)
    duplex = DuplexConfig(control_base=100, max_typed=2, max_heard=3, max_text=3)
    return dataclasses.replace(
        SMALLER, name="larger", backbone=backbone, duplex=duplex, flow=FlowConfig(width=32, depth=2)
    )


def test_on_text_the_logits_are_those_of_the_smaller_model(checkpoint, larger, tmp_path):
    path = tmp_path / "larger.json"
    path.write_text(configs.to_json(larger))
    summary = convert(checkpoint, tmp_path / "ours", begin_as=str(path), verify=True)
    assert "tensors equal, logits of 64 tokens too" in summary
    config, params = read_checkpoint(tmp_path / "ours")
    assert config == larger
    ids = np.random.default_rng(0).integers(0, 100, (2, 96))
    np.testing.assert_array_equal(text_logits(config, params, ids), text_logits(*read_checkpoint(checkpoint), ids))


def test_layers_with_different_dtypes_in_a_release_get_one_dtype(checkpoint, larger, tmp_path):
    """A release has scales of dense layers in bfloat16 and of routers in float32. Here, they share a stack."""
    write_checkpoint(ReleasedCheckpoint(checkpoint), tmp_path / "release", "float32", "hf", "bfloat16")
    release = ReleasedCheckpoint(tmp_path / "release")
    scales = {release.dtype(path) for path in spec_table(release.config) if path.endswith("mlp/global_scale")}
    assert len(scales) == 2
    path = tmp_path / "larger.json"
    path.write_text(configs.to_json(larger))
    assert "logits of 64 tokens too" in convert(tmp_path / "release", tmp_path / "a", begin_as=str(path), verify=True)
    source = WarmStart(release, larger)
    for path, spec in spec_table(larger).items():
        assert source.read(path, full_index(spec)).dtype == source.dtype(path), path


def test_added_layers_are_copies_that_change_nothing(checkpoint, larger):
    source = ReleasedCheckpoint(checkpoint)
    warm = WarmStart(source, larger)
    for layer, (same_kind, kind) in {4: (3, "sliding"), 5: (2, "global")}.items():
        place = _place(InteractionModel(larger), layer)
        origin = warm.layers[place]
        assert origin.added and origin.place == _place(InteractionModel(SMALLER), same_kind), kind
        for name in ("attn/wq", "attn/wo", "mlp/w13", "mlp/w2", "mlp/shared_w2", "mlp/router"):
            rest = full_index(warm.specs[f"{place.run}/{name}"])[2:]
            index, origin_index = (
                (*(slice(i, i + 1) for i in position), *rest) for position in (place.position, origin.place.position)
            )
            ours = warm.read(f"{place.run}/{name}", index)[0, 0]
            theirs = source.read(f"{origin.place.run}/{name}", origin_index)[0, 0]
            if name in ("attn/wo", "mlp/w2", "mlp/shared_w2"):
                assert not ours.any() and theirs.any()
            else:
                np.testing.assert_array_equal(ours, theirs)


def _place(model: InteractionModel, layer: int) -> LayerPlace:
    """Returns where the layer of this number stands in the stacks."""
    backbone = model.backbone
    return next(
        LayerPlace(f"layers/block{b}/run{r}", (i, j))
        for b, block in enumerate(backbone.blocks)
        for r, run in enumerate(block.runs)
        for i in range(block.repeats)
        for j in range(run.layers)
        if backbone.layer_index(b, r, i, j) == layer
    )


def test_clock_and_own_voice_start_at_zero_and_empty_control_rows_get_different_values(checkpoint, larger):
    file = checkpoint / "model.safetensors"
    stored = read_header(file)["model.llm.embed.weight"]
    write_at(stored, 100 * stored.mapped()[:1].nbytes, np.zeros_like(stored.mapped()[100:]))
    warm = WarmStart(ReleasedCheckpoint(checkpoint), larger)
    assert not warm.read("own", (slice(None),)).any()
    assert not warm.read("clock/weight", (slice(None), slice(None))).any()
    embed = warm.read("embed/weight", (slice(None), slice(None)))
    controls = embed[100 : 100 + CONTROLS]
    assert len(np.unique(controls, axis=0)) == CONTROLS
    assert 0.5 < controls.std() / embed[:100].std() < 2
    assert not embed[100 + CONTROLS :].any()
    np.testing.assert_array_equal(warm.read("embed/weight", (slice(96, 108), slice(8, 24))), embed[96:108, 8:24])


def test_a_run_starts_from_a_released_checkpoint_without_converting_it(checkpoint, larger, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    model = InteractionModel(larger)
    params = checkpoint_parameters(checkpoint, model, tmp_path)
    expected = place_parameters(WarmStart(ReleasedCheckpoint(checkpoint), larger), parameter_shapes(model))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    (checkpoint / "tokenizer.json").write_text("another")
    with pytest.raises(InputError, match="its tokenizer.json differs from the tokenizer of"):
        checkpoint_parameters(checkpoint, model, tmp_path)


def test_a_run_may_have_prediction_heads_that_the_checkpoint_it_starts_from_lacks(tmp_path):
    params = init_params(InteractionModel(SMALLER).specs(), 5)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_checkpoint(tmp_path / "ours", SMALLER, params, tokenizer_path=tmp_path / "tokenizer.json")
    more = dataclasses.replace(SMALLER, backbone=dataclasses.replace(SMALLER.backbone, mtp_heads=1))
    started = checkpoint_parameters(tmp_path / "ours", InteractionModel(more), tmp_path)
    heads = started.pop("mtp")
    jax.tree.map(np.testing.assert_array_equal, started, params)
    assert (
        all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(heads)) and heads["block0"]["run0"]["input_proj"].any()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3, "global_layers": (2,)}, "it has 3 layers, and inkling has 4"),
        (
            {"d_ff_expert": 32},
            "cannot start with the weights of inkling: backbone.d_ff_expert is 32, and 24 in inkling",
        ),
        ({"global_layers": (1, 5)}, "its layer 1 is of a kind that inkling does not have there"),
        ({"n_dense": 2}, "inkling: backbone.n_dense is 2, and 1 in inkling"),
    ],
    ids=str,
)
def test_another_backbone_is_refused_and_the_difference_is_named(changes, message, checkpoint, larger):
    other = dataclasses.replace(larger, backbone=dataclasses.replace(larger.backbone, **changes))
    with pytest.raises(InputError, match=message):
        WarmStart(ReleasedCheckpoint(checkpoint), other)


def test_every_tensor_that_both_models_have_is_copied(checkpoint, larger):
    source = ReleasedCheckpoint(checkpoint)
    warm = WarmStart(source, larger)
    for path, spec in spec_table(larger).items():
        if not path.startswith("layers/") and spec.released is not None and path != "embed/weight":
            np.testing.assert_array_equal(
                warm.read(path, full_index(spec)), source.read(path, full_index(spec)), err_msg=path
            )
    assert {p for p, _ in flatten(InteractionModel(larger).specs())} == set(warm.specs)
    assert json.loads((checkpoint / "config.json").read_text()) == DESCRIBED
