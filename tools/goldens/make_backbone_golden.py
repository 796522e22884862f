"""Makes tests/golden/backbone.npz: the released forward's logits for weights and inputs that anyone can make again, and
those of prediction heads.

    python tools/goldens/make_backbone_golden.py

Needs the `oracle` extra (torch, transformers). The tests then compare to the released logits on machines that have
neither; weights and inputs come from `released_weights` and `case_inputs` of this file, by NumPy from a seed, and are
not stored.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from safetensors.numpy import save_file

from jaxtml.checkpoint.inkling.config import config_from_inkling
from jaxtml.checkpoint.inkling.mapping import released_tensors
from jaxtml.config import Config

SEED = 20261123
GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "backbone.npz"
AUDIO, IMAGE = 11, 10  # placeholder ids
FIRST_TEXT = 14
TOKENS = 72  # past the windows (16), both relative extents (16, 24) and the floor of the logarithm (8)


def released_config(**text: Any) -> dict[str, Any]:
    """A released `config.json` of a small model; `text` replaces fields of its text part.

    Spelled as released: `dense_intermediate_size` makes `intermediate_size` the experts' width.
    """
    return {
        "architectures": ["InklingForConditionalGeneration"],
        "model_type": "inkling_mm_model",
        "image_token_id": IMAGE,
        "audio_token_id": AUDIO,
        "image_bos_token_id": 12,
        "audio_bos_token_id": 13,
        "text_config": {
            "model_type": "inkling_text",
            "vocab_size": 128,
            "unpadded_vocab_size": 100,
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "swa_num_attention_heads": 6,
            "swa_num_key_value_heads": 3,
            "swa_head_dim": 8,
            "sliding_window_size": 16,
            "d_rel": 4,
            "rel_extent": 24,
            "log_scaling_n_floor": 8,
            "local_layer_ids": [0, 1, 3],
            "dense_mlp_idx": 1,
            "dense_intermediate_size": 80,
            "intermediate_size": 24,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "logits_mup_width_multiplier": 2.0,
            "sconv_kernel_size": 4,
            "model_max_length": 512,
            "route_scale": 2.5,
        }
        | text,
        "audio_config": {"model_type": "inkling_audio", "mel_vocab_size": 16},
        "vision_config": {"model_type": "inkling_vision", "n_layers": 2},
    }


CASES = {
    "text": released_config(),
    "audio": released_config(dense_mlp_idx=2, n_shared_experts=1, num_experts_per_tok=3),
    "image": released_config(log_scaling_n_floor=None, local_layer_ids=[0, 1, 2]),
    "odd": released_config(  # heads that no power of two counts, one key head for all, every layer but one global
        num_attention_heads=5, num_key_value_heads=1, swa_num_attention_heads=9, swa_num_key_value_heads=3,
        hidden_size=40, num_hidden_layers=3, local_layer_ids=[1], n_routed_experts=5, num_experts_per_tok=4,
    ),
}  # fmt: skip


HEADS = 3
HEADS_CASE = released_config() | {"mtp_config": {"num_nextn_predict_layers": HEADS, "local_layer_ids": [0, 2]}}


def released_weights(config: Config) -> dict[str, np.ndarray]:
    """Every tensor of the released layout, float32, each from its own stream; norms and scales near one."""
    weights = {}
    for place in released_tensors(config):
        assert place.spec.released is not None
        rng = np.random.default_rng((SEED, zlib.crc32(place.name.encode())))
        noise = rng.standard_normal(place.spec.released.shape, np.float32)
        if "norm" in place.name or "scale" in place.name:
            weights[place.name] = 1 + 0.2 * noise
        elif noise.ndim == 1:  # the router's correction bias
            weights[place.name] = 0.2 * noise
        else:
            weights[place.name] = noise / np.float32(np.sqrt(noise.shape[-1]))
    return weights


def case_inputs(name: str) -> dict[str, np.ndarray]:
    """`ids` `[2, T]`, `bins` `[F, 80]` of the audio positions, `patches` `[P, 2, 40, 40, 3]` of the image's."""
    rng = np.random.default_rng((SEED, zlib.crc32(name.encode())))
    ids = rng.integers(FIRST_TEXT, 100, (2, TOKENS))
    if name == "audio":
        ids[0, 5:45] = AUDIO
        ids[1, 20:27] = AUDIO
    if name == "image":
        ids[0, 3:6] = IMAGE
        ids[1, 50:52] = IMAGE
    return {
        "ids": ids,
        "bins": rng.integers(0, 16, (int((ids == AUDIO).sum()), 80)),
        "patches": rng.standard_normal((int((ids == IMAGE).sum()), 2, 40, 40, 3), np.float32),
    }


def reference_logits(directory: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Logits `[2, T, unpadded vocabulary]` of the released forward: eager attention, no cache, float32."""
    import torch
    from transformers import InklingForConditionalGeneration

    model = InklingForConditionalGeneration.from_pretrained(directory, attn_implementation="eager", dtype="float32")
    tensors = {"input_ids": torch.from_numpy(inputs["ids"])}
    if len(inputs["bins"]):
        tensors["audio_input_ids"] = torch.from_numpy(inputs["bins"])
    if len(inputs["patches"]):
        tensors["pixel_values"] = torch.from_numpy(inputs["patches"])
    with torch.no_grad():
        return model.eval()(**tensors, use_cache=False).logits.numpy()


def reference_heads(directory: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Logits `[HEADS, T - HEADS, unpadded vocabulary]` of the heads for the first row, text alone.

    `transformers` 5.24 gives the heads the embedding before its norm, which the released weights want normed (see
    `jaxtml.model.mtp`), and local heads a mask without a window: its layers are called one by one, with what they
    should read and see.
    """
    import torch
    from transformers import InklingForConditionalGeneration
    from transformers.modeling_layers import MtpModel

    model = InklingForConditionalGeneration.from_pretrained(directory, attn_implementation="eager", dtype="float32")
    heads = MtpModel.from_pretrained(model.eval())
    ids = torch.from_numpy(inputs["ids"][:1])
    logits = []
    with torch.no_grad():
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        embedded = model.get_input_embeddings()(ids)
        for depth in range(HEADS):
            ahead = embedded[:, depth + 1 :]
            distance = torch.arange(ahead.shape[1])[:, None] - torch.arange(ahead.shape[1])
            local = depth in HEADS_CASE["mtp_config"]["local_layer_ids"]
            window = HEADS_CASE["text_config"]["sliding_window_size"] if local else TOKENS
            mask = torch.where((distance >= 0) & (distance < window), 0.0, -torch.inf)[None, None]
            hidden = heads.layers[depth](ahead, hidden[:, :-1], None, mask, None, None)
            logits.append(heads._project_to_logits(hidden)[0, : TOKENS - HEADS].numpy())
    return np.stack(logits)


def write_checkpoint(directory: Path, described: dict[str, Any]) -> None:
    save_file(released_weights(config_from_inkling(described)), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(described))


def main() -> None:
    logits = {}
    for name, described in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), described)
            logits[name] = reference_logits(Path(folder), case_inputs(name)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), HEADS_CASE)
        logits["heads"] = reference_heads(Path(folder), case_inputs("text")).astype(np.float32)
    made = json.dumps({"seed": SEED} | {package: version(package) for package in ("torch", "transformers", "numpy")})
    np.savez_compressed(GOLDEN, made_by=made, **logits)
    logging.info("%s: %.0f KB, %s", GOLDEN, GOLDEN.stat().st_size / 1e3, made)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    main()
