"""Renders chat templates in a process of its own: run as a script by `rendering.Renderer`, imported by nobody.

A template is a program from a stranger. Jinja's sandbox keeps it from files and attributes, but nothing inside of a
process can end a long call of C (`9**(9**9)` while it compiles) or bound memory; so the process is given a limit of
memory and is killed by its parent when time is up. It imports transformers' renderer and nothing of this project.

Requests and answers are JSON, each behind its length in 8 bytes. It ends with its parent, whose pipe closes then.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from typing import Any

_MOST_CHARACTERS = 2**24  # of a text
_MOST_SAID = 500  # characters of an error
_MEMORY = 2**30  # bytes of address space, of which Python with transformers' renderer takes a quarter


def _read(count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(0, min(count - len(data), 2**20))
        if not part:
            os._exit(0)
        data += part
    return data


def _answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    """For each job a text and what of it stands in {% generation %}, or the error."""
    from transformers.utils.chat_template_utils import render_jinja_template

    answers: list[dict[str, Any]] = []
    for count, more, prompt in request["jobs"]:
        try:
            rendered: Any = render_jinja_template(
                conversations=[[*request["messages"][:count], *more]],
                tools=request["tools"],
                chat_template=request["template"],
                return_assistant_tokens_mask=request["marks"],
                add_generation_prompt=prompt,
                **request["special"],
            )
            texts, spans = rendered
            if len(texts[0]) > _MOST_CHARACTERS:
                raise ValueError(f"it writes {len(texts[0]):,} characters, more than the {_MOST_CHARACTERS:,} allowed")
            answers.append({"text": texts[0], "spans": spans[0] if request["marks"] else []})
        except Exception as error:  # a template may fail in every way that an expression of Python can
            line = getattr(error, "lineno", None)
            said = str(error)[:_MOST_SAID] or type(error).__name__
            kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
            answers.append({"error": f"{kind}{said}" + (f" (line {line} of the template)" if line else "")})
    return answers


def main() -> None:
    """Answer requests until there are no more."""
    sys.path[:] = json.loads(sys.argv[1])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if most == resource.RLIM_INFINITY else min(_MEMORY, most), most))
    while True:
        (length,) = struct.unpack("<Q", _read(8))
        data = json.dumps(_answer(json.loads(_read(length)))).encode()
        data = struct.pack("<Q", len(data)) + data
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
