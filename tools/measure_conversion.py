"""Measure the conversion tools: speed beside `cp` and `sha256sum` of the same bytes, memory, several processes.

Makes a random checkpoint (bf16, Qwen2-shaped) in --dir and converts it to Megatron's format and back, alternating with
the copy, --rounds times. Prints medians; exit code 1 where a bar is missed: speed at least 0.6 of the copy's, resident
memory at most three times the largest tensor and 1 GB, the same bytes from one process and from --processes.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
SPEED = 0.6
EXTRA_BYTES = 10**9
EXAMPLES = """examples:
  python tools/measure_conversion.py --dir /tmp/conversion --gigabytes 2
"""

#: Runs a tool, then says how much memory was resident at most, in KiB; argv: folder of the tools, tool, its arguments.
PEAK = r"""
import re, sys
sys.path.insert(0, sys.argv[1])
code = __import__(sys.argv[2]).main(sys.argv[3:])
print("peak", re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def make_checkpoint(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write it; returns the bytes of all tensors and of the largest."""
    import torch
    from safetensors.torch import save_file

    from megarl.config.model_shape import model_shape_from_hf
    from megarl.reshard.weight_map import hf_tensors

    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "num_hidden_layers": max(1, round(gigabytes * 1e9 / 2 / 46.8e6) - 3),
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 50_000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = hf_tensors(model_shape_from_hf(config))
    names, files = list(shapes), 6
    source = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    sizes: list[int] = []
    for number in range(files):
        part = {name: torch.randn(shapes[name], generator=source).bfloat16() for name in names[number::files]}
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        sizes += [tensor.nbytes for tensor in part.values()]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
    )
    return sum(sizes), max(sizes)


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp`, to the disk, and `sha256sum`."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    files = sorted(target.glob("*.safetensors"))
    subprocess.run(["sync", *files], check=True)
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def convert(tool: str, arguments: list[str | Path], out: Path, processes: int) -> tuple[float, int]:
    """Seconds by the tool's own account, and the largest process's peak memory in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(processes)] if processes > 1 else []
    command = [*launcher, sys.executable, "-c", PEAK, str(TOOLS), tool, *map(str, arguments), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = re.search(r"in ([\d.]+) s", done.stdout)
    assert seconds, done.stdout
    return float(seconds[1]), max(int(peak) * 1024 for peak in re.findall(r"^peak (\d+)", done.stdout, re.MULTILINE))


def same(left: Path, right: Path) -> bool:
    """Whether two folders hold the same files, byte by byte."""
    names = [sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) for folder in (left, right)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(left, right, names[0], shallow=False)[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="a folder to work in; five times --gigabytes go there")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="conversions of each kind (default: 3)")
    parser.add_argument("--processes", type=int, default=2, help="processes under mpirun (default: 2)")
    options = parser.parse_args(arguments)
    source, megatron, back = options.dir / "hf", options.dir / "megatron", options.dir / "back"
    total, largest = make_checkpoint(source, options.gigabytes)
    print(f"{total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB", flush=True)
    forth: tuple[str, list[str | Path], Path] = ("convert_hf_to_megatron", ["--hf", source], megatron)
    there: tuple[str, list[str | Path], Path] = ("convert_megatron_to_hf", ["--megatron", megatron], back)
    seconds: dict[str, list[float]] = {}
    peak = 0
    for number in range(options.rounds):
        seconds.setdefault("cp and sha256sum", []).append(copy(source, options.dir / "copy"))
        for tool, given, out in (forth, there):
            spent, resident = convert(tool, given, out, 1)
            seconds.setdefault(tool, []).append(spent)
            peak = max(peak, resident)
        print(f"round {number + 1}: " + ", ".join(f"{name} {spent[-1]:.1f} s" for name, spent in seconds.items()))
    copied = statistics.median(seconds["cp and sha256sum"])
    missed = False
    for tool, given, out in (forth, there):
        alone = statistics.median(seconds[tool])
        again = out.with_name(out.name + "-again")
        shared, _ = convert(tool, given, again, options.processes)
        equal = same(out, again)
        shutil.rmtree(again)
        missed |= copied / alone < SPEED or not equal
        print(
            f"{tool}: {total / 1e9 / alone:.2f} GB/s, {copied / alone:.2f} of the copy's speed (bar {SPEED}); "
            f"{options.processes} processes take {shared / alone:.2f} of the time, the same bytes: {equal}"
        )
    bound = 3 * largest + EXTRA_BYTES
    print(f"peak resident memory {peak / 1e9:.2f} GB (bar {bound / 1e9:.2f} GB)")
    return 1 if missed or peak > bound else 0


if __name__ == "__main__":
    sys.exit(main())
