"""The machines that a run is planned for: sizes and link speeds, read from a small YAML file. Torch-free."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from megarl.config.base import Settings
from megarl.config.load import read_table, record_of
from megarl.config.yaml_dialect import Plain
from megarl.errors import Refusal

GIB = 1 << 30

#: Where clusters have names.
FOLDER = Path(__file__).resolve().parents[2] / "configs" / "clusters"


class Cluster(Settings):
    """Nodes that are all alike. Speeds in bytes per second, of one GPU in one direction."""

    gpus_per_node: PositiveInt = Field(description="GPUs of a node, which its fast links join.")
    gpu_memory_gib: PositiveFloat = Field(description="Memory of a GPU in GiB, as a program finds it.")
    compute_capability: str = Field(description="Of a GPU, by which rules of FP8 and of runs that repeat go.")
    host_memory_gib: PositiveFloat = Field(description="Host memory of a node in GiB.")
    nvlink_bytes_per_second: PositiveFloat = Field(description="Between the GPUs of a node.")
    network_bytes_per_second: PositiveFloat = Field(description="Between nodes.")
    hbm_bytes_per_second: PositiveFloat = Field(description="Of a GPU's own memory.")
    bf16_flops_per_second: PositiveFloat = Field(description="Dense BF16 operations of a GPU in a second.")
    message_seconds: NonNegativeFloat = Field(description="What a message takes beside its bytes.")
    reserved_gib: NonNegativeFloat = Field(
        description="GPU memory in GiB of no tensor: CUDA's context, communication buffers, captured graphs, "
        "fragmentation."
    )

    @field_validator("compute_capability")
    @classmethod
    def _major_and_minor(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d?\.\d", value):
            raise ValueError("must be NVIDIA's major and minor number, such as 9.0 for Hopper")
        return value

    @property
    def gpu_memory(self) -> int:
        """Bytes of a GPU."""
        return int(self.gpu_memory_gib * GIB)

    @property
    def capability(self) -> tuple[int, int]:
        """A GPU's compute capability, major and minor."""
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor)

    @property
    def host_memory(self) -> int:
        """Bytes of a node's host."""
        return int(self.host_memory_gib * GIB)

    @property
    def reserved(self) -> int:
        """Bytes of a GPU that are nobody's tensor."""
        return int(self.reserved_gib * GIB)


def read_cluster(name: str, gpu_memory_gib: float | None = None) -> Cluster:
    """The cluster of a name in configs/clusters/, or of a YAML file; `gpu_memory_gib` replaces the file's.

    Raises `Refusal` for an unknown name, and for a file like `load_config`.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(os.path.expanduser(name))
        if not path.is_file():
            known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
            raise Refusal(
                f"--cluster {name}",
                "is neither the name of a cluster nor a file",
                f"use {' or '.join(known)}, or the path of a YAML file like configs/clusters/{known[0]}.yaml",
            )
    table = read_table(path, needed=", ".join(Cluster.model_fields))
    if gpu_memory_gib is not None:
        table["gpu_memory_gib"] = Plain(repr(gpu_memory_gib))
    return record_of(table, Cluster)
