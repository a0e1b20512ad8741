"""Print the README's table of supported families."""

from lightning_npu_tp.models.families.registry import readme_table

print(readme_table())
