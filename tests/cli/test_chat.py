"""``meteora chat`` over the real HTTP interface: pipes, commands, colours, and answers that are stopped."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from meteora_dist.cli.chat.session import Finished, Session
from meteora_dist.client import Client, Options, Piece, RoutingTrace, TokenRouting
from meteora_dist.reports.palette import colour_of
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService, make_service, tokenizer
from tests.serving.scripted import ScriptedEngine, says
from tests.support.http import running
from tests.support.shell import Shell

__all__ = ["make_service", "tokenizer"]


@pytest.fixture
def engine(tokenizer: TextTokenizer) -> ScriptedEngine:
    return says(tokenizer, "yes")


@pytest.fixture
def url(make_service: MakeService, engine: ScriptedEngine) -> Iterator[str]:
    with running(create_api(make_service(engine, max_model_len=512))) as base:
        yield base.removesuffix("/v1")


@pytest.fixture
def pipe(url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., object]:
    """Runs the chat with these lines on stdin."""

    def run(*lines: str, options: tuple[object, ...] = ()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return Shell(monkeypatch, capfd)("chat", "--url", url, "--max-tokens", 8, *options)

    return run


def test_from_a_pipe_answers_are_plain_and_a_conversation_grows(pipe, engine: ScriptedEngine) -> None:
    said = pipe("one", "", "two", options=("--topk", 1))
    assert (said.code, said.out, said.err) == (0, "yes\nyes\n", "")
    first, second = engine.seen
    assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
    assert len(second.prompt_ids) > len(first.prompt_ids)
    assert first.routing.top_k == 1


def test_commands(pipe, engine: ScriptedEngine) -> None:
    said = pipe(
        *("/model wide", "one", "/topk 0", "/topk 3", "/clear", "/model auto", "one", "/model nobody", "/model", "/x"),
        *("/help", "/quit", "never asked"),
    )
    assert (said.code, said.out) == (0, "yes\nyes\n")
    assert len(engine.seen) == 2
    assert engine.seen[0].prompt_ids == engine.seen[1].prompt_ids
    assert engine.seen[1].routing.top_k == 3
    for text in ("wide answers from now on", "'0' is no number", "forgotten", "there is no nobody", "/quit"):
        assert text in said.err
    assert "there is no command /x; there are /model, /topk, /clear, /help, /quit" in said.err


def test_mistakes_are_a_line(pipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    said = pipe("one", "two", options=("--model", "nobody"))
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("error: there is no model 'nobody' here")
    shell = Shell(monkeypatch, capfd)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert "must start with http" in shell("chat", "--url", "localhost:1").err


class Stopping(Client):
    """A service whose answer is stopped by Ctrl-C after its first piece."""

    def __init__(self) -> None:
        pass

    def stream(self, prompt: object, **options: object) -> Iterator[Piece]:
        shares = (0.25, 0.75)
        trace = RoutingTrace(("a", "b"), (TokenRouting("so", 1, shares), TokenRouting(" far", 2, (0.0, 0.0))), "b")
        yield Piece("so far", 0, routing=trace)
        raise KeyboardInterrupt


def test_ctrl_c_stops_the_answer_and_colours_say_who_wrote_it() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="truecolor", width=200, highlight=False)
    session = Session(Stopping(), console, console, Options(model="auto"))
    session.take("a question")
    red, green, blue = (int(colour_of(1)[at : at + 2], 16) for at in (1, 3, 5))
    assert f"\x1b[38;2;{red};{green};{blue}mso\x1b[0m far" in shown.getvalue()
    assert "[stopped]" in shown.getvalue()
    assert "b: 1 tokens, 38% of the weight" in shown.getvalue()
    assert "no expert: 1 tokens" in shown.getvalue()
    assert session.messages[-1] == {"role": "assistant", "content": "so far"}
    with pytest.raises(Finished):
        session.take("/quit")
