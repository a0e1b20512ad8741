"""The training step that an audit watches: of a model that is named, made small, or of the user's own module.

A named model trains one AdamW step on three micro-batches, since each takes other paths: whole sequences, padded
ones, and packed documents. The user's module trains one step under a Lightning Trainer, optimizer and callbacks
included. Both run in as many gloo processes as the layout has ranks, on CPU tensors and with the reference kernels:
a fused kernel of torch_npu computes what the reference does and has no more to stall at.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from typing_extensions import override

from lightning_npu_tp import kernels
from lightning_npu_tp.convert.convert import Options, convert
from lightning_npu_tp.convert.data_parallel import reduce_gradients
from lightning_npu_tp.errors import ConfigError, ConversionError, LightningNPUTPError
from lightning_npu_tp.parallel.clipping import clip_grad_norm_
from lightning_npu_tp.parallel.layout import Groups, Layout, Meshes, resolve_dispatch
from lightning_npu_tp.tools.audit import Finding, Recorder, merge
from lightning_npu_tp.tools.prove import check_layout, load_families
from lightning_npu_tp.tools.small_model import shrink
from lightning_npu_tp.tools.testing.models import random_batch
from lightning_npu_tp.tools.testing.ranks import run_ranks
from lightning_npu_tp.tools.testing.sharded import own_rows
from lightning_npu_tp.trainer.module_setup import plain_parameters
from lightning_npu_tp.trainer.optimizers import choose_implementations

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PRECISIONS = {"bfloat16": "bf16-true", "float16": "16-true", "float32": "32-true"}
# On CPU tensors a fused kernel would fall to the reference by itself, and say so each time.
# And the CPU's look at ids would be taken for a card's.
_REFERENCE = dict.fromkeys(
    ("grouped_matmul", "permute", "swiglu", "rms_norm", "rotary", "attention", "vocabulary"), "reference"
)
# What transformers' experts can run as: the loop, and what it takes by itself.
_EXPERTS = ("eager", "grouped_mm")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to audit.

    config:      transformers config of the small model; or module: "package.module:function" of the user's own.
    unconverted: as transformers computes it, in one process.
    dtype:       of parameters and arithmetic, a key of DTYPES.
    families:    the user's own, as "package.module:NAME".
    """

    config: Any = None
    module: str = ""
    layout: Layout
    options: Options
    dtype: str = "bfloat16"
    unconverted: bool = False
    families: Sequence[str] = ()
    allow: Sequence[str] = ()


def audit(
    request: Request, *, run: Callable[..., list[Any]] = run_ranks, timeout: float = 600.0
) -> tuple[list[Finding], str]:
    """Findings of all ranks, and what was audited in a few words; config is shrunk here.

    Raises ConfigError and ConversionError for what cannot be audited; RankFailure and RankTimeout from the ranks.
    """
    if request.dtype not in DTYPES:
        raise ConfigError(f"--dtype {request.dtype} does not train on Ascend. Use one of {list(DTYPES)}.")
    if request.unconverted and (request.layout.world > 1 or request.options != Options()):
        raise ConfigError("--unconverted audits the model in one process. Leave the layout and its options out.")
    if not request.module:
        own = load_families(request.families)
        if not request.unconverted:
            resolve_dispatch(request.layout, request.options.dispatch)
            check_layout(request.config, request.layout, own)
        request = Request(**{**vars(request), "config": shrink(request.config, request.layout, own)})
        ranks = run(audit_model, request.layout.world, request, timeout=timeout)
    else:
        load_factory(request.module)
        ranks = run(audit_module, request.layout.world, request, timeout=timeout, backend=None)
    for found in ranks:
        if isinstance(found, LightningNPUTPError):
            raise found
    return merge(ranks), _title(request)


def _title(request: Request) -> str:
    what = request.module or type(request.config).__name__.removesuffix("Config")
    sizes = request.layout
    how = "unconverted" if request.unconverted else f"data {sizes.data} x tensor {sizes.tensor}"
    if not request.unconverted:
        how += f", experts over {sizes.expert}"
        how += ", sequence parallel" if request.options.sequence_parallel else ""
        how += f", recompute {request.options.recompute}" if request.options.recompute != "none" else ""
    return f"{what}: {how}, {request.dtype}"


def batches_of(config: Any, layout: Layout) -> list[dict[str, Tensor]]:
    """Global micro-batches of one step: whole sequences, padded ones, two documents in each."""
    rows = max(2, layout.data)
    length = 16 * (1 + layout.tensor // 8)
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)]).expand(rows, -1)
    return [
        random_batch(config, rows, length, seed=0),
        random_batch(config, rows, length, seed=1, padding=True),
        {**random_batch(config, rows, length, seed=2), "position_ids": positions},
    ]


# --- a model by its config ------------------------------------------------------------------


def audit_model(rank: int, world_size: int, request: Request) -> list[Finding]:
    """One rank's findings for `request.config`."""
    with _only_errors_of("torch.distributed.tensor._redistribute"):
        return _audit_model(rank, request)


def _audit_model(rank: int, request: Request) -> list[Finding]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.config, dtype=DTYPES[request.dtype], experts_implementation=None)
    experts: Sequence[str] = ()
    if request.unconverted:
        experts = [name for name in _EXPERTS if _takes(model, name)]
    else:
        meshes = Meshes.build(request.layout, "cpu")
        convert(
            model,
            meshes=meshes,
            groups=Groups(meshes),
            kernels=kernels.select("npu", _REFERENCE),
            device=torch.device("cpu"),
            families=load_families(request.families),
            dtype=DTYPES[request.dtype],
            seed=0,
            options=request.options,
        )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    as_on_ascend([optimizer], plain_parameters(model))
    mine = [
        own_rows(batch, rank // request.layout.tensor, request.layout.data)[1]
        for batch in batches_of(request.config, request.layout)
    ]
    with Recorder(model) as recorder:
        for implementation in experts or [""]:
            if implementation:
                model.set_experts_implementation(implementation)
            _train(model, mine, optimizer)
    return recorder.findings(request.allow)


def _takes(model: Any, experts: str) -> bool:
    if not hasattr(model, "set_experts_implementation") or not model._can_set_experts_implementation():
        return False
    try:
        model.set_experts_implementation(experts)
    except (ValueError, ImportError):
        return False
    return True


def _train(model: Any, batches: Sequence[Mapping[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    for number, batch in enumerate(batches):
        reduce_gradients(model, number == len(batches) - 1)
        output = model(**batch, num_items_in_batch=batch["labels"].numel())
        loss, balance = output.loss, getattr(output, "aux_loss", None)
        (loss if balance is None else loss + balance).backward()
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    clip = clip_grad_norm_ if sharded else torch.nn.utils.clip_grad_norm_
    clip(list(model.parameters()), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def as_on_ascend(optimizers: Iterable[torch.optim.Optimizer], plain: Sequence[torch.nn.Parameter]) -> None:
    """Choose the updates that a card would: for-each over plain parameters, a loop over sharded ones."""
    optimizers = list(optimizers)
    choose_implementations(optimizers, plain, "npu")
    ids = {id(parameter) for parameter in plain}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        open_choice = group.get("foreach", False) is None and not group.get("fused")
        if open_choice and not group.get("differentiable") and {id(p) in ids for p in group["params"]} == {True}:
            group["foreach"] = True


# --- the user's own module ------------------------------------------------------------------


def load_factory(name: str) -> Callable[[], Any]:
    """The callable behind "package.module:function". Raises ConfigError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--module {name} cannot be imported: {error}. Write it as package.module:factory."
        ) from error
    if not callable(factory):
        raise ConfigError(f"--module {name} is a {type(factory).__name__}. Name a function that makes the module.")
    return factory


def audit_module(rank: int, world_size: int, request: Request) -> list[Finding] | LightningNPUTPError:
    """One rank's findings for `request.module`, or the user's mistake; Lightning makes the process group."""
    try:
        # What the trainer says of devices and tips is no finding.
        with _only_errors_of("lightning.pytorch"):
            return _watch_module(world_size, request)
    except (ConfigError, ConversionError) as error:
        return error


@contextmanager
def _only_errors_of(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _watch_module(world_size: int, request: Request) -> list[Finding]:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from lightning_npu_tp.trainer.strategy import NPUTensorParallelStrategy

    made = load_factory(request.module)()
    module, batch = made if isinstance(made, tuple) else (made, None)
    if not isinstance(module, LightningModule):
        raise ConfigError(
            f"--module {request.module} made a {type(module).__name__}. Return a LightningModule, or one and a batch."
        )
    strategy: Any = "auto"
    if not request.unconverted:
        options, layout = request.options, request.layout
        strategy = NPUTensorParallelStrategy(
            data_parallel_size=layout.data,
            tensor_parallel_size=layout.tensor,
            expert_parallel_size=layout.expert,
            data_parallel=options.data_parallel,
            sequence_parallel=options.sequence_parallel,
            dispatch=options.dispatch,
            recompute=options.recompute,
            families=load_families(request.families),
            kernels=_REFERENCE,
        )

    class Watch(Callback):
        """Holds the recorder open for the first batch's step."""

        recorder: Recorder

        @override
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            as_on_ascend(trainer.optimizers, plain_parameters(pl_module))
            self.recorder = Recorder(pl_module)
            self.recorder.__enter__()

        @override
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.recorder.__exit__(None, None, None)

    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        precision=_PRECISIONS[request.dtype],  # type: ignore[arg-type]
        max_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    with warnings.catch_warnings():
        # Of data loaders without workers, loggers and the like: nothing that an audit is about.
        warnings.simplefilter("ignore")
        data: Any = None if batch is None else [batch]
        trainer.fit(module, None if data is None else torch.utils.data.DataLoader(data, batch_size=None))
    return watch.recorder.findings(request.allow)
