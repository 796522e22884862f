"""How evenly a step's tokens are spread over the experts, in units of each layer's mean load.

Called by `jaxtml.train.progress`. A load is `[L, M, E]`: how often each expert was chosen.

Axes: L MoE layers, M modalities (`PositionKind`), E routed experts.
"""

from __future__ import annotations

import numpy as np

from jaxtml.stream.tokens import PositionKind


def expert_balance(load: np.ndarray) -> dict[str, float]:
    """Returns the load of the least and the most loaded expert of any layer, as multiples of the layer's mean.

    Args:
      load: `[L, M, E]`.

    Returns:
      "load_min" and "load_max" over all tokens, and "load_max_KIND" for each modality that occurs.
    """
    if not load.size:
        return {"load_min": 1.0, "load_max": 1.0}
    relative = _relative_to_mean(load.sum(axis=1))
    found = {"load_min": relative.min(), "load_max": relative.max()}
    for kind in PositionKind:
        if load[:, kind].any():
            found[f"load_max_{kind.name.lower()}"] = _relative_to_mean(load[:, kind]).max()
    return {name: float(value) for name, value in found.items()}


def balance_text(load: np.ndarray) -> str:
    """Returns `expert_balance` in short, for a progress line.

    For example "0.61..1.72 (layer 3; own 2.10)": least and most loaded expert, the layer of the latter, and the
    modality that is balanced worst.
    """
    found = expert_balance(load)
    text = f"{found['load_min']:.2f}..{found['load_max']:.2f}"
    if not load.size:
        return text
    modality = max((name for name in found if name.startswith("load_max_")), key=lambda name: found[name])
    worst = int(np.argmax(max_load_by_layer(load)))
    return f"{text} (layer {worst}; {modality.removeprefix('load_max_')} {found[modality]:.2f})"


def max_load_by_layer(load: np.ndarray) -> list[float]:
    """Returns the load of the most loaded expert of each layer, rounded to 0.001."""
    return [round(float(layer.max()), 3) for layer in _relative_to_mean(load.sum(axis=1))] if load.size else []


def _relative_to_mean(load: np.ndarray) -> np.ndarray:
    """Returns the load `[L, E]` divided by each layer's mean load."""
    return load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)
