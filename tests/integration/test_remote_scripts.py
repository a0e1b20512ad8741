"""The scripts for a remote machine, against a real sshd on this one. Catches: data, checkpoints or history that are
copied along, a dry run that changes something, options that are not heeded or not quoted, a failed step
that the report or the exit code hides, a report that does not come back.

Needs sshd and rsync (Debian: `apt-get install openssh-server rsync`); without them only the rest is tested.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
absent = [name for name, there in (("sshd", SSHD), ("rsync", shutil.which("rsync"))) if there is None]
needs_sshd = pytest.mark.skipif(bool(absent), reason=f"not installed on this machine: {', '.join(absent)}")

MAKEFILE = """\
install:
	@mkdir -p .venv/bin
	@printf '#!/bin/sh\\nexec {python} "$$@"\\n' > .venv/bin/python
	@printf '#!/bin/sh\\necho "doctor was asked: $$*"\\n' > .venv/bin/lightning-npu-tp
	@chmod +x .venv/bin/*
	@echo "made with $(PYTHON)"
test:
	@{test}
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("REMOTE_")}
    return subprocess.run(
        [str(part) for part in command],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=150,
        stdin=subprocess.DEVNULL,
    )


# --- without another machine -------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_valid_and_pass_the_linter_where_there_is_one(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0
    if linter := shutil.which("shellcheck"):
        linted = run(linter, "-x", "-P", ROOT, script)
        assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("name", ["sync_to_remote.sh", "test_on_remote.sh"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "export REMOTE_HOST"),
        (("--host",), "--host needs a value"),
        (("--host", "-oProxyCommand=x"), "is no host"),
        (("--host", "h", "--port", "x"), "--port x is no port"),
        (("--host", "h", "--path", "~"), "would mix the files with others"),
        (("--host", "h", "--path", ""), "would mix the files with others"),
        (("--host", "h", "--nonsense"), "--nonsense is no option"),
    ],
)
def test_a_mistake_in_the_options_is_told_in_a_line(name: str, arguments: tuple[str, ...], says: str) -> None:
    done = run(ROOT / "scripts" / name, *arguments)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_names_every_option() -> None:
    for name in ("sync_to_remote.sh", "test_on_remote.sh"):
        script = ROOT / "scripts" / name
        text = script.read_text() + (ROOT / "scripts/remote_options.sh").read_text()
        done = run(script, "--help")
        options = set(re.findall(r"(?m)^\s+(--[\w-]+(?: \| --[\w-]+)*)\)", text))
        names = {option for group in options for option in group.split(" | ")}
        assert done.returncode == 0 and len(names) > 6
        assert not [option for option in names if option not in done.stdout]


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment with an ssh that runs commands here, in a home of its own, and an rsync that notes its target."""
    home, programs = tmp_path / "home", tmp_path / "programs"
    for folder in (home / "copy/scripts", home / "strange", home / "empty", programs):
        folder.mkdir(parents=True)
    (home / "copy/scripts/remote_options.sh").touch()
    (home / "strange/thesis").touch()
    (home / "link").symlink_to(home)
    (programs / "ssh").write_text(f'#!/bin/sh\nshift\ncd "{home}" && HOME="{home}" exec sh -c "$*"\n')
    (programs / "rsync").write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >>"{tmp_path}/targets"\n')
    for name in ("ssh", "rsync"):
        (programs / name).chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "REMOTE_HOST": "there"}


@pytest.mark.parametrize("more", [(), ("--delete",), ("--delete", "--dry-run")], ids=str)
def test_a_target_that_holds_more_than_the_tree_is_refused_by_what_it_is(
    stand_in: dict[str, str], tmp_path: Path, more: tuple[str, ...]
) -> None:
    home, sync = tmp_path / "home", ROOT / "scripts/sync_to_remote.sh"
    homes = (
        "./.",
        "~/.",
        "//",
        "/./",
        f"{home}/",
        f"{home.parent}/",
        "link",
        "copy/..",
        "copy/../.",
        "empty/../link/./",
    )
    for path in homes:
        done = run(sync, "--path", path, *more, **stand_in)
        assert done.returncode == 2 and "is the home on there, or holds it" in done.stderr, (path, done)
    strange = run(sync, "--path", "strange", *more, **stand_in)
    assert strange.returncode == (2 if "--delete" in more else 0)
    assert ("which is no copy of this tree" in strange.stderr) == ("--delete" in more)
    assert (tmp_path / "targets").exists() == ("--delete" not in more), "something would have been removed"


def test_a_copy_an_empty_folder_and_a_new_one_take_what_is_removed_here(
    stand_in: dict[str, str], tmp_path: Path
) -> None:
    for path in ("copy", "./copy/", "link/copy", "empty", "new/folder", "a b; touch c"):
        done = run(ROOT / "scripts/sync_to_remote.sh", "--path", path, "--delete", **stand_in)
        assert done.returncode == 0, done.stderr
    home = tmp_path / "home"
    wanted = [home / path for path in ("copy", "copy", "copy", "empty", "new/folder", "a b; touch c")]
    assert (tmp_path / "targets").read_text().splitlines() == [f"there:{place}/" for place in wanted]
    assert (home / "a b; touch c").is_dir() and not (home / "c").exists()


# --- with an sshd on loopback ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Iterator[dict[str, str]]:
    """An sshd of our own on a free port, and the environment by which the scripts find it."""
    place = tmp_path_factory.mktemp("sshd")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / key)], check=True, timeout=30)
    shutil.copy(place / "user.pub", place / "authorized")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {place}/authorized\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    # sshd wants it when it runs as root; a service would have made it.
    separation = Path("/run/sshd")
    made = os.getuid() == 0 and not separation.exists()
    if made:
        separation.mkdir(mode=0o755)
    server = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(place / "config")], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(100):
            assert server.poll() is None, server.stderr.read()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield {
            "REMOTE_HOST": "127.0.0.1",
            "REMOTE_USER": getpass.getuser(),
            "REMOTE_PORT": str(port),
            "REMOTE_SSH_OPTIONS": f"-i {place}/user -o IdentitiesOnly=yes -o StrictHostKeyChecking=no "
            f"-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -F none",
        }
    finally:
        server.terminate()
        server.communicate(timeout=20)
        if made:
            separation.rmdir()


@pytest.fixture
def tree(tmp_path) -> Path:
    """A working tree with the scripts, with code under names like those of data, and with what must stay here."""
    tree = tmp_path / "my tree"
    shutil.copytree(ROOT / "scripts", tree / "scripts")
    for name in ("lit_models/data/text.py", "conf/data/text.yaml", "lightning_npu_tp/models/file_names.py", "train.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("code\n")
    for name in (
        ".git/HEAD", ".venv/bin/python", ".venv-npu/x", "data/corpus.txt", "runs/a/metrics.csv", "checkpoints/a.txt",
        "my/checkpoints/b.txt", "last.ckpt/manifest.json", "model.safetensors", "a/__0_0.distcp", "part.parquet",
        "lightning_logs/x", "lightning_npu_tp/__pycache__/x.pyc", ".mypy_cache/x", "remote-report.md",
    ):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("stays here\n")
    return tree


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


CODE = {"lit_models/data/text.py", "conf/data/text.yaml", "lightning_npu_tp/models/file_names.py", "train.py"}


@needs_sshd
def test_code_is_copied_and_data_checkpoints_and_history_are_not(machine, tree, tmp_path) -> None:
    there = tmp_path / "over there"
    sync = tree / "scripts/sync_to_remote.sh"
    done = run(sync, "--path", there, "--dry-run", **machine)
    assert done.returncode == 0 and "would be made" in done.stdout and not there.exists(), done.stderr

    done = run(sync, "--path", there, **machine)
    assert done.returncode == 0, done.stderr
    assert files_of(there) == CODE | {f"scripts/{script.name}" for script in SCRIPTS}

    (tree / "train.py").write_text("changed and longer\n")
    (there / "old.py").write_text("of an earlier copy\n")
    (there / "runs").mkdir()
    (there / "runs/result").write_text("made there\n")
    done = run(sync, "--path", there, "--delete", "--dry-run", **machine)
    assert "train.py" in done.stdout and "old.py" in done.stdout and "nothing was copied" in done.stdout
    assert (there / "train.py").read_text() == "code\n" and (there / "old.py").exists()

    assert run(sync, "--path", there, **machine).returncode == 0
    assert (there / "train.py").read_text() == "changed and longer\n" and (there / "old.py").exists()
    assert run(sync, "--path", there, "--delete", **machine).returncode == 0
    assert not (there / "old.py").exists() and (there / "runs/result").exists()


@needs_sshd
def test_a_machine_that_does_not_answer_is_told(machine, tree) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        done = run(tree / "scripts/sync_to_remote.sh", "--port", free.getsockname()[1], **machine)
    assert done.returncode == 1 and "cannot be reached" in done.stderr


@needs_sshd
def test_the_report_of_a_real_training_run_comes_back(machine, tmp_path) -> None:
    tree, there, report = tmp_path / "tree", tmp_path / "there", tmp_path / "report.md"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("scripts", "conf", "lightning_npu_tp", "lit_models"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    shutil.copy(ROOT / "train.py", tree)
    (tree / "Makefile").write_text(MAKEFILE.format(python=sys.executable, test="echo 7 passed"))
    command = (
        tree / "scripts/test_on_remote.sh", "--path", there, "--python", "my python", "--steps", "2",
        "--accelerator", "cpu", "--report", report, "--setup", "export SET_UP=1",
        "--", "data.batch_size=1", "data.sequence_length=32", "data.max_tokens=20000", "data.max_val_tokens=2000",
        "trainer.limit_val_batches=1", "trainer.val_check_interval=2", "scheduler.warmup_steps=1",
    )  # fmt: skip
    planned = run(*command[:1], "--dry-run", *command[1:], **machine)
    assert planned.returncode == 0 and not there.exists() and "export SET_UP=1 && bash" in planned.stdout

    done = run(*command, **machine)
    assert done.returncode == 0, done.stdout + done.stderr + (report.read_text() if report.exists() else "")
    text = report.read_text()
    rows = [row.split(" | ")[:2] for row in text.splitlines() if row.startswith("| ")][1:]
    assert rows == [
        ["| install", "well"],
        ["| doctor", "well"],
        ["| make test", "well"],
        ["| hardware tests", "none in this tree"],
        ["| training, 2 steps", "well"],
    ]
    assert "made with my python" in text and "doctor was asked: doctor" in text and "7 passed" in text
    assert "validation after training" in text and "accelerator cpu, 1 device(s)" in text
    assert not (there / "runs").exists(), "the run's folder was left on the other machine"


@needs_sshd
def test_failed_steps_show_in_report_and_exit_code_and_do_not_stop_the_others(machine, tree, tmp_path) -> None:
    report = tmp_path / "report.md"
    (tree / "Makefile").write_text(MAKEFILE.format(python=sys.executable, test="echo '3 failed'; exit 5"))
    (tree / "train.py").write_text("import sys, time; print('~~~~~~~~ fence'); time.sleep(60)\n")
    (tree / "tests/hardware").mkdir(parents=True)
    (tree / "tests/hardware/test_card.py").write_text("def test_card(): assert 6 * 7 == 42\n")
    command = (tree / "scripts/test_on_remote.sh", "--path", tmp_path / "there", "--report", report, "--limit", "5")
    done = run(*command, **machine)
    assert done.returncode == 1, done.stderr
    text = report.read_text()
    assert "| make test | **failed** (2) |" in text and "3 failed" in text
    assert "| hardware tests | well |" in text and "1 passed" in text
    assert "| training, 20 steps | **ended after 5 s** |" in text
    assert text.count("\n~~~~~~\n") == 5, "an output closed the fence of its block"

    (tree / "Makefile").write_text("install:\n\texit 3\n")
    done = run(*command, **machine)
    assert done.returncode == 1 and report.read_text().count("## ") == 1
