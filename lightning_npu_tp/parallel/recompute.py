"""Activation recompute: a layer keeps its input only, and runs again in the backward pass.

`checkpointed` runs one decoder layer so that the second run is the first one over: it gets the same forward pass,
hence the same slices and masks, and what the layer has remembered there (the router's choice, the numbers of rows to
exchange) is taken from the first run and not computed again. A near-tie in the router thus cannot be
decided the other way, nothing is read on the host twice, and nothing is counted twice.

Built on torch's non-reentrant checkpoint, which keeps the first run's graph: losses that a layer made on
the side keep their gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.parallel.forward_pass import ForwardPass, Memory, handed
from lightning_npu_tp.parallel.tensor_region import Region

Recompute = Literal["none", "moe", "block"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "moe", "block")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def checkpointed(region: Region, keep_random_state: bool, layer: partial[Any], *args: Any) -> Any:
    """Run `layer(*args)` and keep no activations; it runs again when the backward pass needs them.

    region:            of the model; a layer that is called by itself gets a pass of its own over it.
    keep_random_state: for layers with dropout; costs a read of the device's generator.
    layer:             forward of a decoder layer with its keyword arguments, as transformers hands it over; `step`
                       among them is the ForwardPass, which each run gets with the layer's memory in it.
    """
    settings = dict(layer.keywords)
    step = settings.pop("step", None) or ForwardPass(region)
    memory = Memory()
    # The graph keeps this function, and the pass knows losses that hold the graph: nobody would ever free that circle.
    # So the first run takes the pass along, and those after it get a copy without losses.
    first, again = [step.with_memory(memory)], step.without_results(memory)
    forward = partial(layer.func, *layer.args, **settings)
    # Bound to the layer, or a function of the class, which transformers 5.23 hands over with the layer.
    module = getattr(layer.func, "__self__", None) or layer.args[0]
    del layer, step

    def run(*args: Any) -> Any:
        memory.begin_run()
        return forward(*args, **handed(first.pop() if first else again, module))

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=keep_random_state)


def has_dropout(model: nn.Module, config: object) -> bool:
    """Whether any dropout of a transformers config, or of a layer in the model, is above zero."""
    layers = (module.p for module in model.modules() if isinstance(module, _DROPOUTS))
    settings = (value for name, value in vars(config).items() if "dropout" in name)
    return any(isinstance(value, float) and value > 0 for value in (*layers, *settings))


def recompute_layers(model: Any, region: Region, config: object, *, switch_on: bool) -> None:
    """Let the decoder layers of a transformers model for which its own switch is on run `checkpointed` in training.

    switch_on: turn it on for every layer first; else it is as the user left it.
    That leaves FSDP's hooks outside. Raises ConfigError for a model without the switch.
    """
    run = partial(checkpointed, region, has_dropout(model, config))
    switched = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    for module in switched:
        module.gradient_checkpointing = switch_on or module.gradient_checkpointing
        module._gradient_checkpointing_func = run
    if switch_on and not switched:
        raise ConfigError(
            f"recompute=block needs layers that transformers can checkpoint, and {type(model).__name__} has none. "
            f"Set strategy.recompute=none."
        )
