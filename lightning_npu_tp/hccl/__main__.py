"""Print docs/troubleshooting.md, generated from the table of faults."""

from lightning_npu_tp.hccl.faults import troubleshooting

print(troubleshooting(), end="")
