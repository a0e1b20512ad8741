"""Print the README's table of supported families."""

from lightning_npu_tp.families.registry import readme_table

print(readme_table())
