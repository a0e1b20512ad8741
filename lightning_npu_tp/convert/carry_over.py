"""What a user has put on a parameter, hooks and attributes, goes over to the parameter that takes its place.

A plain tensor cannot become a DTensor and stay the object it is: torch.utils.swap_tensors refuses two types of
different slots. So the parameter is another object after conversion; who holds the old one is found by
trainer/early_references.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_npu_tp.errors import ConversionError


@dataclass(frozen=True)
class OnParameter:
    """What a user has put on one parameter.

    attributes: by name. hooks: those of register_hook. after_hooks: those of register_post_accumulate_grad_hook. Both
    as the tables themselves, so that the handles that a user has still remove from them.
    """

    attributes: dict[str, Any]
    hooks: Any
    after_hooks: Any

    @classmethod
    def of(cls, parameter: Tensor) -> OnParameter:
        """What is on `parameter` now."""
        return cls(dict(vars(parameter)), parameter._backward_hooks, parameter._post_accumulate_grad_hooks)

    def put_on(self, parameter: Tensor) -> None:
        """Put it on the parameter that took the place of that one."""
        for name, value in self.attributes.items():
            if name not in vars(parameter):
                setattr(parameter, name, value)
        if self.hooks:
            parameter._backward_hooks = self.hooks
        if self.after_hooks:
            parameter._post_accumulate_grad_hooks = self.after_hooks


@contextmanager
def kept_on_parameters(module: nn.Module) -> Iterator[None]:
    """Let what is on the parameters stay there while `module.to` and the like run inside.

    torch moves a DTensor by swapping it with another one, whose attributes and hooks, none, it then has.
    """
    before = [(parameter, OnParameter.of(parameter)) for parameter in module.parameters()]
    yield
    for parameter, on_parameter in before:
        on_parameter.put_on(parameter)


def refuse_hooks_over_data(model: nn.Module) -> None:
    """Raise ConversionError for a hook of a gradient that would never run: FSDP's shards are in no graph."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            raise ConversionError(
                f"{name} has a hook of register_hook, which would never run: with data_parallel_size above 1 the "
                f"gradient of a parameter is made by FSDP and not by autograd. Use register_post_accumulate_grad_hook, "
                f"the module's on_before_optimizer_step, or strategy.data_parallel_size=1."
            )
