"""A conversation's tokens through the tokenizer's chat template, with what is to be learnt marked.

Learnt of an assistant's turn is what the model has to write: its words, thoughts and calls of tools as the template
has them, and the token that ends the turn. Its header never is, nor what stands between turns.

- Where the template has {% generation %} blocks, what they render is learnt, the k-th block being the k-th turn.
- Otherwise a turn is what its conversation up to and with it, rendered, has behind the header. The header ends where
  the template's prompt for an answer ends (add_generation_prompt); where the template has none, or one that the turn
  does not begin with, it ends where other words in place of the turn's begin.
- A turn ends with its last special token; a turn without one ends where the next message begins.
- A template may write a turn otherwise once others follow it (reasoning models drop their thoughts). Such turns are
  learnt as the model will have to write them: the conversation up to and with the turn is a sample of its own, in which
  it alone is learnt, together with earlier turns that the template has left as they were.

A token is learnt if any of its characters is, as transformers' own masks have it; a sample's first token never is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_npu_tp import DataError
from lit_models.data.conversations import Conversation
from lit_models.data.rendering import Job, Rendered, Renderer
from lit_models.data.tokenizers import Tokenizer

_WORDS = "WordsOfTheAssistant"  # nothing that a template trims, splits or escapes
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # where messages hold them, as transformers has it


@dataclass(frozen=True)
class Sample:
    """ids: int32 [tokens]; learn: uint8 [tokens], 1 for what is to be learnt."""

    ids: np.ndarray
    learn: np.ndarray


@dataclass
class _Text:
    """What a sample is made of: its text, and the characters of it that are learnt."""

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)


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
        self.name = f"of {tokenizer.name}" if template is None else "of data.chat_template"
        if template is not None and "{" not in template and Path(template).expanduser().is_file():
            self.name = f"{template!r}"
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
        self.reads_tools = re.search(r"\btools\b", self.template) is not None
        self._tokenizer: Any = tokenizer
        added = inner.added_tokens_decoder.values()
        self._ends = tuple({*inner.all_special_tokens, *(token.content for token in added if token.special)})
        self._renderer = Renderer(self.template, dict(inner.special_tokens_map), marks=self.marks)
        self._train_on = train_on
        self._probed: tuple[str, bool] | None = None

    def encode(self, conversation: Conversation) -> tuple[list[Sample], list[str]]:
        """The samples of a conversation, none where nothing is to be learnt; and what of it the template leaves out.

        What is left out is said once a conversation and kind, e.g. "reasoning of the assistant".
        Raises DataError, naming template and sample, where the template refuses it or its turns cannot be told apart.
        """
        messages = self._with_arguments(conversation)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [number for number in turns if conversation.learn[number]]
        if self._train_on == "last":
            wanted = [number for number in wanted if number == turns[-1]]
        jobs = [Job(len(messages))]
        if not self.marks:
            jobs += [Job(number + 1) for number in wanted] + [Job(number, prompt=True) for number in wanted]
        rendered = self._render(conversation, messages, jobs)
        whole = self._text(conversation, rendered[0])
        left_out = self._left_out(conversation, messages, whole)
        if self.marks:
            spans = self._marked(conversation, list(rendered[0].spans), turns, wanted)
            texts = [_Text(whole, spans)] if wanted else []
            if len(spans) == len(wanted):
                for number, (begin, end) in zip(wanted, spans, strict=True):
                    left_out |= _unsaid(messages[number], whole[begin:end])
        else:
            texts, at = [_Text(whole)], 1
            for number, after, before in reversed(
                list(zip(wanted, rendered[at:], rendered[at + len(wanted) :], strict=False))
            ):
                text = self._text(conversation, after)
                begin = self._begin(conversation, messages, number, text, before)
                known = self._end_within(texts[-1].text, text, begin)
                if known is None:
                    texts.append(_Text(text))
                texts[-1].spans.append((begin, self._end(text, begin) if known is None else known))
                # What the prompt gives away of a turn is not left out.
                left_out |= _unsaid(messages[number], text[max(0, begin - len(self._probe()[0])) :])
        samples = [self._sample(conversation, text) for text in reversed(texts) if text.spans]
        return [sample for sample in samples if sample.learn.any()], sorted(left_out)

    # What a turn is

    def _begin(
        self,
        conversation: Conversation,
        messages: Sequence[dict[str, Any]],
        number: int,
        after: str,
        before: Rendered,
    ) -> int:
        """Where in `after`, the rendering that turn `number` ends, its header ends."""
        prompt = self._probe()[0]
        if number and prompt and before.error is None:
            if before.text.endswith(prompt) and after.startswith(before.text):
                return len(before.text)
        jobs = [Job(number, more=({"role": "assistant", "content": _WORDS},))]
        with_words, *plain = self._render(conversation, messages, jobs + ([Job(number)] if number else []))
        text = self._text(conversation, with_words)
        header = text[: max(0, text.rfind(_WORDS))]
        # Only what the turn adds can be its header: an earlier turn has the same.
        known = _common(plain[0].text, header) if plain and plain[0].error is None else 0
        at = header.rfind(prompt, known) if prompt else -1
        if at >= 0:
            header = header[: at + len(prompt)]
        if _WORDS not in text or not after.startswith(header):
            why = "its header depends on what" if _WORDS in text else "it leaves out what"
            raise DataError(
                f"{conversation.where}: message {number + 1} cannot be found in what the chat template {self.name} "
                f"writes: {why} the assistant says. Give a data.chat_template that writes it, with {{% generation %}} "
                "around it."
            )
        return len(header)

    def _end(self, text: str, begin: int) -> int:
        """Where a turn ends that goes from `begin` to the end of `text`: before the blanks behind its end token."""
        stripped = text.rstrip()
        return len(stripped) if len(stripped) > begin and stripped.endswith(self._ends) else len(text)

    def _end_within(self, longer: str, text: str, begin: int) -> int | None:
        """Where the last turn of `text` ends in a rendering of more messages; None if it is written otherwise there.

        Some templates close a conversation with one more token, which is not there once it goes on.
        """
        if longer.startswith(text):
            return self._end(text, begin)
        same = text.rstrip()
        while len(same) > begin and same.endswith(self._ends):
            if longer.startswith(same):
                return len(same)
            same = same[: -max(len(token) for token in self._ends if same.endswith(token))].rstrip()
        return None

    def _marked(
        self, conversation: Conversation, spans: list[tuple[int, int]], turns: list[int], wanted: list[int]
    ) -> list[tuple[int, int]]:
        if len(spans) == len(turns):
            return [span for number, span in zip(turns, spans, strict=True) if number in wanted]
        if wanted == turns:
            return spans
        raise DataError(
            f"{conversation.where}: the chat template {self.name} marks {len(spans)} parts with {{% generation %}} for "
            f"{len(turns)} assistant turns, so turns cannot be left out one by one. Remove train, loss, "
            "weight and data.train_on, or mark each turn once in data.chat_template."
        )

    def _sample(self, conversation: Conversation, text: _Text) -> Sample:
        try:
            text.text.encode("utf-8")
        except UnicodeEncodeError as error:
            around = text.text[max(0, error.start - 20) : error.start]
            raise DataError(
                f"{conversation.where} holds half of a surrogate pair, behind {around!r}. Repair or drop the sample."
            ) from error
        ids, begins, ends = self._tokenizer.encode_with_offsets(text.text)
        learn = np.zeros(len(ids), dtype=np.uint8)
        for begin, end in text.spans:
            # Some tokenizers give a token of spaces no width.
            learn[(begins < end) & ((ends > begin) | ((ends == begins) & (begins >= begin)))] = 1
        learn[:1] = 0  # nothing comes before it to predict it from
        return Sample(ids, learn)

    # What the template does not write

    def _left_out(self, conversation: Conversation, messages: Sequence[dict[str, Any]], text: str) -> set[str]:
        left_out = set()
        if conversation.tools and not self.reads_tools:
            left_out.add("the list of tools")
        for message in messages:
            if message["role"] != "assistant" and not _written(message.get("content") or "", text):
                left_out.add(f"words of role {message['role']}")
        return left_out

    # Rendering

    def _render(
        self, conversation: Conversation, messages: Sequence[dict[str, Any]], jobs: Sequence[Job]
    ) -> list[Rendered]:
        try:
            return self._renderer.render(messages, jobs, tools=conversation.tools)
        except DataError as error:
            raise DataError(
                f"{conversation.where}: the chat template {self.name} cannot render the sample: {error}. Repair or "
                "drop the sample, or give another data.chat_template."
            ) from error

    def _text(self, conversation: Conversation, rendered: Rendered) -> str:
        if rendered.error is not None:
            raise DataError(
                f"{conversation.where}: the chat template {self.name} refuses the sample: {rendered.error}. Its roles "
                f"are {[message['role'] for message in conversation.messages]}. Repair or drop the sample, or "
                "give another data.chat_template."
            )
        return rendered.text

    def _probe(self) -> tuple[str, bool]:
        """The template's prompt for an answer, "" for none; and whether it wants arguments of calls as JSON text.

        OpenAI's files hold arguments as text. Most templates write them through `tojson`, which would make an
        escaped string of it; DeepSeek-V3's joins them to strings and takes nothing but text.
        """
        if self._probed is None:
            user = {"role": "user", "content": "x"}

            def call(arguments: Any) -> tuple[dict[str, Any], ...]:
                function = {"name": "f", "arguments": arguments}
                calls = [{"id": "call00000", "type": "function", "function": function}]
                return (user, {"role": "assistant", "content": "", "tool_calls": calls})

            jobs = [Job(0, (user,)), Job(0, (user,), prompt=True), Job(0, call({"kq": "vq"})), Job(0, call(_KQ))]
            try:
                plain, prompted, objects, texts = self._renderer.render([], jobs)
            except DataError as error:
                raise DataError(
                    f"The chat template {self.name} cannot be rendered: {error}. Give another data.chat_template."
                ) from error
            fits = plain.error is None and prompted.error is None and prompted.text.startswith(plain.text)
            as_json = objects.error is None and re.search(r'"kq":\s*"vq"', objects.text)
            as_text = texts.error is None and (_KQ in texts.text or objects.error is not None)
            self._probed = (prompted.text[len(plain.text) :] if fits else "", bool(as_text and not as_json))
        return self._probed

    def _with_arguments(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The messages, with the arguments of calls in the form that the template wants."""
        messages = []
        for number, message in enumerate(conversation.messages, start=1):
            if message.get("tool_calls"):
                where = f"{conversation.where}, message {number}"
                calls = [_call(call, where, as_text=self._probe()[1]) for call in message["tool_calls"]]
                message = {**message, "tool_calls": calls}
            messages.append(message)
        return messages


_KQ = '{"kq": "vq"}'


def _call(call: Mapping[str, Any], where: str, *, as_text: bool) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments")
    if as_text and arguments is not None and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    if not as_text and isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: the arguments of the call of {function.get('name')!r} are not JSON: {error}. Repair or drop "
                "the sample."
            ) from error
    return {**call, "function": function}


def _common(first: str, second: str) -> int:
    """How many characters at the beginning two texts share."""
    at = next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    return min(len(first), len(second)) if at is None else at


def _written(words: str, text: str) -> bool:
    """Whether `text` has `words`, whatever the blanks."""
    return words.strip() in text or "".join(words.split()) in "".join(text.split())


def _unsaid(message: Mapping[str, Any], text: str) -> set[str]:
    """What of an assistant's message is not in what is learnt of it."""
    unsaid = set()
    if not _written(message.get("content") or "", text):
        unsaid.add("words of the assistant")
    thoughts = next((message[key] for key in THOUGHTS if message.get(key)), None)
    if isinstance(thoughts, str) and not _written(thoughts, text):
        unsaid.add("reasoning of the assistant")
    if not all(str(call["function"].get("name", "")) in text for call in message.get("tool_calls") or ()):
        unsaid.add("calls of tools")
    return unsaid
