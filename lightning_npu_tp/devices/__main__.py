"""Print docs/troubleshooting.md, generated from the table of faults."""

from lightning_npu_tp.devices.fault_text import troubleshooting

print(troubleshooting(), end="")
