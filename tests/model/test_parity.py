"""The backbone gives the logits of the released forward pass, for text, audio and images.

The sequences reach beyond windows, relative extents and the floor of log-length scaling. Golden files hold logits of
`transformers`, for machines without torch. The tests marked `oracle` run our model and `transformers` on checkpoints
that `transformers` itself has written.
"""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.checkpoint.inkling.config import config_from_inkling
from jaxtml.checkpoint.inkling.mapping import released_tensors
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.config import Config
from jaxtml.convert.conversion import convert
from jaxtml.model.interaction import Inputs, InteractionModel
from jaxtml.model.spec import Params, flatten, init_params
from jaxtml.stream.clock import CLOCK_FEATURES
from jaxtml.stream.tokens import PositionKind

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "goldens" / "make_backbone_golden.py"), run_name="golden")
CASES = TOOL["CASES"]
BOUND = 3e-5  # relative error of float32 logits


def _assert_same(ours: np.ndarray, reference: np.ndarray) -> None:
    assert np.linalg.norm(ours - reference) / np.linalg.norm(reference) <= BOUND
    assert (ours.argmax(axis=-1) == reference.argmax(axis=-1)).mean() >= 0.999


def _our_logits(config: Config, params: Params, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Returns our logits over the unpadded vocabulary; placeholder ids become dMel frames and patches."""
    ids = inputs["ids"]
    kind = np.full(ids.shape, PositionKind.TEXT, np.uint8)
    kind[ids == TOOL["AUDIO"]] = PositionKind.USER
    kind[ids == TOOL["IMAGE"]] = PositionKind.PATCH
    bins = np.zeros((*ids.shape, 80), np.uint8)
    bins[kind == PositionKind.USER] = inputs["bins"]
    per_row = (kind == PositionKind.PATCH).sum(axis=1)
    patches = np.zeros((len(ids), per_row.max(), 2, 40, 40, 3), np.float32)
    patches[np.arange(per_row.max()) < per_row[:, None]] = inputs["patches"]
    model = InteractionModel(config)
    batch = Inputs(kind, ids.astype(np.int32), bins, np.zeros((*ids.shape, CLOCK_FEATURES), np.float32), patches)

    @jax.jit
    def forward(params, batch):
        hidden, _ = model.hidden(params, batch, jnp.float32)
        return model.logits(params, hidden)

    return np.asarray(forward(params, batch))[..., : config.backbone.unpadded_vocab_size]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_released_ones(name):
    config = config_from_inkling(CASES[name])
    params = jax.tree.map(np.array, init_params(InteractionModel(config).specs(), 0))
    leaves, weights = dict(flatten(params)), TOOL["released_weights"](config)
    for place in released_tensors(config):
        leaves[place.path][place.position] = place.spec.released.load(weights[place.name])
    with np.load(TOOL["GOLDEN"]) as golden:
        _assert_same(_our_logits(config, params, TOOL["case_inputs"](name)), golden[name])


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def _write_random_checkpoint(transformers, described: dict, folder: Path) -> None:
    """Writes a checkpoint with `save_pretrained`, in which no parameter has its neutral value."""
    import torch

    torch.manual_seed(1)
    config = transformers.InklingConfig.from_dict(described)
    config.text_config.initializer_range = 0.15
    model = transformers.InklingForConditionalGeneration(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                assert "norm" in name or "scale" in name or "correction_bias" in name, name
                tensor += 0.2 * torch.randn_like(tensor)
    model.save_pretrained(folder)


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_transformers_gives_its_logits(name, transformers, tmp_path):
    _write_random_checkpoint(transformers, CASES[name], tmp_path)
    config, params = read_checkpoint(tmp_path)
    inputs = TOOL["case_inputs"](name)
    reference = TOOL["reference_logits"](tmp_path, inputs)
    _assert_same(_our_logits(config, params, inputs), reference)


@pytest.mark.oracle
def test_the_released_vision_tower_of_four_folds_gives_its_logits(transformers, tmp_path):
    described = CASES["image"] | {"vision_config": {"model_type": "inkling_vision", "n_layers": 4}}
    _write_random_checkpoint(transformers, described, tmp_path)
    config, params = read_checkpoint(tmp_path)
    assert config.vision.folds == ((1, 5, 128), (1, 2, 320), (1, 4, 4800), (2, 1, 0))
    inputs = TOOL["case_inputs"]("image")
    _assert_same(_our_logits(config, params, inputs), TOOL["reference_logits"](tmp_path, inputs))


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_transformers_finds_the_same_tensors_after_conversion_to_ours_and_back(name, transformers, tmp_path):
    from safetensors.numpy import load_file

    _write_random_checkpoint(transformers, CASES[name], tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    first, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert first.keys() == again.keys()
    for tensor in first:
        np.testing.assert_array_equal(first[tensor], again[tensor], err_msg=tensor)
    _, report = transformers.InklingForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    configs = [transformers.InklingConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("hf", "back")]
    for config in configs:
        del config["_name_or_path"], config["text_config"]["local_layer_ids"]  # `layer_types` has the same information
    assert configs[0] == configs[1]
    inputs = TOOL["case_inputs"](name)
    references = [TOOL["reference_logits"](tmp_path / folder, inputs) for folder in ("hf", "back")]
    np.testing.assert_array_equal(*references)
    _assert_same(_our_logits(*read_checkpoint(tmp_path / "ours"), inputs), references[0])
