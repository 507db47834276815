"""A job's script: the text of a template in slurm/, with its #SBATCH lines and its arguments filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import megarl
from megarl.errors import Refusal

#: Where the templates are.
FOLDER = Path(megarl.__file__).resolve().parents[1] / "slurm"
_DIRECTIVE = re.compile(r"#SBATCH\s+--(?P<name>[a-z-]+)(?:[= ](?P<value>[^#]*?))?\s*(?:#.*)?")


@dataclass(frozen=True, slots=True)
class Template:
    """A template: its text up to the last #SBATCH line, and the rest, which is the job's body."""

    name: str
    header: tuple[str, ...]
    body: str

    def option(self, name: str) -> str | None:
        """The value of one of its #SBATCH lines, empty for one without; None where it has no such line."""
        for line in self.header:
            match = _DIRECTIVE.fullmatch(line)
            if match is not None and match["name"] == name:
                return (match["value"] or "").strip()
        return None

    def fill(self, directives: Mapping[str, str], arguments: Sequence[str], note: str) -> str:
        """The script: `directives` replace #SBATCH lines of the same name or are added, `arguments` are lines of bash.

        An empty directive has no value. `note` says in a comment where the script is from.
        """
        rest = dict(directives)
        lines: list[str] = []
        for line in self.header:
            match = _DIRECTIVE.fullmatch(line)
            name = match["name"] if match is not None else None
            lines.append(_directive(name, rest.pop(name)) if name in rest else line)
        lines += [_directive(name, value) for name, value in rest.items()]
        # A comment ends with its line.
        comment = " ".join(note.split())
        return "\n".join([*lines, "", f"# {comment}", *arguments, "", self.body.lstrip("\n")])


def read_template(name: str, folder: Path = FOLDER) -> Template:
    """The template `slurm/<name>.sbatch`. Raises `Refusal` where it is not there."""
    path = folder / f"{name}.sbatch"
    if not path.is_file():
        raise Refusal(str(path), "is missing beside the package", "install megarl from its repository (pip install -e)")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    header = tuple(line.rstrip("\n") for line in lines[: last + 1])
    return Template(name, header, "".join(lines[last + 1 :]))


def filled_in(logs: Path, arguments: Sequence[Sequence[str]], *, is_array: bool) -> list[str]:
    """Lines of bash: the settings that slurm/common.sh lists, and the script's arguments; of an array, each task's own.

    The ranks' logs go to `logs`-JOB/.
    """
    job = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if is_array else '"$SLURM_JOB_ID"'
    lines = [
        f"export MEGARL_HOME=${{MEGARL_HOME:-{shlex.quote(str(FOLDER.parent))}}}",
        f"export MEGARL_LOGS={shlex.quote(str(logs))}-{job}",
    ]
    if not is_array:
        return [*lines, f"set -- {shlex.join(arguments[0])}"]
    tasks = [f"    {index}) set -- {shlex.join(one)} ;;" for index, one in enumerate(arguments)]
    # Each task is given its settings here.
    return [*lines, "export MEGARL_ARRAY_KEY=", "case $SLURM_ARRAY_TASK_ID in", *tasks, "esac"]


def _directive(name: str, value: str) -> str:
    if re.search(r"[\s#'\\]", value):
        # sbatch reads double quotes in these lines, and ends a bare value at a blank.
        value = f'"{value}"'
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"
