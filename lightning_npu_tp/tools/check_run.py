"""The steps of `lightning-npu-tp check` in their order, and what they found: processes are started here.

What is known of a folder before that is `check_folder.py`'s, what each process does `check_ranks.py`'s, and how it is
said `check_lines.py`'s.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from lightning_npu_tp.convert.convert import Options
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.estimates.what_fits import in_words
from lightning_npu_tp.parallel.layout import Layout, resolve_dispatch
from lightning_npu_tp.tools import check_folder, check_lines, check_ranks, host_memory
from lightning_npu_tp.tools.check_lines import say
from lightning_npu_tp.tools.check_ranks import AloneAnswer, RankAnswer
from lightning_npu_tp.tools.prove import check_layout
from lightning_npu_tp.tools.testing import ranks
from lightning_npu_tp.weights.safetensors_reader import WeightFiles, open_folder

# A smaller model computes faster in one thread than threads can share it.
_WORTH_THREADS = 50_000_000


@dataclass(kw_only=True)
class CheckRun:
    """One check: what was asked for, and what the steps of `run` found.

    rows, length: of the batch, all ranks together. timeout: seconds for the ranks, and again for one process.
    faults:       a few words for each thing that does not hold.
    differences:  number -> worst relative difference of the ranks to one process; empty where that was left out.
    left_out:     why one process, or its backward pass, was.
    """

    model: str
    config: Any
    layout: Layout
    options: Options
    device_type: str
    dtype: str
    rows: int
    length: int
    timeout: float
    faults: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    left_out: str = ""
    alone: AloneAnswer | None = None

    @classmethod
    def prepared(
        cls, model: str, layout: Layout, options: Options, *, device: str, dtype: str, length: int, **settings: Any
    ) -> CheckRun:
        """A check that can be run. Raises ConfigError, ConversionError or DeviceError for one that cannot."""
        config = check_folder.folder_config(model)
        if length > (longest := getattr(config, "max_position_embeddings", length)):
            raise ConfigError(f"--length {length} is beyond the model's {longest} positions. Set it to less.")
        resolve_dispatch(layout, options.dispatch)
        check_layout(config, layout)
        device_type = check_folder.device_type(device, layout.world)
        check_folder.check_dtype(dtype, device_type)
        return cls(
            model=model,
            config=config,
            layout=layout,
            options=options,
            device_type=device_type,
            dtype=dtype,
            length=length,
            **settings,
        )

    def run(self) -> None:
        """The four steps and the comparison, printed as they come."""
        self.tokenizer = check_folder.read_tokenizer(self.model, self.config.vocab_size)
        say("[1/4] tokenizer", self.tokenizer.line)
        if self.tokenizer.fault:
            self.faults.append("the tokenizer")
        self.files: WeightFiles = open_folder(self.model)
        self.structure = check_folder.Structure.of(self.config)
        self.arithmetic = self.structure.run(self.config, self.layout, self.options, self.dtype, self.rows, self.length)
        say("[2/4] load", check_lines.files(self.files))
        self.answers = self._run_ranks()
        say("", *check_lines.loaded(self.answers))
        say("[3/4] MoE structure", *check_lines.structure(self.structure))
        say("[4/4] conversion", *check_lines.conversion(self.answers, self.structure.parameters))
        experts = bool(self.structure.sizes.experts)
        say(
            "forward and backward",
            *check_lines.passes(self.answers, self.request, self.output_shape, with_experts=experts),
        )
        self._compare_with_one_process()

    @property
    def output_shape(self) -> list[int]:
        """Shape of the logits, all ranks together: [rows, length, vocabulary]."""
        return [self.rows, self.length, self.config.vocab_size]

    def _run_ranks(self) -> list[RankAnswer]:
        need = check_folder.rank_bytes(self.arithmetic) * self.layout.world
        if self.device_type == "cpu" and need > (free := host_memory.available_bytes()):
            narrow = "--dtype bfloat16, " if self.dtype != "bfloat16" else ""
            raise ConfigError(
                f"--model {self.model} in {self.layout.world} ranks of {self.dtype} needs about {in_words(need)} "
                f"with gradients, and this host has {in_words(free)} free. Use {narrow}a smaller --length or "
                f"--batch, or a host with more memory; `lightning-npu-tp prove` checks the layout on a small model of "
                f"this kind."
            )
        self.request = check_ranks.Request(
            folder=self.model,
            config=self.config,
            layout=self.layout,
            options=self.options,
            device_type=self.device_type,
            dtype=self.dtype,
            batch=check_folder.batch_of(self.config, self.tokenizer, self.rows, self.length),
            timeout=self.timeout,
        )
        answers: list[RankAnswer] = ranks.run_ranks(
            check_ranks.run_rank, self.layout.world, self.request, timeout=self.timeout, backend=None
        )
        if answers[0].refused is not None:
            raise answers[0].refused
        return answers

    def _compare_with_one_process(self) -> None:
        needs = {way: check_folder.alone_bytes(self.arithmetic, backward=way) for way in (True, False)}
        free = host_memory.available_bytes()
        wide = "float64" if self.dtype == "float64" else "float32"
        if needs[False] > free:
            self.left_out = (
                f"left out: transformers needs about {in_words(needs[False])} for a forward pass in {wide}, and "
                f"this host has {in_words(free)} free"
            )
            say("", f"on the CPU: {self.left_out}")
            return
        backward = needs[True] <= free
        if not backward:
            self.left_out = f"backward left out: it needs about {in_words(needs[True])}, {in_words(free)} are free"
        # Threads that spin while they wait cost a shared machine more than they gain.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        threads = (os.cpu_count() or 1) if self.structure.parameters > _WORTH_THREADS else 1
        (self.alone,) = ranks.run_ranks(
            check_ranks.run_alone, 1, self.request, threads, backward, timeout=self.timeout, backend=None
        )
        self.differences = check_ranks.compare(self.answers, self.alone)
        bound = check_ranks.BOUNDS[self.dtype]
        say("", *check_lines.comparison(self.alone, wide, self.left_out, self.differences, bound))
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
            "device": self.device_type,
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
            "ranks": [answer.as_json() for answer in self.answers],
            "output_shape": self.output_shape,
            "loss": self.answers[0].loss,
            "gradient_norm": self.answers[0].grad_norm,
            "one_process": None if self.alone is None else self.alone.as_json(),
            "left_out": self.left_out,
            "relative_differences": self.differences,
        }
