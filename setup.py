"""Package definition.

Version ranges are those with which the test command has run. Each extra adds one ability; the comment says which.

An installed wheel has one top-level package, `jaxtml`. The folders `configs/` and `launch/` stay at the top of the
repository, where people look for them, and are installed as `jaxtml.configs` and `jaxtml.launch`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

TRACES = ["opentelemetry-api>=1.30,<2"]
WEBRTC = ["aiortc>=1.16,<1.17"]  # jaxtml/serve/transport/peer.py uses internals of aiortc
CLIENTS = ["openai[realtime]>=3.50,<4", "openai-agents>=0.20,<1"]  # stock clients of the protocols that we serve
RUNNERS = ["pytest>=8,<10", "pytest-xdist>=3.7,<4", "hypothesis>=6,<7"]
CHECKERS = ["ruff>=0.14,<0.16", "basedpyright>=1.30,<2"]


def version() -> str:
    """Returns `__version__` of jaxtml/__init__.py, the only place where the version is written."""
    found = re.search(r'^__version__ = "(.+)"$', (HERE / "jaxtml" / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


setup(
    name="jaxtml",
    version=version(),
    description="Train, convert, evaluate and serve full-duplex interaction models in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["jaxtml", "jaxtml.*"]), "jaxtml.configs", "jaxtml.launch"],
    package_dir={"jaxtml.configs": "configs", "jaxtml.launch": "launch"},
    package_data={"jaxtml": ["py.typed", "assets/**/*", "serve/web/page/*"], "jaxtml.launch": ["*"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.14",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<1.1",
        "grain>=0.2.18,<0.3",
        "tensorstore>=0.1.86",
        "numpy>=2.2,<3",
        "isal>=1.7,<2",  # CRC-32 at the speed of memory
        "msgpack>=1.1,<2",
        "psutil>=6,<8",
        "absl-py>=2.3,<3",
        "aiohttp>=3.14,<4",
        "msgspec>=0.20,<1",
        "prometheus-client>=0.22,<1",
        "pyjwt>=2.10,<3",
        "matplotlib>=3.10,<4",
        "rich>=14,<16",
        "safetensors>=0.6,<1",
        "soundfile>=0.13,<1",
        "soxr>=1,<2",
        "sphn>=0.2,<0.3",
        "av>=18,<19",
        "tensorboardX>=2.6,<3",
        "tokenizers>=0.22,<1",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],  # runs on TPUs
        "cuda12": ["jax[cuda12]", "tokamax>=0.0.12"],  # runs on NVIDIA GPUs
        "cuda13": ["jax[cuda13]", "tokamax>=0.0.12"],
        "plan": ["libtpu>=0.0.52"],  # `jaxtml plan` for TPUs, on a machine without one
        "plan-cuda": ["jax-cuda12-plugin", "jax-cuda12-pjrt", "tokamax>=0.0.12"],  # the same for GPUs
        "oracle": ["torch>=2.9", "transformers>=5.24,<6", "pillow>=11"],  # the released implementation, to compare with
        "voices": ["espeakng-loader==0.2.4", "onnx>=1.17", "onnxruntime>=1.20"],  # speech for training data
        "judges": ["faster-whisper>=1.1,<2", "pesq>=0.0.4", "pystoi>=0.4.1", "jiwer>=4,<5"],  # for evaluation
        "webrtc": WEBRTC,  # serves over WebRTC
        "telemetry": [*TRACES, "opentelemetry-distro[otlp]"],  # exports a trace of each session
        "test": [*RUNNERS, *CHECKERS, *CLIENTS, *WEBRTC, *TRACES, "opentelemetry-sdk>=1.30,<2", "setuptools>=77"],
    },
    entry_points={"console_scripts": ["jaxtml=jaxtml.commands.main:run"]},
)
