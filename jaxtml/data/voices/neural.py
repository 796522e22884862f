"""Two things that both neural voices need: an ONNX session that repeats itself, and words as timed phonemes.

Called by `kokoro` and `piper`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtml.data.packages import INSTALL
from jaxtml.data.voices import espeak
from jaxtml.data.voices.utterance import tokens_of
from jaxtml.errors import InputError


def phoneme_line(text: str, accent: str, spell: Callable[[str], str]) -> tuple[str, list[int]]:
    """The characters a neural voice reads, and where in them each word begins.

    Words are phonemised clause by clause and separated by one space; punctuation follows its word; a text without a
    last mark gets a full stop, or the voice trails off. `spell` maps one word's IPA to the model's letters.
    """
    tokens = tokens_of(text)
    if tokens[-1].isalpha() or tokens[-1].endswith("'"):
        tokens.append(".")
    line, begins, clause = "", [], []
    for token in tokens:
        if token[0].isalpha():
            clause.append(token)
            continue
        for word in espeak.phonemes(clause, accent) if clause else ():
            line += " " if line else ""
            begins.append(len(line))
            line += spell(word)
        line += token
        clause = []
    return line, begins


def starts_from_durations(durations_s: np.ndarray, begins: list[int], early_s: float) -> tuple[float, ...]:
    """Start of each word, from `[T]` seconds per token and the token where each word begins.

    The sound runs ahead of the tokens: a word is heard from `early_s` before the token (a space) in front of its own.
    `early_s` is measured per voice, on the onsets of 130 words in s, which a spectrum shows to 5 ms.
    """
    ends = np.concatenate([[0.0], np.cumsum(durations_s)])
    return tuple(max(0.0, float(ends[begin - 1]) - early_s) for begin in begins)


def open_session(model: bytes, extra_outputs: list[str], edit: Callable[[Any], None] | None = None) -> Any:
    """A single-threaded ONNX Runtime session whose graph also gives `extra_outputs` (its durations)."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(f"the package {error.name} is not installed: {INSTALL}") from error
    graph = onnx.load_from_string(model)
    if edit is not None:
        edit(graph.graph)
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in extra_outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def noise_from_inputs(graph: Any) -> None:
    """Feed a graph's noise instead of drawing it: ONNX Runtime's generator runs on from call to call, so the same text
    would sound different each time. `RandomNormalLike(x)` becomes a corner of the input `noise_<i>`, as large as x."""
    import onnx

    random = [node for node in graph.node if node.op_type == "RandomNormalLike"]
    for index, node in enumerate(random):
        name, shape, zeros = f"noise_{index}", f"noise_{index}_shape", f"noise_{index}_zeros"
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", "c", "t"]))
        graph.initializer.append(onnx.helper.make_tensor(zeros, onnx.TensorProto.INT64, [3], [0, 0, 0]))
        place = list(graph.node).index(node)
        graph.node.insert(place, onnx.helper.make_node("Slice", [name, zeros, shape], list(node.output)))
        graph.node.insert(place, onnx.helper.make_node("Shape", list(node.input), [shape]))
        graph.node.remove(node)
