"""ONNX Runtime sessions whose output repeats exactly.

Called by `kokoro` and `piper`. Both need outputs that the published graph does not have, and Piper's graph draws
random numbers that have to come from us.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtml.data.packages import INSTALL
from jaxtml.errors import InputError


def open_session(model: bytes, extra_outputs: list[str], edit: Callable[[Any], None] | None = None) -> Any:
    """Returns a single-threaded `onnxruntime.InferenceSession`.

    Args:
      model: the ONNX file.
      extra_outputs: names of inner values that the session also returns, such as the durations of phonemes.
      edit: changes the `onnx.GraphProto` in place before the session is made.

    Raises:
      InputError: onnx or onnxruntime is not installed.
    """
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
    """Makes a graph read its noise from inputs instead of drawing it.

    ONNX Runtime's random generator continues from one call to the next, so the same text would sound different each
    time. Node `i` of the kind `RandomNormalLike(x)` is replaced by a slice of the new input `noise_<i>`. The slice
    starts at the first element of each axis and has the shape of `x`.

    Args:
      graph: an `onnx.GraphProto`, changed in place.
    """
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
