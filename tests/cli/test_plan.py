"""``meteora plan``: its pages are what it prints, refusals are one line, and no torch is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("planning.md", "sizing.md")]
PROGRAM = (
    "import sys; from meteora_dist.cli.main import main\n"
    "try: main()\n"
    "except SystemExit as end: code = end.code\n"
    "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    "sys.exit(code)"
)


def meteora(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "80"})


def sessions() -> list[tuple[str, str]]:
    """(arguments, output) of every console block of the pages."""
    blocks = [re.findall(r"```console\n\$ meteora (.*?)\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES]
    assert all(blocks)
    return [block for found in blocks for block in found]


@pytest.mark.parametrize(("arguments", "output"), sessions(), ids=lambda text: text.split("\n")[0][:60])
def test_the_page_shows_what_the_command_prints(arguments: str, output: str) -> None:
    done = meteora(*arguments.split())
    shown = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
    assert shown == [line.rstrip() for line in output.splitlines()]
    assert done.returncode == output.startswith("error:")


def test_json_has_every_number() -> None:
    options = "--model SmolLM2-135M --experts 8 --rank 8 --gpus 2 --kv-tokens 4096 --json"
    done = meteora("plan", *options.split())
    assert done.returncode == 0, done.stderr
    (best,), (refused,) = (json.loads(done.stdout)[name] for name in ("fitting", "refused"))
    assert best["mesh"] == {"ep": 2, "tp": 1}
    memory = best["memory"]
    assert memory["total"] == memory["base"] + memory["bank"] + memory["gates"] + memory["kv"]
    # 134,515,008 parameters of two bytes.
    assert memory["base"] == 269_030_016
    assert [exchange["linears"][0] for exchange in best["exchanges"]] == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert refused["refusal"] == "tp 2 does not divide the 9 attention heads"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "lots"], "error: 'lots' is no size in bytes; write one like 80GiB, 512MB or 1000000\n"),
        (["--experts", "0"], "error: experts is 0; it must be at least 1\n"),
        (["--gpu-memory", "200MiB", "--headroom", "0"], "more than the 200 MiB usable of 200 MiB\n"),
    ],
)
def test_refusals_are_one_line_and_exit_code_one(options: list[str], message: str) -> None:
    done = meteora("plan", "--model", "SmolLM2-135M", "--experts", "8", "--rank", "8", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(message)
    assert len(done.stderr.splitlines()) == 1


def test_help_has_an_example() -> None:
    assert "Example: meteora plan --model Llama-3.1-8B" in meteora("plan", "--help").stdout
