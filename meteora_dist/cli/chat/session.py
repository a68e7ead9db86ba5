"""A conversation with a service, from lines the user types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console

from meteora_dist.cli.chat.display import AnswerDisplay
from meteora_dist.client import Client, Message, Options, Routing
from meteora_dist.errors import MeteoraError

COMMANDS = """\
/model NAME   who answers: auto, an expert, a blend, base; without NAME: what there is
/topk N       experts a token uses under auto; without N: as the bank has it
/clear        forget the conversation
/help         this
/quit         the end; Ctrl-D too
Ctrl-C stops an answer."""


class Finished(Exception):
    """The user has had enough."""


@dataclass
class Session:
    """The state of a chat.

    Attributes:
        client: Of the service, opened.
        console: Where answers go.
        notes: Where everything else goes.
        options: Of every call; the model among them.
        top_k: Experts a token uses under ``auto``; None for the bank's.
        messages: The conversation so far.
    """

    client: Client
    console: Console
    notes: Console
    options: Options
    top_k: int | None = None
    messages: list[Message] = field(default_factory=list)

    def take(self, line: str) -> None:
        """Does what a line asks for.

        Raises:
            Finished: It was ``/quit``.
            MeteoraError: The service refused, or cannot be reached; the conversation is as it was before.
        """
        line = line.strip()
        if line.startswith("/"):
            self._command(*line.partition(" ")[::2])
        elif line:
            self._ask(line)

    def _ask(self, question: str) -> None:
        messages: list[Message] = [*self.messages, {"role": "user", "content": question}]
        display = AnswerDisplay(self.console)
        options: Options = {**self.options, "routing": Routing(top_k=self.top_k, trace=True)}
        try:
            for piece in self.client.stream(messages, **options):
                display.show(piece)
        except KeyboardInterrupt:
            self.console.print(" [stopped]", style="dim", markup=False, end="")
        except MeteoraError:
            if display.text:
                self.console.print()
            raise
        display.end()
        self.messages = [*messages, {"role": "assistant", "content": display.text}]

    def _command(self, name: str, value: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/model": self._model,
            "/topk": self._topk,
            "/clear": self._clear,
            "/help": self._help,
            "/quit": self._quit,
        }
        if name not in commands:
            self._say(f"there is no command {name}; there are {', '.join(commands)}")
            return
        commands[name](value.strip())

    def _model(self, name: str) -> None:
        if not name:
            self._say(f"{self.options['model']} answers; there are {', '.join(self.client.models())}")
            return
        names = self.client.models()
        # A blend names experts with weights; the service checks those.
        if ":" not in name and name not in names:
            self._say(f"there is no {name}; there are {', '.join(names)}, and blends such as a:0.7,b:0.3")
            return
        self.options["model"] = name
        self._say(f"{name} answers from now on")

    def _topk(self, value: str) -> None:
        if value and (not value.isdecimal() or int(value) < 1):
            self._say(f"{value!r} is no number of experts; write one from 1, such as /topk 2")
            return
        self.top_k = int(value) if value else None
        self._say(f"{value or 'as many experts as the bank says'} a token")

    def _clear(self, _: str) -> None:
        self.messages = []
        self._say("forgotten")

    def _help(self, _: str) -> None:
        self._say(COMMANDS)

    def _quit(self, _: str) -> None:
        raise Finished

    def _say(self, text: str) -> None:
        self.notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
