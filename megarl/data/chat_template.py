"""Chat templates beside a sentencepiece model: the Jinja texts that Hugging Face's tokenizers carry. Torch-free.

Rendered as transformers renders them, without importing it: https://huggingface.co/docs/transformers/chat_templating.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from megarl.errors import Refusal


def find_template(folder: Path) -> str | None:
    """The template in `folder`: chat_template.jinja, else that of tokenizer_config.json, else None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    config = folder / "tokenizer_config.json"
    if config.is_file():
        template = json.loads(config.read_text()).get("chat_template")
        return template if isinstance(template, str) else None
    return None


def render(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str], origin: str) -> str:
    """The text of a conversation up to where the assistant speaks. `tokens` are bos_token and its siblings.

    Templates run in a sandbox. Raises `Refusal` where the template is broken, or refuses the messages.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    try:
        rows = [dict(message) for message in messages]
        return environment.from_string(template).render(messages=rows, add_generation_prompt=True, **tokens)
    except TemplateError as error:
        raise Refusal(
            f"the chat template of {origin}", f"cannot render a prompt ({error})", "correct it, or the messages"
        ) from None
