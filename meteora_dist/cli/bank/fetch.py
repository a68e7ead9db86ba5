"""``meteora bank pull``: a bank from a folder, the Hugging Face hub or a cloud's store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meteora_dist.bank.pull import pull_bank
from meteora_dist.cli.bank.make import say
from meteora_dist.cli.options import AsJson
from meteora_dist.cli.progress import progress_bar


def pull(
    source: Annotated[
        str,
        typer.Argument(help="hf://owner/name, hf://owner/name@revision/folder, s3://..., gs://..., or a local folder."),
    ],
    out: Annotated[Path, typer.Argument(help="Where the bank goes; nothing may be there yet.")],
    as_json: AsJson = False,
) -> None:
    """Fetch a bank, check every digest, and put it in its place; if anything fails, nothing is left there.

    Only the safetensors and JSON files that its bank.json lists are fetched. For s3:// install s3fs, for gs:// gcsfs.

    Example: meteora bank pull hf://owner/bank@v2 bank
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    with progress_bar() as progress:
        task = progress.add_task(source, total=None)
        bank = pull_bank(source, out, lambda done, of: progress.update(task, completed=done, total=of))
    say(bank, as_json)
