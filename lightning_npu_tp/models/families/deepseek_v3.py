"""DeepSeek-V3 and R1: latent attention with a query latent, sigmoid scores, a bias that balances the choice.

The selection bias is the buffer `mlp.gate.e_score_correction_bias`, kept under that name. The layers that
predict further tokens are no part of transformers' model. Balance losses, by `aux_loss_alpha`, are off
unless the config sets them.
Source: arXiv:2412.19437; module and parameter names are transformers'.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_npu_tp.models.families import common
from lightning_npu_tp.models.families.deepseek_v2 import moe_block, plan
from lightning_npu_tp.models.file_names import Ignored, KeyTable


def keys(config: Any) -> KeyTable:
    """As V2's; the layers behind the last one predict further tokens in training and are not part of the model."""
    first, number = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 1
    ignored = [Ignored(f"model.layers.{first + extra}.*", "multi-token prediction") for extra in range(number)]
    return KeyTable(entries=common.expert_keys(), ignored=ignored)


DEEPSEEK_V3 = common.decoder_family(
    "DeepseekV3",
    common.latent_attention,
    heads=common.latent_units,
    moe=partial(moe_block, scoring="sigmoid", topk_method="noaux_tc", normalisation="v3"),
    moe_class="DeepseekV3MoE",
    checks=[common.check_one_key_per_head],
    name="deepseek_v3",
    plan=plan,
    keys=keys,
    experts="n_routed_experts",
    sparse_layers=common.layers_behind_dense,
    dense_first=common.settings_of_dense,
    models="DeepSeek-V3, -R1",
)
