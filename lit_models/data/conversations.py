"""Conversations from files, and their tokens through a tokenizer's chat template with what is to be learnt marked.

Learnt is what the assistant says, the template's end of the turn included:

- where the template has {% generation %} blocks, what they render, the k-th block being the k-th assistant turn;
- otherwise what a turn adds to the prompt before it: the turns up to it, rendered, must begin with the turns before
  it rendered with the generation prompt, and the whole conversation with both. A template that writes earlier
  turns otherwise (reasoning models drop their thoughts) breaks that, and the sample is named in an error.

A token is learnt if any of its characters is, as transformers' own masks have it. A turn with "train": false or
"weight": 0 is context only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_npu_tp import DataError
from lit_models.data.documents import Record, SourceFile, read_records
from lit_models.data.tokenizers import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_NAMES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them; `learn` says for each whether it is to be learnt."""

    name: str
    where: str
    messages: list[dict[str, Any]]
    learn: list[bool]


@dataclass(frozen=True)
class MessageKeys:
    """Where a record holds its messages and a message its role and text; role_names: names for the `ROLES`."""

    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    role_names: Mapping[str, str] | None = None


def read_conversations(files: Iterable[SourceFile], keys: MessageKeys) -> Iterator[Conversation]:
    """A conversation a line or row of .jsonl and .parquet files.

    Raises DataError with file and line or row for what is not a conversation.
    """
    for file in files:
        if file.path.suffix.lower() == ".txt":
            raise DataError(
                f"data.paths names {str(file.path)!r}, but data=chat reads .jsonl and .parquet files. Use data=text "
                "for plain text."
            )
        for record in read_records(file, keys=(keys.messages,), setting="data.messages_key"):
            yield _conversation(record, keys)


def _conversation(record: Record, keys: MessageKeys) -> Conversation:
    turns = record.values[keys.messages]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{record.where}: {keys.messages!r} is {'empty' if turns in ([], None) else 'not a list'}. It must hold "
            f'messages such as {{"{keys.role}": "user", "{keys.content}": "..."}}; drop or repair the sample.'
        )
    messages, learn = [], []
    for number, turn in enumerate(turns, start=1):
        where = f"{record.where}, message {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{where} is {type(turn).__name__}, not an object with {keys.role!r} and {keys.content!r}.")
        message = _message(turn, where, keys)
        messages.append(message)
        learn.append(message["role"] == "assistant" and _is_learnt(turn, where))
    return Conversation(record.name, record.where, messages, learn)


def _message(turn: dict[str, Any], where: str, keys: MessageKeys) -> dict[str, Any]:
    given = turn.get(keys.role)
    if given is None:
        raise DataError(
            f"{where} has no {keys.role!r}; its keys are {sorted(turn)}. Set data.role_key and data.content_key (for "
            "from/value files: data.messages_key=conversations data.role_key=from data.content_key=value)."
        )
    role = {**ROLE_NAMES, **(keys.role_names or {})}.get(given, given)
    if role not in ROLES:
        raise DataError(
            f"{where} has the unknown role {given!r}. Known are {', '.join([*ROLES, *ROLE_NAMES])}; name others with "
            f"'data.role_names={{{given}: user}}'."
        )
    content = turn.get(keys.content)
    # A call of a tool needs no text.
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise DataError(
            f"{where}: {keys.content!r} holds {type(content).__name__}, not text; its keys are {sorted(turn)}. Set "
            "data.content_key to the one with the text."
        )
    # A parquet row has every key of the column's type, null where it was not given.
    rest = {k: v for k, v in turn.items() if k not in (keys.role, keys.content, "train", "weight") and v is not None}
    return {"role": role, **({} if content is None else {"content": content}), **rest}


def _is_learnt(turn: dict[str, Any], where: str) -> bool:
    train, weight = turn.get("train"), turn.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        raise DataError(
            f"{where} has train={train!r}, weight={weight!r}. A turn is learnt or it is not: train takes true or false "
            "and weight 0 or 1."
        )
    return train is not False and weight != 0


class ChatTemplate:
    """A tokenizer's chat template, or another one for it.

    template: None for the tokenizer's own; a template, the path of a file with one, or the name of one of several.
    train_on: "all" assistant turns or the "last" alone.

    Raises DataError for a tokenizer without a template, and for one that is no template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, *, train_on: str = "all") -> None:
        inner = getattr(tokenizer, "transformers", None)
        if inner is None:
            raise DataError(
                f"data=chat needs a Hugging Face tokenizer, but data.tokenizer is {tokenizer.name}. Set data.tokenizer "
                "to the model's folder."
            )
        if template is not None and "{" not in template and Path(template).expanduser().is_file():
            template = Path(template).expanduser().read_text(encoding="utf-8")
        if template is None and not inner.chat_template:
            raise DataError(
                f"The tokenizer {tokenizer.name!r} has no chat template. Set data.chat_template to a file with one "
                "(Jinja, as in tokenizer_config.json's chat_template), or data.tokenizer to the chat model's folder."
            )
        try:
            self.template: str = inner.get_chat_template(template)
        except ValueError as error:
            raise DataError(f"data.chat_template={template!r} cannot be used: {error}") from error
        if "{" not in self.template:
            raise DataError(
                f"data.chat_template={template!r} is neither a file nor a template: it has no {{{{ }}}} and no {{% %}}."
            )
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        self._tokenizer: Any = tokenizer
        self._special = dict(inner.special_tokens_map)
        self._train_on = train_on

    def encode(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [tokens], and uint8 [tokens] that is 1 for what is to be learnt; the first never is.

        Raises DataError, naming the sample, where the template refuses it or its turns cannot be told apart.
        """
        text, spans = self._render(conversation, len(conversation.messages), prompt=False)
        wanted = [number for number, learn in enumerate(conversation.learn) if learn]
        if self._train_on == "last":
            turns = [number for number, one in enumerate(conversation.messages) if one["role"] == "assistant"]
            wanted = [number for number in wanted if number == turns[-1]]
        if self.marks:
            spans = self._marked(conversation, spans, wanted)
        else:
            spans = [self._added(conversation, number, text) for number in wanted]
        ids, begins, ends = self._tokenizer.encode_with_offsets(text)
        learn = np.zeros(len(ids), dtype=np.uint8)
        for begin, end in spans:
            # Some tokenizers give a token of spaces no width.
            learn[(begins < end) & ((ends > begin) | ((ends == begins) & (begins >= begin)))] = 1
        learn[:1] = 0  # nothing comes before it to predict it from
        return ids, learn

    def _marked(self, conversation: Conversation, spans: list[tuple[int, int]], wanted: list[int]) -> list[Any]:
        turns = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if len(spans) == len(turns):
            return [span for number, span in zip(turns, spans, strict=True) if number in wanted]
        if wanted == turns:
            return spans
        raise DataError(
            f"{conversation.where}: the chat template marks {len(spans)} parts with {{% generation %}} for "
            f"{len(turns)} assistant turns, so turns cannot be left out one by one. Remove train, "
            "weight and data.train_on, or mark each turn once in data.chat_template."
        )

    def _added(self, conversation: Conversation, number: int, whole: str) -> tuple[int, int]:
        """Begin and end of what message `number` adds behind the generation prompt."""
        after = self._render(conversation, number + 1, prompt=False)[0]
        # Many templates cannot render a conversation without messages.
        before = self._render(conversation, number, prompt=True)[0] if number else ""
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"{conversation.where}: message {number + 1} cannot be found in the rendered conversation, because the "
                "chat template writes a turn otherwise when others follow or when the model is prompted for it. Give a "
                "data.chat_template with {% generation %} around what the assistant says, or set data.train_on=last."
            )
        return len(before), len(after)

    def _render(self, conversation: Conversation, count: int, *, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        # Imported here because transformers takes seconds and other data needs none of it.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[conversation.messages[:count]],
                chat_template=self.template,
                return_assistant_tokens_mask=self.marks,
                add_generation_prompt=prompt,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"{conversation.where}: the chat template refuses the sample: {error}. Its roles are "
                f"{[message['role'] for message in conversation.messages[:count]]}. Repair or drop the sample, or give "
                "another data.chat_template."
            ) from error
        texts, spans = rendered
        return texts[0], list(spans[0]) if self.marks else []
