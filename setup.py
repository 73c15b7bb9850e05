"""Package metadata. Tool settings live in pyproject.toml.

Tested windows (pinned to the minor version): jax 0.10 / flax 0.12 on Python 3.11, which `make`
installs, and jax 0.11 / flax 0.12 on Python 3.12. `launch/doctor.py` reads CORE, EXTRAS and
python_requires from here and says what on this machine lies outside.
"""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.1",
    "flax>=0.12.8,<0.13",
    "jax>=0.10.2,<0.12",
    "jaxtyping>=0.3.9,<0.4",
    "ml-collections>=1.1,<2",
    "msgpack>=1.1,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=11",
    "safetensors>=0.6,<0.9",
    "simplejpeg>=1.8,<2",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.66",
    "websockets>=15,<18",
]
EXTRAS = {
    # TFDS round trips and the tf.data stream; training from the byte index needs neither.
    "data": ["tensorflow-cpu>=2.20,<2.22", "tensorflow-datasets>=4.9.9,<5"],
    # Tokenizers that ship without a tokenizer.json are converted by transformers (no torch).
    "convert": ["transformers>=5.20,<6", "sentencepiece>=0.2"],
    # LeRobot's parquet files and videos.
    "lerobot": ["av>=18.0,<19", "pyarrow>=25,<27"],
    "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
    "tpu": ["jax[tpu]>=0.10.2,<0.12"],
    "log": ["tensorboardX>=2.6,<3", "wandb>=0.19"],
    "demo": ["matplotlib>=3.9"],
    "dev": [
        "av>=18.0,<19",
        "beartype>=0.20",
        "matplotlib>=3.9",
        "pyarrow>=25,<27",
        "pyright==1.1.414",
        "pytest>=8.3,<10",
        "pytest-xdist>=3.6",
        "ruff==0.17.5",
        "tensorboardX>=2.6,<3",
        "tensorflow-cpu>=2.20,<2.22",
        "tensorflow-datasets>=4.9.9,<5",
        "transformers>=5.20,<6",
    ],
}

setup(
    name="vla_jax",
    version="0.1.0",
    description="Vision-language-action models in JAX: backbone x structure x head",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vla_jax", "vla_jax.*"]),
    python_requires=">=3.11,<3.13",
    install_requires=CORE,
    extras_require=EXTRAS,
)
