"""Conversations from the formats that people have them in: messages as chat templates take them, and what is learnt.

Recognised by their keys: `messages` of role and content (OpenAI, TRL), `conversations` of from and value (ShareGPT),
instruction, input and output (Alpaca), prompt and completion. Settings that name the keys leave nothing to recognise.
`system` and `tools` of a record are part of its conversation. Templates and tokens are not known here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_npu_tp import DataError
from lit_models.data.records import Record, read_records
from lit_models.data.source_files import SourceFile

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's, its tool calls and their results, and OpenAI's former name for a tool.
ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
_LISTS = ("messages", "conversations", "conversation")
_COLUMNS = (
    *_LISTS,
    *("instruction", "input", "output", "history", "prompt", "completion", "system", "tools"),
)
_FORMATS = (
    "messages (role and content), conversations (from and value), instruction with output and perhaps input, "
    "prompt with completion"
)
# Of a message, and not its template's.
_FLAGS = ("train", "loss", "weight")


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them; `learn` says for each whether it is to be learnt.

    A call of a tool is {"type": "function", "function": {"name", "arguments"}}, the arguments as the file has them.
    tools: descriptions of the tools, as the template takes them; None for none.
    """

    name: str
    where: str
    messages: list[dict[str, Any]]
    learn: list[bool]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class MessageKeys:
    """Where a record holds its messages and a message its role and text; role_names: names for the `ROLES`.

    None of the keys: as recognised.
    """

    messages: str | None = None
    role: str | None = None
    content: str | None = None
    role_names: Mapping[str, str] | None = None


def read_conversations(
    files: Iterable[SourceFile], keys: MessageKeys, formats: Counter[str] | None = None
) -> Iterator[Conversation]:
    """A conversation a record of the files.

    formats: counts the records of each recognised format.
    Raises DataError with file and line or row for what is not a conversation.
    """
    required = () if keys.messages is None else (keys.messages,)
    for file in files:
        if file.kind == ".txt":
            raise DataError(
                f"data.paths names {str(file.path)!r}, but data=chat reads .jsonl, .json, .csv, .parquet and .arrow "
                "files. Use data=text for plain text."
            )
        for record in read_records(file, keys=required, setting="data.messages_key", optional=_COLUMNS):
            format_name, turns = _turns(record, keys)
            if formats is not None:
                formats[format_name] += 1
            yield _conversation(record, turns, keys)


def _turns(record: Record, keys: MessageKeys) -> tuple[str, list[Any]]:
    """The name of a record's format and its messages as they are."""
    values = record.values
    key = keys.messages or next((name for name in _LISTS if name in values), None)
    if key is not None:
        turns = _unpacked(values.get(key), record.where, key)
        if not isinstance(turns, list) or not turns:
            raise DataError(
                f"{record.where}: {key!r} is {'empty' if turns in ([], None, '') else 'not a list'}. It must hold "
                'messages such as {"role": "user", "content": "..."}; drop or repair the sample.'
            )
        first = turns[0] if isinstance(turns[0], dict) else {}
        role = keys.role or ("from" if "from" in first and "role" not in first else "role")
        content = keys.content or ("value" if "value" in first and "content" not in first else "content")
        return f"{key} of {role} and {content}", turns
    if "prompt" in values and "completion" in values:
        prompt, completion = (_unpacked(values[name], record.where, name) for name in ("prompt", "completion"))
        parts = (("user", prompt), ("assistant", completion))
        return "prompt and completion", [
            turn for role, part in parts for turn in (part if isinstance(part, list) else [_turn(role, part)])
        ]
    if "instruction" in values and "output" in values:
        turns = []
        for pair in values.get("history") or ():
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise DataError(f"{record.where}: 'history' holds {pair!r}, not pairs of a question and its answer.")
            turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
        asked = values["instruction"]
        if values.get("input") and isinstance(asked, str) and isinstance(values["input"], str):
            asked = f"{asked}\n{values['input']}"
        turns += [_turn("user", asked), _turn("assistant", values["output"])]
        return "instruction, input and output", turns
    raise DataError(
        f"{record.where} is no conversation in a known format; its keys are {sorted(values)}. Known are {_FORMATS}. "
        "Set data.messages_key to the key with a list of messages, or bring the file into one of these formats."
    )


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _unpacked(value: Any, where: str, key: str) -> Any:
    """The value, or what its text says where that is a list: in .csv and some .parquet files lists are JSON."""
    if isinstance(value, str) and value.lstrip().startswith("[") and key not in ("prompt", "completion"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {key!r} is not JSON: {error}. Repair or drop the sample.") from error
    return value


def _conversation(record: Record, turns: list[Any], keys: MessageKeys) -> Conversation:
    messages, learn = [], []
    for number, turn in enumerate(turns, start=1):
        where = f"{record.where}, message {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{where} is {type(turn).__name__}, not an object with a role and content.")
        message = _message(turn, where, keys)
        messages.append(message)
        learn.append(message["role"] == "assistant" and _is_learnt(turn, where))
    system = record.values.get("system")
    if system not in (None, "", []):
        if not isinstance(system, str):
            raise DataError(f"{record.where}: 'system' holds {type(system).__name__}, not text.")
        if messages[0]["role"] != "system":
            messages.insert(0, _turn("system", system))
            learn.insert(0, False)
        elif messages[0]["content"] != system:
            raise DataError(
                f"{record.where} has a 'system' text and a first message of role system that says otherwise. Keep one."
            )
    return Conversation(record.name, record.where, messages, learn, _tools(record))


def _tools(record: Record) -> list[dict[str, Any]] | None:
    tools = _unpacked(record.values.get("tools"), record.where, "tools")
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{record.where}: 'tools' is not a list of objects such as "
            '{"type": "function", "function": {...}}, nor the JSON of one. Repair or drop the sample.'
        )
    return tools


def _message(turn: dict[str, Any], where: str, keys: MessageKeys) -> dict[str, Any]:
    role_key = keys.role or ("from" if "from" in turn and "role" not in turn else "role")
    content_key = keys.content or ("value" if "value" in turn and "content" not in turn else "content")
    given = turn.get(role_key)
    if given is None:
        raise DataError(
            f"{where} has no {role_key!r}; its keys are {sorted(turn)}. Set data.role_key and data.content_key to "
            "those that hold the speaker and the text."
        )
    if not isinstance(given, str):
        raise DataError(f"{where}: {role_key!r} holds {type(given).__name__}, not the name of a role.")
    role = {**ROLE_NAMES, **(keys.role_names or {})}.get(given, given)
    if role not in ROLES:
        raise DataError(
            f"{where} has the unknown role {given!r}. Known are {', '.join([*ROLES, *ROLE_NAMES])}. Say with "
            f"'data.role_names={{{given}: ROLE}}' which of {', '.join(ROLES)} it is."
        )
    leave_out = (role_key, content_key, "tool_calls", "function_call", *_FLAGS)
    # A row of a table has every key of the column's type, null where it was not given.
    rest = {key: value for key, value in turn.items() if key not in leave_out and value is not None}
    calls = _calls(turn, where)
    content = _text(turn.get(content_key), where, content_key)
    if given == "function_call" and role == "assistant" and not calls:
        calls, content = _called(content, where), ""
    if content is None:
        if not calls:
            raise DataError(
                f"{where}: {content_key!r} holds {type(turn.get(content_key)).__name__}, not text; its keys are "
                f"{sorted(turn)}. Set data.content_key to the one with the text."
            )
        content = ""  # a call needs no text; templates print null as "None"
    return {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **rest}


def _text(content: Any, where: str, key: str) -> str | None:
    """A message's text, that of a list of text parts included; None for what is not text."""
    if isinstance(content, list) and content:
        texts = []
        for part in content:
            text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise DataError(f"{where}: {key!r} has a part of type {kind!r}. Only parts of text are learnt from.")
            texts.append(text)
        return "".join(texts)
    return content if isinstance(content, str) else None


def _calls(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Calls of tools in the form that templates take, whether with or without a "function" around them."""
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    wrapped = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: 'tool_calls' is not a list of objects such as "
                '{"type": "function", "function": {"name": ..., "arguments": ...}}. Repair or drop the sample.'
            )
        outside = call if "function" in call else {}
        wrapped.append({"type": "function", **outside, "function": function})
    return wrapped


def _called(text: str | None, where: str) -> list[dict[str, Any]]:
    """The calls that the text of a ShareGPT message from function_call holds as JSON."""
    try:
        calls = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is from function_call, but its text is not the JSON of a call, "
            f'{{"name": ..., "arguments": ...}}: {error}. Repair or drop the sample.'
        ) from error
    return _calls({"tool_calls": calls if isinstance(calls, list) else [calls]}, where)


def _is_learnt(turn: dict[str, Any], where: str) -> bool:
    train, loss, weight = (turn.get(name) for name in _FLAGS)
    if any(flag not in (None, True, False) for flag in (train, loss)) or weight not in (None, 0, 1):
        raise DataError(
            f"{where} has train={train!r}, loss={loss!r}, weight={weight!r}. A turn is learnt or it is not: train and "
            "loss take true or false, and weight 0 or 1."
        )
    return train is not False and loss is not False and weight != 0
