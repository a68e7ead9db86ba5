"""``meteora keys``: API keys of the service's callers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from meteora_dist.cli.options import AsJson
from meteora_dist.config import faults
from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.keys import KeyEntry, key_digest, new_key


def new(
    name: Annotated[str, typer.Option(help="Who gets it; what logs and limits call the caller.")],
    admin: Annotated[bool, typer.Option("--admin", help="The caller may change the experts as well.")] = False,
    model: Annotated[
        list[str] | None, typer.Option(help="A model the caller may use: repeat for several. [default: all]")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most calls a minute. [default: any]")] = None,
    max_live_requests: Annotated[int | None, typer.Option(help="Most calls at once. [default: any]")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key: print it, once, and its entry for the keys file.

    The file holds a digest of the key. The key itself is nowhere but in this output: hand it to the caller.

    Example: meteora keys new --name search --model auto --requests-per-minute 600
    """
    key = new_key()
    asked: dict[str, Any] = {
        "name": name,
        "sha256": key_digest(key),
        "role": "admin" if admin else "user",
        "models": model or None,
        "requests_per_minute": requests_per_minute,
        "max_live_requests": max_live_requests,
    }
    entry = {field: value for field, value in asked.items() if value is not None}
    try:
        KeyEntry.model_validate(entry)
    except ValidationError as error:
        raise InvalidRequest(faults(error)) from None
    if as_json:
        typer.echo(json.dumps({"key": key, "entry": entry}))
        return
    typer.echo(f"# The key; it is shown only now.\n# {key}\n# Its entry for the keys file:")
    typer.echo(yaml.safe_dump([entry], sort_keys=False), nl=False)
