"""The demo: which rows it asks, what it prints, the line it ends with, and how it fails."""

from __future__ import annotations

import contextlib
import gzip
import json
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from meteora_dist.cli import demo
from meteora_dist.cli.demo_display import Outcome, header, row, shortened, summary, trace
from meteora_dist.cli.demo_questions import SHORT_SHARE, TRANSPORTS, Question, read_questions, short_rows
from meteora_dist.cli.demo_replies import Reply, Token
from meteora_dist.cli.main import build_app
from meteora_dist.errors import CheckpointError
from meteora_dist.evaluation.tasks import TaskRow, read_task, split
from meteora_dist.serving.local import Endpoints
from tests.support.tiny import Spec, write_tiny_bank

ROOT = Path(__file__).parents[2]
TASKS = tuple(path.name.removesuffix(".jsonl.gz") for path in sorted((ROOT / "examples" / "data").glob("*.jsonl.gz")))
EXPERTS = ("animals", "colours", "numbers")


def write_rows(path: Path, inputs: Sequence[str]) -> Path:
    lines = (json.dumps({"input": text, "target": text.upper(), "choices": None}) for text in inputs)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def token(text: str, expert: int) -> Token:
    return Token(text, tuple(0.8 if index == expert else 0.1 for index in range(len(EXPERTS))))


def single(transport: str = "http", answer: str = "four", dominating: str | None = "numbers") -> Outcome:
    question = Question((TaskRow("2 [b]+ 2?", "four"),), ("numbers",), transport)
    return Outcome(question, (Reply(answer, (token(answer, 2),), dominating),))


def composite() -> Outcome:
    rows = tuple(TaskRow(f"what {task}?", task[:2]) for task in EXPERTS)
    tokens = (token("1. an", 0), token(" 2. co", 1), token("[/x]", 1), token("", 2))
    return Outcome(Question(rows, EXPERTS, "grpc_stream"), (Reply("1. an 2. co[/x]", tokens, "colours"),))


def conversation() -> Outcome:
    question = Question(composite().question.rows, EXPERTS, "http_stream", conversation=True)
    replies = (Reply(task[:2], (token(task[:2], index),), task) for index, task in enumerate(EXPERTS))
    return Outcome(question, tuple(replies))


def printed(*parts: object, width: int = 120, colour: bool = False) -> str:
    console = Console(width=width, force_terminal=colour, color_system="256" if colour else None, highlight=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


def test_the_demo_asks_every_task_over_every_transport_and_composites_last() -> None:
    *singles, prompt, talk = read_questions(ROOT / "examples" / "data", TASKS)
    assert len(TASKS) == 8
    assert len(singles) >= 10
    assert {question.tasks for question in singles} == {(task,) for task in TASKS}
    assert set(Counter(question.transport for question in singles)) == set(TRANSPORTS)
    for last in (prompt, talk):
        assert (last.composite, last.tasks, last.rows) == (True, TASKS[:3], prompt.rows)
    assert (len(prompt.turns), len(talk.turns)) == (1, 3)
    assert not any(question.composite for question in singles)


def test_every_row_is_held_out_and_asked_once() -> None:
    asked = [
        (task, row)
        for question in read_questions(ROOT / "examples" / "data", TASKS)[:-1]
        for task, row in zip(question.tasks, question.rows, strict=True)
    ]
    for task in TASKS:
        training, held_out = split(read_task(ROOT / "examples" / "data" / f"{task}.jsonl.gz"))
        ours = [row for name, row in asked if name == task]
        assert all(row in held_out and row not in training for row in ours)
    assert len(set(asked)) == len(asked)


def test_a_composite_prompt_numbers_its_questions_and_a_conversation_takes_them_in_turn() -> None:
    (prompt,) = composite().question.turns
    assert prompt.endswith("1. what animals?\n\n2. what colours?\n\n3. what numbers?")
    assert conversation().question.turns == ("what animals?", "what colours?", "what numbers?")
    assert conversation().question.gold == ("an", "co", "nu")


def test_short_rows_are_the_first_of_the_shortest_held_out_ones(tmp_path: Path) -> None:
    # 40 rows, of which the last 8 are held out; int(8 / 3) = 2 of those are shorter than bb, which is as long as dd
    held_out = ["c" * 9, "c", "e" * 8, "bb", "a", "f" * 7, "dd", "g" * 6]
    path = write_rows(tmp_path / "t.jsonl.gz", [*(f"{number}" for number in range(32)), *held_out])
    assert SHORT_SHARE == 1 / 3
    assert [row.input for row in short_rows(path, 3)] == ["c", "bb", "a"]
    with pytest.raises(CheckpointError, match=r"t\.jsonl\.gz: has 4 short held-out rows; the demo needs 6"):
        short_rows(path, 6)


def test_an_expert_without_a_task_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"animals\.jsonl\.gz: there is no such file"):
        read_questions(tmp_path, EXPERTS)
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder; run the demo in a checkout"):
        read_questions(tmp_path / "nowhere", EXPERTS)


def test_a_row_shows_prompt_answer_gold_expert_and_transport() -> None:
    line = printed(row(single("http_stream"), EXPERTS))
    for part in ("http_stream", "2 [b]+ 2?", "✓ four", "✓ numbers"):
        assert part in line


@pytest.mark.parametrize(("answer", "dominating", "marks"), [("five", "numbers", "✗✓"), ("four", None, "✓✗")])
def test_a_row_marks_wrong_answers_and_foreign_experts(answer: str, dominating: str | None, marks: str) -> None:
    line = printed(row(single(answer=answer, dominating=dominating), EXPERTS))
    assert "".join(letter for letter in line if letter in "✓✗") == marks


def test_rows_printed_one_by_one_line_up() -> None:
    head, first, second = (printed(part) for part in (header(), row(single(), EXPERTS), row(composite(), EXPERTS)))
    place = head.index("prompt")
    assert first.index("numbers") == second.index("animals + colours") == place
    assert max(len(line) for line in printed(row(composite(), EXPERTS), width=80).splitlines()) <= 80


def test_a_failed_row_says_why() -> None:
    failed = Outcome(single().question, (), "HTTP 503: the engine is starting")
    assert "failed: HTTP 503" in printed(row(failed, EXPERTS))


def test_a_row_of_several_tasks_shows_every_answer_and_whose_tokens_they_are() -> None:
    line = printed(row(conversation(), EXPERTS))
    for part in ("animals, then colours, then", "1. an", "2. co", "3. nu", "numbers: 1 tokens"):
        assert part in line
    assert "✓" not in line


def test_the_trace_names_the_expert_wherever_it_changes_without_colours() -> None:
    lines = printed(trace(composite(), EXPERTS)).splitlines()
    assert lines[2:] == [
        "  [1]1. an[2] 2. co[/x][3]·",
        "[2] colours: 2 tokens, 45% of the gate weight",
        "[1] animals: 1 tokens, 28% of the gate weight",
        "[3] numbers: 1 tokens, 28% of the gate weight",
    ]


def test_the_trace_of_a_conversation_has_a_line_for_each_answer() -> None:
    assert printed(trace(conversation(), EXPERTS)).splitlines()[2:5] == ["  [1]an", "  [2]co", "  [3]nu"]


def test_the_trace_gives_every_expert_a_colour_of_its_own() -> None:
    many = tuple(f"e{index}" for index in range(8))
    tokens = tuple(Token(name, tuple(float(index == place) for place in range(8))) for index, name in enumerate(many))
    outcome = Outcome(composite().question, (Reply("", tokens, None),))
    text = printed(trace(outcome, many), colour=True)
    assert len({text[: text.index(f"{name}\x1b")].rpartition("\x1b[")[2] for name in many}) == 8


def test_the_summary_counts_single_task_prompts_alone() -> None:
    outcomes = [single("http"), single("grpc", dominating="animals"), composite(), conversation()]
    assert summary(2, 3, outcomes) == (
        "DEMO OK ranks=2 experts=3 http=ok http_stream=ok grpc=ok grpc_stream=ok routed_to_own_task=1/2"
    )


def test_the_failure_line_names_the_transport_and_the_reason_on_one_line() -> None:
    failed = Outcome(single("http_stream").question, (), "HTTP 500:\nthe rank is gone")
    line = summary(2, 3, [single("http"), failed, composite()])
    assert line.startswith("DEMO FAILED ranks=2 experts=3 http=ok http_stream=failed grpc=ok grpc_stream=ok ")
    assert line.endswith(": http_stream, numbers: HTTP 500: the rank is gone")


def test_shortened_text_keeps_both_ends() -> None:
    assert shortened("  a\n b ", 5) == "a b"
    assert shortened("abcdefghij", 5) == "ab…ij"


def test_free_ports_are_free_different_and_outside_rays() -> None:
    ports = demo.free_ports(2)
    assert len(set(ports)) == 2
    for port in ports:
        assert not 10_002 <= port <= 19_999
        with socket.socket() as probe:
            probe.bind(("", port))


def run_demo(*arguments: str):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(build_app(["demo"]), ["demo", *arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_outside_a_checkout_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_demo()
    assert result.exit_code == 1
    assert result.output.startswith("DEMO FAILED examples/bank: there is no such folder; run the demo in a checkout")


def test_a_service_that_does_not_answer_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    bank = write_tiny_bank(tiny_base, tmp_path, {task: Spec(2, 4) for task in TASKS[:2]})
    http, grpc = demo.free_ports(2)

    @contextlib.contextmanager
    def nobody_there(*_: object) -> Iterator[Endpoints]:
        yield Endpoints(f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}")

    monkeypatch.setattr(demo, "running_service", nobody_there)
    monkeypatch.setattr(demo, "damage", lambda folder: None)
    monkeypatch.chdir(ROOT)
    result = run_demo("--bank", str(bank.path))
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert last.startswith("DEMO FAILED grpc, ListExperts: UNAVAILABLE")


def test_on_a_pipe_every_step_is_one_line() -> None:
    console = Console(width=120, force_terminal=False, highlight=False)
    with console.capture() as capture, demo.Activity(console) as activity:
        activity.begin("starting")
        activity.update("starting: half way")
        activity.begin("stopping")
    assert capture.get() == "starting\nstopping\n"
