"""The commands that README.md and docs/ show, where each is run, and which are not run and why.

A command is a line of a fenced block marked `bash`, its continuation lines joined and its comment taken off. Two test
files read this: tests/unit/test_documented_commands.py, that every command stands in one of the tables and that the
tests named there hold it; tests/integration/test_documented_runs.py, that those of RUN_AS_WRITTEN end well.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Run word for word by test_documented_runs.py, with files of its own for the names and fewer steps for train.py.
RUN_AS_WRITTEN = (
    "python train.py --help",
    "python train.py data=text 'data.paths=[my/texts]' data.tokenizer=PATH",
    "python train.py data=text data.tokenizer=PATH "
    "'data.sources=[{path: my/texts, weight: 2}, {path: texts, weight: 0.5}]'",
    "python train.py data=chat 'data.paths=[chats.jsonl]' data.tokenizer=FOLDER",
    "python train.py model=pretrained model.path=FOLDER data.tokenizer=FOLDER",
    "python train.py model=pretrained model.path=FOLDER data=text 'data.paths=[texts]' data.tokenizer=FOLDER",
    "python train.py trainer.devices=4 strategy.data_parallel_size=2 strategy.tensor_parallel_size=2 "
    "strategy.expert_parallel_size=4",
    "python train.py export=true",
    "torchrun --nproc-per-node=2 train.py trainer.devices=2",
    "lightning-npu-tp show-data data=chat 'data.paths=[chats.jsonl]' data.tokenizer=FOLDER",
    "lightning-npu-tp audit --model deepseek_v2_lite",
    "python -m lightning.pytorch.utilities.consolidate_checkpoint CKPT",
)

_TRAIN = "tests/integration/test_train.py::"
_HOSTS = "tests/distributed/test_two_hosts.py::"
_REMOTE = "tests/integration/test_remote_scripts.py::"
_PROVE = "tests/distributed/test_prove_ranks.py::"
# Pattern of commands (* is any text) -> the tests that run them, and what of the command stands in each of these tests.
RUN_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "python train.py": {_TRAIN + "test_the_run_folder_holds_everything_the_run_promises": ("train.py",)},
    "python train.py trainer.devices=4": {
        _TRAIN + "test_more_devices_train_the_same_model_in_one_folder": ("trainer.devices=", "[2, 4]")
    },
    "python train.py trainer.devices=2 trainer.max_steps=150 trainer.val_check_interval=50": {
        _TRAIN + "test_more_devices_train_the_same_model_in_one_folder": (
            "trainer.devices=",
            "trainer.max_steps=",
            "trainer.val_check_interval=",
        )
    },
    "python train.py -m optimizer.lr=1e-3,3e-3 trainer.devices=1,2": {
        _TRAIN + "test_a_sweep_gives_every_job_a_folder_and_goes_on_after_a_failure": ('"-m"',),
        "tests/distributed/test_launcher_sweep.py::"
        "test_the_first_job_of_a_sweep_may_fail_on_two_devices_and_the_second_trains_on_one": ('"-m"', "devices=2,1"),
    },
    "python train.py experiment=deepseek_v2_lite_4npu": {
        _TRAIN + "test_the_card_experiment_says_in_one_sentence_what_is_missing": ("experiment=deepseek_v2_lite_4npu",)
    },
    "python train.py resume=auto hydra.run.dir=FOLDER": {
        "tests/integration/test_resume_run.py::test_a_run_that_is_killed_and_gone_on_with_ends_as_if_it_had_not_been": (
            "hydra.run.dir=",
            "train.py",
        )
    },
    "torchrun --nnodes=2 *": {
        _HOSTS + "test_two_hosts_train_as_one_and_a_cut_link_ends_both_with_the_silent_hosts_name": (
            "torch.distributed.run",
            "--nnodes=2",
            "--node-rank=",
            "--master-addr=",
        )
    },
    "srun python train.py *": {
        _HOSTS + "test_ranks_that_slurm_starts_on_two_nodes_are_one_run_in_one_folder": ("SLURM_PROCID", "train.py")
    },
    "python examples/plain_module.py meta": {
        "tests/integration/test_examples.py::test_a_module_that_knows_nothing_of_us_trains": ("plain_module.py", "meta")
    },
    "python examples/own_model.py *": {
        "tests/integration/test_examples.py::test_a_model_of_ones_own_trains_with_a_family_and_with_a_function": (
            "own_model.py",
            '"family"',
            '"convert"',
        )
    },
    "pytest tests/distributed/test_parity.py -s": {
        "tests/distributed/test_parity.py::test_every_layout_equals_one_process": ("train_sharded",)
    },
    "lightning-npu-tp prove --model deepseek_v2_lite --tensor 4": {
        _PROVE + "test_the_command_prints_a_row_per_rule_and_ends_with_the_verdict": ("prove", "--model", "--tensor")
    },
    "lightning-npu-tp prove --model my/model/config.json --tensor 4 --recompute block --json proof.json": {
        _PROVE + "test_the_command_prints_a_row_per_rule_and_ends_with_the_verdict": ("--model", "--tensor", "--json"),
    },
    "lightning-npu-tp prove --model deepseek_v2_lite --data 2 --tensor 2 --expert 4 --sequence-parallel": {
        "tests/sim/test_float64.py::test_a_layout_on_cards_is_proven_as_closely_as_on_the_cpu": (
            "prove(",
            "Layout(2, 2, 4), Options(sequence_parallel=True",
        ),
        _PROVE + "test_layouts_over_data_ranks_are_proven": ("prove(",),
    },
    "lightning-npu-tp check --model FOLDER --tensor 4": {
        "tests/distributed/test_check_ranks.py::test_the_four_steps_and_the_comparison": (
            '"check"',
            '"--model"',
            '"--tensor", 4',
        )
    },
    "lightning-npu-tp doctor*": {
        "tests/unit/devices/test_device.py::test_the_doctor_comes_up_where_torch_npu_has_no_cann": (
            "lightning-npu-tp",
            '"doctor"',
            '"--json"',
        ),
        "tests/unit/tools/test_doctor.py::test_this_machine_is_examined_within_seconds": ("doctor",),
    },
    "lightning-npu-tp inspect CKPT": {
        "tests/unit/checkpoint/test_checkpoint_inspect.py::test_a_good_checkpoint_is_described": ("inspect",),
        "tests/unit/checkpoint/test_checkpoint_inspect.py::"
        "test_a_folder_of_checkpoints_shows_which_one_a_resume_takes": ("checkpoints",),
    },
    "lightning-npu-tp export CKPT OUT --dtype bfloat16": {
        "tests/unit/weights/test_export.py::test_another_dtype_is_the_checkpoints_weights_rounded": (
            "export",
            "--dtype",
            "bfloat16",
        )
    },
    "lightning-npu-tp download OWNER/NAME FOLDER": {
        "tests/unit/weights/test_download.py::test_only_what_loading_needs_is_fetched_and_shown_before": (
            "download",
            '"owner/model"',
        )
    },
    ".venv-npu/bin/lightning-npu-tp rehearse -n 4 -- *": {
        "tests/sim/test_runs.py::test_a_rehearsal_sums_up_what_its_processes_did": ('"rehearse", "-n", "4"', '"--"')
    },
    "python -m ascend_sim run -n 4 train.py *": {
        "tests/sim/test_runs.py::"
        "test_the_default_job_on_two_data_ranks_writes_its_files_and_says_no_more_than_it_should": (
            '"ascend_sim"',
            '"run", "-n", "4", "train.py"',
            "trainer.accelerator=npu",
        )
    },
    ".venv-npu/bin/lightning-npu-tp rehearse -n 4 --float64 -- lightning-npu-tp prove *": {
        "tests/unit/tools/test_rehearse.py::test_the_command_line_takes_the_command_behind_two_dashes": (
            "rehearse",
            "--float64",
        ),
        "tests/sim/test_float64.py::test_a_layout_on_cards_is_proven_as_closely_as_on_the_cpu": ("prove",),
    },
    "scripts/sync_to_remote.sh --dry-run": {
        _REMOTE + "test_code_is_copied_and_data_checkpoints_and_history_are_not": ("sync_to_remote.sh", "--dry-run")
    },
    "scripts/test_on_remote.sh *": {
        _REMOTE + "test_the_report_of_a_real_training_run_comes_back": ("test_on_remote.sh", "--python", "--setup")
    },
    "python benchmarks/checkpoint_damage.py": {
        "tests/unit/checkpoint/test_checkpoint_format.py::"
        "test_every_truncation_and_forty_changed_bytes_are_noticed_and_the_file_named": ("checkpoint_damage.py",)
    },
    "python benchmarks/fault_matrix.py": {
        "tests/sim/test_runs.py::test_a_fault_ends_all_ranks_with_cause_and_remedy_and_a_whole_checkpoint": (
            "benchmarks/fault_matrix.py",
        )
    },
}

_INDEX = "installs from a package index; the tests run in the environment that it makes"
_LONG = "takes minutes to hours, and means nothing beside other tests; run by hand, its results are kept"
# Pattern of commands -> why no test runs them.
NOT_RUN: dict[str, str] = {
    "pip install *": _INDEX,
    "make train*": "the set-up, then train.py, which tests run without make",
    "make fuzz": "tests/unit/test_parsers.py is run with fewer inputs",
    "make test*": "it is what runs the tests",
    "make install-npu": _INDEX,
    "python train.py -m hydra/launcher=submitit_slurm *": "needs a SLURM queue; submitit_local was tried by hand",
    "less remote-report.md": "a pager",
    **{
        f"python benchmarks/{name}.py": _LONG
        for name in (
            "moe_block training_step load_weights checkpoint_save kill_rounds kill_writers resume_table proof_table "
            "losses_on_npu mutations memory_arithmetic export_memory token_cache recompute_memory bf16_optimizer"
        ).split()
    },
}


def without_comment(line: str) -> str:
    """A line of shell without its comment; a # inside of quotes or of a word is none."""
    for place in (found.start() for found in re.finditer(r"(^|\s)#", line)):
        if line[:place].count("'") % 2 == 0 and line[:place].count('"') % 2 == 0:
            return line[:place].strip()
    return line.strip()


def commands() -> dict[str, list[str]]:
    """Every command -> the places, `page:line`, that show it. Lines that only set variables are none."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for block in re.finditer(r"(?ms)^```bash\n(.*?)^```$", page.read_text()):
            first, pending = page.read_text()[: block.start(1)].count("\n") + 1, ""
            for number, line in enumerate(block[1].splitlines(), first):
                line = without_comment(line)
                pending = f"{pending} {line.removesuffix(chr(92)).strip()}".strip()
                if line.endswith("\\"):
                    continue
                if pending and not pending.startswith("export "):
                    found.setdefault(pending, []).append(f"{page.relative_to(ROOT)}:{number}")
                pending = ""
    return found


def matches(pattern: str, command: str) -> bool:
    """Whether a command is meant by a pattern, in which * is any text."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), command) is not None


def words(command: str) -> list[str]:
    """The command as a shell would hand it on."""
    return shlex.split(command)
