"""``meteora demo``: eight experts on two ranks, asked over HTTP and gRPC, and how each token was routed."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from meteora_dist.bank.bank import MANIFEST_FILE
from meteora_dist.bank.manifest import read_manifest
from meteora_dist.cli.demo_display import Outcome, header, one_line, row, summary, trace
from meteora_dist.cli.demo_questions import Question, read_questions
from meteora_dist.cli.demo_replies import AskFailed
from meteora_dist.cli.demo_transports import Client, connected
from meteora_dist.cli.fetch_demo import StepProgress
from meteora_dist.errors import BankError, EngineUnavailable, MeteoraError
from meteora_dist.model.demo_model import damage, demo_model_dir, fetch
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.local import Endpoints, running_service

DATA = Path("examples/data")
DEMO_BANK = Path("examples/bank")
RANKS = 2

# Below the ports Linux gives to whoever asks for any, and above those of Ray's workers.
_PORTS = range(20_000, 32_768)
_KV_CACHE_TOKENS = 8_192
_PIPE_WIDTH = 120


def command(
    bank: Annotated[Path, typer.Option(help="Folder of the bank; every expert is named after its task.")] = DEMO_BANK,
) -> None:
    """Serve the demo bank from two ranks, question it over HTTP and gRPC, and show which experts answered.

    Run it in a checkout of the repository. It starts a Ray of its own and leaves nothing running.

    Example: meteora demo --bank examples/bank
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    # A service manager ends us with SIGTERM; it has to clean up as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        line, good = _demo(console, bank)
    except MeteoraError as error:
        line, good = f"DEMO FAILED {one_line(str(error))}", False
    except Exception as error:
        traceback.print_exc()
        line, good = f"DEMO FAILED {type(error).__name__}: {one_line(str(error))}", False
    except KeyboardInterrupt:
        line, good = "DEMO FAILED it was interrupted", False
    finally:
        signal.signal(signal.SIGTERM, before)
    typer.echo(line)
    if not good:
        raise typer.Exit(1)


class Activity(AbstractContextManager["Activity"]):
    """Shows what is under way: a spinner with the time on a terminal, one line for each step elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._started = monotonic()

    def __enter__(self) -> Activity:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, step: str) -> None:
        """Shows a step in place of the one before."""
        self._started = monotonic()
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(step)
        if self._progress.disable:
            self._console.print(step)

    def update(self, step: str) -> None:
        """Says more of the step that is under way."""
        for task in self._progress.task_ids:
            self._progress.update(task, description=step)

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return monotonic() - self._started


def _demo(console: Console, bank: Path) -> tuple[str, bool]:
    """Runs everything; the line to end with, and whether all went well."""
    if not bank.is_dir():
        raise BankError(bank, "there is no such folder; run the demo in a checkout of the repository, or give --bank")
    experts = [expert.name for expert in read_manifest(bank / MANIFEST_FILE).experts]
    questions = read_questions(DATA, experts)
    if damage(demo_model_dir()) is not None:
        with StepProgress(console) as report:
            fetch(report)
    config = ServiceConfig(model=demo_model_dir(), bank=bank, ep=RANKS, kv_cache_tokens=_KV_CACHE_TOKENS, access="open")
    http_port, grpc_port = free_ports(2)
    with Activity(console) as activity:
        activity.begin(f"Starting Ray and {RANKS} ranks with {bank}, {len(experts)} experts")
        with running_service(config, http_port, grpc_port) as endpoints:
            console.print(f"{RANKS} ranks are ready after {activity.seconds:.0f} s: {endpoints.http}, {endpoints.grpc}")
            activity.begin(f"Asking {len(questions)} questions")
            outcomes = asyncio.run(_ask_all(endpoints, questions, experts, console, activity))
            activity.begin("Stopping Ray and the ranks")
    single = [outcome for outcome in outcomes if not outcome.question.composite]
    console.print(f"right answers: {sum(outcome.right for outcome in single)} of {len(single)}")
    return summary(RANKS, len(experts), outcomes), all(outcome.replies for outcome in outcomes)


async def _ask_all(
    endpoints: Endpoints, questions: Sequence[Question], experts: Sequence[str], console: Console, activity: Activity
) -> list[Outcome]:
    """Sends all questions at once, and prints the answers in the order of the questions as they arrive."""
    arrived: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        arrived.append(outcome)
        activity.update(f"Asking {len(questions)} questions: {len(arrived)} answered")

    async with connected(endpoints) as client:
        served = await client.experts()
        if served != tuple(experts):
            raise EngineUnavailable(f"the service serves {', '.join(served)}, not the bank's {', '.join(experts)}")
        console.print(header())
        outcomes = []
        async with asyncio.TaskGroup() as group:
            # the composite ones, last in the table, take longest: they are sent first
            calls = [group.create_task(_ask(client, question, note)) for question in reversed(questions)]
            for call in reversed(calls):
                outcomes.append(await call)
                console.print(row(outcomes[-1], experts))
    for outcome in outcomes:
        if outcome.question.composite and outcome.replies:
            console.print(trace(outcome, experts))
    return outcomes


async def _ask(client: Client, question: Question, note: Callable[[Outcome], None]) -> Outcome:
    try:
        outcome = Outcome(question, await client.ask(question))
    except AskFailed as error:
        outcome = Outcome(question, (), str(error))
    note(outcome)
    return outcome


def free_ports(count: int) -> list[int]:
    """Different TCP ports that nobody listens on, outside those that Ray and the system hand out.

    Raises:
        EngineUnavailable: There are not that many.
    """
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise EngineUnavailable(f"{len(found)} of {count} ports are free between {_PORTS.start} and {_PORTS.stop - 1}")
