"""Any module of a model that is shared over data ranks gathers its parameters by itself, however it is called.

FSDP gathers where the modules that were given to it are called: the model, its decoder, its layers, its experts. What a
user calls besides (an embedding, the head, an attention, `forward` instead of the module) would compute with one data
rank's slice as if it were the whole, or with whole parameters whose gradients nobody averages. Here each module's
`forward` first enters the FSDP module that holds its parameters, unless that is running already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from lightning_npu_tp.parallel.layout import Groups

_ENTER = "call_gathered"


def gather_on_call(model: Any, groups: Groups) -> None:
    """Let every module of `model` that has parameters be called by itself, in any order; `model` is an FSDP module.

    groups: of the model. Calls after these were closed raise ConfigError.
    """
    installed: set[nn.Module] = set()

    def begin() -> None:
        groups.require_open()
        # Whichever module ran first would be FSDP's root for good, and refuse to be part of the model's forward.
        model._get_fsdp_state()._lazy_init()

    def visit(module: nn.Module, owner: Any) -> None:
        if isinstance(module, FSDPModule):
            owner = module
            setattr(owner, _ENTER, _call)
            register_fsdp_forward_method(owner, _ENTER)
            owner.register_forward_pre_hook(lambda *_: begin(), prepend=True)
        if module in installed:
            return
        installed.add(module)
        has_forward = type(module).forward is not nn.Module.forward
        if has_forward and any(True for _ in module.parameters()):
            _enter_first(module, owner, begin)
        for child in module.children():
            visit(child, owner)

    visit(model, model)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _enter_first(module: nn.Module, owner: Any, begin: Callable[[], None]) -> None:
    """Let `module.forward` enter the forward of `owner`, which holds its parameters, unless it is called from there."""
    replaced = module.__dict__.get("forward")
    own = type(module).forward if replaced is None else _call_replaced(replaced)

    @wraps(own if replaced is None else replaced)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A copy has parameters of its own, which FSDP does not gather.
        if self is not module or owner._get_fsdp_state()._training_state.name == "FORWARD":
            return own(self, *args, **kwargs)
        begin()
        return getattr(owner, _ENTER)(partial(own, self), *args, **kwargs)

    # A method, so that a copy of the module is called with itself.
    module.forward = MethodType(forward, module)


def _call_replaced(replaced: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *args, **kwargs: replaced(*args, **kwargs)
