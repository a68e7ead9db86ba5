"""The page's files as they are served: headers, caching, keys, prefixes, and the switch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from meteora_dist.evaluation.tasks import read_task, split
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.playground.page import read_assets
from meteora_dist.serving.service import TextService
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine

STATIC = Path("meteora_dist/serving/playground/static")
SEVERAL = "a whale in a bus"


def client(service: TextService, playground: bool = True, prefix: str = "") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_api(service, playground=playground), root_path=prefix)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_every_file_says_what_it_is_and_lets_nothing_else_in(guarded: TextService) -> None:
    assets = read_assets()
    assert {"/", "/playground/main.js", "/playground/style.css", "/playground/examples.json"} <= assets.keys()
    async with client(guarded) as http:
        for path in assets:
            got = await http.get(path)
            assert got.status_code == 200
            policy = got.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(
                policy
            )
            assert not {"unsafe-inline", "unsafe-eval", "http:", "https:", "*"} & set(
                re.split(r"[ ;']+", " ".join(policy))
            )
            assert got.headers["x-content-type-options"] == "nosniff"
            assert got.headers["referrer-policy"] == "no-referrer"
            assert got.headers["cache-control"] == "no-cache"
            head = await http.head(path)
            assert (head.status_code, head.content, head.headers["content-type"]) == (
                200,
                b"",
                got.headers["content-type"],
            )
        assert (await http.get("/")).headers["content-type"] == "text/html; charset=utf-8"
        assert (await http.get("/playground/main.js")).headers["content-type"] == "text/javascript; charset=utf-8"


async def test_a_file_that_has_not_changed_is_not_sent_again(guarded: TextService) -> None:
    async with client(guarded) as http:
        first = await http.get("/playground/style.css")
        again = await http.get("/playground/style.css", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
        other = await http.get("/", headers={"If-None-Match": first.headers["etag"]})
        assert other.status_code == 200


@pytest.mark.parametrize("prefix", ["", "/models/llm"], ids=["root", "prefix"])
async def test_only_the_page_and_probes_need_no_key(guarded: TextService, prefix: str) -> None:
    async with client(guarded, prefix=prefix) as http:
        for path in ("/", "/playground/pane.js", "/healthz"):
            assert (await http.get(prefix + path)).status_code == 200
        for path in ("/v1/models", "/playground/", "/playground/page.py", "/playground/../v1/models", "/nowhere"):
            assert (await http.get(prefix + path)).status_code == 401


async def test_a_prefix_without_its_slash_leads_to_the_page(guarded: TextService) -> None:
    async with client(guarded, prefix="/llm") as http:
        got = await http.get("/llm")
        assert got.status_code in (307, 308)
        assert got.headers["location"].endswith("/llm/")


async def test_without_the_page_nothing_is_there(make_service: MakeService, guarded: TextService) -> None:
    for path in ("/", "/playground/main.js"):
        assert (await client(guarded, playground=False).get(path)).status_code == 401
        assert (await client(make_service(ScriptedEngine([])), playground=False).get(path)).status_code == 404
    fields = {"model": "m", "bank": "b"}
    assert ServiceConfig.model_validate(fields).playground
    assert not ServiceConfig.model_validate(fields | {"playground": False}).playground


def test_files_name_no_other_host_and_only_files_that_are_there() -> None:
    names = {path.removeprefix("/playground/") for path in read_assets()}
    for file in STATIC.glob("*.*"):
        if file.suffix == ".json":
            continue
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "//" not in re.sub(r"(^|\s)//.*", "", text), f"{file.name} names another host"
        used = re.findall(r'(?:href|src)="playground/([^"]+)"|from "\./([^"]+)"', text)
        assert {first or second for first, second in used} <= names
    page = (STATIC / "index.html").read_text()
    for module in STATIC.glob("*.js"):
        assert f"playground/{module.name}" in page, f"{module.name} would be found one round trip later"


def test_examples_are_held_out_rows_of_the_demos_tasks() -> None:
    examples = json.loads((STATIC / "examples.json").read_text())
    manifest = json.loads(Path("examples/bank/bank.json").read_text())
    assert [one["experts"] for one in examples[1:]] == [[expert["name"]] for expert in manifest["experts"]]
    assert examples[0]["title"] == SEVERAL
    for example in examples[1:]:
        (task,) = example["experts"]
        _, held_out = split(read_task(Path(f"examples/data/{task}.jsonl.gz")))
        assert example["prompt"] in {row.prompt for row in held_out}
