"""`lightning-npu-tp show-data`: runs show_data.py of the project in the working folder.

Data modules belong to the project and not to this package, which knows neither them nor their configs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

SCRIPT = Path("show_data.py")


def show_data(context: typer.Context) -> None:
    """Print a batch of data as the model gets it, with what is learnt marked; takes the settings of train.py.

    lightning-npu-tp show-data data=chat data.paths=chats.jsonl data.tokenizer=FOLDER; also --batch N, --tokens N and
    --validation
    """
    if not SCRIPT.is_file():
        typer.echo(
            f"error: {SCRIPT} is not in {Path.cwd()}. Run the command in the project's folder, beside train.py.",
            err=True,
        )
        raise typer.Exit(2)
    raise typer.Exit(subprocess.run([sys.executable, str(SCRIPT), *context.args], check=False).returncode)
