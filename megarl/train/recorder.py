"""What a run leaves behind: metrics.jsonl, samples.jsonl, TensorBoard, summary.json, curves.png; and the terminal.

Only rank 0 writes; on other ranks every method does nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megarl.config.schema import RunConfig
from megarl.records import Prompt, Sample
from megarl.train.curves import draw_curves
from megarl.train.display import Display
from megarl.train.past import keep_configuration


class Recorder:
    """Writes the files of one run directory."""

    def __init__(self, config: RunConfig, writes: bool, *, show: bool) -> None:
        self.config = config
        self.directory = Path(config.runs_dir) / config.name
        self._writes = writes
        self.display = Display(config.name, config.steps, enabled=show)
        self._tensorboard: Any = None
        self._wandb: Any = None

    def open(self, finished: int | None = None) -> None:
        """Start recording, after step `finished` where the run continues: what came after that is removed.

        None begins anew: nothing that an earlier run of this name recorded is kept.
        """
        if not self._writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        keep_configuration(self.config, finished or 0)
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_lines_of(self.directory / name, finished, self.config.steps)
        if self.config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Later steps are written again, so TensorBoard must forget the interrupted ones.
            purge = 0 if finished is None else finished + 1
            self._tensorboard = SummaryWriter(str(self.directory / "tensorboard"), purge_step=purge)
        if self.config.logging.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb = wandb.init(project=self.config.logging.wandb, name=self.config.name, resume="allow")

    def status(self, text: str) -> None:
        """Say on the terminal what is being done."""
        self.display.status(text)

    def phase(self, name: str) -> None:
        """Say on the terminal which phase the step is in."""
        self.display.phase(name)

    def metrics(self, values: dict[str, Any]) -> None:
        """Append one step's (or evaluation's) line."""
        if not self._writes:
            return
        with open(self.directory / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_null_where_not_finite(values)) + "\n")
        flat = {f"{k}/{n}": v for k, d in values.items() if isinstance(d, dict) for n, v in d.items()}
        flat |= {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if self._tensorboard is not None:
            for name, value in flat.items():
                self._tensorboard.add_scalar(name, value, values["step"])
        if self._wandb is not None:
            self._wandb.log(flat, step=values["step"])
        self.display.step(values)

    def samples(self, step: int, prompts: list[Prompt], samples: list[Sample]) -> None:
        """Append samples with their prompts; `prompts[i]` belongs to `samples[i]`."""
        if not self._writes or not samples:
            return
        with open(self.directory / "samples.jsonl", "a", encoding="utf-8") as file:
            for prompt, sample in zip(prompts, samples, strict=True):
                line = {
                    "step": step,
                    "prompt_index": sample.prompt_index,
                    "sample_index": sample.sample_index,
                    "prompt": prompt.text,
                    "answer": prompt.answer,
                    "response": sample.text,
                    "reward": sample.reward,
                    "finish_reason": sample.finish_reason,
                }
                if sample.reward_terms:
                    line["reward_terms"] = sample.reward_terms
                file.write(json.dumps(line) + "\n")

    def curves(self) -> None:
        """Redraw curves.png from metrics.jsonl."""
        if self._writes:
            draw_curves(self.directory / "metrics.jsonl", self.directory / "curves.png", self.config.name)

    def summary(self, values: dict[str, Any]) -> None:
        """Write summary.json."""
        if self._writes:
            partial = self.directory / "summary.json.partial"
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            partial.replace(self.directory / "summary.json")

    def close(self) -> None:
        """Flush and end the display."""
        self.display.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _null_where_not_finite(value: Any) -> Any:
    """JSON has no NaN and no infinity, which the loss of a skipped update may be."""
    if isinstance(value, dict):
        return {key: _null_where_not_finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_lines_of(file: Path, finished: int | None, steps: int) -> None:
    """Keep the lines up to step `finished`, without a torn last line and the evaluation at the run's end.

    That evaluation is made again whenever a run reaches its end.
    """
    if not file.is_file():
        return
    kept: list[str] = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        made_again = "accuracy" in line and line["step"] >= steps
        if finished is not None and line["step"] <= finished and not made_again:
            kept.append(text + "\n")
    fresh = file.with_name(file.name + ".partial")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(file)
