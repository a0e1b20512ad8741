"""Catches: a cache that differs from what memory would hold, that is taken though it is damaged, half written or of
other files or settings, that is built twice at once, or that fails without saying what to do."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from test_data_tokenizers import make_tokenizer

from lightning_npu_tp.errors import DataError
from lit_models.data import TextDataModule
from lit_models.data import cache as cache_module
from lit_models.data.cache import default_folder, open_or_build
from lit_models.data.tokenizers import load_tokenizer


def corpus(folder: Path, count: int = 40) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(f"<{number}> 深度学习\n" * (1 + number % 7))
    return folder


def module(folder: Path, cache: Path | None, **settings) -> TextDataModule:
    defaults = {"sequence_length": 32, "batch_size": 4, "val_fraction": 0.2}
    return TextDataModule(source="text", paths=[folder], cache_dir=cache, **{**defaults, **settings})


def arrays(data: TextDataModule) -> list:
    data.setup()
    sets = [one for one in (data.train_set, data.val_set) if one is not None]
    return [array.tolist() for one in sets for array in (one.stream.tokens, one.stream.starts)]


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


# The same as memory


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"val_fraction": 0},
        {"max_tokens": 300, "max_val_tokens": 50},
        {"max_documents": 3},
        {"val_fraction": 0.0001},  # the nearest document is moved over
        {"val_fraction": 0.9999},
        {"seed": 3},
    ],
)
def test_a_cache_holds_what_memory_would(tmp_path, settings):
    count = 5 if settings.get("val_fraction") in (0.0001, 0.9999) else 40
    folder = corpus(tmp_path / "text", count)
    memory, built, opened = (module(folder, cache, **settings) for cache in (None, *[tmp_path / "cache"] * 2))
    assert arrays(built) == arrays(memory) == arrays(opened)
    assert built.identity() == memory.identity() == opened.identity()
    assert isinstance(opened.train_set.stream.tokens.base, np.memmap)
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("seed", [0, 1])  # on one of the two sides the only document falls first
@pytest.mark.parametrize("val_fraction", [0.1, 0.9])
def test_a_lone_file_larger_than_every_buffer_is_cut_in_two_as_in_memory(tmp_path, val_fraction, seed):
    text = "".join(f"{number:07} 深" for number in range(800_000))  # 8.8 MB: three parts
    (tmp_path / "book.txt").write_text(text)
    data = module(tmp_path / "book.txt", tmp_path / "cache", val_fraction=val_fraction, seed=seed)
    data.setup()
    decode = data.tokenizer.decode
    train, validation = (one.stream.tokens for one in (data.train_set, data.val_set))
    assert decode(train[:-1][:2000]) == text.encode()[:2000].decode(errors="replace")
    assert np.array_equal(np.concatenate([train[:-1], validation[:-1]]), np.frombuffer(text.encode(), np.uint8))
    assert train[-1] == validation[-1] == data.tokenizer.eos_id
    assert abs(len(validation) / (len(train) + len(validation)) - val_fraction) < 1e-6
    memory = module(tmp_path / "book.txt", None, val_fraction=val_fraction, seed=seed)
    assert memory.identity() == data.identity()


def test_skipped_documents_and_notes_are_told_from_the_cache_too(tmp_path):
    folder = corpus(tmp_path / "text")
    (folder / "empty.txt").write_text("")
    summaries = [module(folder, tmp_path / "cache").summary() for _ in range(2)]
    assert summaries[0] == summaries[1] and "skipped: 1 empty documents" in summaries[0]
    (tmp_path / "lone.txt").write_text("one document " * 40)
    summaries = [module(tmp_path / "lone.txt", tmp_path / "cache").summary() for _ in range(2)]
    assert summaries[0] == summaries[1] and "the only document is cut in two" in summaries[0]


# When it is taken


def test_other_files_settings_or_tokenizers_are_other_caches(tmp_path):
    folder, cache = corpus(tmp_path / "text"), tmp_path / "cache"
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    for number, settings in enumerate(
        [{}, {"val_fraction": 0.3}, {"seed": 1}, {"max_tokens": 99}, {"max_val_tokens": 9}, {"tokenizer": tokenizer}]
    ):
        module(folder, cache, **settings).setup()
        assert len(entries(cache)) == number + 1, settings
    module(folder, cache, sequence_length=16, batch_size=1, shuffle=False).setup()  # cut later: the same tokens
    assert len(entries(cache)) == 6
    stat = (folder / "003.txt").stat()
    (folder / "003.txt").write_text((folder / "003.txt").read_text().replace("3", "4"))  # of the same size
    os.utime(folder / "003.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert 4 in {token - 48 for token in arrays(module(folder, cache))[0][:600]}
    assert len(entries(cache)) == 7


def test_a_finished_cache_is_opened_without_reading_the_files_or_taking_the_lock(tmp_path, monkeypatch):
    folder = corpus(tmp_path / "text")
    module(folder, tmp_path / "cache").setup()
    monkeypatch.setattr(TextDataModule, "_encode", None)
    monkeypatch.setattr(cache_module, "hold", None)
    module(folder, tmp_path / "cache").setup()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "longer":
        data += b"x"
    path.write_bytes(data[: {"empty": 0, "short": len(data) - 1}.get(how, len(data))])


@pytest.mark.parametrize("how", ["flip", "short", "empty", "longer", "gone"])
@pytest.mark.parametrize("name", ["train.tokens", "train.starts", "validation.tokens", "cache.json"])
def test_a_damaged_cache_is_noticed_and_built_anew(tmp_path, capsys, name, how):
    folder = corpus(tmp_path / "text")
    expected = arrays(module(folder, tmp_path / "cache"))
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    path.unlink() if how == "gone" else damage(path, how)
    assert arrays(module(folder, tmp_path / "cache")) == expected
    word = capsys.readouterr().err
    assert "is damaged (" in word and name in word
    assert arrays(module(folder, tmp_path / "cache")) == expected and not capsys.readouterr().err


def test_a_killed_build_leaves_nothing_that_is_taken_and_the_next_one_removes_it(tmp_path):
    def killed(path: Path) -> dict:
        (path / "train.tokens").write_bytes(b"half")
        raise KeyboardInterrupt

    partial = tmp_path / ".key.partial-0123456789ab"
    partial.mkdir()
    (partial / "train.tokens").write_bytes(b"of a process that was killed")
    with pytest.raises(KeyboardInterrupt):
        open_or_build(tmp_path, "key", killed)
    assert entries(tmp_path) == []
    folder, told = open_or_build(tmp_path, "key", lambda path: {"told": (path / "a").write_bytes(b"x")})
    assert entries(tmp_path) == ["key"] and told == {"told": 1} and (folder / "a").read_bytes() == b"x"


def test_one_process_builds_and_the_others_wait_and_use_it(tmp_path):
    """Threads stand for processes: a lock belongs to whoever opened the file, and each opens it anew."""
    builds, answers = [], []

    def build(path: Path) -> dict:
        builds.append(path)
        time.sleep(0.3)
        (path / "a").write_bytes(b"x" * 1000)
        return {"number": len(builds)}

    threads = [threading.Thread(target=lambda: answers.append(open_or_build(tmp_path, "key", build))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert answers == [(tmp_path / "key", {"number": 1})] * 3 and len(builds) == 1


# What cannot be written


def test_a_full_disk_is_told_with_bytes_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 2_000_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        with pytest.raises(DataError) as caught:
            module(tmp_path / "a.txt", tmp_path / "cache").setup()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "does not fit into" in str(caught.value) and "bytes of at most 20,000,000" in str(caught.value)
    assert "bytes are free" in str(caught.value) and "data.cache_dir" in str(caught.value)
    assert entries(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"cannot be written: .*file.* data\.cache_dir .* or to null"):
        open_or_build(tmp_path / "file" / "cache", "key", lambda path: {})

    def refuse(*_args, **_settings):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "cache"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match=r"cannot be written: Read-only file system"):
        open_or_build(tmp_path / "cache", "key", lambda path: {})


def test_auto_is_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "lightning_npu_tp" / "tokens"
    assert module(tmp_path, "auto").cache_dir == default_folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "lightning_npu_tp" / "tokens"


# Streaming


_PEAK = """
import pathlib, sys, threading, time
from lit_models.data import TextDataModule

def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

peak = 0
threading.Thread(target=watch, daemon=True).start()
for folder in sys.argv[1:]:
    data = TextDataModule(source="text", paths=folder, val_fraction=0.01, cache_dir=f"{folder}-cache")
    peak = before = anonymous()
    data.setup()
    print(peak - before)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """12 MB of text and then 48 MB in one process: what is kept while building is a buffer, not the corpus.

    Pages of the mapped cache are not counted: the system takes them back when it likes.
    """
    for megabytes in (12, 48):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        line = '{"text": "' + "some words of text " * 50 + '"}\n'
        (folder / "a.jsonl").write_text(line * (megabytes * 500_000 // len(line)))
        (folder / "b.txt").write_text("some words of text " * (megabytes * 500_000 // 19))
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "12"), str(tmp_path / "48")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    small, large = (int(line) / 1024 for line in done.stdout.split())
    assert large - small < 16, f"{large - small} MiB more for 36 MB more text, whose tokens are 72 MB"


def test_long_documents_encoded_in_parts_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    rng = np.random.default_rng(0)
    words = ["def", "train(model):", "return", "深度学习", "naïve", "🙂", "\n", "\n", "\n    ", "\t", "  "]
    text = "".join(f"{words[at]}{' ' * (at % 2)}" for at in rng.integers(0, len(words), 20_000))
    whole = tokenizer.encode(text)
    for name, value in (("_LONG", 5_000), ("_WINDOW", 200), ("LONGEST_PART", 10_200)):
        monkeypatch.setattr(f"lit_models.data.tokenizers.{name}", value)
    (tmp_path / "a.txt").write_text(text, newline="")
    monkeypatch.setattr("lit_models.data.documents._PART", 7_001)
    sizes = []
    encode_batch = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: sizes.extend(map(len, texts)) or encode_batch(texts))
    data = module(tmp_path / "a.txt", tmp_path / "cache", tokenizer=tokenizer, val_fraction=0)
    data.setup()
    assert np.array_equal(data.train_set.stream.tokens[:-1], whole) and data.train_set.stream.num_documents == 1
    assert len(sizes) > 8 and max(sizes) <= 10_200  # parts came and went; the file was never held whole
    for ids, one in zip(tokenizer.encode_batch([text, "", "x"]), [text, "", "x"], strict=True):
        assert np.array_equal(ids, tokenizer.encode(one))


def test_a_text_that_no_cut_leaves_alone_is_encoded_whole(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    for name, value in (("_LONG", 100), ("_WINDOW", 20), ("LONGEST_PART", 220)):
        monkeypatch.setattr(f"lit_models.data.tokenizers.{name}", value)
    assert tokenizer.place_to_cut("nothingtocutat" * 100) is None
    assert tokenizer.place_to_cut("a line\n" * 100) == 105
    monkeypatch.setattr(type(tokenizer), "_may_cut", lambda self, text, at: False)
    assert tokenizer.place_to_cut("a line\n" * 100) is None
    monkeypatch.setattr("lit_models.data.documents._PART", 64)
    (tmp_path / "a.txt").write_text("a line\n" * 100)
    data = module(tmp_path / "a.txt", None, tokenizer=tokenizer, val_fraction=0)
    data.setup()
    assert np.array_equal(data.train_set.stream.tokens[:-1], tokenizer.encode("a line\n" * 100))


def test_row_groups_and_parts_give_every_document_once(tmp_path):
    texts = [f"<{number}> text" for number in range(3000)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=700)
    data = module(tmp_path / "a.parquet", tmp_path / "cache", val_fraction=0)
    data.setup()
    assert data.tokenizer.decode(data.train_set.stream.tokens) == "".join(texts)
    assert data.train_set.stream.num_documents == 3000
