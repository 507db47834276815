"""Chat templates beside a sentencepiece model: the Jinja texts that Hugging Face's tokenizers carry. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.errors import Refusal


def find_template(folder: Path) -> str | None:
    """The template in `folder`: chat_template.jinja, else that of tokenizer_config.json, else None.

    Of several named templates it is the one called default. Raises `Refusal` where the file cannot be read.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        template = json.loads(config.read_text()).get("chat_template")
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}["default"]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise Refusal(
            str(config), f"must be JSON with a chat_template, or with a default one ({error!r})", "restore the file"
        ) from None
    return template


def render(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str], origin: str) -> str:
    """The text of a conversation up to where the assistant speaks, by transformers' own renderer, in its sandbox.

    `tokens` are bos_token and its siblings. Raises `Refusal` where the template is broken, or refuses the messages.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    rows = [dict(message) for message in messages]
    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, **tokens}
    try:
        rendered = render_jinja_template([rows], **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise Refusal(
            f"the chat template of {origin}", f"cannot render a prompt ({error})", "correct it, or the messages"
        ) from None
    return rendered[0][0]
