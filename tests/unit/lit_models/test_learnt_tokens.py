"""Catches: a header, a system block or another role's words that are learnt; words, thoughts, calls or an end mark that
are not; turns that a template rewrites learnt as nobody will have to write them; things left out without a word.

Twelve templates with the structure of published ones, ten conversations, and a table that was written by hand.
"""

import io
import json
import re
from textwrap import dedent

import pytest
from rich.console import Console

from lightning_npu_tp.errors import DataError
from lit_models.data import ChatDataModule, load_tokenizer
from lit_models.data.rendering import kept
from lit_models.data.show import show_batch

SPECIAL = (
    "<bos> <eos> <|im_start|> <|im_end|> <|User|> <|Assistant|> <|calls|> <|call|> <|sep|> <|/call|> <|/calls|> "
    "<|outs|> <|out|> <|/out|> <|/outs|> <|start_header|> <|end_header|> <|eot|> <start_of_turn> <end_of_turn> "
    "<|user|> <|assistant|> <|system|> <|end|>"
).split()


def lines(template):
    """Jinja without the line ends and the indentation that make it readable here."""
    return "".join(line.strip() for line in dedent(template).splitlines())


CHATML = lines(r"""
    {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""")
# Ignores add_generation_prompt.
PROMPTLESS = lines(r"""
    {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
""")
DEEPSEEK_V2 = lines(r"""
    {{ bos_token }}{% for m in messages %}
    {% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}
    {% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}
    {% elif m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}
    {% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
""")
# Arguments of calls are text that is added to text; after tools' results a turn has no header.
DEEPSEEK_V3 = lines(r"""
    {% set ns = namespace(is_tool=false, first_output=true, system='') %}
    {% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] %}{% endif %}
    {% endfor %}{{ bos_token }}{{ ns.system }}
    {% for m in messages %}
    {% if m['role'] == 'user' %}{% set ns.is_tool = false %}{{ '<|User|>' + m['content'] }}{% endif %}
    {% if m['role'] == 'assistant' and 'tool_calls' in m %}{% set ns.is_tool = false %}
    {{ '<|Assistant|>' }}{% if m['content'] is not none %}{{ m['content'] }}{% endif %}{{ '<|calls|>' }}
    {% for c in m['tool_calls'] %}
    {{ '<|call|>' + c['type'] + '<|sep|>' + c['function']['name'] + '\n' + c['function']['arguments'] + '<|/call|>' }}
    {% endfor %}{{ '<|/calls|><eos>' }}
    {% elif m['role'] == 'assistant' %}
    {% if ns.is_tool %}{{ '<|/outs|>' + m['content'] + '<eos>' }}{% set ns.is_tool = false %}
    {% else %}{% set content = m['content'] %}
    {% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
    {{ '<|Assistant|>' + content + '<eos>' }}{% endif %}{% endif %}
    {% if m['role'] == 'tool' %}{% set ns.is_tool = true %}
    {% if ns.first_output %}{{ '<|outs|>' }}{% set ns.first_output = false %}{% endif %}
    {{ '<|out|>' + m['content'] + '<|/out|>' }}{% endif %}
    {% endfor %}{% if ns.is_tool %}{{ '<|/outs|>' }}{% endif %}
    {% if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|>' }}{% endif %}
""")
R1 = DEEPSEEK_V3.replace("{{ '<|Assistant|>' }}{% endif %}", r"{{ '<|Assistant|><think>\n' }}{% endif %}")
QWEN_CALLS = lines(r"""
    {% for c in m.tool_calls %}{% if c.function %}{% set c = c.function %}{% endif %}{{ '<tool_call>\n{"name": "' }}
    {{ c.name }}{{ '", "arguments": ' }}{{ c.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}
""")
QWEN2_5 = lines(r"""
    {% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
    {% else %}{% set system = 'You are Q.' %}{% endif %}{{ '<|im_start|>system\n' + system }}
    {% if tools %}{{ '\n<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '</tools>' }}{% endif %}
    {{ '<|im_end|>\n' }}
    {% for m in messages %}
    {% if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {% elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
    {{ '\n' }}CALLS{{ '<|im_end|>\n' }}
    {% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}
    {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""").replace("CALLS", QWEN_CALLS)
# Thoughts stand behind the last question only, and the last turn there has them even if they are empty.
QWEN3 = lines(r"""
    {% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}
    {{ '</tools><|im_end|>\n' }}{% endif %}
    {% set ns = namespace(asked=messages|length - 1, open=true) %}
    {% for m in messages[::-1] %}{% if ns.open and m.role == 'user' %}
    {% set ns.open = false %}{% set ns.asked = messages|length - 1 - loop.index0 %}{% endif %}{% endfor %}
    {% for m in messages %}
    {% if m.role in ['user', 'system'] %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {% elif m.role == 'assistant' %}{% set thought = '' %}
    {% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% endif %}
    {{ '<|im_start|>assistant\n' }}
    {% if loop.index0 > ns.asked and (loop.last or thought) %}
    {{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + m.content.lstrip('\n') }}
    {% else %}{{ m.content }}{% endif %}
    {% if m.tool_calls %}CALLS{% endif %}{{ '<|im_end|>\n' }}
    {% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}
    {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""").replace("CALLS", QWEN_CALLS)
LLAMA3 = lines(r"""
    {{ bos_token }}
    {% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}
    {% else %}{% set system = '' %}{% endif %}
    {{ '<|start_header|>system<|end_header|>\n\nToday Date: 26 Jul 2024\n\n' + system }}
    {% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{{ '<|eot|>' }}
    {% for m in messages %}
    {% if m.role == 'tool' %}{{ '<|start_header|>ipython<|end_header|>\n\n' }}{{ m.content | tojson }}{{ '<|eot|>' }}
    {% elif 'tool_calls' in m %}
    {% if not m.tool_calls|length == 1 %}{{ raise_exception('one call at a time') }}{% endif %}
    {% set c = m.tool_calls[0].function %}{{ '<|start_header|>assistant<|end_header|>\n\n' }}
    {{ '{"name": "' + c.name + '", "parameters": ' }}{{ c.arguments | tojson }}{{ '}<|eot|>' }}
    {% else %}{{ '<|start_header|>' + m.role + '<|end_header|>\n\n' + m.content | trim + '<|eot|>' }}{% endif %}
    {% endfor %}{% if add_generation_prompt %}{{ '<|start_header|>assistant<|end_header|>\n\n' }}{% endif %}
""")
# Llama 2, Mistral: no header and no prompt, the system text within the first question, strict turns.
INST = lines(r"""
    {% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}
    {% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{ bos_token }}
    {% for m in messages %}
    {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
    {% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}
""")
GEMMA = lines(r"""
    {{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set role = 'model' %}
    {% else %}{% set role = m.role %}{% endif %}
    {{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}
    {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
""")
# One more token closes a conversation that does not go on.
PHI3 = lines(r"""
    {% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
    {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
""")
MARKED = lines(r"""
    {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
    {% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
    {% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
""")


def user(content):
    return {"role": "user", "content": content}


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


CALL = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": null}'}}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds"}}]
SHAPES = {
    "one turn": {"messages": [user("hi"), says("Hello")]},
    "system": {"system": "Be kind.", "messages": [user("hi"), says("Hello")]},
    "two turns": {"messages": [user("hi"), says("Hello"), user("bye"), says("Ciao")]},
    "assistant opens": {"messages": [says("Welcome"), user("hi"), says("Hello")]},
    "thoughts": {"messages": [user("2+2?"), says("4", reasoning_content="easy")]},
    "thoughts twice": {
        "messages": [user("2+2?"), says("4", reasoning_content="easy"), user("3+3?"), says("6", reasoning_content="hm")]
    },
    "first not learnt": {"messages": [user("hi"), says("Hello", loss=False), user("bye"), says("Ciao")]},
    "calls": {
        "tools": TOOLS,
        "messages": [user("2+2?"), says(None, tool_calls=CALL), {"role": "tool", "content": "four"}, says("4")],
    },
    "user ends": {"messages": [user("hi"), says("Hello"), user("bye")]},
    "blanks": {"messages": [user("hi"), says("\n 你好 \n")]},
}
PLAIN = {
    "one turn": "Hello<|im_end|>",
    "system": "Hello<|im_end|>",
    "two turns": "Hello<|im_end|> & Ciao<|im_end|>",
    "assistant opens": "Welcome<|im_end|> & Hello<|im_end|>",
    "thoughts": "4<|im_end|> - reasoning of the assistant",
    "thoughts twice": "4<|im_end|> & 6<|im_end|> - reasoning of the assistant",
    "first not learnt": "Ciao<|im_end|>",
    "calls": "<|im_end|> & 4<|im_end|> - calls of tools, the list of tools",
    "user ends": "Hello<|im_end|>",
    "blanks": "\n 你好 \n<|im_end|>",
}
V3 = {
    "one turn": "Hello<eos>",
    "system": "Hello<eos>",
    "two turns": "Hello<eos> & Ciao<eos>",
    "assistant opens": "Welcome<eos> & Hello<eos>",
    "thoughts": "4<eos> - reasoning of the assistant",
    "thoughts twice": "4<eos> & 6<eos> - reasoning of the assistant",
    "first not learnt": "Ciao<eos>",
    "calls": '<|calls|><|call|>function<|sep|>add\n{"a": 2, "b": null}<|/call|><|/calls|><eos> & 4<eos>'
    " - the list of tools",
    "user ends": "Hello<eos>",
    "blanks": "\n 你好 \n<eos>",
}
# Runs of learnt tokens between " & ", samples between " || ", what the summary says is left out behind " - ".
TABLE = {
    "chatml": (CHATML, PLAIN),
    "promptless": (PROMPTLESS, PLAIN),
    "marked": (MARKED, PLAIN),
    "deepseek_v2": (
        DEEPSEEK_V2,
        {
            "one turn": " Hello<eos>",
            "system": " Hello<eos>",
            "two turns": " Hello<eos> &  Ciao<eos>",
            "assistant opens": " Welcome<eos> &  Hello<eos>",
            "thoughts": " 4<eos> - reasoning of the assistant",
            "thoughts twice": " 4<eos> &  6<eos> - reasoning of the assistant",
            "first not learnt": " Ciao<eos>",
            "calls": " <eos> &  4<eos> - calls of tools, the list of tools, words of role tool",
            "user ends": " Hello<eos>",
            "blanks": " \n 你好 \n<eos>",
        },
    ),
    "deepseek_v3": (DEEPSEEK_V3, V3),
    "r1": (R1, V3),
    "qwen2_5": (
        QWEN2_5,
        {
            **PLAIN,
            "calls": '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": null}}\n</tool_call><|im_end|>'
            " & 4<|im_end|>",
        },
    ),
    "qwen3": (
        QWEN3,
        {
            "one turn": "<think>\n\n</think>\n\nHello<|im_end|>",
            "system": "<think>\n\n</think>\n\nHello<|im_end|>",
            "two turns": "<think>\n\n</think>\n\nHello<|im_end|> || <think>\n\n</think>\n\nCiao<|im_end|>",
            "assistant opens": "Welcome<|im_end|> & <think>\n\n</think>\n\nHello<|im_end|>",
            "thoughts": "<think>\neasy\n</think>\n\n4<|im_end|>",
            "thoughts twice": "<think>\neasy\n</think>\n\n4<|im_end|> || <think>\nhm\n</think>\n\n6<|im_end|>",
            "first not learnt": "<think>\n\n</think>\n\nCiao<|im_end|>",
            "calls": "<think>\n\n</think>\n\n"
            '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": null}}\n</tool_call>'
            "<|im_end|> || <think>\n\n</think>\n\n4<|im_end|>",
            "user ends": "<think>\n\n</think>\n\nHello<|im_end|>",
            "blanks": "<think>\n\n</think>\n\n 你好 \n<|im_end|>",
        },
    ),
    "llama3": (
        LLAMA3,
        {
            "one turn": "Hello<|eot|>",
            "system": "Hello<|eot|>",
            "two turns": "Hello<|eot|> & Ciao<|eot|>",
            "assistant opens": "Welcome<|eot|> & Hello<|eot|>",
            "thoughts": "4<|eot|> - reasoning of the assistant",
            "thoughts twice": "4<|eot|> & 6<|eot|> - reasoning of the assistant",
            "first not learnt": "Ciao<|eot|>",
            "calls": '{"name": "add", "parameters": {"a": 2, "b": null}}<|eot|> & 4<|eot|>',
            "user ends": "Hello<|eot|>",
            "blanks": "你好<|eot|>",
        },
    ),
    "inst": (
        INST,
        {
            "one turn": "Hello<eos>",
            "system": "Hello<eos>",
            "two turns": "Hello<eos> & Ciao<eos>",
            "assistant opens": "refused: roles must alternate",
            "thoughts": "4<eos> - reasoning of the assistant",
            "thoughts twice": "4<eos> & 6<eos> - reasoning of the assistant",
            "first not learnt": "Ciao<eos>",
            "calls": "refused: roles must alternate",
            "user ends": "Hello<eos>",
            "blanks": "\n 你好 \n<eos>",
        },
    ),
    "gemma": (
        GEMMA,
        {
            "one turn": "Hello<end_of_turn>",
            "system": "Hello<end_of_turn>",
            "two turns": "Hello<end_of_turn> & Ciao<end_of_turn>",
            "assistant opens": "Welcome<end_of_turn> & Hello<end_of_turn>",
            "thoughts": "4<end_of_turn> - reasoning of the assistant",
            "thoughts twice": "4<end_of_turn> & 6<end_of_turn> - reasoning of the assistant",
            "first not learnt": "Ciao<end_of_turn>",
            "calls": "<end_of_turn> & 4<end_of_turn> - calls of tools, the list of tools",
            "user ends": "Hello<end_of_turn>",
            "blanks": "你好<end_of_turn>",
        },
    ),
    "phi3": (
        PHI3,
        {
            "one turn": "Hello<|end|>\n<eos>",
            "system": "Hello<|end|>\n<eos>",
            "two turns": "Hello<|end|> & Ciao<|end|>\n<eos>",
            "assistant opens": "Welcome<|end|> & Hello<|end|>\n<eos>",
            "thoughts": "4<|end|>\n<eos> - reasoning of the assistant",
            "thoughts twice": "4<|end|> & 6<|end|>\n<eos> - reasoning of the assistant",
            "first not learnt": "Ciao<|end|>\n<eos>",
            "calls": "<|end|> & 4<|end|>\n<eos> - calls of tools, the list of tools",
            "user ends": "Hello<|end|>",
            "blanks": "\n 你好 \n<|end|>\n<eos>",
        },
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Bytes as tokens, and every family's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    place = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>").save_pretrained(place)
    with kept():
        yield load_tokenizer(place)


def listed(path, record, tokenizer, template):
    """What `show-data` marks as learnt and the summary as left out, in the notation of the table."""
    path.write_text(json.dumps(record), encoding="utf-8")
    settings = {"pack": False, "sequence_length": 512, "val_fraction": 0}
    data = ChatDataModule(paths=path, tokenizer=tokenizer, chat_template=template, **settings)
    try:
        summary = data.summary()
    except DataError as error:
        return "refused: " + re.search(r"refuses the sample: (.*?)\. Its roles are", str(error))[1]
    samples = []
    for item in data.train_set:
        file = io.StringIO()
        show_batch({name: value[None] for name, value in item.items()}, tokenizer, Console(file=file), most_tokens=None)
        samples.append(" & ".join(re.findall("«(.*?)»", file.getvalue().split("\n|", 1)[1], re.DOTALL)))
    left_out = re.findall(r"skipped: 1 conversations of which the chat template leaves out (.*): a\.jsonl:1", summary)
    return " || ".join(samples) + (f" - {', '.join(left_out)}" if left_out else "")


@pytest.mark.parametrize("name", TABLE)
def test_exactly_the_assistants_words_and_end_marks_are_learnt(tmp_path, tokenizer, name):
    template, expected = TABLE[name]
    found = {shape: listed(tmp_path / "a.jsonl", record, tokenizer, template) for shape, record in SHAPES.items()}
    assert found == expected


# The prompt gives the first words of a turn, and messages hold their thoughts in their text.
QWQ = CHATML.replace(r"{{ '<|im_start|>assistant\n' }}", r"{{ '<|im_start|>assistant\n<think>\n' }}")
# Asks for an answer behind questions alone; behind a tool's result the turn has its header all the same.
ASKS_USERS = CHATML.replace(
    "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1].role == 'user' %}"
)
COUNTS = CHATML.replace("m.role + '", "m.role + m.content|length|string + '")
MUTE = CHATML.replace("{{ '<|im_start|>' + m.role", "{{ '' if m.role == 'assistant' else '<|im_start|>' + m.role")
THOUGHT = {"messages": [user("2+2?"), says("<think>\nhm\n</think>\n\n4")]}


@pytest.mark.parametrize(
    ("template", "record", "expected"),
    [
        (QWQ, THOUGHT, "hm\n</think>\n\n4<|im_end|>"),
        (R1, THOUGHT, "\n\n4<eos> - words of the assistant"),
        (ASKS_USERS, SHAPES["calls"], PLAIN["calls"]),
        (CHATML, {"messages": [user("a"), says("b"), says("c")]}, "b<|im_end|> & c<|im_end|>"),
        (
            QWEN3,
            {"messages": [user("a"), says("b", weight=0), says("c", train=True)]},
            "<think>\n\n</think>\n\nc<|im_end|>",
        ),
    ],
)
def test_turns_of_less_common_kinds(tmp_path, tokenizer, template, record, expected):
    assert listed(tmp_path / "a.jsonl", record, tokenizer, template) == expected


@pytest.mark.parametrize(("template", "why"), [(COUNTS, "its header depends on what"), (MUTE, "it leaves out what")])
def test_a_turn_whose_words_cannot_be_told_from_its_header_is_refused(tmp_path, tokenizer, template, why):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [says("Welcome"), user("hi")]}))
    data = ChatDataModule(
        paths=tmp_path / "a.jsonl", tokenizer=tokenizer, chat_template=template, sequence_length=99, val_fraction=0
    )
    with pytest.raises(DataError, match=rf"a\.jsonl' line 1: message 1 cannot be found .*: {why} the assistant says"):
        data.setup()
