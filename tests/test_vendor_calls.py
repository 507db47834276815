"""Every call of Megatron-core, vLLM and Transformer Engine fits the locked versions, those that need a GPU too."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import vendor_calls
from packaging.version import Version
from vendor_calls import Known, faults_of, live, python_files, uses_in

ROOT = Path(__file__).parents[1]
LOCKED = dict(re.findall(r"^([\w-]+)={2,3}(\S+)$", (ROOT / "requirements" / "gpu.lock").read_text(), re.MULTILINE))
ENGINE = Version(LOCKED["transformer-engine"])
#: What Megatron-core calls for and this Transformer Engine lacks, and why megarl does not get there.
NOT_REACHED = {
    r"pytorch\.ops\.(GroupedLinear|Scaled\w+): ": "use_transformer_engine_op_fuser, which asks for 2.14 itself",
    r"pytorch\.ep\.": "dispatchers other than the all-to-all one",
    r"generalized_tensor_parallelism\.py": "tensor_parallel_num_weight_shards",
    r"cuda_graphs\.py:\d+: .*\.quantization_state": "CUDA graphs; asked for where it exists",
    r"fp4_utils\.py": "FP4",
    r"general_gemm: .*'workspace'": "given where get_workspace exists",
}
HAS_ENGINE = find_spec("transformer_engine") is not None


def of_transformer_engine(name: str) -> Known:
    """By what is installed, else by the table."""
    return live(name) if HAS_ENGINE else vendor_calls.tabled(name)


def test_calls_of_megatron_and_vllm_fit() -> None:
    files = list(python_files(ROOT, "megarl"))
    seen = [use for file in files for use in uses_in(ROOT, file, ["megatron", "vllm"], ENGINE)]
    assert sum(use.call is not None for use in seen) > 60
    # What the CPU alone has is called there alone.
    only_cpu = {"megarl/rollout/cpu_worker.py"} if HAS_ENGINE else set()
    assert [
        said
        for file in files
        if file not in only_cpu
        for said in faults_of(ROOT, file, ["megatron", "vllm"], ENGINE, live)
    ] == []


def test_calls_of_transformer_engine_fit() -> None:
    """Megatron-core's calls of it: that its version and Megatron's go together is said by neither."""
    root, files = vendor_calls.megatron_files()
    ours = [file for folder in ("megarl", "tests/gpu") for file in python_files(ROOT, folder)]
    callers = [(root, file) for file in files] + [(ROOT, file) for file in ours]
    engine = [vendor_calls.TRANSFORMER_ENGINE]
    seen = [use for folder, file in callers for use in uses_in(folder, file, engine, ENGINE)]
    assert sum(use.call is not None for use in seen) > 80
    found = [
        said for folder, file in callers for said in faults_of(folder, file, engine, ENGINE, of_transformer_engine)
    ]
    assert [said for said in found if not any(re.search(pattern, said) for pattern in NOT_REACHED)] == []


def test_the_table_is_of_the_locked_version() -> None:
    """Made anew by `python tests/vendor_calls.py` in an environment of the GPU lock."""
    table = vendor_calls.table()
    assert table["version"] == LOCKED["transformer-engine"]
    assert sum(isinstance(known, list) for known in table["signatures"].values()) > 40


@pytest.mark.skipif(not HAS_ENGINE, reason="Transformer Engine is not installed: its table is taken for it")
def test_the_table_is_what_is_installed() -> None:
    found, table = vendor_calls.written_out(), vendor_calls.table()
    assert found["version"] == table["version"]
    assert found["signatures"].items() <= table["signatures"].items()


CALLS = """
import json
from json import JSONEncoder as Encoder
from json import gone

def f(indent, *more, **kept):
    json.dumps(1, indent=2)                     # right
    json.dumps(1, indents=2)                    # taken: it has **kw
    json.load()
    json.loads("1", indents=2, **kept)          # taken: it has **kw
    json.gone(1)
    Encoder(indent=1, sortkeys=True)
    table = {"separators": None}
    table["seperators"] = 1
    Encoder(**table)
    json = indent
    json.anything()

class Mine(Encoder):
    def __init__(self, **kept):
        super().__init__(1)
        super().__init__(skipkeys=True, **kept)
        super().gone()

if is_te_min_version("2.12.0"):
    from json import newer
if not is_te_min_version("2.3.0") or is_te_min_version("2.11.0", check_equality=False):
    from json import older
if is_te_min_version("2.11.0") and HAVE_TE:
    from json import named
try:
    from json import perhaps

    def g():
        json.dumps()
except ImportError:
    perhaps = None
try:
    from json import dump

    dump()
except ImportError:
    dump = None
encoder: Any = json.encoder
encoder.encode_basestring = f
encoder.renamed = f
json.decoder.JSONDecoder.decode = f
json.decoder.JSONDecoder.decoding = f
"""
FAULTS = [
    "4: json.gone: does not exist",
    "9: json.load: missing a required argument: 'fp'",
    "11: json.gone: does not exist",
    "12: json.JSONEncoder: got an unexpected keyword argument 'sortkeys'",
    "15: json.JSONEncoder: got an unexpected keyword argument 'seperators'",
    "21: json.JSONEncoder.__init__: too many positional arguments",
    "23: json.JSONEncoder.gone: does not exist",
    "30: json.named: does not exist",
    "41: json.dump: missing a required argument: 'obj'",
    "46: json.encoder.renamed: does not exist",
    "48: json.decoder.JSONDecoder.decoding: does not exist",
]


def test_calls_that_do_not_fit_are_found(tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    found = faults_of(tmp_path, "calls.py", ["json"], Version("2.11.0"), live)
    assert found == [f"calls.py:{said}" for said in FAULTS]


def test_relative_imports_are_of_their_package(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "calls.py").write_text("from . import dumps\nfrom .decoder import nothing\ndumps()\n")
    assert faults_of(tmp_path, "json/calls.py", ["json"], ENGINE, live) == [
        "json/calls.py:2: json.decoder.nothing: does not exist",
        "json/calls.py:3: json.dumps: missing a required argument: 'obj'",
    ]
