"""Catches: a format that people have read as another or not at all, tools and system texts that never reach the
template, other rows' fields learnt as null, hints that lead astray, bad samples that end in a traceback or never."""

import gzip
import json
import os
import time

import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet
import pytest
from test_learnt_tokens import CALL, CHATML, DEEPSEEK_V3, QWEN2_5, QWEN3, TOOLS, listed, says, tokenizer, user

from lightning_npu_tp.errors import DataError
from lit_models.data import ChatDataModule, TextDataModule, rendering
from lit_models.data.show import spell
from lit_models.data.source_files import find_files

assert tokenizer  # a fixture of the other file

PAIR = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
KIND = "<|im_start|>system\nBe kind.<|im_end|>\n"
MORE = "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


def module(path, tokenizer, template=CHATML, **settings):
    settings = {"pack": False, "sequence_length": 512, "val_fraction": 0, "shuffle": False, **settings}
    return ChatDataModule(paths=path, tokenizer=tokenizer, chat_template=template, **settings)


def rendered(data):
    """The text of each sample."""
    data.setup()
    return [spell(data.tokenizer, item["input_ids"][item["token_mask"]].tolist()) for item in data.train_set]


def write(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


# Formats

FROM_VALUE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("record", "text", "told"),
    [
        ({"messages": [user("hi"), says("Hello")]}, PAIR, "messages of role and content"),
        ({"messages": FROM_VALUE}, PAIR, "messages of from and value"),
        ({"conversations": FROM_VALUE}, PAIR, "conversations of from and value"),
        ({"conversations": [user("hi"), says("Hello")]}, PAIR, "conversations of role and content"),
        ({"conversations": FROM_VALUE, "system": "Be kind."}, KIND + PAIR, "conversations of from and value"),
        ({"instruction": "hi", "output": "Hello"}, PAIR, "instruction, input and output"),
        ({"instruction": "hi", "input": "", "output": "Hello"}, PAIR, "instruction, input and output"),
        (
            {"instruction": "hi", "input": "you", "output": "Hello"},
            PAIR.replace("hi", "hi\nyou"),
            "instruction, input and output",
        ),
        (
            {"instruction": "more", "output": "yes", "history": [["hi", "Hello"]], "system": "Be kind."},
            KIND + PAIR + MORE,
            "instruction, input and output",
        ),
        ({"prompt": "hi", "completion": "Hello"}, PAIR, "prompt and completion"),
        ({"prompt": [user("hi")], "completion": [says("Hello")]}, PAIR, "prompt and completion"),
        (
            {"messages": [user([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), says(["Hello"])]},
            PAIR,
            "messages of role and content",
        ),
    ],
)
def test_formats_are_recognised_and_told(tmp_path, tokenizer, record, text, told):
    data = module(write(tmp_path / "a.jsonl", record, record), tokenizer)
    assert rendered(data) == [text, text]
    assert f"note: 2 conversations read as {told}" in data.summary()


def test_calls_of_sharegpt_and_of_openais_former_way_are_calls(tmp_path, tokenizer):
    call = {"name": "add", "arguments": {"a": 2}}
    ways = [
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "function_call", "value": json.dumps(call)}]},
        {"messages": [user("2+2?"), says(None, function_call={"name": "add", "arguments": '{"a": 2}'})]},
        {"messages": [user("2+2?"), says("", tool_calls=[call])]},
    ]
    results = ({"from": "observation", "value": "four"}, {"role": "function", "content": "four"})
    for record, result in zip(ways, (*results, results[1]), strict=True):
        record[next(iter(record))].append(result)
    data = module(write(tmp_path / "a.jsonl", *ways), tokenizer, QWEN2_5)
    first, *others = rendered(data)
    assert first.endswith(
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>four</tool_response><|im_end|>\n"
    )
    assert others == [first, first]


@pytest.mark.parametrize("arguments", [{"a": 2, "b": "é"}, '{"a": 2, "b": "é"}'])
@pytest.mark.parametrize("template", [QWEN2_5, QWEN3, DEEPSEEK_V3])
def test_arguments_reach_every_template_in_the_form_that_it_takes(tmp_path, tokenizer, template, arguments):
    call = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
    found = listed(tmp_path / "a.jsonl", {"messages": [user("2+2?"), says("", tool_calls=call)]}, tokenizer, template)
    assert '{"a": 2, "b": "é"}' in found and "\\" not in found.replace("\\n", "")


def test_tools_may_be_json_and_a_table_has_no_fields_of_other_rows(tmp_path, tokenizer):
    def record(arguments, tools):
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return {"messages": [user("2+2?"), says("", tool_calls=calls)], "tools": tools}

    other = [{"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "int"}}}}]
    rows = [record({"a": 2}, TOOLS), record({"b": "c"}, other)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    expected = rendered(module(write(tmp_path / "a.jsonl", *lines), tokenizer, QWEN2_5))
    assert '<tools>{"type": "function", "function": {"name": "add", "description": "adds"}}</tools>' in expected[0]
    assert rendered(module(tmp_path / "a.parquet", tokenizer, QWEN2_5)) == expected
    assert "null" not in "".join(expected)


def test_a_null_that_a_line_says_is_kept(tmp_path, tokenizer):
    messages = [user("2+2?"), says(None, tool_calls=CALL)]
    assert (
        '{"a": 2, "b": null}'
        in rendered(module(write(tmp_path / "a.jsonl", {"messages": messages}), tokenizer, QWEN2_5))[0]
    )


# Kinds of files


def test_every_kind_of_file_gives_the_same_records(tmp_path, tokenizer):
    records = [{"instruction": f'say "hi", {n}\n你好', "output": f"Hello {n}"} for n in range(3)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    table = pa.Table.from_pylist(records)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.json").write_text(text)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    with pa.CompressedOutputStream(pa.OSFile(str(tmp_path / "e.jsonl.zst"), "wb"), "zstd") as file:
        file.write(text.encode())
    arrow_csv.write_csv(table, tmp_path / "f.csv")
    parquet.write_table(table, tmp_path / "g.parquet")
    with pa.ipc.new_file(tmp_path / "h.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "i.arrow", table.schema) as writer:
        writer.write_table(table)
    expected = None
    for path in sorted(tmp_path.iterdir()):
        texts = rendered(module(path, tokenizer))
        expected = expected or texts
        assert texts == expected and len(texts) == 3, path
        plain = TextDataModule(source="text", paths=path, text_key="output", val_fraction=0, sequence_length=8)
        plain.setup()
        assert plain.train_set.stream.num_documents == 3, path


def test_a_field_of_csv_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text(f'text\n"{"word " * 40_000}"\n')
    data = TextDataModule(source="text", paths=tmp_path, val_fraction=0)
    data.setup()
    assert data.train_set.stream.num_tokens == 200_001


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_files_of_other_kinds_are_counted_and_named_once(tmp_path, tokenizer, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", {"text": "some words " * 9, "messages": [user("hi"), says("Hello")]})
    for name in ("notes.md", "dataset_info.json", "weights.bin", ".hidden"):
        (folder / name).write_text("x")
    settings = {"paths": folder, "cache_dir": tmp_path / "cache", "val_fraction": 0, "sequence_length": 64}
    for _ in range(2):  # built, then opened
        if kind == "text":
            data = TextDataModule(source="text", **settings)
        else:
            data = ChatDataModule(tokenizer=tokenizer, chat_template=CHATML, **settings)
        assert "skipped: 3 files of other kinds: dataset_info.json, notes.md, weights.bin" in data.summary()
    patterns = TextDataModule(source="text", **{**settings, "paths": [str(folder / "*")], "cache_dir": None})
    assert "skipped: 3 files of other kinds: data/dataset_info.json" in patterns.summary()


# What cannot be read


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": ["user"], "content": "x"}]}', r"message 1: 'role' holds list, not the name of a role"),
        (
            '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}]}',
            r"half of a surr",
        ),
        (
            '{"messages": ' + nested(100_000) + "}",
            r"line 2 cannot be read as JSON: maximum recursion",
        ),
        ('{"messages": [{"role": "user", "content": %s}]}' % ("9" * 5000), r"line 2 cannot be read as JSON"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', r"message 1: .* part of type 'image'"),
        ('{"messages": [{"role": "user", "content": "x", "weight": [1]}, 3]}', r"line 2, message 2 is int"),
        ('{"messages": [{"role": "assistant", "content": "x", "loss": "no"}]}', r"loss='no'.*true or false"),
        ('{"messages": "[1"}', r"line 2: 'messages' is not JSON"),
        ('{"messages": {"a": 1}}', r"line 2: 'messages' is not a list"),
        (
            '{"prompt": "x"}',
            r"line 2 is no conversation .* keys are \['prompt'\]. Known are messages .*data\.messages_key",
        ),
        ('{"chosen": "x", "rejected": "y"}', r"line 2 is no conversation in a known format"),
        ('{"instruction": "x", "output": "y", "history": ["z"]}', r"line 2: 'history' holds 'z', not pairs"),
        ('{"instruction": 3, "output": "y"}', r"message 1: 'content' holds int, not text"),
        ('{"conversations": [{"from": "robot", "value": "x"}]}', r"unknown role 'robot'.*role_names=\{robot: ROLE\}"),
        (
            '{"conversations": [{"from": "function_call", "value": "x"}]}',
            r"from function_call, but .* not the JSON of a",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [3]}]}',
            r"message 1: 'tool_calls' is not a list of objects",
        ),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [3]}', r"line 2: 'tools' is not a list of objects"),
        ('{"messages": [{"role": "user", "content": "x"}], "system": 3}', r"line 2: 'system' holds int, not text"),
        (
            '{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], "system": "y"}',
            r"line 2 has a 'system' text and a first message of role system",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"name": "f", '
            '"arguments": "{"}]}]}',
            r"line 2, message 2: the arguments of the call of 'f' are not JSON",
        ),
    ],
)
def test_a_bad_line_is_named_and_no_hint_leads_astray(tmp_path, tokenizer, line, message):
    path = write(tmp_path / "a.jsonl", {"messages": [user("hi"), says("Hello")]})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message) as error:
        module(path, tokenizer, QWEN2_5).setup()
    assert "a.jsonl' line 2" in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "x"},\n {"text": }]', r"a\.json' line 2 \(entry 1 of its array\) is not JSON"),
        ("a.json", '[{"text": "x"}\n', r"a\.json' line 1 \(entry 0 of its array\) is not JSON: Expecting ',' or '\]'"),
        ("a.json", '[{"text": "x"},\n 3]', r"a\.json' line 2 \(entry 1 of its array\) is not a JSON object"),
        ("a.json", f"[{nested(100_000)}]", r"a\.json' line 1 \(entry 0 of its array\) cannot be read as JSON"),
        ("a.csv", 'text,b\nx,1\n"y",\n"z"\n', r"a\.csv' line 4 has 1 fields, but the file's first line names 2"),
        ("a.csv", 'text\n"x"y"\n', r"a\.csv' line 2 cannot be read as CSV"),
        ("a.csv", b"text\n\xff\n", r"a\.csv' is not UTF-8 text"),
        ("a.csv", "words\nx\n", r"a\.csv' line 2 has no key 'text'; its keys are \['words'\]"),
        ("a.jsonl.gz", b"x", r"a\.jsonl\.gz' cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99)[:-12], r"a\.jsonl\.gz' cannot be read"),
        ("a.jsonl.zst", b"x" * 99, r"a\.jsonl\.zst' cannot be read"),
        ("a.arrow", b"x" * 99, r"a\.arrow' cannot be read as arrow"),
        ("a.parquet", b"x" * 99, r"a\.parquet' cannot be read as parquet"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        TextDataModule(source="text", paths=tmp_path, val_fraction=0).setup()


def test_links_to_nothing_and_pipes_are_named(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    for path, message in (
        (tmp_path, r"takes in '.*a\.jsonl', which cannot be read: a link to 'gone\.jsonl': No such file"),
        (tmp_path / "*.jsonl", r"takes in '.*a\.jsonl', which cannot be read"),
        (tmp_path / "a.jsonl", r"names '.*a\.jsonl', which is a link to what does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            find_files([path])
    (tmp_path / "a.jsonl").unlink()
    os.mkfifo(tmp_path / "b.jsonl")
    for path in (tmp_path, tmp_path / "b.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl', which is no file but a pipe"):
            find_files([path])


# Templates from strangers

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, r"did not end within 1 s"),
        ("{{ 9**(9**9) }}", r"did not end within 1 s"),
        (
            "{% set ns = namespace(n=7) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
            r"within 1 s",
        ),
        ("{{ 'x' * 4000000000 }}", r"MemoryError"),
        ("{{ 'x' | center(4000000000) }}", r"MemoryError"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", r"refuses the sample: .*unsafe"),
        ("{% for m in messages %}{{ m.content }}", r"refuses the sample: .*\(line 1 of the template\)"),
        ("{{ messages[0].role * 5000000 }}", r"refuses the sample: ValueError: it writes 20,000,000 characters"),
        ("{{ raise_exception('x' * 9000000) }}", r"refuses the sample: xxx"),
        ("{{ 1 / 0 }}", r"refuses the sample: ZeroDivisionError"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", r"refuses the sample: RecursionError"),
        ("{{ messages | tojson(indent=messages) }}", r"refuses the sample: TypeError"),
    ],
)
def test_a_template_is_bounded_in_time_and_memory_and_named_with_the_sample(
    tmp_path, tokenizer, template, message, monkeypatch
):
    # The other limits are met at once, however busy the machine is.
    monkeypatch.setattr(rendering, "SECONDS", 1.0 if "within" in message else 60.0)
    (tmp_path / "own.jinja").write_text(template)
    data = module(
        write(tmp_path / "a.jsonl", {"messages": [user("hi"), says("Hello")]}), tokenizer, str(tmp_path / "own.jinja")
    )
    begin = time.monotonic()
    with pytest.raises(DataError, match=message) as error:
        data.setup()
    assert "a.jsonl' line 1" in str(error.value) and "own.jinja" in str(error.value)
    assert len(str(error.value)) < 1200 and time.monotonic() - begin < 60
