"""A mutation run: one arithmetic line is made wrong at a time; what notices it, unit tests or `prove`?

    python benchmarks/mutations.py --list
    python benchmarks/mutations.py --json FILE.json [--shard 1/2] [--only kernels/plain.py]

Every function of `kernels/`, `models/layers/`, `models/moe/` and `parallel/` is changed in a copy of the tree: signs,
operators, factors dropped, numbers off by one, comparisons, masks and reductions left out, statements dropped. A mutant
is killed by the unit tests that execute its lines (a traced session finds them first), else by `prove` in the layouts
of LAYOUTS, or else it survives: it is equivalent, or a test is missing. An unchanged tree is tried first: it must
survive, or the run ends.

Each mutant is a fork of a process that has imported torch and transformers, and nothing of ours. It takes some seconds
of one core, a survivor a minute. Linux only.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lightning_npu_tp"
ROOMS = ("kernels", "models/layers", "models/moe", "parallel")
# Those that meet the arithmetic are found by the lines that they execute.
UNIT_TESTS = tuple(
    f"tests/unit/{room}"
    for room in ("kernels", "models", "parallel", "convert", "callbacks", "trainer", "lit_models/test_lit_model.py")
)
TEST_SECONDS, PROOF_SECONDS = 120.0, 300.0
KILLED, SURVIVED = "killed", "survived"

# family, (data, tensor, expert), options: between them every option and both forms of attention.
LAYOUTS: tuple[tuple[str, tuple[int, int, int], dict[str, Any]], ...] = (
    ("deepseek_v2", (1, 2, 2), {}),
    ("deepseek_v3", (2, 2, 4), {"sequence_parallel": True, "recompute": "block"}),
    ("qwen3_moe", (2, 2, 2), {"data_parallel": "replicate", "dispatch": "all_to_all"}),
    ("mixtral", (1, 4, 4), {"sequence_parallel": True, "recompute": "moe"}),
)

_OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}
_COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
# Parts of a definition; a call has keywords too.
_NO_ARITHMETIC = frozenset("annotation returns decorator_list bases keywords".split())
# x.f(...) becomes x: what was done to x is left out.
_DROPPED = frozenset(
    "abs clamp clamp_ clamp_min cumsum detach div_ div exp flip float long masked_fill masked_fill_ mean mul mul_ neg "
    "pow rsqrt sigmoid softmax sqrt square sum tril tril_ triu triu_ transpose add add_ sub sub_ sort zero_ fill_ "
    "index_add_ logsumexp amax".split()
)


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    file: path under the package; line: first of the statement; last: its last line; number: of the change in the file.
    """

    file: str
    number: int
    line: int
    last: int
    function: str
    change: str

    @property
    def key(self) -> str:
        """The mutant by its words, which survive a change elsewhere in the file."""
        return f"{self.file} {self.function}: {self.change}"


class Mutator:
    """All changes of one file, found in one walk; `source(number)` is the file with one of them made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text())
        self.mutants: list[Mutant] = []
        self._apply: list[tuple[list[Any], Callable[[ast.AST], ast.AST]]] = []
        self._walk(self.tree, [], "", None)

    def source(self, number: int) -> str:
        """The file's text with this change made."""
        way, change = self._apply[number]
        tree = deepcopy(self.tree)
        *before, (field, index) = way
        at: Any = tree
        for name, i in before:
            at = getattr(at, name) if i is None else getattr(at, name)[i]
        old = getattr(at, field) if index is None else getattr(at, field)[index]
        new = ast.copy_location(change(old), old)
        if index is None:
            setattr(at, field, new)
        else:
            getattr(at, field)[index] = new
        return ast.unparse(ast.fix_missing_locations(tree))

    def _walk(self, node: ast.AST, way: list[Any], function: str, statement: ast.stmt | None) -> None:
        if isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            statement = node
        inside = statement is not None and "." in f"{function}." and function
        if inside:
            for text, change in changes(node):
                self._add(node, way, function, statement, text, change)
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            return
        for field, value in ast.iter_fields(node):
            if field in {"annotation", "returns", "decorator_list", "bases", "keywords"} and not isinstance(
                node, ast.Call
            ):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    self._walk(child, [*way, (field, index)], function, statement)

    def _add(self, node: Any, way: list[Any], function: str, statement: Any, text: str, change: Any) -> None:
        # A compound statement is executed where its head is.
        last = statement.body[0].lineno - 1 if hasattr(statement, "body") else statement.end_lineno
        first = getattr(node, "lineno", statement.lineno)
        shown = ast.unparse(node).splitlines()[0]
        shown = shown if len(shown) < 90 else shown[:87] + "..."
        words = f"{shown} -> {text}"
        again = sum(other.function == function and other.change.startswith(words) for other in self.mutants)
        words += f" ({again + 1})" if again else ""
        mutant = Mutant(
            str(self.path.relative_to(PACKAGE)),
            len(self.mutants),
            min(first, statement.lineno),
            max(last, statement.lineno),
            function,
            words,
        )
        self.mutants.append(mutant)
        self._apply.append((way, change))


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[Any], ast.AST]]]:
    """What can be made wrong at this node, each as words and a function that makes it so of a copy."""

    def field(name: str, value: Any) -> Callable[[Any], ast.AST]:
        def change(copy: Any) -> ast.AST:
            setattr(copy, name, value)
            return copy

        return change

    if isinstance(node, ast.BinOp):
        yield from ((other.__name__, field("op", other())) for other in _OPERATORS.get(type(node.op), ()))
        yield "left side", lambda copy: copy.left
        if isinstance(node.op, (ast.Mult, ast.Add, ast.BitAnd, ast.BitOr)):
            yield "right side", lambda copy: copy.right
    elif isinstance(node, ast.AugAssign):
        yield from ((other.__name__, field("op", other())) for other in _OPERATORS.get(type(node.op), ()))
        yield "left out", lambda copy: ast.Pass()
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int):
            # A dimension counted from the end, as a rule; its number is not walked into.
            yield str(-node.operand.value - 1), lambda copy: ast.Constant(-copy.operand.value - 1)
        else:
            yield "operand", lambda copy: copy.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = _COMPARISONS[type(node.ops[0])]
        yield other.__name__, field("ops", [other()])
    elif isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield other.__name__, field("op", other())
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.IfExp):
        yield "body", lambda copy: copy.body
        yield "else", lambda copy: copy.orelse
    elif isinstance(node, ast.If):
        if not isinstance(node.body[-1], ast.Raise):
            yield "always", field("test", ast.Constant(True))
            yield "never", field("test", ast.Constant(False))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "left out", lambda copy: ast.Pass()
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _constants(node: ast.Constant) -> Iterator[tuple[str, Callable[[Any], ast.AST]]]:
    value = node.value
    if isinstance(value, bool):
        yield str(not value), lambda copy: ast.Constant(not value)
    elif isinstance(value, int):
        yield str(value + 1), lambda copy: ast.Constant(value + 1)
    elif isinstance(value, float):
        yield str(value * 2 or 1.0), lambda copy: ast.Constant(value * 2 or 1.0)


def _calls(node: ast.Call) -> Iterator[tuple[str, Callable[[Any], ast.AST]]]:
    function = node.func
    if not isinstance(function, ast.Attribute):
        return
    on_torch = isinstance(function.value, ast.Name) and function.value.id in {"torch", "F", "functional"}
    if function.attr in _DROPPED and not on_torch:
        yield f"without .{function.attr}", lambda copy: copy.func.value
    if function.attr in _DROPPED and on_torch and node.args:
        yield f"without {function.attr}", lambda copy: copy.args[0]
    if function.attr == "where" and len(node.args) == 3:
        yield "where: first", lambda copy: copy.args[1]
        yield "where: second", lambda copy: copy.args[2]
    for name, other in (("sum", "mean"), ("mean", "sum"), ("cos", "sin"), ("sin", "cos"), ("amax", "amin")):
        if function.attr == name:
            yield f".{other}", _renamed(other)


def _renamed(name: str) -> Callable[[Any], ast.AST]:
    def change(copy: Any) -> ast.AST:
        copy.func.attr = name
        return copy

    return change


def all_mutators(only: str | None) -> list[Mutator]:
    """Of every file of ROOMS whose path has `only` in it."""
    files = [file for room in ROOMS for file in sorted((PACKAGE / room).glob("*.py"))]
    return [Mutator(file) for file in files if only is None or only in str(file)]


# ---- What runs in forks of this process ----


def forked(function: Callable[[], str], log: Path, seconds: float) -> str:
    """The text that `function` returns in a fork; "" for none, "died" or "time-out". Its output goes to `log`."""
    answer = log.with_suffix(".answer")
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        try:
            answer.write_text(function())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        # Its ranks and what they started.
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    if time.monotonic() >= end:
        return "time-out"
    return answer.read_text() if answer.exists() else "died"


# What this process has imported before pytest is no mistake of the tests.
_QUIET = ("-W", "ignore:Module already imported")


def run_tests(tree: Path, tests: list[str]) -> str:
    """The first of the tests that fails, "" where all pass; in a fork."""
    import pytest

    failed: list[str] = []

    class Note:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                failed.append(f"collecting {report.nodeid}")

    os.chdir(tree)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *_QUIET, *tests], plugins=[Note()])
    return failed[0] if failed else "" if code == 0 else f"pytest {code}"


def trace_tests(tree: Path, into: Path) -> str:
    """Write which lines of ROOMS each passing unit test executes, and its seconds; in a fork."""
    import pytest

    prefix = tuple(str(tree / "lightning_npu_tp" / room) + "/" for room in ROOMS)
    lines: set[tuple[str, int]] = set()
    found: dict[str, Any] = {}
    cut = len(str(tree / "lightning_npu_tp")) + 1

    def line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            lines.add((frame.f_code.co_filename[cut:], frame.f_lineno))
        return line

    def call(frame: Any, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(prefix) else None

    class Note:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Any:
            lines.clear()
            start = time.monotonic()
            sys.settrace(call)
            try:
                return (yield)
            finally:
                sys.settrace(None)
                found[item.nodeid] = (time.monotonic() - start, sorted(lines))

    os.chdir(tree)
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *_QUIET, "-m", "not full", *UNIT_TESTS]
    code = pytest.main(arguments, plugins=[Note()])
    into.write_text(json.dumps(found))
    return f"traced, pytest {code:d}"


def _problem_file(tree: Path, number: int) -> Path:
    return tree / f"problem_{number}.pickle"


def write_problems(tree: Path) -> str:
    """One process's answers for LAYOUTS, of the unchanged tree: a mutant is not compared with itself; in a fork."""
    prove, testing = (importlib.import_module(f"lightning_npu_tp.tools.{name}") for name in ("prove", "testing.models"))
    layouts = importlib.import_module("lightning_npu_tp.parallel.layout")
    for number, (family, sizes, _) in enumerate(LAYOUTS):
        config = testing.tiny_config(family, num_attention_heads=4, num_key_value_heads=4)
        problem = prove.Problem.of(config, layouts.Layout(*sizes), reshard=False)
        # The plan knows functions; it is made again of the config.
        parts = (problem.training, problem.expected, problem.counts, problem.kinds)
        _problem_file(tree, number).write_bytes(pickle.dumps(parts))
    return "written"


def run_proofs(tree: Path) -> str:
    """The first of LAYOUTS that does not hold, "" where all do; in a fork."""
    ranks = importlib.import_module("lightning_npu_tp.tools.testing.ranks")
    ranks.get_context = lambda _: multiprocessing.get_context("fork")
    try:
        prove = importlib.import_module("lightning_npu_tp.tools.prove")
        convert = importlib.import_module("lightning_npu_tp.convert.convert")
        layouts = importlib.import_module("lightning_npu_tp.parallel.layout")
        for number, (family, sizes, options) in enumerate(LAYOUTS):
            training, *answers = pickle.loads(_problem_file(tree, number).read_bytes())
            problem = prove.Problem(prove.plan_of(training.config), training, *answers)
            proof = prove.examine(problem, layouts.Layout(*sizes), convert.Options(**options), timeout=60.0)
            if proof.failed:
                return f"prove {family} {sizes}: {proof.failed[0].name}"
    except Exception as error:
        return f"prove: {type(error).__name__}: {str(error)[:200]}"
    return ""


class Copy:
    """A copy of the tree in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        keep = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", ".*_cache")
        shutil.copytree(ROOT, self.tree, ignore=keep)
        self.log = folder / "log.txt"
        sys.path.insert(0, str(self.tree))
        os.environ["PYTHONPATH"] = str(self.tree)
        # A mutated file's bytecode must not meet the next mutant's source of the same second and size.
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

    @contextlib.contextmanager
    def changed(self, file: str, source: str) -> Iterator[None]:
        """While inside, `file` of the package is `source`."""
        path = self.tree / "lightning_npu_tp" / file
        before = path.read_text()
        path.write_text(source)
        # Bytecode of the unchanged file, made while tracing.
        for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
            cached.unlink()
        try:
            yield
        finally:
            path.write_text(before)

    def judge(self, tests: list[str]) -> tuple[str, str]:
        """Whether the tree as it is now is noticed, and by what."""
        by = forked(lambda: run_tests(self.tree, tests), self.log, TEST_SECONDS) if tests else ""
        by = by or forked(lambda: run_proofs(self.tree), self.log, PROOF_SECONDS)
        return (KILLED, by) if by else (SURVIVED, "")


def tests_of(mutant: Mutant, traced: dict[str, Any]) -> list[str]:
    """The unit tests that execute the mutant's statement, the quickest first, at most a minute's worth."""
    found, seconds = [], 0.0
    for name, (took, lines) in sorted(traced.items(), key=lambda item: item[1][0]):
        if any(file == mutant.file and mutant.line <= line <= mutant.last for file, line in lines):
            seconds += took
            if seconds > 60:
                break
            found.append(name)
    return found


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--only", help="part of a file's path")
    parser.add_argument("--shard", default="1/1", help="K/N: each N-th mutant, from the K-th")
    parser.add_argument("--json", type=Path, help="gets a line as each mutant is judged; those in it are passed over")
    arguments = parser.parse_args()
    mutators = all_mutators(arguments.only)
    shard, shards = map(int, arguments.shard.split("/"))
    chosen = [(mutator, m) for mutator in mutators for m in mutator.mutants][shard - 1 :: shards]
    if arguments.list:
        for _, mutant in chosen:
            print(f"{mutant.file}:{mutant.line} {mutant.function}: {mutant.change}")
        print(f"{len(chosen)} mutants in {len(mutators)} files")
        return 0
    done = {}
    if arguments.json and arguments.json.exists():
        done = {row["key"]: row for row in map(json.loads, arguments.json.read_text().splitlines())}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    with tempfile.TemporaryDirectory(prefix="mutations_") as folder:
        copy = Copy(Path(folder))
        for name in (
            "torch",
            "lightning",
            "transformers",
            "pytest",
            "torch.distributed.tensor",
            "torch.distributed.fsdp",
        ):
            importlib.import_module(name)
        for family in ("deepseek_v2", "deepseek_v3", "qwen3_moe", "mixtral"):
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        sys.modules["torch"].set_num_threads(1)
        traces = Path(folder) / "traces.json"
        done_so = forked(lambda: trace_tests(copy.tree, traces), copy.log, 1800)
        assert done_so == "traced, pytest 0", done_so + copy.log.read_text()[-3000:]
        traced = json.loads(traces.read_text())
        assert forked(lambda: write_problems(copy.tree), copy.log, 300) == "written", copy.log.read_text()[-3000:]
        every = [name for name, (took, lines) in traced.items() if lines and took < 1]
        state, by = copy.judge(every)
        if state != SURVIVED:
            print(f"the unchanged tree fails: {by}\n{copy.log.read_text()[-3000:]}", file=sys.stderr)
            return 2
        for index, (mutator, mutant) in enumerate(chosen):
            if mutant.key in done:
                continue
            tests = tests_of(mutant, traced)
            with copy.changed(mutant.file, mutator.source(mutant.number)):
                state, by = copy.judge(tests)
            row = {"key": mutant.key, "state": state, "by": by, "tests": len(tests), **asdict(mutant)}
            print(f"{index + 1}/{len(chosen)} {state}: {mutant.key} [{by}]", flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
