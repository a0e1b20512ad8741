"""A region that leaves out the collectives of one sharding rule, to see that the proof catches it.

Conversion is given it in the place of `Region`; its modules say in `of=` and `weight(owner, name)` whose
parameters a collective serves. Shapes stay as they are, only the sum over the ranks is missing: what a
rank computes is then right for its own part and wrong as a whole. Only what a `Region` communicates can be
left out; all-to-all exchanges and the data ranks' reductions are not the region's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from typing_extensions import override

from lightning_npu_tp.convert.convert import conversion_of
from lightning_npu_tp.parallel.collectives import group_size
from lightning_npu_tp.parallel.layout import Groups
from lightning_npu_tp.parallel.plan import Rule
from lightning_npu_tp.parallel.sequence import join_slices, own_slice, slice_sequence
from lightning_npu_tp.parallel.tensor_region import Region, local


class BrokenRegion(Region):
    """A region without the collectives that serve the parameters of one rule.

    pattern: of the plan, such as "*.self_attn.o_proj.weight".
    num_left_out: collectives left out so far; still 0 after a forward means that the rule needs none here.

    It learns the parameters' names from the first module that is called with it, which is the model.
    """

    def __init__(self, groups: Groups, *, sequence_parallel: bool = False, pattern: str) -> None:
        super().__init__(groups, sequence_parallel=sequence_parallel)
        self.pattern = pattern
        self.num_left_out = 0
        # (module, name of the parameter in it) -> the rule, for parameters that the pattern matches.
        self._broken: dict[tuple[nn.Module, str], Rule] = {}
        # A hook for all modules, since conversion has no model to offer when it asks for a region.
        self._hook: Any = register_module_forward_pre_hook(self._learn_names)

    def _learn_names(self, module: nn.Module, _: Any) -> None:
        if getattr(module, "region", None) is not self:
            return
        self._hook.remove()
        report = conversion_of(module)
        assert report is not None, f"{type(module).__name__} was called before the model that it belongs to"
        for name, rule in report.rules.items():
            if fnmatchcase(name, self.pattern):
                owner, _, leaf = name.rpartition(".")
                self._broken[module.get_submodule(owner), leaf] = rule

    @override
    def enter(self, *tensors: Tensor, of: Any = ()) -> Any:
        """The same activations; their gradients stay this rank's part."""
        if not self._leaves_out(of, _is_entered):
            return super().enter(*tensors, of=of)
        group = self.groups.tensor()
        if self._length is not None:
            tensors = tuple(_GatherWithoutSum.apply(tensor, self._length, group) for tensor in tensors)
        return tensors if len(tensors) > 1 else tensors[0]

    @override
    def leave(self, partial: Tensor, *, of: Any = ()) -> Tensor:
        """This rank's part, or its slice of that, instead of the sum."""
        if not self._leaves_out(of, _is_left):
            return super().leave(partial, of=of)
        return partial if self._length is None else slice_sequence(partial, self.groups.tensor())

    @override
    def share(self, *tensors: Tensor, of: Any = ()) -> Any:
        """The same activations; their gradients stay this rank's part. With slices there is nothing to leave out."""
        if self._length is not None or not self._leaves_out(of, _is_shared):
            return super().share(*tensors, of=of)
        return tensors if len(tensors) > 1 else tensors[0]

    @override
    def weight_inside(self, owner: nn.Module, name: str = "weight") -> Tensor:
        """The parameter; its gradient stays this rank's part. `weight` ends here where it communicates."""
        if (owner, name) in self._broken and self._communicates():
            return local(getattr(owner, name))
        return super().weight_inside(owner, name)

    @override
    def total_inside(self, partial: Tensor, *, of: Any = ()) -> Tensor:
        """This rank's part instead of the sum."""
        return partial if self._leaves_out(of, _is_shared) else super().total_inside(partial, of=of)

    def _leaves_out(self, of: Any, serves: Callable[[Rule, str, bool], bool]) -> bool:
        owners = of if isinstance(of, tuple) else (of,)
        found = any(serves(self._broken[key], key[1], is_own) for key, is_own in self._parameters_of(owners))
        return found and self._communicates()

    def _parameters_of(self, owners: Iterable[nn.Module | None]) -> list[tuple[tuple[nn.Module, str], bool]]:
        """Broken parameters of these modules, and whether they are a module's own or lie deeper in it."""
        return [
            (key, key[0] is owner)
            for owner in owners
            if owner is not None
            for key in self._broken
            if any(key[0] is module for module in owner.modules())
        ]

    def _communicates(self) -> bool:
        ranks = group_size(self.groups.tensor())
        self.num_left_out += ranks > 1
        return ranks > 1


def _is_entered(rule: Rule, name: str, is_own: bool) -> bool:
    # A replicated bias is added, it does not meet the input. Of a whole module (the shared experts) only what
    # takes its input counts: the weights that are split by outputs.
    return rule.dim == 0 or (rule.dim is None and is_own and name != "bias")


def _is_left(rule: Rule, name: str, is_own: bool) -> bool:
    # A replicated bias is added after the sum.
    return rule.dim is not None


def _is_shared(rule: Rule, name: str, is_own: bool) -> bool:
    return True


class _GatherWithoutSum(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, own: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return join_slices(own, length, group)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return own_slice(grad, ctx.group).clone(), None, None
