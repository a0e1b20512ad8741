"""What a user copies and edits: LightningModules, optimizers and data modules for `lightning_npu_tp`."""
