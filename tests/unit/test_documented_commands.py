"""Catches: a command in README.md or docs/ that no test runs and nobody excused, an excuse or a test that is gone, an
option or setting that does not exist, a link or an anchor that leads nowhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import documented
import pytest
from documented import NOT_RUN, PAGES, ROOT, RUN_AS_WRITTEN, RUN_BY, matches, words

COMMANDS = documented.commands()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_run_by_a_test_or_excused(command: str) -> None:
    run = [pattern for pattern in (*RUN_BY, *RUN_AS_WRITTEN) if matches(pattern, command)]
    excused = [pattern for pattern in NOT_RUN if matches(pattern, command)]
    where = ", ".join(COMMANDS[command])
    assert run or excused, f"{where}: `{command}` is in no table of tests/documented.py"
    assert not (run and excused), f"{where}: {run} run it, and {excused} say that nobody does"


@pytest.mark.parametrize("pattern", [*RUN_BY, *RUN_AS_WRITTEN, *NOT_RUN])
def test_the_tables_hold_nothing_that_is_no_longer_shown(pattern: str) -> None:
    assert any(matches(pattern, command) for command in COMMANDS)


def test_the_pages_are_read() -> None:
    assert len(COMMANDS) > 50 and COMMANDS["python train.py"]
    assert documented.without_comment("a 'b # c' d#e  # f") == "a 'b # c' d#e"
    # Continuation lines are one command, whatever page it is on.
    assert any("-- experiment=deepseek_v2_lite_4npu" in command for command in COMMANDS)


@pytest.mark.parametrize("pattern", RUN_BY)
def test_the_named_tests_hold_the_commands_essence(pattern: str) -> None:
    for test, essence in RUN_BY[pattern].items():
        path, _, name = test.partition("::")
        text = with_what_it_uses(ROOT / path, name)
        assert essence and not [part for part in essence if part not in text], test


def with_what_it_uses(file: Path, name: str) -> str:
    """The source of a test, and of the functions, fixtures and constants of its file that it uses."""
    source = file.read_text()
    defined: dict[str, str] = {}
    # Calls beside all functions, such as `app.command()(inspect)`.
    calls = [ast.unparse(node) for node in ast.parse(source).body if isinstance(getattr(node, "value", 0), ast.Call)]
    for node in ast.parse(source).body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = text
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id: text for target in targets if isinstance(target, ast.Name)}
    assert name in defined, f"{file} has no {name}"
    used, left = {name}, [name]
    while left:
        found = set(re.findall(r"\w+", defined[left.pop()])) & defined.keys() - used
        used |= found
        left += found
    return "\n".join([*calls, *(defined[one] for one in sorted(used))])


# --- what commands name exists --------------------------------------------------------------------


def test_options_of_the_commands_exist() -> None:
    import typer

    from lightning_npu_tp.tools.cli import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = set()
    for command in COMMANDS:
        for part in re.split(r"(?<= )-- ", command):
            given = words(part.replace("[", "").replace("]", ""))
            if not given[0].endswith("lightning-npu-tp"):
                continue
            name = given[1]
            options = {option for parameter in known[name].params for option in parameter.opts}
            unknown = [word for word in given[2:] if word.startswith("-") and word != "--" and word not in options]
            assert not unknown, f"{command}: {name} has no {unknown}"
            seen.add(name)
    # Each has a section.
    assert seen == known.keys()
    page = (ROOT / "docs" / "commands.md").read_text()
    assert not [name for name in known if f"\n## {name}\n" not in page]


def settings(command: str) -> list[str]:
    """The settings of train.py that a command gives, the first value of each in a sweep."""
    given = words(command)
    if "train.py" not in given:
        return []
    given = given[given.index("train.py") + 1 :]
    sweeps = "-m" in given
    # Of Hydra itself and of its plugins, which need not be installed.
    found = [word for word in given if not word.startswith(("-", "hydra"))]
    return [word.split(",")[0] for word in found] if sweeps else found


@pytest.mark.parametrize("command", [command for command in COMMANDS if settings(command)])
def test_settings_of_train_py_exist(command: str) -> None:
    from hydra import compose, initialize_config_dir

    from lit_models.run.run_folder import register_resolvers

    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("train", settings(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_files_and_targets_that_a_command_names_exist(command: str) -> None:
    for word in words(command):
        if re.fullmatch(r"(?:benchmarks|examples|scripts|tests)/[\w/]+\.(?:py|sh)", word):
            assert (ROOT / word).is_file(), f"{COMMANDS[command]}: {word} does not exist"
    if command.startswith("make "):
        target = words(command)[1]
        assert re.search(rf"(?m)^{re.escape(target)}:", (ROOT / "Makefile").read_text()), f"no target {target}"


# --- links ----------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^```.*?^```$", "", text))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text())):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = next(n for n in range(len(found) + 1) if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
            if not re.match(r"[a-z]+:", target):
                yield page, target


@pytest.mark.parametrize(("page", "target"), [pytest.param(*link, id=f"{link[0].stem}-{link[1]}") for link in links()])
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    place = (page.parent / path).resolve() if path else page
    assert place.exists() and place.is_relative_to(ROOT), f"{page.name} links to {target}, which is not there"
    if anchor:
        assert anchor in anchors(place), f"{place.name} has no heading #{anchor}; it has {sorted(anchors(place))}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {target.partition("#")[0] for page, target in links() if page.name == "README.md"}
    assert not [page.name for page in PAGES[1:] if f"docs/{page.name}" not in linked]
