"""What is said to the policy in the midst of a conversation, as token ids that follow those it wrote."""

from __future__ import annotations

from collections.abc import Sequence

from megarl.data.chat_template import TemplateRefusal
from megarl.data.messages import Message, question_of
from megarl.data.tokenizer import Tokenizer

#: Stands for what the assistant said, which is not rendered again.
_SAID = "The answer so far."


def continuation_ids(tokenizer: Tokenizer, messages: Sequence[Message], last: int) -> list[int]:
    """Ids of `messages` after a turn of the assistant's, up to where it speaks again, by the chat template.

    `last` is the last token of that turn: the token with which the template ends a turn is not said twice. Without a
    template the messages' contents stand between blank lines. Raises `TemplateRefusal` where the template raises, or
    leaves a turn out.
    """
    if tokenizer.chat_template is None:
        return tokenizer.encode(f"\n\n{question_of(messages)}\n\n")
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}, *messages]
    _, found, after = tokenizer.chat_text(conversation).partition(_SAID)
    if not found:
        raise TemplateRefusal(
            "the chat template", "leaves out what the assistant has said", "use one that renders conversations"
        )
    ids = tokenizer.chat_ids(after)
    return ids[1:] if ids[:1] == [last] else ids
