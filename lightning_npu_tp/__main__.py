"""`python -m lightning_npu_tp`: the command line where its script is not on the path."""

from lightning_npu_tp.tools.cli import app

app(prog_name="lightning-npu-tp")
