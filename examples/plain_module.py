"""A LightningModule that knows nothing of this package, trained over two ranks with one more argument.

    python examples/plain_module.py                # model on the meta device, filled from the seed
    python examples/plain_module.py random         # built with random weights: they are kept
    python examples/plain_module.py PATH           # from_pretrained(PATH): its weights are kept

On Ascend replace accelerator="cpu" by "npu".
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DeepseekV2Config

from lightning_npu_tp import NPUTensorParallelStrategy

CONFIG = DeepseekV2Config(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
)


class LanguageModel(LightningModule):
    """What anybody would write around a transformers model."""

    def __init__(self, source: str = "meta") -> None:
        super().__init__()
        if source == "meta":
            with torch.device("meta"):
                self.network = AutoModelForCausalLM.from_config(CONFIG)
        elif source == "random":
            self.network = AutoModelForCausalLM.from_config(CONFIG)
        else:
            self.network = AutoModelForCausalLM.from_pretrained(source)

    def training_step(self, batch, batch_idx):
        """One step of next-token prediction."""
        loss = self.network(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        """Any optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(source: str = "meta", devices: int = 2, **trainer_arguments) -> Trainer:
    """Fit on a few random sentences; returns the trainer."""
    torch.manual_seed(0)
    data = DataLoader(torch.randint(0, 256, (16, 32)), batch_size=4)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=NPUTensorParallelStrategy(tensor_parallel_size=devices, init_seed=0),
        max_epochs=8,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        logger=False,
        **trainer_arguments,
    )
    trainer.fit(LanguageModel(source), data)
    return trainer


if __name__ == "__main__":
    final = train(*sys.argv[1:2]).callback_metrics["loss"]
    print(f"final loss {final:.3f}")
