"""Where a run's numbers go beside its own files: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.report.figures import flat, one_level


class Tracker(Protocol):
    def numbers(self, values: dict[str, Any]) -> None:
        """Take a line of metrics.jsonl."""
        ...

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Take lines of samples.jsonl."""
        ...

    def place(self) -> str:
        """Where a user finds it."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...


def trackers(config: RunConfig, directory: Path, finished: int | None) -> list[Tracker]:
    """Those that `config` asks for, of a run that goes on after step `finished`, or begins anew (None)."""
    found: list[Tracker] = []
    if config.logging.tensorboard:
        found.append(TensorBoard(directory / "tensorboard", finished))
    if config.logging.wandb is not None:
        found.append(Wandb(config, config.logging.wandb, directory, finished))
    return found


class TensorBoard:
    """Scalars by step."""

    def __init__(self, directory: Path, finished: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory = directory
        # Later steps are written again, so TensorBoard must forget the interrupted ones.
        self._writer = SummaryWriter(str(directory), purge_step=0 if finished is None else finished + 1)

    def numbers(self, values: dict[str, Any]) -> None:
        for name, value in flat(values).items():
            self._writer.add_scalar(name, value, values["step"])

    def samples(self, rows: list[dict[str, Any]]) -> None:
        pass

    def place(self) -> str:
        return f"tensorboard --logdir {self._directory}"

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, whose id stays in the run's folder, so that a run that continues is one there too.

    It has the resolved configuration, all numbers over `step`, and a table of samples. Raises `Refusal` where it cannot
    be started.
    """

    def __init__(self, config: RunConfig, project: str, directory: Path, finished: int | None) -> None:
        # Read as it is imported. What the run prints is the terminal's; errors are said.
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # pyright: ignore[reportMissingImports]

        self._library: Any = wandb
        try:
            self._run: Any = wandb.init(
                project=project,
                name=config.name,
                id=run_id(directory, new=finished is None),
                resume="allow",
                dir=str(directory),
                config=config.model_dump(mode="json"),
                allow_val_change=True,
                # wandb would take hold of the streams.
                settings=wandb.Settings(console="off"),
            )
        except Exception as error:
            said = " ".join(str(error).split()).rstrip(".")
            raise Refusal(
                f"logging.wandb={project}",
                f"must be a project that wandb can start a run in ({said})",
                "log in (wandb login), set WANDB_MODE=offline, or leave logging.wandb out",
            ) from error
        # Steps after the last checkpoint come again when a run continues, which wandb's own count would refuse.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def numbers(self, values: dict[str, Any]) -> None:
        self._run.log(flat(values))

    def samples(self, rows: list[dict[str, Any]]) -> None:
        flattened = [one_level(row) for row in rows]
        columns = list(dict.fromkeys(name for row in flattened for name in row))
        table = self._library.Table(columns=columns, data=[[row.get(name) for name in columns] for row in flattened])
        self._run.log({"samples": table, "step": rows[-1]["step"]})

    def place(self) -> str:
        return f"wandb sync {Path(self._run.dir).parent}" if self._run.offline else self._run.url

    def close(self) -> None:
        self._run.finish()


def run_id(directory: Path, *, new: bool) -> str:
    """The id under which wandb knows the run in `directory`: the one that is kept there, or a `new` one, kept."""
    kept = directory / "wandb_id"
    if new or not kept.is_file():
        kept.write_text(f"{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
    return kept.read_text(encoding="utf-8").strip()
