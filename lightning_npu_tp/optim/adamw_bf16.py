"""AdamW for weights that live in bfloat16, without what a plain AdamW loses of them.

A bfloat16 number has eight bits: an update below 1/256 of a weight is rounded away, and at the rates of fine-tuning
most are. Here the sixteen bits that a weight lost are kept beside it (split_float.py), so that both together are the
float32 master of mixed precision, in two bytes a parameter instead of four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.adamw import adamw
from typing_extensions import override

from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.optim.noise import Place, key_of, noise, place_of
from lightning_npu_tp.optim.split_float import join, round_stochastically, split

Moments = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Piece:
    """Elements `start` to `stop` of a parameter's flattened local part; the tensors are views of [stop - start]."""

    number: int
    place: Place
    start: int
    stop: int
    weight: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor
    remainder: Tensor | None
    step: Tensor


class AdamWBF16(AdamW):
    """torch's AdamW over bfloat16 parameters and their exact float32 masters; of other dtypes it is torch's AdamW.

    With moments="float32" weight and remainder are, bit for bit, what torch.optim.AdamW makes of float32 parameters
    whose forward reads them rounded to bfloat16. Takes DTensors of any layout and plain tensors, in one group too.

    A parameter's state, in its own shape and placement: `step`; `exp_avg` and `exp_avg_sq` in the dtype of `moments`;
    `remainder`, int16. The sign of `exp_avg_sq`, which nothing else needs, says of a master that it lies exactly half
    way above its weight. `masters()` gives the float32 values.

    moments:     dtype of the two moments; bfloat16 is rounded stochastically, alike in every layout, since a nearest
                 rounding would forget what is below 1/256 of a moment.
    bucket_mib:  at most so much memory for what one part of the update needs, float32 copies above all; a bucket takes
                 many small parameters or a piece of a large one.
    seed:        of the stochastic rounding.
    foreach, fused: which of torch's implementations computes, as for torch.optim.AdamW; the strategy chooses where both
                 are None.

    Raises ConfigError for moments of another name, float16 parameters, and AdamW's amsgrad, capturable, differentiable.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        moments: Moments = "float32",
        bucket_mib: float = 64,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        options = {"amsgrad": amsgrad, "capturable": capturable, "differentiable": differentiable}
        if any(options.values()):
            asked = next(name for name, value in options.items() if value)
            raise ConfigError(f"AdamWBF16 has no {asked}=True. Leave it out, or use torch.optim.AdamW in 32-true.")
        if moments not in _DTYPES:
            raise ConfigError(f"AdamWBF16: moments={moments!r} is not one of {list(_DTYPES)}. Take one of these.")
        if bucket_mib <= 0:
            raise ConfigError(f"AdamWBF16: bucket_mib={bucket_mib} is not above 0. Set it to some MiB, such as 64.")
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach, fused=fused)
        self._moments = moments
        self._complete_groups()
        # Whole vectors of the processor: torch's fused kernel rounds otherwise in what is left over at a tensor's end.
        self._bucket_elements = max(1, int(bucket_mib * 2**20) // _TEMPORARY_BYTES // _ALIGNED) * _ALIGNED
        self._seed = seed

    def _complete_groups(self) -> None:
        # With the other settings, so that groups of the user's can differ and a checkpoint has them.
        for group in self.param_groups:
            group.setdefault("moments", self._moments)

    @property
    def state_bytes(self) -> int:
        """Bytes of state for each element of a bfloat16 parameter: two moments and the remainder."""
        return 2 * max(_DTYPES[group["moments"]].itemsize for group in self.param_groups) + 2

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if any(parameter.dtype == torch.float16 for parameter in self.param_groups[-1]["params"]):
            raise ConfigError(
                "AdamWBF16 keeps the lost bits of bfloat16 weights, and there are float16 ones. Set trainer.precision "
                "to bf16-true, or use torch.optim.AdamW."
            )

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbers, scratch = count(), dict[torch.device, _Scratch]()
        for group in self.param_groups:
            waiting: dict[torch.device, list[_Piece]] = {}
            for parameter in group["params"]:
                number = next(numbers)
                if parameter.grad is None:
                    continue
                for piece in self._pieces(parameter, group, number):
                    device = piece.weight.device
                    bucket = waiting.setdefault(device, [])
                    if sum(other.weight.numel() for other in bucket) + piece.weight.numel() > self._bucket_elements:
                        self._update(bucket, group, scratch)
                        bucket.clear()
                    bucket.append(piece)
            for bucket in waiting.values():
                self._update(bucket, group, scratch)
        return loss

    def masters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with its float32 value, one after the other; a DTensor's is one of the same placements."""
        for group in self.param_groups:
            for parameter in group["params"]:
                yield parameter, master_of(parameter, self.state.get(parameter, {}))

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            is_split = parameter.dtype == torch.bfloat16
            dtype = _DTYPES[group["moments"]] if is_split else parameter.dtype
            where = local_part(parameter).device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
            if is_split:
                state["remainder"] = torch.zeros_like(parameter, dtype=torch.int16)
        return state

    def _pieces(self, parameter: Tensor, group: dict[str, Any], number: int) -> Iterator[_Piece]:
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise ConfigError("AdamWBF16 takes dense gradients. Set sparse=False on the embedding.")
        state = self._state_of(parameter, group)
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor):
            grad = grad.redistribute(placements=parameter.placements)
        tensors = [parameter, grad, state["exp_avg"], state["exp_avg_sq"]]
        if "remainder" in state:
            tensors.append(state["remainder"])
        weight, grad, *states = map(local_part, tensors)
        # In the order of memory, so that weights and states are views: what is written to a copy would be lost.
        strides = weight.stride()
        order = sorted(range(weight.dim()), key=lambda dim: (-strides[dim], dim))
        place = place_of(parameter, order)
        flat = [tensor.permute(order).view(-1) for tensor in (weight, *states)]
        flat.insert(1, grad.permute(order).reshape(-1))
        total = weight.numel()
        if not total:
            # The rank has nothing of it, and counts its steps as the others do.
            state["step"] += 1
        for start in range(0, total, self._bucket_elements):
            stop = min(start + self._bucket_elements, total)
            weight, grad, first, second, *rest = (tensor[start:stop] for tensor in flat)
            # torch counts up the step that it is given: that of the parameter itself once, with the last piece.
            step = state["step"] if stop == total else state["step"].clone()
            remainder = rest[0] if rest else None
            yield _Piece(number, place, start, stop, weight, grad, first, second, remainder, step)

    def _update(self, bucket: list[_Piece], group: dict[str, Any], scratches: dict[torch.device, _Scratch]) -> None:
        if not bucket:
            return
        device = bucket[0].weight.device
        scratch = scratches.get(device) or scratches.setdefault(device, _Scratch(self._bucket_elements, device))
        scratch.empty()
        weights, grads, firsts, seconds = zip(*map(scratch.widened, bucket), strict=True)
        beta1, beta2 = group["betas"]
        adamw(
            list(weights),
            list(grads),
            list(firsts),
            list(seconds),
            [],
            [piece.step for piece in bucket],
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        for piece, weight, first, second in zip(bucket, weights, firsts, seconds, strict=True):
            if piece.remainder is None:
                continue
            if piece.second.dtype == torch.bfloat16:
                key = key_of(self._seed, piece.number)
                noises = noise(piece.place, piece.start, piece.stop, key, piece.step, weight.device)
                round_stochastically(first, noises[0], piece.first)
                round_stochastically(second, noises[1], piece.second)
            split(weight, piece.weight, piece.remainder, piece.second, scratch.spare(weight.numel()))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class gave, in the dtypes that it has; what torch's Adam and AdamW gave too.

        torch's would give every state the dtype of its parameter, and with it round the moments and the remainder.
        """
        kept = {key: dict(value) for key, value in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in kept.get(number, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[parameter][name] = deepcopy(value.to(local_part(parameter).device))
        self._complete_groups()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "exp_avg" in state and parameter.dtype == torch.bfloat16 and "remainder" not in state:
                    # Of another AdamW: these weights are all that is known of their masters.
                    state["remainder"] = torch.zeros_like(parameter, dtype=torch.int16)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = state[name].to(_DTYPES[group["moments"]])


# float32 copies of weight, gradient and two moments, torch's square root, and integers that are thrown away.
_TEMPORARY_BYTES = 6 * 4
_ALIGNED = 256


class _Scratch:
    """float32 memory for one bucket, filled anew for each: what is allocated anew costs as much as the update."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self._free = torch.empty(4 * elements, dtype=torch.float32, device=device)
        self._spare = torch.empty(elements, dtype=torch.int32, device=device)
        self._used = 0

    def empty(self) -> None:
        self._used = 0

    def spare(self, elements: int) -> Tensor:
        return self._spare[:elements]

    def widened(self, piece: _Piece) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, gradient and moments as torch's AdamW takes them; what is as wide in memory is the same memory."""
        if piece.remainder is None:
            return piece.weight, piece.grad, piece.first, piece.second
        weight, spare = self._take(piece.weight.numel()), self.spare(piece.weight.numel())
        join(piece.weight, piece.remainder, piece.second, weight, spare)
        return weight, self._wide(piece.grad), self._wide(piece.first), self._wide(piece.second)

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float32 else self._take(tensor.numel()).copy_(tensor)

    def _take(self, elements: int) -> Tensor:
        self._used += elements
        return self._free[self._used - elements : self._used]


def local_part(tensor: Tensor) -> Tensor:
    """The rank's part of a DTensor; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def master_of(parameter: Tensor, state: dict[str, Any]) -> Tensor:
    """The float32 value of a parameter with this state of AdamWBF16; without a remainder, its own in float32."""
    if "remainder" not in state:
        return parameter.detach().float()
    parts = (local_part(tensor) for tensor in (parameter.detach(), state["remainder"], state["exp_avg_sq"]))
    weight, remainder, second = parts
    local = torch.empty_like(weight, dtype=torch.float32)
    join(weight, remainder, second.clone(), local, torch.empty_like(weight, dtype=torch.int32))
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
