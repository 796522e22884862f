#!/usr/bin/env python3
"""Makes tests/golden/backbone.npz: logits of the released Inkling model and of its prediction heads.

Needs the `oracle` extra (torch, transformers). The tests compare our logits with backbone.npz, also on machines that
have neither package. backbone.npz does not hold weights or inputs. The functions `released_weights` and `case_inputs`
of this tool make them again from a seed, with NumPy alone.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxtml.checkpoint.inkling.config import config_from_inkling
from jaxtml.checkpoint.inkling.mapping import released_tensors
from jaxtml.commands.arguments import run_tool, tool_parser
from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.strict_json import dumps

SEED = 20261123
GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "backbone.npz"
AUDIO, IMAGE = 11, 10  # ids of the placeholders of audio and images
FIRST_TEXT = 14  # ids from here on are text
TOKENS = 72  # more than the windows (16), both relative extents (16, 24) and the floor of the log scaling (8)


def released_config(**text: Any) -> dict[str, Any]:
    """Returns the `config.json` of a small model in Inkling's released format. `text` replaces fields of the text part.

    The field names are those of the released checkpoint. There `intermediate_size` is the width of the experts, because
    `dense_intermediate_size` is given too.
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
    "odd": released_config(  # head counts that are no power of two, one key head, all layers but one global
        num_attention_heads=5, num_key_value_heads=1, swa_num_attention_heads=9, swa_num_key_value_heads=3,
        hidden_size=40, num_hidden_layers=3, local_layer_ids=[1], n_routed_experts=5, num_experts_per_tok=4,
    ),
}  # fmt: skip


HEADS = 3
HEADS_CASE = released_config() | {"mtp_config": {"num_nextn_predict_layers": HEADS, "local_layer_ids": [0, 2]}}


def released_weights(config: Config) -> dict[str, np.ndarray]:
    """Returns every tensor of the released layout by name, float32. Norms and scales are near one.

    Each tensor has its own random stream, so a tensor's numbers do not depend on the other tensors.
    """
    weights = {}
    for place in released_tensors(config):
        assert place.spec.released is not None
        rng = np.random.default_rng((SEED, zlib.crc32(place.name.encode())))
        noise = rng.standard_normal(place.spec.released.shape, np.float32)
        if "norm" in place.name or "scale" in place.name:
            weights[place.name] = 1 + 0.2 * noise
        elif noise.ndim == 1:  # the correction bias of the router
            weights[place.name] = 0.2 * noise
        else:
            weights[place.name] = noise / np.float32(np.sqrt(noise.shape[-1]))
    return weights


def case_inputs(name: str) -> dict[str, np.ndarray]:
    """Returns the inputs of a case: `ids` `[2, T]`, `bins` `[F, 80]` of the F audio positions, and `patches`
    `[P, 2, 40, 40, 3]` of the P image positions."""
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
    """Returns logits `[2, T, unpadded vocabulary]` of the released forward pass: eager attention, no cache, float32."""
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
    """Returns logits `[HEADS, T - HEADS, unpadded vocabulary]` of the prediction heads for the first row, text alone.

    `transformers` 5.24 runs the heads differently from what the released weights need (see `jaxtml.model.mtp`): it
    passes the embedding before its norm, and a mask without a window to local heads. This function therefore calls the
    layers of the heads one by one, with the normed embedding and the right mask.
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
    """Writes a checkpoint in the released format, with the config `described` and the weights of `released_weights`."""
    save_file(released_weights(config_from_inkling(described)), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(dumps(described))


def make(args: argparse.Namespace) -> None:
    if not args.out.parent.is_dir():
        raise InputError(f"no folder {args.out.parent}: make it first, or give another --out")
    logits = {}
    try:
        for name, described in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                write_checkpoint(Path(folder), described)
                logits[name] = reference_logits(Path(folder), case_inputs(name)).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), HEADS_CASE)
            logits["heads"] = reference_heads(Path(folder), case_inputs("text")).astype(np.float32)
    except ImportError as error:
        raise InputError(f"{error}: pip install -e '.[oracle]'") from error
    made_by = dumps({"seed": SEED} | {package: version(package) for package in ("torch", "transformers", "numpy")})
    np.savez_compressed(args.out, allow_pickle=False, made_by=made_by, **logits)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} KB, {made_by}")


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/goldens/make_backbone_golden.py --out /tmp/backbone.npz")
    parser.add_argument("--out", type=Path, default=GOLDEN, metavar="NPZ", help="default: tests/golden/backbone.npz")
    run_tool(parser, make)
