"""Commands in the pages are commands: options exist, files are there, requests are ones the service takes."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
import yaml

from meteora_dist.cli.main import build_app
from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.admin_http import NewExpertBody
from meteora_dist.serving.openai_schema import ChatBody, CompletionBody, parse
from meteora_dist.serving.reference.http_page import openapi_document
from tests.docs.pages import PAGES, ROOT
from tests.docs.shell import commands
from tests.docs.walk import blocks

BLOCKS = [(page, block) for page in PAGES for block in blocks(str(page))]
OTHERS = {
    **dict.fromkeys(["cd", "cp", "grep", "ln", "mkdir", "source", "tee"], "a shell's own"),
    **dict.fromkeys(["docker", "helm", "kind", "kubectl", "kustomize"], "needs a cluster; their files are checked"),
    **dict.fromkeys(["pip", "protoc", "serve"], "another project's"),
}
"""What is not ours, and why nothing but the files it names is checked."""
BODIES = {"/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody, "/admin/experts": NewExpertBody}
RUN_PYTHON = {"README.md", "docs/bank-format.md", "docs/client.md", "docs/placement.md"}
"""Pages whose Python other tests run."""
FILES = re.compile(r"(?:docker|docs|examples|k8s|meteora_dist|scripts|tests)/[\w./-]+")


BadLine = typer.BadParameter.__mro__[1]
"""What a command line is refused with."""


def name(value: object) -> str | None:
    return str(value) if isinstance(value, Path) else None


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=name)
def test_a_block_of_shell(page: Path, block: str) -> None:
    subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=10)
    found = list(commands(block))
    assert found
    for words in found:
        check(words)


def check(words: list[str]) -> None:
    """Fails on a command that cannot be."""
    program, *rest = words
    if program == "compute-sanitizer":
        return check(rest[rest.index("meteora") :])
    program = program.removeprefix(".venv/bin/")
    if program == "meteora":
        check_meteora(rest)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in rest), words
    elif program == "python":
        check_python(rest)
    elif program == "curl":
        check_curl(rest)
    else:
        assert program in OTHERS, f"{program}: neither checked nor excused in OTHERS"
    for path in (path for word in words for path in FILES.findall(word) if not word.startswith("http")):
        assert (ROOT / path).exists() or path.startswith("meteora/"), f"{path} is not there: {words}"
    return None


def check_meteora(arguments: list[str]) -> None:
    """Parses them as the command line would, short of running the command."""
    command: Any = typer.main.get_command(build_app(arguments))
    context = command.context_class(command, info_name="meteora")
    words = list(arguments)
    while hasattr(command, "resolve_command"):
        _, command, words = command.resolve_command(context, words)
    command.make_context("meteora", words)


def check_python(arguments: list[str]) -> None:
    """The script or module is there, and has the options."""
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), arguments
        return
    code = (ROOT / arguments[0]).read_text()
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{option}"' in code, f"{arguments[0]} has no option {option}"


def check_curl(arguments: list[str]) -> None:
    """The path is a route, and the body is one it takes."""
    (url,) = (word for word in arguments if word.startswith("http"))
    path = urlsplit(url).path
    routes = [re.sub(r"\{\w+\}", "[^/]+", route) for route in openapi_document()["paths"]]
    assert any(re.fullmatch(route, path) for route in routes), path
    if "-d" in arguments:
        parse(BODIES[path], arguments[arguments.index("-d") + 1].encode())


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_blocks_of_other_languages(page: Path) -> None:
    for text in blocks(str(page), "json"):
        json.loads(text)
    for text in blocks(str(page), "yaml"):
        yaml.safe_load(text)
    for code in blocks(str(page), "python"):
        ast.parse(code)
        assert str(page) in RUN_PYTHON, f"no test runs the Python of {page}"


@pytest.mark.parametrize(
    "line",
    [
        "meteora serve --modle base",
        "meteora plan --model Llama-3.1-8B",
        "python examples/nothing.py",
        "python examples/train_adapters.py --bse base",
        "make dmeo",
        "curl http://127.0.0.1:8000/v1/chat -d '{}'",
        """curl http://127.0.0.1:8000/v1/completions -d '{"promt": "Hi"}'""",
        "kubectl apply -k k8s/overlays/none",
        "sudo reboot",
    ],
)
def test_what_is_wrong_is_noticed(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises((AssertionError, OSError, InvalidRequest, BadLine)):
        check(words)


def test_a_block_is_taken_apart() -> None:
    block = "A=1 one 'two\nthree' | four > five # six\n(cd seven && eight \\\n  --nine \"$(ten | eleven)\") &\n"
    assert list(commands(block)) == [
        ["one", "two\nthree"],
        ["four"],
        ["cd", "seven"],
        ["eight", "--nine", "SUBSTITUTED"],
    ]
