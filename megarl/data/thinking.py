"""Where in a response the thinking ends and the answer begins. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from megarl.data.prefixes import tokens_until
from megarl.data.tokenizer import Tokenizer
from megarl.errors import Refusal


class ThinkingEnd:
    """The text `marker` that ends the thinking, as a tokenizer has it.

    `token_id` is the marker's own token, or None where the tokenizer spells it with several. With such a token, it
    alone is the marker; the same letters spelled with others are text like any other.
    """

    def __init__(self, tokenizer: Tokenizer, marker: str = "</think>") -> None:
        self.marker = marker
        self.token_id = _own_token(tokenizer, marker)
        self._tokenizer = tokenizer

    def require_token(self) -> int:
        """The marker's token id, where generation stops. Raises `Refusal` where the tokenizer spells the marker with
        several tokens."""
        if self.token_id is None:
            raise Refusal(
                f"rollout.thinking_end={self.marker!r}",
                "must be one token of the tokenizer, as generation stops there",
                "name the token that ends the thinking, or answer in one part: no algorithm.responder, "
                "algorithm.responses or evaluation.consumer",
            )
        return self.token_id

    def split(self, token_ids: Sequence[int]) -> int | str:
        """How many tokens of a response are its thinking, the marker included; or the name of a counter where the
        response is not one thinking and an answer.

        thinking_missing: there is no marker, or its last token also begins the answer; thinking_repeated: there are
        several; thinking_empty: nothing but blanks and its opening counterpart (such as <think>) before it;
        thinking_unanswered: nothing but blanks and the end token after it.
        """
        found = self._by_text(token_ids) if self.token_id is None else self._by_token(token_ids, self.token_id)
        if isinstance(found, str):
            return found
        thinking, length = found
        if not thinking.replace(self.marker.replace("</", "<", 1), "").strip():
            return "thinking_empty"
        if not self._tokenizer.decode(token_ids[length:]).strip():
            return "thinking_unanswered"
        return length

    def last(self, token_ids: Sequence[int]) -> int | None:
        """How many tokens there are up to the end of the last marker; None without any."""
        if self.token_id is not None:
            places = [place for place, token_id in enumerate(token_ids) if token_id == self.token_id]
            return places[-1] + 1 if places else None
        text = self._tokenizer.decode(token_ids)
        start = text.rfind(self.marker)
        return None if start < 0 else tokens_until(self._tokenizer, token_ids, text[: start + len(self.marker)])

    def _by_token(self, token_ids: Sequence[int], marker: int) -> tuple[str, int] | str:
        """The text before the marker, and the number of tokens up to its end."""
        places = [place for place, token_id in enumerate(token_ids) if token_id == marker]
        if len(places) != 1:
            return "thinking_repeated" if places else "thinking_missing"
        return self._tokenizer.decode(token_ids[: places[0]]), places[0] + 1

    def _by_text(self, token_ids: Sequence[int]) -> tuple[str, int] | str:
        """The same for a marker of several tokens."""
        text = self._tokenizer.decode(token_ids)
        start = text.find(self.marker)
        if start < 0:
            return "thinking_missing"
        if text.find(self.marker, start + 1) >= 0:
            return "thinking_repeated"
        end = start + len(self.marker)
        length = tokens_until(self._tokenizer, token_ids, text[:end])
        # No token ends where the thinking does: either part would take a piece of the other.
        if self._tokenizer.decode(token_ids[:length])[end:].strip():
            return "thinking_missing"
        return text[:start], length


def _own_token(tokenizer: Tokenizer, marker: str) -> int | None:
    """The token that is the marker wherever it stands; None where there is no such token."""
    # Not of the marker alone: a tokenizer may put a blank before every text, or know no token for this one. Two of an
    # unknown text in a row are one token for the whole, or several; two markers are twice the marker's token.
    once, twice = tokenizer.encode(marker), tokenizer.encode(marker + marker)
    if not once or twice != [*once, once[-1]]:
        return None
    token_id = once[-1]
    # Where the token counts as a control token it decodes to nothing.
    if tokenizer.decode([token_id]).strip() not in ("", marker.strip()):
        return None
    # A token that was learned from texts may give way to others that join the marker's ends with what stands there.
    neighbours = ("a", "4", ".", ">", "\n")
    everywhere = all(tokenizer.encode(one + marker + one).count(token_id) == 1 for one in neighbours)
    return token_id if everywhere else None
