"""Chat templates: the Jinja texts that Hugging Face's tokenizers carry, in all the places where they keep them.

Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.errors import Refusal

Message = Mapping[str, Any]

#: Folders of named templates, NAME.jinja each.
_FOLDERS = ("additional_chat_templates", "chat_templates")


class TemplateRefusal(Refusal):
    """A chat template that cannot render a conversation."""


class TurnLost(TemplateRefusal):
    """A chat template that renders a conversation without one of its turns."""


def find_template(folder: Path) -> str | None:
    """The template in `folder`, None where there is none; of several named ones it is the one called default.

    Template files go before tokenizer_config.json, and this before chat_template.json, a processor's. Raises `Refusal`
    where a file cannot be read, or none of several is the default.
    """
    named: dict[str, Any] = {}
    for name in _FOLDERS:
        named |= {file.stem: _read(file) for file in sorted((folder / name).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        named["default"] = _read(folder / "chat_template.jinja")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if "default" not in named and (folder / name).is_file():
            named |= _templates_in(folder / name)
    template = named.get("default")
    if named and not isinstance(template, str):
        raise Refusal(
            f"the chat templates of {folder} ({', '.join(map(str, named))})",
            "must include a text called default",
            "name the one that is meant default, or write it to chat_template.jinja",
        )
    return template


def _templates_in(config: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(config)).get("chat_template")
        if isinstance(found, list):
            return {one["name"]: one["template"] for one in found}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        rule = f"must be JSON with a chat_template, or with a list of them by name ({error!r})"
        raise Refusal(str(config), rule, "restore the file") from None
    if isinstance(found, Mapping):
        return dict(found)
    return {} if found is None else {"default": found}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(str(file), f"cannot be read as UTF-8 text ({error})", "restore the file") from None


def render(template: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> str:
    """The text of a conversation up to where the assistant speaks, by transformers' own renderer, in its sandbox.

    `tokens` are bos_token and its siblings. Raises what the template raises.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, **tokens}
    return render_jinja_template([[dict(message) for message in messages]], **options)[0][0]


def checked(renderer: Callable[[], str], messages: Sequence[Message], origin: str) -> str:
    """What `renderer` makes of `messages` by the chat template of `origin`.

    Raises `TemplateRefusal` where it raises anything, and `TurnLost` where the text of a turn is not in what it makes.
    Turns of the assistant are the template's business: many leave out what was thought in them.
    """
    try:
        text = renderer()
    except Exception as error:  # a template is a program of the user's
        what = " ".join(f"{error}".split())[:300] or type(error).__name__
        raise TemplateRefusal(
            f"the chat template of {origin}", f"cannot render a prompt ({what})", "correct it, or the messages"
        ) from None
    for message in messages:
        if message["role"] != "assistant" and not _holds(text, message["content"]):
            raise TurnLost(
                f"the chat template of {origin}",
                f"leaves out what a turn of role {message['role']} says",
                "correct the template, use roles that it knows, or set data.template",
            )
    return text


def _holds(text: str, part: str) -> bool:
    """Whether `part` is in `text`, whatever becomes of its blanks."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())
