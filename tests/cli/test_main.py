"""The command line's shell: help, version, errors, and that only the named command is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meteora_dist import __version__
from meteora_dist.cli.main import COMMANDS, Command, build_app, main
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
    assert len(lines) <= 24
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
