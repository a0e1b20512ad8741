"""The command line, `lightning-npu-tp`: one module of `commands/` for each command, put together here.

Exit code 0: what was asked holds. 1: it does not. 2: a mistake in the arguments, told in one line.
"""

from __future__ import annotations

import typer

from lightning_npu_tp.tools.commands.audit_command import audit
from lightning_npu_tp.tools.commands.check_command import check
from lightning_npu_tp.tools.commands.doctor_command import doctor
from lightning_npu_tp.tools.commands.download_command import download
from lightning_npu_tp.tools.commands.export_command import export
from lightning_npu_tp.tools.commands.inspect_command import inspect
from lightning_npu_tp.tools.commands.prove_command import prove
from lightning_npu_tp.tools.commands.rehearse_command import rehearse
from lightning_npu_tp.tools.commands.show_data_command import show_data

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Tools around sharded training with lightning_npu_tp."""


for command in (prove, audit, check, doctor, download, export, inspect, rehearse):
    app.command()(command)
# What follows are the settings of the project's own script.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(show_data)
