"""Catches: a file read twice or not at all, an order that depends on the machine, a document lost in one of the
formats, and a bad file that is swallowed or fails without saying where."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from lightning_npu_tp.errors import DataError
from lit_models.data.documents import read_files, read_stdlib, split_point, stdlib_files
from lit_models.data.source_files import find_files


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path, columns):
    parquet.write_table(pa.table(columns), path)
    return path


def read(*paths, **kwargs):
    return [(document.name, document.text) for document in read_files(find_files(paths), **kwargs)]


def names(*paths):
    return [file.name for file in find_files(paths)]


# The standard library


def test_the_running_interpreter_has_a_library_without_installed_packages_or_tests():
    files = [file.name for file in stdlib_files()]
    assert files == sorted(files)
    assert {"argparse.py", "json/decoder.py"} <= set(files)
    assert not [name for name in files if {"site-packages", "dist-packages", "test"} & set(name.split("/"))]


def test_only_sources_of_the_library_itself_are_listed(tmp_path):
    for name in ("b.py", "a/c.py", "test/d.py", "a/tests/e.py", "site-packages/f.py", "a/__pycache__/g.py", "h.pyc"):
        write(tmp_path / name, "x")
    assert [file.name for file in stdlib_files(root=tmp_path)] == ["a/c.py", "b.py"]
    with_tests = [file.name for file in stdlib_files(root=tmp_path, include_tests=True)]
    assert with_tests == ["a/c.py", "a/tests/e.py", "b.py", "test/d.py"]


def test_an_undecodable_source_is_skipped_and_counted(tmp_path):
    write(tmp_path / "a.py", "# 好\n")
    write(tmp_path / "b.py", b"# \xff\n")
    write(tmp_path / "c.py", "pass\n")
    skipped = Counter()
    documents = list(read_stdlib(stdlib_files(root=tmp_path), skipped))
    assert [(document.name, document.text) for document in documents] == [("a.py", "# 好\n"), ("c.py", "pass\n")]
    assert skipped == {"undecodable files": 1}


def test_a_python_without_sources_is_named(tmp_path):
    with pytest.raises(DataError, match=r"finds no \.py file .* ships without its sources.* data=text"):
        stdlib_files(root=tmp_path)


# The split


def test_the_split_point_is_uniform_and_depends_on_seed_and_name_alone():
    points = [split_point(0, f"file{number}") for number in range(4000)]
    share = sum(point < 0.1 for point in points) / len(points)
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5  # four standard deviations of a fair draw
    assert all(0 <= point < 1 for point in points)
    assert split_point(1, "file0") != points[0]
    # Known values, so that a hash that differs from process to process shows without starting one.
    assert (split_point(0, "argparse.py"), split_point(1, "argparse.py")) == (0.40711159263159813, 0.8512696191096891)


# Finding files


def test_each_file_is_taken_once_in_the_order_given(tmp_path):
    for name in ("z.txt", "sub/a.jsonl", "sub/b.txt", "sub/deeper/c.parquet"):
        write(tmp_path / name, "x")
    order = names(tmp_path / "z.txt", tmp_path / "sub", tmp_path / "sub" / "*.txt", tmp_path)
    assert order == ["z.txt", "a.jsonl", "b.txt", "deeper/c.parquet"]


def test_folders_skip_hidden_and_foreign_files_and_survive_circular_links(tmp_path):
    for name in ("a.TXT", ".hidden.txt", ".cache/b.txt", "notes.md", "linked/c.txt"):
        write(tmp_path / "corpus" / name, "x")
    (tmp_path / "corpus" / "linked" / "circle").symlink_to(tmp_path / "corpus")
    write(tmp_path / "elsewhere" / "d.txt", "x")
    (tmp_path / "corpus" / "outside").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "corpus") == ["a.TXT", "linked/c.txt", "outside/d.txt"]


def test_patterns_reach_into_folders_and_take_known_kinds(tmp_path):
    for name in ("a/x.txt", "a/b/y.jsonl", "a/readme.md"):
        write(tmp_path / name, "x")
    assert names(tmp_path / "a" / "**" / "*") == ["b/y.jsonl", "a/x.txt"]


def test_paths_that_lead_nowhere_are_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.paths is empty"):
        find_files([])
    with pytest.raises(DataError, match=r"data\.paths names '.*gone\.txt', which does not exist"):
        find_files([tmp_path / "gone.txt"])
    with pytest.raises(DataError, match=r"data\.val_paths names '.*', which holds no \.txt, \.jsonl, .*\.arrow file"):
        find_files([tmp_path], setting="data.val_paths")
    with pytest.raises(DataError, match=r"names '.*\*\.txt', which holds no"):
        find_files([tmp_path / "*.txt"])
    with pytest.raises(DataError, match=r"names '.*notes\.md', but only .* rename it to \.txt"):
        find_files([write(tmp_path / "notes.md", "x")])


# Reading


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbf" + "第一行\r\n第二行\n".encode())
    assert read(tmp_path) == [("a.txt", "第一行\r\n第二行\n")]


def test_json_lines_give_a_document_a_line(tmp_path):
    lines = ["\ufeff" + json.dumps({"text": "一"}, ensure_ascii=False), "", '{"id": 2, "text": "two\u2028still two"}']
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, '{"text": null}']))
    assert read(path) == [("a.jsonl:1", "一"), ("a.jsonl:3", "two\u2028still two"), ("a.jsonl:4", "")]
    assert read(write(tmp_path / "b.jsonl", '{"body": "b"}\n'), text_key="body") == [("b.jsonl:1", "b")]


def test_parquet_gives_a_document_a_row_across_batches(tmp_path):
    texts = [f"第{number}行" for number in range(2500)]  # three batches of 1024
    path = write_parquet(tmp_path / "a.parquet", {"id": range(2500), "text": texts})
    assert read(path) == [(f"a.parquet:{row}", text) for row, text in enumerate(texts)]
    path = write_parquet(tmp_path / "b.parquet", {"content": ["x", None]})
    assert read(path, text_key="content") == [("b.parquet:0", "x"), ("b.parquet:1", "")]


def test_a_file_is_opened_when_its_turn_comes(tmp_path):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, name)
    documents = read_files(find_files([tmp_path]))
    assert next(documents).text == "a.txt"
    (tmp_path / "a.txt").unlink()  # read already, and not read again
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.txt' cannot be read: No such file"):
        next(documents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xffdef", r"a\.txt is not UTF-8 text: byte 0xff at offset 3\. .*GB18030"),
        (b"ab\x00", r"a\.txt is not UTF-8 text: byte 0x00 at offset 2"),
        ("中文".encode("gb18030"), r"a\.txt is not UTF-8 text: byte 0xd6 at offset 0"),
    ],
)
def test_a_text_file_that_is_not_text_is_named_with_the_byte(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.txt", content))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"a\.jsonl' line 2 is not JSON: .* at column 13"),
        (b"[1]", r"line 2 is not a JSON object"),
        (b'{"body": "x", "id": 1}', r"line 2 has no key 'text'; its keys are \['body', 'id'\].*data\.text_key"),
        (b'{"text": 3}', r"line 2: 'text' holds int, not text"),
        (b'{"text": "\\ud83d"}', r"line 2: 'text' holds half of a surrogate pair at character 0"),
        (b'{"text": "\xff"}', r"line 2 is not UTF-8 text: byte 0xff at offset 27"),
    ],
)
def test_a_bad_json_line_is_named_with_its_number(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        read(path)


def test_bad_parquet_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no column 'text'; its columns are \['id', 'body'\]"):
        read(write_parquet(tmp_path / "a.parquet", {"id": [1], "body": ["x"]}))
    with pytest.raises(DataError, match=r"b\.parquet' row 1: 'text' holds bytes, not text"):
        read(write_parquet(tmp_path / "b.parquet", {"text": pa.array([None, b"x"])}))
    with pytest.raises(DataError, match=r"c\.parquet' cannot be read as parquet"):
        read(write(tmp_path / "c.parquet", b"not parquet at all"))
