"""What conversion needs to know about one model family: a frozen record, no behaviour of its own.

A family names the transformers class it converts, the plan that says how each parameter is split,
the modules to swap and the sizes that a layout must divide. Users pass their own record for their
own model: `NPUTensorParallelStrategy(families=[MY_FAMILY])`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_npu_tp.kernels import Kernels
from lightning_npu_tp.models.file_names import KeyTable
from lightning_npu_tp.models.moe.dispatch import AllToAll, Replicated
from lightning_npu_tp.parallel.plan import Plan
from lightning_npu_tp.parallel.tensor_region import Region


@dataclass(frozen=True)
class BuildContext:
    """What a constructor of a swapped module may use.

    region:    frames the work on split parameters; all modules of the model share it.
    kernels:   the kernels chosen for the device and by the user.
    config:    the model's own (copied) config.
    dispatch:  "replicated" or "all_to_all".
    recompute: "none", "moe" or "block"; the blocks heed "moe".
    """

    region: Region
    kernels: Kernels
    config: Any
    dispatch: str = "replicated"
    recompute: str = "none"

    def dispatcher(self) -> Replicated | AllToAll:
        """How tokens reach the experts, for a mixture-of-experts block."""
        if self.dispatch == "all_to_all":
            return AllToAll(self.region.groups.expert, self.kernels.permute)
        return Replicated(self.region.groups.expert)


# Any: which transformers module comes in, each constructor knows.
Constructor = Callable[[Any, BuildContext], nn.Module]


@dataclass(frozen=True)
class ModelFamily:
    """One supported model family.

    name:        how users and messages call it; transformers' model_type where there is one.
    model_class: name of the class to convert, e.g. "DeepseekV2ForCausalLM"; subclasses count.
    plan:        config -> sharding plan; patterns match parameter names below that class.
    swaps:       class name -> constructor of its replacement; takes the module and the context, and
                 reuses its parameters under the same names.
    units:       config -> {unit: number} that a split must not cut, e.g. {"head": 16, "expert": 64}.
    mixins:      path of a submodule ("" for the model itself) -> class mixed into it, whose
                 forward then replaces its own.
    expected:    config -> {class name: how many are swapped}; None asks for at least one of each.
    check:       config -> None; raises ConversionError for a variant that is not supported.
    keys:        config -> names of the parameters in the files that are published of it, where they differ.
    layers:      path of the list of decoder layers; data parallelism gathers one at a time.
    experts:     name of the config's setting for the number of routed experts; "" where a layer has none.
    sparse_layers: config -> number of layers with routed experts, where there are any.
    dense_first: number -> settings by which that many layers, the first ones, have no routed experts.
    head_norms:  whether queries and keys are normalised before they are rotated.
    small:       settings of the small model that a proof compares with transformers' own.
    models:      what is published of it, for the table in docs/own-models.md.
    refused:     what `check` and the sizes refuse, for that table.
    """

    name: str
    model_class: str
    plan: Callable[[Any], Plan]
    swaps: Mapping[str, Constructor]
    units: Callable[[Any], Mapping[str, int]]
    mixins: Mapping[str, type] = field(default_factory=dict)
    expected: Callable[[Any], Mapping[str, int]] | None = None
    check: Callable[[Any], None] = lambda config: None
    keys: Callable[[Any], KeyTable] = lambda config: KeyTable()
    layers: str = "model.layers"
    experts: str = ""
    sparse_layers: Callable[[Any], int] = lambda config: config.num_hidden_layers
    dense_first: Callable[[int], Mapping[str, Any]] = lambda number: {}
    head_norms: bool = False
    small: Mapping[str, Any] = field(default_factory=dict)
    models: str = ""
    refused: str = ""

    def matches(self, module: nn.Module) -> bool:
        """Whether this family converts `module`; compares names, so that nothing is imported."""
        return any(base.__name__ == self.model_class for base in type(module).__mro__)

    def num_experts(self, config: Any) -> int:
        """Routed experts of a layer that has them; 0 where no layer has."""
        return (getattr(config, self.experts, None) or 0) if self.experts else 0

    def num_sparse_layers(self, config: Any) -> int:
        """Layers with routed experts."""
        return self.sparse_layers(config) if self.num_experts(config) else 0
