"""Catches: a printed batch that says other text, marks or counts than the model is given."""

import io
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from lit_models.data import ByteTokenizer
from lit_models.data.packing import PackedDataset
from lit_models.data.show import show_batch, spell
from lit_models.data.streams import StreamBuilder

ROOT = Path(__file__).parents[3]


def printed(batch, *, terminal=False, most_tokens=None) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=200)
    show_batch(batch, ByteTokenizer(), console, most_tokens=most_tokens)
    return file.getvalue()


def batch(*documents: str, size: int, isolate: bool = True):
    builder = StreamBuilder(vocab_size=259, eos_id=257)
    for document in documents:
        builder.add(document, ByteTokenizer().encode(document))
    item = PackedDataset(builder.build(), sequence_length=size, pad_id=258, isolate_documents=isolate)[0]
    return {name: value[None] for name, value in item.items()}


def test_learnt_text_borders_padding_and_counts_are_those_of_the_batch():
    text = printed(batch("first", "二", size=14))
    assert "sequence 0: 14 tokens: 8 learnt (57%), 2 context, 4 padding, positions restart at 0, 6" in text
    # The first byte of 二 is context, so the character is cut in two.
    assert "|f«irst<eos>»\n|\ufffd«\ufffd\ufffd<eos>»\n(4 padding)" in text
    assert "batch: input_ids [1, 14], labels [1, 14], position_ids [1, 14]" in text


def test_without_positions_the_sequence_is_one_piece_and_long_ones_are_cut_short():
    text = printed(batch("first", "second", size=13, isolate=False), most_tokens=8)
    assert "|f«irst<eos>se»\n(… 5 more tokens)" in text
    assert "positions restart" not in text and "13 tokens: 12 learnt (92%), 1 context, 0 padding" in text


def test_a_terminal_gets_colours_and_no_marks():
    text = printed(batch("first", size=6), terminal=True)
    assert "\x1b[1;32mirst<eos>\x1b[0m" in text and "\x1b[2mf\x1b[0m" in text and "«" not in text


def test_a_blank_sequence_is_all_padding():
    ids = torch.full((1, 4), 258)
    text = printed({"input_ids": ids, "labels": torch.full((1, 4), -100), "position_ids": torch.arange(4)[None]})
    assert "4 tokens: 0 learnt (0%), 0 context, 4 padding" in text and "(4 padding)" in text


def test_special_tokens_of_a_hugging_face_tokenizer_are_spelt_out(tmp_path):
    from test_data_tokenizers import END, make_tokenizer

    from lit_models.data import load_tokenizer

    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    assert spell(tokenizer, [*tokenizer.encode("模型 model").tolist(), tokenizer.eos_id]) == f"模型 model{END}"


def test_the_command_shows_a_batch_and_tells_mistakes_in_one_line(tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT))
    try:
        import show_data
    finally:
        sys.path.remove(str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some text to learn " * 50)
    settings = ["data=text", f"data.paths=[{tmp_path / 'a.txt'}]", "data.sequence_length=32", "data.batch_size=2"]
    assert show_data.main([*settings, "data.shuffle=false"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("data: text, tokenizer bytes") and "|s«ome text to learn some text to" in out
    assert show_data.main([*settings, "--validation", "--tokens", "4"]) == 0
    assert "(… 28 more tokens)" in capsys.readouterr().out
    for wrong, message in (
        (["--batch", "99"], "error: --batch 99 does not exist: there are 14 batches"),
        (["data.batch_size=0"], "error: data.batch_size=0 is too small"),
        (["data=missing"], "error: In 'train': Could not find 'data/missing'"),
    ):
        assert show_data.main([*settings, *wrong]) == 2
        assert capsys.readouterr().err.startswith(message)
    assert show_data.main(["data=chat"]) == 2
    assert "Missing mandatory value" in capsys.readouterr().err


def test_paths_with_other_letters_are_quoted_as_the_page_says(tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT))
    try:
        import show_data
    finally:
        sys.path.remove(str(ROOT))
    for page in ("README.md", "docs/data.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert """'data.paths=["语料/对话 (1).jsonl"]'""" in text
    (tmp_path / "语料").mkdir()
    (tmp_path / "语料" / "对话 (1).jsonl").write_text('{"text": "some text to learn"}\n' * 20)
    monkeypatch.chdir(tmp_path)
    settings = ["data=text", "data.sequence_length=32", "data.batch_size=1", "data.cache_dir=null"]
    assert show_data.main([*settings, 'data.paths=["语料/对话 (1).jsonl"]']) == 0
    assert "some text to learn" in capsys.readouterr().out
    assert show_data.main([*settings, "data.paths=[语料]"]) == 2, "Hydra takes it now: say so in the pages"


def test_the_script_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "show_data.py"), "data.max_tokens=2000", "data.batch_size=1", "--tokens=8"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "data: stdlib" in done.stdout and list(tmp_path.iterdir()) == []


def test_the_command_runs_the_projects_script(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from lightning_npu_tp.tools.cli import app

    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, ["show-data", "data=chat"])
    assert told.exit_code == 2 and "show_data.py is not in" in told.stderr
    (tmp_path / "show_data.py").write_text("import sys; open('told', 'w').write(' '.join(sys.argv[1:])); sys.exit(7)")
    assert CliRunner().invoke(app, ["show-data", "data=chat", "--tokens", "5"]).exit_code == 7
    assert (tmp_path / "told").read_text() == "data=chat --tokens 5"
