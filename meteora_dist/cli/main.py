"""The ``meteora`` command: a table of commands, of which only the one that was asked for is imported."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from meteora_dist import __version__
from meteora_dist.errors import MeteoraError


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command lives.

    Attributes:
        words: What the user types after ``meteora``.
        module: Imported only when the command is asked for: torch and ray take seconds.
        function: Its typer function in that module.
        summary: Its line in ``meteora --help``.
    """

    words: tuple[str, ...]
    module: str
    function: str
    summary: str

    def load(self) -> Callable[..., None]:
        """Imports the module and returns the function."""
        function: Callable[..., None] = getattr(importlib.import_module(self.module), self.function)
        return function


COMMANDS = (
    Command(("fetch-demo",), "meteora_dist.cli.fetch_demo", "command", "Fetch and convert the demo's base model."),
    Command(("demo",), "meteora_dist.cli.demo", "command", "Serve the demo bank from two ranks and question it."),
    Command(("serve",), "meteora_dist.cli.serve", "command", "Serve a bank over HTTP and gRPC, and stay up."),
    Command(("chat",), "meteora_dist.cli.chat.command", "chat", "Talk with a service; colours show the experts."),
    Command(("trace",), "meteora_dist.cli.trace.command", "trace", "Draw which experts wrote an answer."),
    Command(("doctor",), "meteora_dist.cli.doctor.command", "doctor", "Check this installation; say how to repair it."),
    Command(("check",), "meteora_dist.cli.check", "command", "Check a serve_config.yaml or a RayService strictly."),
    Command(("train", "gates"), "meteora_dist.cli.train", "gates", "Train the gates of a bank from data sets."),
    Command(("train", "moa"), "meteora_dist.cli.train_moa", "command", "Train layer routers and LoRAs jointly (MoA)."),
    Command(("bank", "build"), "meteora_dist.cli.bank.make", "build", "Build a bank of PEFT adapters, untrained."),
    Command(("bank", "inspect"), "meteora_dist.cli.bank.look", "inspect", "Show what a bank holds."),
    Command(("bank", "validate"), "meteora_dist.cli.bank.look", "validate", "Check every header and digest."),
    Command(("bank", "add"), "meteora_dist.cli.bank.change", "add", "Write a bank with more experts, or newer ones."),
    Command(("bank", "remove"), "meteora_dist.cli.bank.change", "remove", "Write a bank with fewer experts."),
    Command(("bank", "diff"), "meteora_dist.cli.bank.look", "diff", "Show how two banks differ."),
    Command(("bank", "pull"), "meteora_dist.cli.bank.fetch", "pull", "Fetch a bank from a hub, a store or a folder."),
    Command(
        ("bank", "import-reference"),
        "meteora_dist.cli.bank.make",
        "import_reference",
        "Make a bank of a checkpoint of MeteoRA's authors.",
    ),
    Command(("keys", "new"), "meteora_dist.cli.keys", "new", "Make an API key and its entry for the keys file."),
    Command(("plan",), "meteora_dist.cli.plan", "command", "Compute memory and traffic of the layouts that fit."),
    Command(("report", "routing"), "meteora_dist.cli.report.routing", "routing", "Draw how a bank routes data sets."),
    Command(("report", "bench"), "meteora_dist.cli.report.bench", "bench", "Draw what `meteora bench --json` wrote."),
    Command(("eval",), "meteora_dist.cli.eval", "command", "Score a bank against adapters, merges and other routers."),
    Command(("bench", "decode"), "meteora_dist.cli.bench_speed", "decode", "Measure tokens per second of decoding."),
    Command(("bench", "prefill"), "meteora_dist.cli.bench_speed", "prefill", "Measure how long prompts take."),
    Command(("bench", "scaling"), "meteora_dist.cli.bench", "scaling", "Measure two ranks against one."),
    Command(("bench", "capacity"), "meteora_dist.cli.bench", "capacity", "Measure what the ranks of a mesh hold."),
    Command(("bench", "kernels"), "meteora_dist.cli.bench_kernels", "kernels", "Measure what routing costs a layer."),
    Command(("bench", "gates"), "meteora_dist.cli.bench_training", "gates", "Measure the training of gates."),
    Command(("bench", "serve"), "meteora_dist.cli.bench_serve", "serve", "Send load to any OpenAI endpoint."),
    Command(
        ("bench", "load"), "meteora_dist.cli.bench_local", "load", "Load a local service: errors, memory, refusals."
    ),
    Command(("bench", "frontend"), "meteora_dist.cli.bench_local", "frontend", "Measure what HTTP costs."),
    Command(
        ("bench", "chaos"), "meteora_dist.cli.bench_chaos", "chaos", "Harm ranks under load: what do callers lose?"
    ),
)

GROUPS = {
    "bank": "Make, look at, change and fetch banks of experts.",
    "bench": "Measure how fast it is, how much it holds and what it survives.",
    "keys": "API keys of the service's callers.",
    "report": "Single HTML pages: how a bank routes, what was measured.",
    "train": "Make banks from adapters and data sets.",
}

_COMPLETION = ("--install-completion", "--show-completion")


def build_app(arguments: Sequence[str], commands: Sequence[Command] = COMMANDS) -> typer.Typer:
    """The typer application for one command line.

    Args:
        arguments: The command line without the program's name. The command it names is imported; the others are
            listed in the help without being imported.
        commands: The commands there are.
    """
    words = tuple(argument for argument in arguments if not argument.startswith("-"))
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.callback()(_options)
    groups: dict[str, typer.Typer] = {}
    for command in commands:
        *parents, name = command.words
        home = app
        for parent in parents:
            if parent not in groups:
                groups[parent] = typer.Typer(no_args_is_help=True, help=GROUPS[parent])
                app.add_typer(groups[parent], name=parent)
            home = groups[parent]
        asked_for = words[: len(command.words)] == command.words
        home.command(name, help=None if asked_for else command.summary)(command.load() if asked_for else _listed_only)
    return app


def main() -> None:
    """Runs the command line; one of our own errors becomes one line on stderr and exit code 1."""
    arguments = sys.argv[1:]
    if _names_shell(arguments):
        # Typer takes the name of a shell only where it may not look for the one that it was started from.
        os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    try:
        build_app(_completing() or arguments)(arguments)
    except MeteoraError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


def _names_shell(arguments: Sequence[str]) -> bool:
    """Whether completion is asked for by the name of a shell, as in ``--show-completion zsh``."""
    return len(arguments) == 2 and arguments[0] in _COMPLETION and not arguments[1].startswith("-")


def _completing() -> list[str]:
    """The words so far of the command line that a shell wants completed; none when this is no such call."""
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return typed.split()[1:] if "_METEORA_COMPLETE" in os.environ else []


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """One LLM, many LoRA experts: the model picks its adapters token by token."""


def _version(asked_for: bool) -> None:
    if asked_for:
        typer.echo(f"meteora {__version__}")
        raise typer.Exit


def _listed_only() -> None:
    """Stands in the help for a command that this command line does not name."""
