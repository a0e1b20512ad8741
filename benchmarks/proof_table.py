"""Every family in every kind of layout, proven against transformers in one process: the worst difference of any number.

    python benchmarks/proof_table.py
    python -m ascend_sim run -n 4 --float64 -- benchmarks/proof_table.py --device npu --json FILE.json

What `lightning-npu-tp prove` does, on four ranks that are kept: a batch of each kind, loss, logits, gradients, clip
norm, expert counts, three steps of AdamW, and a checkpoint loaded into another layout. Exit code 1 where one does not
hold.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.models.families.registry import FAMILIES
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.tools.check_folder import device_type
from lightning_npu_tp.tools.proof_batches import KINDS
from lightning_npu_tp.tools.prove import prove, widest
from lightning_npu_tp.tools.testing.models import tiny_config
from lightning_npu_tp.tools.testing.ranks import RankPool

RANKS = 4
LAYOUTS = {
    "tensor 4": (Layout(1, 4, 4), Options()),
    "tensor 4, slices": (Layout(1, 4, 4), Options(sequence_parallel=True)),
    "data 2, tensor 2, slices, blocks": (Layout(2, 2, 4), Options(sequence_parallel=True, recompute="block")),
    "data 2, tensor 2, replicas, all to all": (
        Layout(2, 2, 2),
        Options(data_parallel="replicate", dispatch="all_to_all"),
    ),
    "data 4, experts 1": (Layout(4, 1, 1), Options(recompute="moe")),
    "data 4, experts 4": (Layout(4, 1, 4), Options()),
}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [family.name for family in FAMILIES]
    parser.add_argument("--device", default="cpu", help="cpu, cuda, npu or auto")
    parser.add_argument("--family", action="append", choices=names, help="repeat it; all by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    on = device_type(arguments.device, RANKS)
    rows: list[dict[str, Any]] = []
    with RankPool(RANKS) as pool:
        for family in arguments.family or names:
            # Four heads, so that each of four tensor ranks has one.
            config = tiny_config(family, num_attention_heads=4, num_key_value_heads=4)
            for name, (layout, options) in LAYOUTS.items():
                proof = prove(
                    config,
                    layout,
                    options,
                    dtype=widest(on),
                    device=on,
                    run=lambda fn, world_size, *args, **how: pool.run(fn, *args, **how),
                )
                row = {"family": family, "layout": name, "worst": proof.worst.difference, "where": proof.worst.where}
                kinds = {check.name: check.worst.difference for check in proof.checks if check.name in KINDS}
                rows.append({**row, "kinds": kinds, "failed": [check.name for check in proof.failed]})
                print(f"{family}, {name}: {proof.headline()}", flush=True)
    Console(width=160).print(table(rows, f"worst relative difference, {RANKS} ranks on {on}, {widest(on)}"))
    if arguments.json:
        head = {"date": date.today().isoformat(), "command": " ".join(["python", *sys.argv])}
        result = {**head, "machine": f"{platform.machine()}, {on}", "dtype": widest(on), "proofs": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row["failed"] for row in rows))


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """Families down, layouts across."""
    found = Table("family", *LAYOUTS, title=title)
    for family in dict.fromkeys(row["family"] for row in rows):
        found.add_row(family, *(f"{row['worst']:.1e}" for row in rows if row["family"] == family))
    return found


if __name__ == "__main__":
    sys.exit(main())
