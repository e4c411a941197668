"""Chat rendering: system-prompt conditions, token ids, and which tokens are whose.

The template that comes with a tokenizer is the only authority on how turns look. `ChatTemplate` learns
its parts by rendering probe conversations, so no model is known by name, and then checks on the rendered
text and its token ids that a condition really holds: `none` has no system turn, `empty` has one with
nothing in it, a prompt is a prefix of prompt + response. Generation reads a prompt's tokens and adds new ones, so where a token
of the whole text would lie across prompt and answer, the two are tokenised apart.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mech.errors import InputError
from mech.system_prompt import Identity, SystemPrompt, system_text
from mech.turns import Message, assistant_turn, user_turn

__all__ = ["ChatTemplate", "Encoded", "Identity", "SystemPrompt", "system_text"]

_SYSTEM, _USER, _ASSISTANT, _USER2 = "Qsysq", "Quserq", "Qassistantq", "Qsecondq"

_ANCHORS = ("", "\n")
"""What a piece is tokenised behind: nothing, or a line break, for tokenizers that begin a text with a blank of their own."""


@dataclass(frozen=True)
class Encoded:
    """One conversation as token ids, with half-open token spans that say whose each token is.

    `prompt` runs to the last token before the model's answer; `response` is the answer's own text;
    `closing` is what the template puts after it; its first token ends the turn.
    """

    ids: tuple[int, ...]
    n_prompt: int
    n_response: int
    text: str
    marked: tuple[tuple[str, int, int], ...] = ()
    """Further spans: name, first token, the token after the last (`ChatTemplate.mark`)."""
    seam: int | None = None
    """The character of `text` at which it was tokenised in two pieces; None where it was tokenised as a whole."""

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Token spans by name."""
        end = self.n_prompt + self.n_response
        whose = {
            "prompt": (0, self.n_prompt),
            "response": (self.n_prompt, end),
            "closing": (end, len(self.ids)),
        }
        return whose | {name: (start, stop) for name, start, stop in self.marked}

    def until(self, end: int) -> "Encoded":
        """The row without its tokens from `end` on; `text` and marked spans stay those of the whole row."""
        n_prompt = min(self.n_prompt, end)
        n_response = min(self.n_response, end - n_prompt)
        return replace(self, ids=self.ids[:end], n_prompt=n_prompt, n_response=n_response)


class ChatTemplate:
    """A tokenizer's chat template, understood.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        template_kwargs: passed to the template as they are (`enable_thinking: false`, ...).

    Raises:
        InputError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{getattr(tokenizer, 'name_or_path', 'the tokenizer')} has no chat template: "
                "take an instruct model, or set tokenizer.chat_template"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})

    # -- what the template does ------------------------------------------------------------------

    @cached_property
    def closing(self) -> str:
        """What follows an assistant's text at the end of a conversation."""
        text = self._apply([user_turn(_USER), assistant_turn(_ASSISTANT)])
        return text[text.rindex(_ASSISTANT) + len(_ASSISTANT) :]

    @cached_property
    def user_header(self) -> str:
        """What opens a user's turn, learnt from the second user turn of a conversation."""
        turns = [user_turn(_USER), assistant_turn(_ASSISTANT), user_turn(_USER2)]
        text = self._apply(turns)
        between = text[text.rindex(_ASSISTANT) + len(_ASSISTANT) : text.rindex(_USER2)]
        if not between.startswith(self.closing):
            raise InputError(f"the chat template closes turns in two ways ({self.closing!r} and {between!r})")
        return between.removeprefix(self.closing)

    @cached_property
    def inserted(self) -> str:
        """What the template puts before the first user turn by itself (without the sequence start)."""
        head = self._before_user([user_turn(_USER)])
        return head.removeprefix(self._start(head))

    @cached_property
    def system_turn(self) -> tuple[str, str] | None:
        """Text before and after a system message, or None where the template has no such turn."""
        try:
            text = self._apply([{"role": "system", "content": _SYSTEM}, user_turn(_USER)])
        except InputError:
            return None  # the template refuses the role by raising
        head = text[: text.index(_USER)]
        if _SYSTEM not in head or not head.endswith(self.user_header):
            return None  # dropped, or folded into the user's turn
        head = head.removesuffix(self.user_header)
        opening, _, closing = head.partition(_SYSTEM)
        # A turn of its own ends before the user's begins; folded text would come after the user's header.
        return None if self.user_header in opening else (opening, closing)

    @cached_property
    def default_system(self) -> str | None:
        """The system text that the template inserts by itself; None where it inserts no system turn."""
        if self.system_turn is None or not self.inserted:
            return None
        opening, closing = self.system_turn
        opening = opening.removeprefix(self._start(opening))
        return self.inserted.removeprefix(opening).removesuffix(closing)

    # -- rendering -------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Message],
        condition: SystemPrompt | None = None,
        *,
        identity: Identity | None = None,
        others: Mapping[str, str] | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """Render a conversation under a system-prompt condition.

        Args:
            messages: turns with `role` and `content`. A system turn of the conversation's own stands
                under `default` and is replaced by every other condition.
            condition: the condition; `default` when left out.
            identity: the model's own identity; needed for `identity` and `other:NAME`.
            others: maker by name for `other:NAME`.
            generation_prompt: end with the opening of the assistant's turn.

        Raises:
            InputError: the template cannot do the condition; the message says why.
        """
        condition = condition or SystemPrompt()
        own = [m for m in messages if m["role"] != "system"]
        if condition.kind == "default":
            return self._as_it_is(messages, generation_prompt=generation_prompt)
        if condition.kind == "none":
            return self._without_system(own, generation_prompt=generation_prompt)
        content = system_text(condition, identity, others or {})
        turns = [{"role": "system", "content": content}, *own]
        if self.system_turn is None:
            raise InputError(
                f"condition {condition}: this chat template refuses, drops or merges a system turn"
            )
        text = self._apply(turns, generation_prompt=generation_prompt)
        expected = self.system_turn[0] + content + self.system_turn[1] + self.user_header
        if not text.startswith(expected):
            raise InputError(
                f"condition {condition}: the chat template does not keep this system text as it is"
            )
        return text

    def system_of(
        self,
        messages: Sequence[Message],
        condition: SystemPrompt | None = None,
        *,
        identity: Identity | None = None,
        others: Mapping[str, str] | None = None,
    ) -> str | None:
        """The text of the system turn that a conversation gets under a condition; None where it gets none."""
        condition = condition or SystemPrompt()
        if condition.kind == "none":
            return None
        if condition.kind != "default":
            return system_text(condition, identity, others or {})
        own = [m["content"] for m in messages[:1] if m["role"] == "system"]
        return own[0] if own else self.default_system

    def encode_prompt(
        self,
        messages: Sequence[Message],
        condition: SystemPrompt | None = None,
        *,
        identity: Identity | None = None,
        others: Mapping[str, str] | None = None,
    ) -> Encoded:
        """Token ids of a prompt that ends where the assistant's answer begins."""
        text = self.render(messages, condition, identity=identity, others=others, generation_prompt=True)
        ids = self.ids(text)
        return Encoded(ids, len(ids), 0, text)

    def encode(
        self,
        messages: Sequence[Message],
        condition: SystemPrompt | None = None,
        *,
        identity: Identity | None = None,
        others: Mapping[str, str] | None = None,
    ) -> Encoded:
        """Token ids and spans of a conversation whose last turn is the assistant's.

        The prompt's tokens are those of `encode_prompt`. Where a token of the whole text would lie across prompt and answer (the
        generation prompt ends in a blank), what follows the prompt is tokenised by itself, as generation would go on from there.

        Raises:
            InputError: the last turn is not the assistant's, the answer is empty, the template alters it, or its tokens cannot be told
                from those around it.
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise InputError("the last turn must be the assistant's")
        answer = messages[-1]["content"]
        names: dict[str, Any] = {"identity": identity, "others": others}
        prompt = self.render(messages[:-1], condition, **names, generation_prompt=True)
        text = self.render(messages, condition, **names)
        # Some templates put an empty thinking block before the answer: it belongs to the prompt. So the answer is sought from the end.
        start = len(text) - len(self.closing) - len(answer)
        end = start + len(answer)
        kept = start >= len(prompt) and text[start:] == answer + self.closing
        if not answer or not text.startswith(prompt) or not kept:
            raise InputError(
                f"the chat template does not keep the answer {answer[:60]!r} as it is (empty, or stripped?)"
            )
        ids, head, body = self.ids(text), self.ids(text[:start]), self.ids(text[:end])
        if ids[: len(head)] != head and text[len(prompt) : start].isspace():
            # Mistral's space before an answer is one token with its first word: as in generation.
            start, head = len(prompt), self.ids(prompt)
        if ids[: len(head)] != head:
            return self._in_pieces(text, len(prompt), start, end)
        if ids[: len(body)] != body or len(body) == len(head):
            raise InputError(
                f"a token spans the answer {answer[:60]!r} and what the chat template puts behind it: spans cannot be trusted"
            )
        return Encoded(ids, len(head), len(body) - len(head), text)

    def piece(self, encoded: Encoded, start: int, stop: int) -> Encoded:
        """A row cut off after a piece of its text, with the piece as its response, so that whatever reads responses reads it.

        What followed the piece could not have changed how a causal model reads it. A token that lies only partly in the piece (a space
        that is one with its first word) belongs to it.

        Args:
            encoded: the row.
            start: first character of the piece in `encoded.text`.
            stop: the character after its last.

        Raises:
            InputError: no token lies there, or the tokenizer cannot say where its tokens lie.
        """
        first, last = self._tokens_at(encoded, start, stop)
        return Encoded(encoded.ids[:last], first, last - first, encoded.text, seam=encoded.seam)

    def mark(self, encoded: Encoded, **pieces: str | tuple[int, int]) -> Encoded:
        """The row with named spans, for the pooling `span:NAME`.

        A token that lies only partly in a piece belongs to it.

        Args:
            encoded: the row.
            pieces: by name, a text that the row holds once, or its first character in `encoded.text` and the one after its last.

        Raises:
            InputError: a name that is taken or empty text; a text that the row does not hold, or holds more than once;
                no token lies there, or the tokenizer cannot say where its tokens lie.
        """
        marked = list(encoded.marked)
        for name, piece in pieces.items():
            if name in encoded.spans:
                raise InputError(f"span {name}: the row has one of that name")
            start, stop = _characters(encoded.text, name, piece) if isinstance(piece, str) else piece
            marked.append((name, *self._tokens_at(encoded, start, stop)))
        return replace(encoded, marked=tuple(marked))

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of already rendered text: nothing is added to it."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # -- inside ----------------------------------------------------------------------------------

    def _in_pieces(self, text: str, asked: int, start: int, end: int) -> Encoded:
        """A row tokenised in two pieces, for a token of the whole would lie across them.

        Args:
            text: the whole.
            asked: where the generation prompt ends.
            start: where the row's prompt ends (behind a thinking block that the template puts there).
            end: where the answer ends.
        """
        head, prompt, answer = self.ids(text[:start]), self.ids(text[:asked]), text[start:end]
        if head[: len(prompt)] != prompt:
            raise InputError(
                f"a token spans the generation prompt and {text[asked:start][:60]!r}, which the chat template puts before an answer"
            )
        for anchor in _ANCHORS:
            rest, body = self._ids_behind(anchor, text[start:]), self._ids_behind(anchor, answer)
            if body and rest[: len(body)] == body and self._reads(head, body, answer):
                return Encoded(head + rest, len(head), len(body), text, seam=start)
        raise InputError(
            f"a token spans the seam between the prompt and the answer {answer[:60]!r}, and this tokenizer does not write "
            "the answer by itself as it is: let the template's generation prompt end in no blank"
        )

    def _ids_behind(self, anchor: str, piece: str) -> tuple[int, ...]:
        """Token ids of a text that stands behind another; none where a token lies across the two."""
        before, both = self.ids(anchor), self.ids(anchor + piece)
        return both[len(before) :] if both[: len(before)] == before else ()

    def _reads(self, head: tuple[int, ...], body: tuple[int, ...], text: str) -> bool:
        """Whether tokens behind others read as a text, blank for blank, up to how Unicode writes it (Qwen's composes accents)."""
        decode = self.tokenizer.decode
        before, both = (decode(list(t), clean_up_tokenization_spaces=False) for t in (head, head + body))
        one, other = (unicodedata.normalize("NFKC", part) for part in (both[len(before) :], text))
        return bool(both.startswith(before)) and one == other

    def _tokens_at(self, encoded: Encoded, start: int, stop: int) -> tuple[int, int]:
        """The half-open span of tokens that characters of a row lie in."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError("finding a piece of a row needs a fast tokenizer (one that keeps offsets)")
        for anchor in _ANCHORS if encoded.seam is not None else _ANCHORS[:1]:
            tokens = self._placed(encoded.text, encoded.seam or 0, anchor)
            inside = [i for i, (_, a, b) in enumerate(tokens) if a < stop and b > start]
            if inside and tuple(token for token, _, _ in tokens) == encoded.ids:
                return inside[0], inside[-1] + 1
        raise InputError(f"characters {start} to {stop} of the row: no token lies there")

    def _placed(self, text: str, seam: int, anchor: str) -> list[tuple[int, int, int]]:
        """Tokens of a text, with the first character of each and the one after its last; from `seam` on tokenised apart, behind an anchor."""
        found: list[tuple[int, int, int]] = []
        for piece, before, at in ((text[:seam], "", 0), (text[seam:], anchor, seam - len(anchor))):
            made = self.tokenizer(before + piece, add_special_tokens=False, return_offsets_mapping=True)
            tokens = zip(made["input_ids"], made["offset_mapping"], strict=True)
            found += [(token, at + a, at + b) for token, (a, b) in tokens][len(self.ids(before)) :]
        return found

    def _apply(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        turns = [{"role": m["role"], "content": m["content"]} for m in messages]
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=generation_prompt, **self.template_kwargs
                )
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise InputError(f"the chat template refuses these turns ({roles}): {error}") from error

    def _as_it_is(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """The template untouched; but a system turn of the conversation's own that it drops without a word is no condition."""
        text = self._apply(messages, generation_prompt=generation_prompt)
        for own in messages[:1]:
            if own["role"] == "system" and own["content"].strip() not in text:
                raise InputError(
                    f"the chat template drops the system turn {own['content'][:60]!r}: say `none`, or put its text into the user's turn"
                )
        return text

    def _before_user(self, messages: Sequence[Message]) -> str:
        text = self._apply(messages)
        return text[: text.index(_USER)].removesuffix(self.user_header)

    def _start(self, text: str) -> str:
        """The sequence-start token where the text begins with one that does not itself open a turn."""
        bos = getattr(self.tokenizer, "bos_token", None) or ""
        return bos if bos and text.startswith(bos) and not self.user_header.startswith(bos) else ""

    def _without_system(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        text = self._apply(messages, generation_prompt=generation_prompt)
        start = self._start(text)
        body = text.removeprefix(start)
        if self.inserted:
            if not body.startswith(self.inserted + self.user_header):
                raise InputError(
                    "condition none: cannot find the system turn that this chat template inserts"
                )
            body = body.removeprefix(self.inserted)
        opening = (self.system_turn or ("", ""))[0].removeprefix(start)
        if not body.startswith(self.user_header) or (opening and body.startswith(opening)):
            raise InputError(
                "condition none: this chat template keeps a system turn that cannot be taken out"
            )
        return start + body


def _characters(text: str, name: str, piece: str) -> tuple[int, int]:
    """Where a text occurs in another, which must contain it exactly once."""
    if not piece or (n := text.count(piece)) != 1:
        what = f"{n} times in the row" if piece else "empty"
        raise InputError(f"span {name}: {piece[:60]!r} is {what}; give its characters (start, stop)")
    return text.index(piece), text.index(piece) + len(piece)
