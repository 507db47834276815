"""Convert a Megatron distributed checkpoint, of a run or of tools/convert_hf_to_megatron.py, to a Hugging Face one.

The result has config.json, generation_config.json, the tokenizer's files, and safetensors files with an index. Tensors
go through memory one by one, so the model may be of any size. Under mpirun or srun the processes share the work; one
that was killed goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python tools/convert_megatron_to_hf.py --megatron runs/quickstart --out models/trained
  mpirun -n 8 python tools/convert_megatron_to_hf.py --megatron runs/32b/checkpoints/step_000400 --out models/32b-rl
"""


def main(arguments: list[str] | None = None) -> int:
    from megarl.conversion import command
    from megarl.parallel import terminal

    terminal.keep()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megatron", type=command.directory, required=True, help="a checkpoint, or a run, whose newest is taken"
    )
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--hf-config", type=command.directory, help="where config.json and tokenizer are (default: as noted there)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32", "fp8"),
        help="type of the weights (default: as they are); fp8: linear layers in FP8 blocks of 128 x 128, the rest bf16",
    )
    parser.add_argument(
        "--max-file-size", type=command.gigabytes, default="5", metavar="GB", help="of a file at most (default: 5 GB)"
    )
    options = parser.parse_args(arguments)

    from megarl.conversion import to_hf
    from megarl.formats.huggingface import PRECISIONS

    return command.run(
        lambda ranks: command.convert(
            ranks,
            options.out,
            lambda progress: to_hf.convert(
                options.megatron,
                options.out,
                ranks,
                hf_config=options.hf_config,
                dtype=PRECISIONS.get("bf16" if options.dtype == "fp8" else options.dtype),
                fp8=options.dtype == "fp8",
                file_bytes=options.max_file_size,
                progress=progress,
            ),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
