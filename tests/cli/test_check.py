"""``meteora check``: what a configuration deploys, or what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from meteora_dist.cli.main import build_app
from meteora_dist.errors import InvalidRequest

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


def test_it_says_what_a_file_deploys() -> None:
    arguments = ["check", str(CONFIG)]
    done = CliRunner().invoke(build_app(arguments), arguments)
    assert done.stdout.splitlines() == [
        "HTTP on port 8000, gRPC on port 9000",
        "replicas: 1, each with 2 rank(s), ep 2 x tp 1",
        "a replica reserves: 1 CPU, 0.8 CPU",
    ]


def test_programs_read_it() -> None:
    arguments = ["check", str(CONFIG), "--json"]
    done = CliRunner().invoke(build_app(arguments), arguments)
    assert json.loads(done.stdout) == {
        "http_port": 8000,
        "grpc_port": 9000,
        "replicas": {"min": 1, "max": 1},
        "ep": 2,
        "tp": 1,
        "ranks": 2,
        "reserved": [{"CPU": 1}, {"CPU": 0.8}],
    }


def test_it_reads_stdin_and_refuses_what_serve_would_pass_over() -> None:
    arguments = ["check", "-"]
    scaling = "    deployments: [{name: meteora, autoscaling_config: {min_replicas: 2, max_replicas: 3}}]\n"
    done = CliRunner().invoke(build_app(arguments), arguments, input=CONFIG.read_text() + scaling)
    assert "replicas: 2 to 3, each with 2 rank(s)" in done.stdout
    done = CliRunner().invoke(build_app(arguments), arguments, input=CONFIG.read_text() + "typo: 1\n")
    assert isinstance(done.exception, InvalidRequest)
    assert str(done.exception) == "stdin: unknown keys typo"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    arguments = ["check", str(tmp_path / "none.yaml")]
    done = CliRunner().invoke(build_app(arguments), arguments)
    assert isinstance(done.exception, InvalidRequest)
    assert str(tmp_path / "none.yaml") in str(done.exception)
