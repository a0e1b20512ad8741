"""A region that leaves out the collectives of one sharding rule, to see that the proof catches it.

Conversion is given it in the place of `Region`. Which module is running it knows from hooks on all modules, and whose
parameters that module's collectives serve from the table here, so layers carry nothing for it. Shapes stay as they
are, only the sum over the ranks is missing: what a rank computes is then right for its own part and wrong as a
whole. Only what a `Region` communicates can be left out; all-to-all exchanges and the data ranks' reductions are not
the region's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from typing_extensions import override

from lightning_npu_tp.convert.convert import conversion_of
from lightning_npu_tp.parallel.collectives import group_size
from lightning_npu_tp.parallel.layout import Groups
from lightning_npu_tp.parallel.plan import Rule
from lightning_npu_tp.parallel.sequence import join_slices, own_slice, slice_sequence
from lightning_npu_tp.parallel.tensor_region import Region, local

# Class of the module that runs -> its collective -> what in it has the parameters that the collective serves ("": the
# module itself). A number is that of the tensors which enter together, where a module has several of one kind.
_SERVED: dict[str, dict[str | tuple[str, int], tuple[str, ...]]] = {
    "VocabEmbedding": {"leave": ("",)},
    "VocabHead": {"enter": ("",)},
    "ShardedCausalLM": {"enter": ("lm_head",)},
    "ShardedMLP": {"enter": ("gate_proj", "up_proj"), "leave": ("down_proj",)},
    "AllHeadsNorm": {"total_inside": ("",)},
    "GroupedQueryAttention": {"enter": ("q_proj", "k_proj", "v_proj"), "leave": ("o_proj",)},
    "MLAttention": {
        "enter": ("q_proj", "q_a_proj"),
        ("share", 1): ("q_a_proj", "q_a_layernorm", "q_b_proj"),
        ("share", 2): ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"),
        "leave": ("o_proj",),
    },
    "MoEBlock": {
        # Tokens and routing weights; where every rank sends its own slice, tokens for the shared experts only.
        ("enter", 2): ("gate", "experts", "shared_experts"),
        ("leave", 2): ("experts", "shared_experts.down_proj"),
        ("enter", 1): ("shared_experts",),
        ("leave", 1): ("shared_experts.down_proj",),
    },
}


class _Watch:
    """Which module is running, and which parameters are broken; one for a region and all that are made of it."""

    def __init__(self, region: Region, pattern: str) -> None:
        self.region, self.pattern = region, pattern
        self.num_left_out = 0
        # (module, name of the parameter in it) -> the rule, for parameters that the pattern matches.
        self.broken: dict[tuple[nn.Module, str], Rule] = {}
        self._running: list[nn.Module] = []
        self._num_entered: dict[nn.Module, int] = {}
        self._hooks = [
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, module: nn.Module, _: Any) -> None:
        if not self._running and not self.broken and getattr(module, "region", None) is self.region:
            report = conversion_of(module)
            assert report is not None, f"{type(module).__name__} was called before the model that it belongs to"
            for name, rule in report.rules.items():
                if fnmatchcase(name, self.pattern):
                    owner, _, leaf = name.rpartition(".")
                    self.broken[module.get_submodule(owner), leaf] = rule
        self._running.append(module)

    def _end(self, module: nn.Module, *_: Any) -> None:
        while self._running and self._running.pop() is not module:
            # A module that an exception ended.
            pass

    def close(self) -> None:
        """Remove the hooks on all modules."""
        for hook in self._hooks:
            hook.remove()

    def leaves_out(self, collective: str, number: int, serves: Callable[[Rule, str, bool], bool]) -> bool:
        """Whether a collective of the running module, over so many tensors, serves a broken parameter."""
        module = self._running[-1]
        if collective == "enter":
            self._num_entered[module] = number
        elif collective == "leave":
            number = self._num_entered.get(module, number)
        table = next((_SERVED[base.__name__] for base in type(module).__mro__ if base.__name__ in _SERVED), {})
        paths = table.get(collective, table.get((collective, number), ()))
        owners = [owner for owner in (_part(module, path) for path in paths) if owner is not None]
        return any(serves(self.broken[key], key[1], is_own) for key, is_own in self._parameters_of(owners))

    def _parameters_of(self, owners: Iterable[nn.Module]) -> list[tuple[tuple[nn.Module, str], bool]]:
        """Broken parameters of these modules, and whether they are a module's own or lie deeper in it."""
        return [
            (key, key[0] is owner)
            for owner in owners
            for key in self.broken
            if any(key[0] is module for module in owner.modules())
        ]


def _part(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path of attributes, None where there is none."""
    found: nn.Module | None = module
    for name in filter(None, path.split(".")):
        found = getattr(found, name, None)
    return found


class BrokenRegion(Region):
    """A region without the collectives that serve the parameters of one rule.

    pattern: of the plan, such as "*.self_attn.o_proj.weight".

    It learns the parameters' names from the first module that is called with it, which is the model. To be closed.
    """

    def __init__(self, groups: Groups, *, sequence_parallel: bool = False, pattern: str) -> None:
        super().__init__(groups, sequence_parallel=sequence_parallel)
        self._watch = _Watch(self, pattern)

    @property
    def num_left_out(self) -> int:
        """Collectives left out so far; still 0 after a forward means that the rule needs none here."""
        return self._watch.num_left_out

    def close(self) -> None:
        """Remove the hooks that all modules have for it."""
        self._watch.close()

    @override
    def enter(self, *tensors: Tensor) -> Any:
        """The activations, entered as `Region.enter` does; their gradients stay this rank's part."""
        if not self._leaves_out("enter", len(tensors), _is_entered):
            return super().enter(*tensors)
        group = self.groups.tensor()
        if self.length is not None:
            tensors = tuple(_GatherWithoutSum.apply(tensor, self.length, group) for tensor in tensors)
        return tensors if len(tensors) > 1 else tensors[0]

    @override
    def leave(self, partial: Tensor) -> Tensor:
        """This rank's part, or its slice of that, instead of the sum."""
        if not self._leaves_out("leave", 1, _is_left):
            return super().leave(partial)
        return partial if self.length is None else slice_sequence(partial, self.groups.tensor())

    @override
    def share(self, *tensors: Tensor) -> Any:
        """The tensors as they are; their gradients stay this rank's part. With slices there is nothing to leave out."""
        if self.length is not None or not self._leaves_out("share", len(tensors), _is_shared):
            return super().share(*tensors)
        return tensors if len(tensors) > 1 else tensors[0]

    @override
    def weight_inside(self, owner: nn.Module, name: str = "weight") -> Tensor:
        """The parameter; its gradient stays this rank's part. `weight` ends here where it communicates."""
        if (owner, name) in self._watch.broken and self._communicates():
            return local(getattr(owner, name))
        return super().weight_inside(owner, name)

    @override
    def total_inside(self, partial: Tensor) -> Tensor:
        """This rank's partial numbers instead of their sum over the ranks."""
        return partial if self._leaves_out("total_inside", 1, _is_shared) else super().total_inside(partial)

    def _leaves_out(self, collective: str, number: int, serves: Callable[[Rule, str, bool], bool]) -> bool:
        return self._watch.leaves_out(collective, number, serves) and self._communicates()

    def _communicates(self) -> bool:
        ranks = group_size(self.groups.tensor())
        self._watch.num_left_out += ranks > 1
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
