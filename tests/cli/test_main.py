"""The command line's shell: help, version, errors, and that only the named command is imported."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from meteora_dist import __version__
from meteora_dist.bank import Bank
from meteora_dist.cli.main import COMMANDS, Command, build_app, main
from meteora_dist.cli.options import complete_expert
from meteora_dist.errors import BankError


def run(*arguments: str, commands: tuple[Command, ...] = COMMANDS):
    return CliRunner().invoke(build_app(arguments, commands), list(arguments))


def failing_command() -> None:
    raise BankError(Path("some/bank"), "gate digest does not match")


FAILING = Command(("fail",), __name__, "failing_command", "Fails.")


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"meteora {__version__}\n")


def test_help_fits_one_screen_and_names_every_command() -> None:
    lines = run("--help").output.splitlines()
    assert len(lines) <= 32
    for command in COMMANDS:
        assert any(command.words[0] in line for line in lines)


def test_help_of_a_group_lists_its_commands() -> None:
    result = run("bench", "--help")
    assert result.exit_code == 0
    assert "decode" in result.output


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv = ['meteora', '--help']\n"
        "from meteora_dist.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_unknown_command_is_a_usage_error() -> None:
    result = run("fetchdemo")
    assert result.exit_code == 2
    assert "fetchdemo" in result.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.words))
def test_every_listed_command_exists_and_explains_itself(command: Command) -> None:
    result = run(*command.words, "--help")
    assert result.exit_code == 0, result.exception
    assert "Usage" in result.output
    assert command.load().__doc__


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.words))
def test_every_help_has_an_example_that_can_be_typed(command: Command) -> None:
    example = re.search(r"^ *Example: (.+)$", command.load().__doc__ or "", flags=re.MULTILINE)
    assert example, "its help needs a line `Example: meteora ...`"
    program, *words = shlex.split(example[1])
    count = len(command.words)
    assert (program, tuple(words[:count])) == ("meteora", command.words)
    found = typer.main.get_command(build_app(words))
    for word in command.words:
        found = found.commands[word]
    # Unknown options, wrong values and missing arguments are errors here.
    found.make_context(words[count - 1], words[count:])


def test_brackets_in_help_are_shown() -> None:
    assert "[default: examples/bank]" in run("serve", "--help").output


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("meteora ba", ["bank"]),
        ("meteora bench ca", ["capacity"]),
        ("meteora bank remove BANK pl", ["plain"]),
        ("meteora chat --mo", ["--model"]),
    ],
)
def test_the_shell_completes(tiny_bank: Bank, typed: str, expected: list[str]) -> None:
    words = typed.replace("BANK", str(tiny_bank.path))
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_METEORA_COMPLETE": "complete_bash"}
    meteora = Path(sys.executable).with_name("meteora")
    done = subprocess.run([meteora], capture_output=True, text=True, check=True, env={**os.environ, **asked})
    assert done.stdout.split() == expected


def test_experts_of_no_bank_are_none(tmp_path: Path) -> None:
    assert complete_expert(SimpleNamespace(params={"bank": tmp_path}), "") == []  # type: ignore[arg-type]
    (tmp_path / "bank.json").write_text('{"experts": [1]}')
    assert complete_expert(SimpleNamespace(params={"bank": tmp_path}), "") == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shell", "more", "expected"),
    [
        ("zsh", {}, ['_arguments \'*: :(("capacity":"Measure what the ranks of a mesh hold."))\'']),
        ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}, ["capacity\tMeasure what the ranks of a mesh hold."]),
    ],
)
def test_other_shells_complete(shell: str, more: dict[str, str], expected: list[str]) -> None:
    asked = {"_TYPER_COMPLETE_ARGS": "meteora bench ca", "_METEORA_COMPLETE": f"complete_{shell}", **more}
    meteora = Path(sys.executable).with_name("meteora")
    done = subprocess.run([meteora], capture_output=True, text=True, check=True, env={**os.environ, **asked})
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize(
    ("shell", "begins"),
    [
        ("bash", "_meteora_completion() {"),
        ("zsh", "#compdef meteora"),
        ("fish", "complete --command meteora"),
    ],
)
def test_the_script_is_for_the_shell_that_was_named(shell: str, begins: str) -> None:
    meteora = Path(sys.executable).with_name("meteora")
    done = subprocess.run([meteora, "--show-completion", shell], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(begins)
    assert f"complete_{shell}" in done.stdout


def test_an_unknown_shell_is_refused() -> None:
    meteora = Path(sys.executable).with_name("meteora")
    done = subprocess.run([meteora, "--show-completion", "tcsh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'tcsh' is not one of" in done.stderr


def test_the_shell_is_taught_to(tmp_path: Path) -> None:
    meteora = Path(sys.executable).with_name("meteora")
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([meteora, "--install-completion", "bash"], check=True, capture_output=True, env=environment)
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert "_METEORA_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()


def test_our_error_is_one_line_on_stderr_and_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["meteora", "fail"])
    monkeypatch.setattr("meteora_dist.cli.main.build_app", lambda arguments: build_app(arguments, (*COMMANDS, FAILING)))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: some/bank: gate digest does not match\n"
