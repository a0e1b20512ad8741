"""Memory and time of an export: DeepSeek-V2-Lite's widths with few layers, in bfloat16, from a checkpoint folder.

    python benchmarks/export_memory.py [--layers 2] [--out benchmarks/results/export_memory_cpu_2026-11.json]

Peak of the process's own memory (RssAnon, sampled every 5 ms; mapped files are the page cache's) above that before the
export, while it writes and while it compares files. A safetensors file is in memory while it is filled, so the peak is
to be that of the largest file and a few runs of rows, whatever the model's size: measured with files of 500 MB, and
with one of all. Loading through transformers is left out: it holds a whole model.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config

from lightning_npu_tp.checkpoint import training_state
from lightning_npu_tp.weights import hf_export as exporting
from lightning_npu_tp.weights.row_runs import CHUNK_BYTES


def anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1])


class Peak:
    def __enter__(self) -> Peak:
        self.before = self.highest = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, anonymous())

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._start
        self.mib = (self.highest - self.before) / 2**20


def make(folder: Path, layers: int) -> DeepseekV2Config:
    config = DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    bits = {"generator": generator, "dtype": torch.int16}
    weights = {f"model.{n}": torch.randint(-20000, 20000, s, **bits).view(torch.bfloat16) for n, s in shapes.items()}
    training_state.save_sharded({"state_dict": weights}, folder, is_main=True)
    return config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "c.ckpt"
        config = make(path, arguments.layers)
        memory = psutil.virtual_memory()
        psutil.virtual_memory = lambda: memory._replace(available=0)
        results: dict[str, Any] = {}
        for what, verify, largest in (
            ("write, files of 500 MB", False, 500 * 10**6),
            ("write, one file", False, exporting.MAX_SHARD_BYTES),
            ("write, checksums, compare, files of 500 MB", True, 500 * 10**6),
        ):
            out = Path(root) / "out"
            with Peak() as peak:
                done = exporting.export_checkpoint(
                    path, out, config=config, with_tokenizer=False, verify=verify, max_shard_bytes=largest
                )
            results[what] = {
                "peak_mib_above_before": round(peak.mib, 1),
                "largest_file_mib": round(max(file.stat().st_size for file in out.glob("*.safetensors")) / 2**20, 1),
                "seconds": round(peak.seconds, 2),
            }
            assert not done.differences
            shutil.rmtree(out)
    results |= {"weight_bytes": done.weight_bytes, "tensors": done.tensors, "compared": done.compared}
    results |= {"chunk_mib": CHUNK_BYTES / 2**20, "machine": f"{platform.processor() or platform.machine()}"}
    results |= {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "layers": arguments.layers}
    text = json.dumps(results, indent=2) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
