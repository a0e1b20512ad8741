"""Encode a corpus into the token cache: peak memory above the imports, MB of text per second, seconds to open it again.

    python benchmarks/token_cache.py --megabytes 300 --json benchmarks/results/token_cache_cpu_2026-11.json

The text is the standard library's sources, over and over. Each case runs in a process of its own, which reports the
peak of its anonymous memory (pages of the mapped cache are the system's to take back); a quarter of the corpus beside
the whole shows what grows with it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

from lit_models.data import TextDataModule
from lit_models.data.documents import read_stdlib, stdlib_files


def write_corpus(folder: Path, kind: str, megabytes: float) -> None:
    """About so many MB of text, as one .txt, one .jsonl or one .parquet."""
    from collections import Counter

    texts = [document.text for document in read_stdlib(stdlib_files(), Counter())]
    wanted = int(megabytes * 1e6)
    folder.mkdir()
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        schema = pa.schema([("text", pa.string())])
        with parquet.ParquetWriter(folder / "corpus.parquet", schema) as writer:
            while wanted > 0:
                rows = [f"# {wanted}\n{text}" for text in texts]
                writer.write_table(pa.table({"text": rows}), row_group_size=100)
                wanted -= sum(len(row) for row in rows)
        return
    with (folder / f"corpus.{kind}").open("w") as file:
        while wanted > 0:
            for text in texts:
                line = json.dumps({"text": f"# {wanted}\n{text}"}) + "\n" if kind == "jsonl" else f"# {wanted}\n{text}"
                wanted -= file.write(line)
                if wanted <= 0:
                    break


def train_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 8,000 tokens, trained on the text itself."""
    from collections import Counter
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((d.text for d in islice(read_stdlib(stdlib_files(), Counter()), 150)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder)
    return folder


class Peak(threading.Thread):
    """Samples this process's anonymous memory, in KiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value = self.now()
        self.start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while True:
            self.value = max(self.value, self.now())
            time.sleep(0.005)


def measure(folder: str, cache: str, tokenizer: str, megabytes: str) -> dict[str, float]:
    """Build and open, in this process."""
    data = TextDataModule(
        source="text", paths=folder, cache_dir=cache, tokenizer=tokenizer or None, sequence_length=2048
    )
    if tokenizer:
        data.tokenizer.encode_batch(["warm up"])  # type: ignore[attr-defined]
    peak = Peak()
    before = peak.value
    begin, cpu = time.perf_counter(), time.process_time()
    data.setup()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    again = TextDataModule(source="text", paths=folder, cache_dir=cache, tokenizer=tokenizer or None)
    begin = time.perf_counter()
    again.setup()
    opened = time.perf_counter() - begin
    assert data.train_set is not None
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "text_mb": float(megabytes),
        "file_mb": size / 1e6,
        "tokens_million": data.train_set.stream.num_tokens / 1e6,
        "cache_mb": sum(path.stat().st_size for path in Path(cache).glob("*/*")) / 1e6,
        "peak_mib_above_imports": (peak.value - before) / 1024,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "mb_of_text_per_second": float(megabytes) / seconds,
        "seconds_to_open_again": opened,
    }


def machine() -> str:
    """Processor, cores and system."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=300.0)
    parser.add_argument("--bpe-megabytes", type=float, default=60.0, help="for the Hugging Face tokenizer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(*given.case)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as place:
        tokenizer = str(train_tokenizer(Path(place, "tokenizer")))
        for kind in ("txt", "jsonl", "parquet"):
            for name, path, whole in (("bytes", "", given.megabytes), ("bpe", tokenizer, given.bpe_megabytes)):
                for size in (whole / 4, whole):
                    corpus = Path(place, f"{kind}_{name}_{size:.0f}")
                    write_corpus(corpus, kind, size)
                    case = [str(corpus), str(Path(place, "cache", corpus.name)), path, str(size)]
                    command = [sys.executable, __file__, "--case", *case]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    found = json.loads(done.stdout.splitlines()[-1])
                    results[f"{kind} {name} {size:.0f} MB"] = found
                    print(
                        f"{kind:8}{name:6}{size:7.0f} MB  peak {found['peak_mib_above_imports']:6.0f} MiB  "
                        f"{found['mb_of_text_per_second']:6.1f} MB/s  open {found['seconds_to_open_again']:5.2f} s",
                        flush=True,
                    )
                    shutil.rmtree(corpus)
    if given.json:
        report = {
            "cases": results,
            "date": str(date.today()),
            "machine": machine(),
            "command": "python benchmarks/token_cache.py " + " ".join(sys.argv[1:]),
        }
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
