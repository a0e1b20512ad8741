"""`lightning-npu-tp check`: the conversion test without training, in four numbered steps and a comparison.

[1/4] tokenizer, [2/4] load, [3/4] MoE structure, [4/4] conversion; then forward and backward passes of the sharded
model, and of transformers' own in one process on the CPU. Reads the options, prints, and decides the exit code; the
work is `check_folder.py`'s.
"""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_npu_tp.errors import ConfigError, LightningNPUTPError, RankFailure

if TYPE_CHECKING:
    from lightning_npu_tp.tools.check_folder import Structure, Tokenizer
    from lightning_npu_tp.tools.check_ranks import AloneAnswer, RankAnswer, Request
    from lightning_npu_tp.weights.safetensors_reader import WeightFiles

_INDENT = "      "
_SHOWN = 8
_WIDTH = 100
_WORTH_THREADS = 50_000_000


def check(
    model: Annotated[str, typer.Option(help="Hugging Face folder with config.json and safetensors files")],
    tensor: Annotated[int, typer.Option(help="tensor ranks")] = 1,
    data: Annotated[int, typer.Option(help="data ranks")] = 1,
    expert: Annotated[int | None, typer.Option(help="expert ranks; as many as tensor ranks by default")] = None,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="slice sequences")] = False,
    dispatch: Annotated[str, typer.Option(help="auto, replicated or all_to_all")] = "auto",
    recompute: Annotated[str, typer.Option(help="none, moe or block")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or npu")] = "auto",
    dtype: Annotated[str, typer.Option(help="of the ranks: float32, bfloat16 or float64")] = "float32",
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = 64,
    batch: Annotated[int | None, typer.Option(help="sequences, all ranks together; one per data rank")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers to this file")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that the ranks may take, and then one process")] = 1800.0,
) -> None:
    """Check without training that a folder's model loads, converts and computes in a layout.

    Reads the tokenizer, then the weights, each rank its own slices, and says what was converted; runs forward and
    backward on the device and holds loss, logits and gradient norm against transformers in one process on the CPU.
    """
    try:
        from lightning_npu_tp.convert.convert import Options
        from lightning_npu_tp.parallel.layout import Layout, resolve_dispatch
        from lightning_npu_tp.tools import check_folder
        from lightning_npu_tp.tools.prove import check_layout

        given = {"tensor": tensor, "data": data, "batch": data if batch is None else batch}
        for name, number in given.items():
            if number < 1:
                raise ConfigError(f"--{name} {number} is no number of anything. Set --{name} to 1 or more.")
        if given["batch"] < data:
            raise ConfigError(f"--batch {batch} leaves some of --data {data} ranks without a sequence. Set it higher.")
        if length < 2:
            raise ConfigError(f"--length {length} leaves nothing to predict. Set --length to 2 or more.")
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise ConfigError(f"--json {json_file} lies in a folder that does not exist. Make it, or name another.")
        config = check_folder.folder_config(model)
        if length > (longest := getattr(config, "max_position_embeddings", length)):
            raise ConfigError(f"--length {length} is beyond the model's {longest} positions. Set it to less.")
        sizes = "auto" if expert is None else expert
        layout = Layout.resolve(world=data * tensor, data=data, tensor=tensor, expert=sizes)  # type: ignore[arg-type]
        resolve_dispatch(layout, dispatch)  # type: ignore[arg-type]
        options = Options(
            sequence_parallel=sequence_parallel,
            dispatch=dispatch,  # type: ignore[arg-type]
            recompute=recompute,  # type: ignore[arg-type]
        )
        check_layout(config, layout)
        on = check_folder.device_type(device, layout.world)
        check_folder.check_dtype(dtype, on)
        found = _Check(model, config, layout, options, on, dtype, given["batch"], length, timeout)
    except (LightningNPUTPError, OSError) as error:
        _fail(error, 2)
    try:
        found.run()
    except (ConfigError, OSError) as error:
        _fail(error, 2)
    except (RankFailure, TimeoutError) as error:
        typer.echo(f"error: the ranks did not come to an end: {error}", err=True)
        raise typer.Exit(1) from error
    except LightningNPUTPError as error:
        _fail(error, 1)
    if json_file is not None:
        json_file.write_text(json.dumps(found.as_json(), indent=2) + "\n")
    typer.echo(found.headline())
    raise typer.Exit(1 if found.faults else 0)


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"error: {_for_options(' '.join(str(error).split()))}", err=True)
    raise typer.Exit(code) from error


def _for_options(text: str) -> str:
    """The names of the strategy's settings as this command calls them."""
    for axis in ("data", "tensor", "expert"):
        text = text.replace(f"strategy.{axis}_parallel_size", f"--{axis}")
        text = text.replace(f"{axis}_parallel_size=", f"--{axis} ")
    return text.replace("strategy.dispatch", "--dispatch").replace("strategy.recompute", "--recompute")


class _Check:
    """One check: what was asked for, what the steps found, and `faults`, a line for each thing that does not hold."""

    def __init__(
        self,
        model: str,
        config: Any,
        layout: Any,
        options: Any,
        on: str,
        dtype: str,
        rows: int,
        length: int,
        timeout: float,
    ) -> None:
        self.model, self.config, self.layout, self.options = model, config, layout, options
        self.on, self.dtype, self.rows, self.length, self.timeout = on, dtype, rows, length, timeout
        self.faults: list[str] = []
        self.differences: dict[str, float] = {}
        self.left_out = ""
        self.alone: AloneAnswer | None = None

    def run(self) -> None:
        """The four steps and the comparison, printed as they come."""
        from lightning_npu_tp.tools import check_folder
        from lightning_npu_tp.weights.safetensors_reader import open_folder

        self.tokenizer: Tokenizer = check_folder.read_tokenizer(self.model, self.config.vocab_size)
        _say("[1/4] tokenizer", self.tokenizer.line)
        if self.tokenizer.fault:
            self.faults.append("the tokenizer")
        self.files: WeightFiles = open_folder(self.model)
        self.structure: Structure = check_folder.Structure.of(self.config)
        _say("[2/4] load", _files_line(self.files))
        answers = self._ranks()
        _say("", _loaded_line(answers), *_ignored_lines(answers[0].ignored))
        _say(*_structure_lines(self.structure))
        swapped = ", ".join(f"{number} {name}" for name, number in sorted(answers[0].swapped.items()))
        _say("[4/4] conversion", f"replaced: {swapped}", *_rank_lines(answers, self.structure.parameters))
        _say("forward and backward", *self._passes(answers))
        self._hold_against_one(answers)

    def _ranks(self) -> list[RankAnswer]:
        from lightning_npu_tp.estimates.what_fits import in_words
        from lightning_npu_tp.tools import check_folder, check_ranks
        from lightning_npu_tp.tools.host_memory import available_bytes
        from lightning_npu_tp.tools.testing.ranks import run_ranks

        need = check_folder.rank_bytes(self._arithmetic()) * self.layout.world
        if self.on == "cpu" and need > (free := available_bytes()):
            narrow = "--dtype bfloat16, " if self.dtype != "bfloat16" else ""
            raise ConfigError(
                f"--model {self.model} in {self.layout.world} ranks of {self.dtype} needs about {in_words(need)} with "
                f"gradients, and this host has {in_words(free)} free. Use {narrow}a smaller --length or --batch, or a "
                f"host with more memory; `lightning-npu-tp prove` checks the layout on a small model of this kind."
            )
        self.request: Request = check_ranks.Request(
            folder=self.model,
            config=self.config,
            layout=self.layout,
            options=self.options,
            device_type=self.on,
            dtype=self.dtype,
            batch=check_folder.batch_of(self.config, self.tokenizer, self.rows, self.length),
            timeout=self.timeout,
        )
        answers: list[RankAnswer] = run_ranks(
            check_ranks.run_rank, self.layout.world, self.request, timeout=self.timeout, backend=None
        )
        if answers[0].refused is not None:
            raise answers[0].refused
        self.answers = answers
        return answers

    def _arithmetic(self) -> Any:
        return self.structure.run(self.config, self.layout, self.options, self.dtype, self.rows, self.length)

    def _passes(self, answers: list[RankAnswer]) -> list[str]:
        from lightning_npu_tp.checkpoint.files import size_in_words

        ranks = f"{len(answers)} ranks" if len(answers) > 1 else "1 rank"
        experts = f", experts over {self.layout.expert}" if self.structure.sizes.experts else ""
        shape = [self.rows, self.length, self.config.vocab_size]
        peaks = [answer.peak for answer in answers]
        self.step_seconds = [
            max(answer.forward[step] + answer.backward[step] for answer in answers)
            for step in range(len(answers[0].forward))
        ]
        forward, backward = (max(min(times[1:]) for times in (getattr(a, way) for a in answers)) for way in _WAYS)
        return [
            f"on the device: {self.on}, {ranks} (data {self.layout.data}, tensor {self.layout.tensor}{experts}), "
            f"{self.dtype}",
            f"  logits {shape}, loss {answers[0].loss:.6f}, gradient norm {answers[0].grad_norm:.6f}",
            f"  first step {_ms(self.step_seconds[0])}, later {_ms(min(self.step_seconds[1:]))} "
            f"(forward {_ms(forward)}, backward {_ms(backward)})",
            f"  peak memory of a rank {size_in_words(max(peaks))}, of it weights "
            f"{size_in_words(max(answer.local_bytes for answer in answers))}",
        ]

    def _hold_against_one(self, answers: list[RankAnswer]) -> None:
        from lightning_npu_tp.checkpoint.files import size_in_words
        from lightning_npu_tp.estimates.what_fits import in_words
        from lightning_npu_tp.tools import check_folder, check_ranks
        from lightning_npu_tp.tools.host_memory import available_bytes
        from lightning_npu_tp.tools.testing.ranks import run_ranks

        wide = "float64" if self.dtype == "float64" else "float32"
        needs = {way: check_folder.alone_bytes(self._arithmetic(), backward=way) for way in (True, False)}
        free = available_bytes()
        if needs[False] > free:
            self.left_out = (
                f"left out: transformers needs about {in_words(needs[False])} for a forward pass in {wide}, and this "
                f"host has {in_words(free)} free"
            )
            _say("", f"on the CPU: {self.left_out}")
            return
        backward = needs[True] <= free
        # Threads that spin while they wait cost a shared machine more than they gain.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        threads = (os.cpu_count() or 1) if self.structure.parameters > _WORTH_THREADS else 1
        (alone,) = run_ranks(
            check_ranks.run_alone, 1, self.request, threads, backward, timeout=self.timeout, backend=None
        )
        self.alone, self.differences = alone, check_ranks.compare(answers, alone)
        bound = check_ranks.BOUNDS[self.dtype]
        times = f"forward {_ms(alone.forward)}, backward {_ms(alone.backward)}"
        if not backward:
            self.left_out = f"backward left out: it needs about {in_words(needs[True])}, {in_words(free)} are free"
            times = f"forward {_ms(alone.forward)}; {self.left_out}"
        norm = "" if alone.grad_norm is None else f", gradient norm {alone.grad_norm:.6f}"
        lines = [
            f"on the CPU: transformers' own model in one process, {wide}",
            f"  logits {list(alone.logits.shape)}, loss {alone.loss:.6f}{norm}",
            f"  {times}; peak memory {size_in_words(alone.peak)}",
            "relative difference: "
            + ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
            + f"; bound {bound:.0e}",
        ]
        _say("", *lines)
        self.faults += [name for name, value in self.differences.items() if not value <= bound]

    def headline(self) -> str:
        """The verdict in one line."""
        if self.faults:
            return f"check failed: {', '.join(self.faults)}"
        done = "loads and converts; not compared with one process"
        if self.differences:
            done = "loads, converts, and computes what one process computes"
        return f"check passed: {self.model} {done}"

    def as_json(self) -> dict[str, Any]:
        """Everything that was printed, as plain data."""
        sizes = self.structure.sizes
        return {
            "model": str(self.model),
            "passed": not self.faults,
            "faults": self.faults,
            "device": self.on,
            "dtype": self.dtype,
            "layout": {"data": self.layout.data, "tensor": self.layout.tensor, "expert": self.layout.expert},
            "tokenizer": self.tokenizer.line,
            "files": len(self.files.files),
            "file_bytes": self.files.nbytes,
            "tensors": len(self.files.tensors),
            "family": self.structure.family,
            "layers": sizes.layers,
            "moe_layers": sizes.sparse_layers,
            "experts": sizes.experts,
            "experts_per_token": sizes.picks,
            "shared_width": sizes.shared_width,
            "parameters": self.structure.parameters,
            "active_parameters": self.structure.active,
            "swapped": self.answers[0].swapped,
            "ranks": [
                {
                    "local_experts": answer.experts[1] if answer.experts else None,
                    "parameters": answer.parameters,
                    "weight_bytes": answer.local_bytes,
                    "read_bytes": answer.read_bytes,
                    "read_seconds": answer.read_seconds,
                    "peak_loading_bytes": answer.loading_peak,
                    "peak_bytes": answer.peak,
                    "forward_seconds": answer.forward,
                    "backward_seconds": answer.backward,
                }
                for answer in self.answers
            ],
            "output_shape": [self.rows, self.length, self.config.vocab_size],
            "loss": self.answers[0].loss,
            "gradient_norm": self.answers[0].grad_norm,
            "one_process": None
            if self.alone is None
            else {
                "loss": self.alone.loss,
                "gradient_norm": self.alone.grad_norm,
                "forward_seconds": self.alone.forward,
                "backward_seconds": self.alone.backward,
                "peak_bytes": self.alone.peak,
            },
            "left_out": self.left_out,
            "relative_differences": self.differences,
        }


_WAYS = ("forward", "backward")


def _say(title: str, *lines: str) -> None:
    if title:
        typer.echo(title)
    for line in lines:
        indent = _INDENT + " " * (len(line) - len(line.lstrip()))
        wrapped = textwrap.wrap(
            line.strip(),
            _WIDTH,
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        typer.echo("\n".join(wrapped))


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _files_line(files: WeightFiles) -> str:
    from lightning_npu_tp.checkpoint.files import size_in_words

    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in files.tensors.values()})
    count = "1 file" if len(files.files) == 1 else f"{len(files.files)} files"
    return f"{count}, {len(files.tensors):,} tensors, {size_in_words(files.nbytes)} of {', '.join(kinds)}"


def _loaded_line(answers: list[RankAnswer]) -> str:
    from lightning_npu_tp.checkpoint.files import size_in_words

    read, seconds = sum(answer.read_bytes for answer in answers), max(answer.read_seconds for answer in answers)
    each = "" if len(answers) == 1 else f" by {len(answers)} ranks, each its own slices"
    return (
        f"read {size_in_words(read)}{each}, in {_ms(seconds)}: {size_in_words(round(read / max(seconds, 1e-9)))}/s; "
        f"all {answers[0].tensors:,} in use"
    )


def _ignored_lines(ignored: dict[str, str]) -> list[str]:
    reasons = sorted(set(ignored.values()))
    return [f"not used: {sum(why == reason for why in ignored.values())} tensors, {reason}" for reason in reasons]


def _structure_lines(structure: Structure) -> list[str]:
    sizes = structure.sizes
    counts = f"{structure.parameters:,} parameters ({_billions(structure.parameters)})"
    if not sizes.experts:
        return [
            "[3/4] MoE structure",
            f"none: {structure.family}, {sizes.layers} layers, all of them dense",
            f"{counts}, all of them at work for every token",
        ]
    dense = sizes.layers - sizes.sparse_layers
    shared = f"shared experts of width {sizes.shared_width:,} together" if sizes.shared_width else "no shared experts"
    return [
        "[3/4] MoE structure",
        f"{structure.family}, {sizes.layers} layers: {dense} dense, {sizes.sparse_layers} with experts",
        f"{sizes.experts} experts, top {sizes.picks}, of width {sizes.expert_width:,}; {shared}",
        f"{counts}, of them {structure.active:,} ({_billions(structure.active)}) at work for a token",
    ]


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _rank_lines(answers: list[RankAnswer], total: int) -> list[str]:
    from lightning_npu_tp.checkpoint.files import size_in_words

    lines = []
    for rank, answer in enumerate(answers):
        experts = f"{answer.experts[0]} experts -> {answer.experts[1]} local experts, " if answer.experts else ""
        lines.append(
            f"rank {rank}: {experts}{answer.parameters:,} parameters ({answer.parameters / total:.1%}), "
            f"{size_in_words(answer.local_bytes)}"
        )
    if len(lines) > 2 * _SHOWN and len({line.split(": ", 1)[1] for line in lines}) == 1:
        return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more ranks with the same"]
    return lines
