"""A service with administrators, on a real engine in this process, and adapters for them, good and bad."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from meteora_dist.engine.rank import RankEngine
from meteora_dist.serving.admin import AdminService
from meteora_dist.serving.admin_grpc import AdminMethods
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.keys import Keyring, key_digest
from meteora_dist.serving.sources import Sources
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.lone import lone_replica
from tests.support.tiny import SPECS, Spec, write_adapter

ADMIN = {"Authorization": "Bearer the-admin"}
USER = {"Authorization": "Bearer a-user"}


@dataclass
class Site:
    """A service with administrators, and the folder their adapters come from."""

    root: Path
    http: httpx.AsyncClient
    methods: AdminMethods

    async def names(self) -> list[str]:
        models = (await self.http.get("/v1/models", headers=ADMIN)).json()["data"]
        return [model["id"] for model in models][3:]

    async def generation(self) -> int:
        return int((await self.http.get("/admin/experts", headers=ADMIN)).json()["generation"])

    async def clear(self) -> None:
        """Removes what tests have added."""
        for name in await self.names():
            if name not in SPECS:
                await self.http.delete(f"/admin/experts/{quote(name, safe='')}", headers=ADMIN)
        assert await self.names() == list(SPECS)

    async def add(self, name: str, adapter: str, **more: Any) -> httpx.Response:
        return await self.http.post("/admin/experts", headers=ADMIN, json={"name": name, "adapter": adapter, **more})


def write_adapters(base: Path, root: Path, outside: Path) -> Path:
    """Adapters below ``root``: good ones, and all kinds of bad ones, some of which lead to ``outside``."""
    good = write_adapter(base, root / "team" / "good", Spec(3, 6), seed=41)
    write_adapter(base, root / "other", Spec(2, 4), seed=42)
    for kind in ("pickled", "lying", "truncated", "dora"):
        shutil.copytree(good, root / kind)
    (root / "pickled" / "adapter_model.safetensors").write_bytes(pickle.dumps({"evil": os.getcwd}))
    weights = (root / "lying" / "adapter_model.safetensors").read_bytes()
    length = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first]["data_offsets"][1] += 4096
    lie = json.dumps(header).encode().ljust(length)
    (root / "lying" / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(lie)) + lie + weights[8 + length :]
    )
    (root / "truncated" / "adapter_model.safetensors").write_bytes(weights[:-100])
    config = json.loads((root / "dora" / "adapter_config.json").read_text())
    (root / "dora" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    secret = shutil.copytree(good, outside / "secret")
    (root / "link").symlink_to(secret)
    (root / "linked-file").mkdir()
    shutil.copyfile(good / "adapter_config.json", root / "linked-file" / "adapter_config.json")
    (root / "linked-file" / "adapter_model.safetensors").symlink_to(secret / "adapter_model.safetensors")
    (root / "inner-link").symlink_to(root / "team" / "good")
    (root / "loop").mkdir()
    (root / "loop" / "adapter_config.json").symlink_to("adapter_config.json")
    return root


@asynccontextmanager
async def administered(
    engine: RankEngine, configured: Path, tokenizer: TextTokenizer, root: Path, folder: Path
) -> AsyncIterator[Site]:
    """The service over ``engine``; what it makes lies in ``folder``. It leaves the engine with the experts it found."""
    keys = folder / "keys.yaml"
    callers = (("boss", "the-admin", "admin"), ("app", "a-user", "user"))
    keys.write_text(json.dumps([{"name": n, "sha256": key_digest(k), "role": r} for n, k, r in callers]))
    gate = Gate(Keyring(keys))
    async with lone_replica(engine, configured, folder / "generations", tokenizer, gate) as replica:
        methods = AdminMethods()
        methods.service = replica.service
        methods.admin = AdminService(replica.experts, replica.sharing, Sources((root,)))
        transport = httpx.ASGITransport(create_api(replica.service, methods.admin), raise_app_exceptions=False)
        site = Site(root, httpx.AsyncClient(transport=transport, base_url="http://test"), methods)
        yield site
        await site.clear()
        async with asyncio.timeout(20):
            while len(replica.experts.live) > 1:
                await asyncio.sleep(0.01)
