"""Package metadata. Tool settings live in pyproject.toml.

Tested windows (pinned to the minor version): jax 0.10 / flax 0.12 on Python 3.11, which `make`
installs, and jax 0.12 / flax 0.12 on Python 3.12 and 3.13. `vla doctor` reads these numbers from
the installed package and says what on this machine lies outside.

`vla_jax/configs` and `vla_jax/launch` are links to the folders at the top: so that a wheel carries
them, and so that `vla_jax.configs` is importable in a checkout as it is after an installation.
"""

from pathlib import Path

from setuptools import find_packages, setup

JAX = ">=0.10.2,<0.13"
CORE = [
    "absl-py>=2.1",
    "filelock>=3.13",  # jax bounds its compilation cache with it
    "flax>=0.12.8,<0.13",
    f"jax{JAX}",
    "jaxtyping>=0.3.9,<0.4",
    "ml-collections>=1.1,<2",
    "msgpack>=1.1,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "packaging>=23",
    "pillow>=11",
    "prometheus-client>=0.20",  # orbax needs it as well
    "simplejpeg>=1.8,<2",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.66",
    "universal-pathlib>=0.3.10,<0.4",  # data in object stores; brings fsspec
    "websockets>=15,<18",
]
EXTRAS = {
    # TFDS round trips and the tf.data stream; training from the byte index needs neither.
    "data": ["tensorflow-cpu>=2.20,<2.22", "tensorflow-datasets>=4.9.9,<5", "google-crc32c>=1.6"],
    # Tokenizers that ship without a tokenizer.json are converted by transformers (no torch).
    "convert": ["transformers>=5.20,<6", "sentencepiece>=0.2", "protobuf>=5"],
    # Data in object stores: http(s)://, gs:// and s3://.
    "cloud": ["fsspec[http]>=2025.9", "gcsfs>=2025.9", "s3fs>=2025.9"],
    # LeRobot's parquet files and videos.
    "lerobot": ["av>=18.0,<19", "pyarrow>=25,<27"],
    "cuda": [f"jax[cuda13]{JAX}"],
    "tpu": [f"jax[tpu]{JAX}"],
    # The compilers of machines that are not here, for `vla plan --compile`: no accelerator and no
    # driver is needed. Best in an environment of its own: jax looks for the devices of both.
    "plan": [f"jax[tpu]{JAX}", f"jax-cuda13-pjrt{JAX}", f"jax-cuda13-plugin{JAX}"],
    # Profiles in the browser.
    "xprof": ["xprof>=2.20,<3"],
    # Starts jobs on GKE, see docs/scale.md.
    "k8s": ["xpk>=1.16,<2"],
    "log": ["tensorboardX>=2.6,<3", "wandb>=0.19"],
    "demo": ["matplotlib>=3.9"],
}
# What the tests import beside the core: most of the extras, other projects' readers, the linters.
EXTRAS["dev"] = [
    *EXTRAS["data"],
    *EXTRAS["lerobot"],
    *EXTRAS["demo"],
    "beartype>=0.20",
    "fsspec[http]>=2025.9",
    "setuptools>=77",
    "pyrefly==1.5.0",
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6",
    "ruff==0.17.5",
    "safetensors>=0.6,<0.9",
    "tensorboardX>=2.6,<3",
    "transformers>=5.20,<6",
]

setup(
    name="vla_jax",
    version="0.2.0",
    description="Vision-language-action models in JAX: backbone x structure x head",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The vla_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["robotics", "vision-language-action", "jax", "flax", "imitation learning"],
    # eval_servers is also a distribution of its own (eval_servers/pyproject.toml), for machines
    # that run a robot or a simulator and have no jax; the two carry the same files.
    packages=find_packages(include=["vla_jax", "vla_jax.*", "eval_servers", "eval_servers.*"]),
    package_data={
        "vla_jax": ["py.typed"],
        "vla_jax.launch": ["*.sh", "*.yaml"],
        "eval_servers": ["*.sh"],
        **{
            f"eval_servers.{name}": ["*.json", "*.txt", "*.sh", "*.c"]
            for name in ("calvin", "libero", "simpler", "tabletop")
        },
    },
    entry_points={"console_scripts": ["vla = vla_jax.cli:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=CORE,
    extras_require=EXTRAS,
)
