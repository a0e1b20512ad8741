"""All that knows a model: families, layers, the mixture block, and how its weights are named in files.

The names below are what a `ModelFamily` of your own is made of: rules for its plan, and sharded modules to swap in;
`supported()` lists the built-in families. examples/own_model.py shows one.
"""

from typing import TYPE_CHECKING

from lightning_npu_tp.devices.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_npu_tp.models.families.family import BuildContext, ModelFamily
    from lightning_npu_tp.models.families.registry import supported
    from lightning_npu_tp.models.file_names import KeyTable
    from lightning_npu_tp.models.layers.gqa import GroupedQueryAttention
    from lightning_npu_tp.models.layers.linear import RMSNorm, ShardedLinear, ShardedMLP
    from lightning_npu_tp.models.layers.mla import MLAttention
    from lightning_npu_tp.models.layers.rotary import RotaryTables
    from lightning_npu_tp.models.layers.sharded_causal_lm import ShardedCausalLM, ShardedDecoder, ShardedDecoderLayer
    from lightning_npu_tp.models.layers.vocab import VocabEmbedding, VocabHead
    from lightning_npu_tp.models.moe.block import MoEBlock
    from lightning_npu_tp.parallel.forward_pass import ForwardPass
    from lightning_npu_tp.parallel.plan import Columns, Experts, Plan, Replicated, Rows, Rule, Vocab

__all__ = [
    "BuildContext",
    "Columns",
    "Experts",
    "ForwardPass",
    "GroupedQueryAttention",
    "KeyTable",
    "MLAttention",
    "MoEBlock",
    "ModelFamily",
    "Plan",
    "RMSNorm",
    "Replicated",
    "RotaryTables",
    "Rows",
    "Rule",
    "ShardedCausalLM",
    "ShardedDecoder",
    "ShardedDecoderLayer",
    "ShardedLinear",
    "ShardedMLP",
    "Vocab",
    "VocabEmbedding",
    "VocabHead",
    "supported",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "models.families.family": "BuildContext ModelFamily",
        "models.families.registry": "supported",
        "models.file_names": "KeyTable",
        "models.layers.sharded_causal_lm": "ShardedCausalLM ShardedDecoder ShardedDecoderLayer",
        "models.layers.gqa": "GroupedQueryAttention",
        "models.layers.linear": "RMSNorm ShardedLinear ShardedMLP",
        "models.layers.mla": "MLAttention",
        "models.layers.rotary": "RotaryTables",
        "models.layers.vocab": "VocabEmbedding VocabHead",
        "models.moe.block": "MoEBlock",
        "parallel.forward_pass": "ForwardPass",
        "parallel.plan": "Columns Experts Plan Replicated Rows Rule Vocab",
    },
)
