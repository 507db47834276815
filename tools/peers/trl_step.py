"""TRL's GRPO step on the work of configs/bench_step.yaml; run by tools/measure_peer.py in an environment with TRL.

Prints one JSON line: seconds of each step, and of its generation with all that comes before the update.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with model/ and arithmetic/train.jsonl")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder that the trainer may write")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    import torch
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.data / "model"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.data / "model", padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    problems = load_dataset("json", data_files=str(arguments.data / "arithmetic" / "train.jsonl"), split="train")

    def boxed(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(f"\\boxed{{{right}}}" in text) for text, right in zip(completions, answer, strict=True)]

    seconds: list[float] = []
    generating: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, *given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = super()._generate_and_score_completions(*given, **named)
            generating.append(time.perf_counter() - start)
            return found

    # 32 prompts x 8 answers x 64 tokens, one update on all of them, no reference.
    settings = GRPOConfig(
        output_dir=str(arguments.out),
        per_device_train_batch_size=256,
        num_generations=8,
        max_completion_length=64,
        learning_rate=1e-5,
        beta=0.0,
        max_steps=arguments.steps,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=problems,
        reward_funcs=boxed,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    print(json.dumps({"steps": seconds, "generation": generating}))


if __name__ == "__main__":
    main()
