"""Package definition. Ranges are those that the test command has run with; extras are for who needs them."""

from pathlib import Path

from setuptools import find_packages, setup

ORACLE = ["torch>=2.9", "transformers>=5.20,<6", "pillow>=11"]
VOICES = [
    "espeakng-loader==0.2.4",
    "onnx>=1.17",
    "onnxruntime>=1.20",
]
JUDGES = ["faster-whisper>=1.1,<2", "pesq>=0.0.4", "pystoi>=0.4.1", "jiwer>=4,<5"]
CLIENTS = ["openai[realtime]>=3.50,<4", "openai-agents>=0.20,<1"]  # of the protocols that are served
WEBRTC = ["aiortc>=1.16,<1.17"]  # serve/peer.py relies on what is inside
RUNNERS = ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6,<7"]
TRACES = ["opentelemetry-api>=1.30,<2"]
TEST = [*RUNNERS, *CLIENTS, *TRACES, *WEBRTC, "opentelemetry-sdk>=1.30,<2", "ruff>=0.14,<0.16", "basedpyright>=1.30,<2"]


setup(
    name="jaxtml",
    version="0.1.0",
    description="Train, convert, evaluate and serve full-duplex interaction models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["jaxtml", "jaxtml.*", "configs"]),
    package_data={"jaxtml": ["assets/**/*", "serve/page/*"]},
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
        "tpu": ["jax[tpu]"],
        "plan": ["libtpu>=0.0.52"],  # compiles for TPUs where there are none
        "plan-cuda": ["jax-cuda12-plugin", "jax-cuda12-pjrt", "tokamax>=0.0.12"],  # and for GPUs
        "cuda12": ["jax[cuda12]", "tokamax>=0.0.12"],
        "cuda13": ["jax[cuda13]", "tokamax>=0.0.12"],
        "oracle": ORACLE,
        "voices": VOICES,
        "judges": JUDGES,
        "webrtc": WEBRTC,
        "telemetry": [*TRACES, "opentelemetry-distro[otlp]"],
        "test": TEST,
    },
    entry_points={"console_scripts": ["jaxtml=jaxtml.commands.main:run"]},
)
