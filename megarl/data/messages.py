"""From the cell of a prompt to chat messages: the one place where it is decided whether all of it is text. Torch-free.

A cell is kept whole or not at all. What is asked with a picture, a tool or a turn that nobody can read is another
question without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megarl.data.cells import NoText, native, text_of

Message = Mapping[str, Any]

#: Fields of a message, or kinds of its parts, that carry what is not text.
_NOT_TEXT = (
    "audio",
    "audios",
    "document",
    "documents",
    "file",
    "files",
    "function_call",
    "image",
    "images",
    "image_url",
    "input_audio",
    "input_image",
    "tool_call_id",
    "tool_calls",
    "tools",
    "video",
    "videos",
    "video_url",
)
#: Columns beside a prompt's that data sets of questions about pictures and sound have; a text only marks their place.
BESIDE = ("image", "images", "video", "videos", "audio", "audios")
#: Kinds of parts that are text.
_TEXT_KINDS = ("text", "input_text", "output_text")


class Unfit(Exception):
    """A prompt's cell that is no conversation in text; `reason` is the name of its counter.

    no_prompt: it holds no question; not_text: pictures, sound, files or calls of tools; bad_turns: it is something
    else than a text or a list of messages, or a turn is blank or has no content.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def messages_of(cell: Any) -> list[Message]:
    """The conversation in a prompt's cell: a text is one turn of the user's. Raises `Unfit`.

    A turn's content is a text or a list of parts, whose texts are put together with line ends between them. A turn
    without role is the user's; an empty turn of the system's says nothing and is left out; further fields, such as
    name, go on to the chat template.
    """
    if isinstance(cell, Mapping):
        cell = _turns_of_columns(cell)
    if not isinstance(cell, list):
        text = _text(cell)
        if text is None:
            raise Unfit("no_prompt")
        return [{"role": "user", "content": text}]
    turns = [_turn(one) for one in cell]
    spoken = [turn for turn in turns if turn["role"] != "system"]
    if not any(turn["content"] for turn in spoken):
        raise Unfit("no_prompt")
    if not all(turn["content"] for turn in spoken):
        raise Unfit("bad_turns")
    return [turn for turn in turns if turn["content"]]


def question_of(messages: Sequence[Message]) -> str:
    """The conversation's texts, without the roles."""
    return "\n\n".join(message["content"] for message in messages)


def _turns_of_columns(cell: Mapping[str, Any]) -> list[Any]:
    """The turns of a record of lists, which some libraries make of a list of records; a record alone is one turn."""
    columns = {name: column for name, column in cell.items() if column is not None}
    if "content" not in columns or not isinstance(columns.get("role"), list):
        return [cell]
    if any(not isinstance(column, list) or len(column) != len(columns["role"]) for column in columns.values()):
        raise Unfit("bad_turns")
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]


def _turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise Unfit("bad_turns")
    # Typed tables give every message each field that any of them has.
    given = {name: value for name, value in turn.items() if value not in (None, [], {}, "")}
    if any(name in given for name in _NOT_TEXT):
        raise Unfit("not_text")
    if "content" not in turn:
        raise Unfit("bad_turns")
    role = given.pop("role", "user")
    if not isinstance(role, str):
        raise Unfit("bad_turns")
    return {"role": role, "content": _content(given.pop("content", None))} | native(given)


def _content(content: Any) -> str:
    if not isinstance(content, list):
        return _text(content) or ""
    return "\n".join(text for text in map(_part, content) if text)


def _part(part: Any) -> str:
    if isinstance(part, str):
        return _text(part) or ""
    if not isinstance(part, Mapping):
        raise Unfit("bad_turns")
    given = {name for name, value in part.items() if value not in (None, [], {}, "")}
    kind = part.get("type") or "text"
    if kind not in _TEXT_KINDS or given & {*_NOT_TEXT}:
        raise Unfit("not_text")
    if "text" not in part:
        raise Unfit("bad_turns")
    return _text(part["text"]) or ""


def _text(value: Any) -> str | None:
    try:
        return text_of(value)
    except NoText:
        raise Unfit("bad_turns") from None
