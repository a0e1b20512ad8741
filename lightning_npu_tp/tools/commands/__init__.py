"""Commands of lightning-npu-tp, one module each; cli.py registers them."""
