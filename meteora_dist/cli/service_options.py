"""Options of commands that ask a running service."""

from __future__ import annotations

from typing import Annotated

import typer

URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(help="The service: http://, https://, grpc:// or grpcs://.")]
ApiKey = Annotated[str | None, typer.Option(envvar="METEORA_API_KEY", help="Sent with every call.")]
Model = Annotated[str, typer.Option(help="auto, auto-sequence, an expert, a blend such as a:0.7,b:0.3, or base.")]
Experts = Annotated[int | None, typer.Option("--topk", help="Experts a token uses under auto. [the bank's]", min=1)]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token.", min=0)]
Seed = Annotated[int | None, typer.Option(help="Makes answers repeatable.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)]
