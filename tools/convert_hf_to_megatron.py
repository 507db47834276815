"""Convert a Hugging Face checkpoint to a Megatron distributed checkpoint.

The result loads under any layout (megarl: model.weights=OUT, with model.path=OUT/hf). Tensors go through memory one
by one, so the model may be of any size. Under mpirun or srun the processes share the work; one that was killed goes on
where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python tools/convert_hf_to_megatron.py --hf models/Qwen2.5-32B --out checkpoints/Qwen2.5-32B --tensor 8
  mpirun -n 8 python tools/convert_hf_to_megatron.py --hf models/Qwen3-30B-A3B --out checkpoints/30b --expert 8
"""


def main(arguments: list[str] | None = None) -> int:
    from megarl.conversion import command
    from megarl.parallel import terminal

    terminal.keep()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=command.directory, required=True, help="the Hugging Face checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument("--tensor", type=command.positive, default=1, help="store shards of this tensor parallelism")
    parser.add_argument("--pipeline", type=command.positive, default=1, help="... of this pipeline parallelism")
    parser.add_argument("--expert", type=command.positive, default=1, help="... of this expert parallelism")
    parser.add_argument(
        "--expert-tensor", type=command.positive, help="... of this tensor parallelism for experts (default: --tensor)"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="type of the weights (default: as they are)")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model*.bin, weights alone")
    options = parser.parse_args(arguments)

    from megarl.config.sections import ParallelSettings
    from megarl.conversion import to_megatron
    from megarl.formats.huggingface import PRECISIONS

    layout = ParallelSettings(
        tensor=options.tensor,
        pipeline=options.pipeline,
        expert=options.expert,
        expert_tensor=options.expert_tensor,
    )
    return command.run(
        lambda ranks: command.convert(
            ranks,
            options.out,
            lambda progress: (
                options.hf,
                to_megatron.convert(
                    options.hf,
                    options.out,
                    layout,
                    ranks,
                    dtype=PRECISIONS.get(options.dtype),
                    allow_pickle=options.allow_pickle,
                    progress=progress,
                ),
            ),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
