"""``meteora chat``: a conversation in the terminal."""

from __future__ import annotations

import sys

from rich.console import Console

from meteora_dist.cli.chat.session import Finished, Session
from meteora_dist.cli.service_options import URL, ApiKey, Experts, MaxTokens, Model, Seed, Temperature, Url
from meteora_dist.client import Client, Options
from meteora_dist.errors import MeteoraError


def chat(
    url: Url = URL,
    model: Model = "auto",
    top_k: Experts = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    api_key: ApiKey = None,
) -> None:
    """Talk with a running service; every token has the colour of the expert with the largest share of it.

    /help lists the chat's commands. Ctrl-C stops an answer, Ctrl-D ends the chat. From a pipe, every line is a
    question of one conversation, and a failure ends it with exit code 1.

    Example: meteora chat --url grpc://127.0.0.1:9000 --model auto
    """
    options = Options(model=model, max_tokens=max_tokens, temperature=temperature)
    if seed is not None:
        options["seed"] = seed
    console = Console(highlight=False)
    with Client(url, api_key=api_key) as client:
        session = Session(client, console, Console(stderr=not console.is_terminal, highlight=False), options, top_k)
        if not sys.stdin.isatty():
            _read_pipe(session)
            return
        names = client.models()
        console.print(f"{url}: {len(names)} models; {model} answers. /help lists commands.", style="dim", markup=False)
        _read_terminal(session)


def _read_pipe(session: Session) -> None:
    for line in sys.stdin:
        try:
            session.take(line)
        except Finished:
            return


def _read_terminal(session: Session) -> None:
    # Lines can be edited and called back.
    import readline  # noqa: F401

    while True:
        try:
            session.take(input("\n> "))
        except KeyboardInterrupt:
            session.console.print("\n/quit or Ctrl-D ends the chat", style="dim", markup=False)
        except (EOFError, Finished):
            return
        except MeteoraError as error:
            session.console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
