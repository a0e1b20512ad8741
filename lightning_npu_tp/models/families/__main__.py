"""Print the table of supported families for docs/own-models.md."""

from lightning_npu_tp.models.families.registry import families_table

print(families_table())
