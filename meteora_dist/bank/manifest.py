"""bank.json: what a bank says of itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, PositiveInt, StringConstraints, ValidationError

from meteora_dist.adapters.files import parse_json_object, read_bytes
from meteora_dist.config import StrictModel
from meteora_dist.errors import BankError

SCHEMA_VERSION: Final = 1
RESERVED_NAMES = frozenset({"auto", "auto-sequence", "base"})
"""Words that requests use in the place of an expert's name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_expert_name(name: str) -> str:
    """Returns ``name``; ValueError when no expert may be called so."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"expert name {name!r} must be 1 to 64 letters, digits, dots, underscores or hyphens, "
            "and start with a letter or digit"
        )
    if name in RESERVED_NAMES:
        raise ValueError(f"expert name {name!r} is reserved; {', '.join(sorted(RESERVED_NAMES))} choose a routing mode")
    return name


ExpertName = Annotated[str, AfterValidator(check_expert_name)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A sha256 in hex."""


GateOrigin = Literal["trained", "prototype"]
RouterRow = Literal["trained", "none"]
VoteRule = Literal["majority", "last"]
"""How the layers' routers decide together: the expert that most of them chose, or the choice of the last one."""
Pooling = Literal["last", "mean"]
"""What of a prompt a router reads: the state of its last token, or the mean over its tokens."""


class RoutingDefaults(StrictModel):
    """How a request that says nothing of routing is routed.

    Attributes:
        mode: ``auto`` lets the gates pick; ``base`` uses no expert.
        top_k: Experts a token uses under ``auto``; above the number of experts it means all.
        temperature: Divides the chosen gate logits before the softmax.
        vote: How routers decide under ``auto-sequence``, where the bank has them.
    """

    mode: Literal["auto", "base"] = "auto"
    top_k: PositiveInt = 2
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    vote: VoteRule = "majority"


class RouterSettings(StrictModel):
    """The layer routers of a bank (MoA, arXiv 2403.03432).

    Attributes:
        digest: sha256 of routers.safetensors.
        pooling: What of a prompt they read.
    """

    digest: Digest
    pooling: Pooling = "last"


class ExpertEntry(StrictModel):
    """One expert.

    Attributes:
        name: Its name in requests and its folder under ``experts/``.
        digest: sha256 of its adapter's config and weights.
        rank: r of its config; single linears may differ.
        alpha: lora_alpha of its config; single linears may differ.
        rslora: Whether scales are ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        targets: Sorted last parts of the names of the linears it adapts, such as ``q_proj``.
        gate: Where its gate rows are from. ``trained``: they score an input x by their product with it, g . x.
            ``prototype``: made from the adapter's own matrices, they score x by |g . x|.
        router: ``trained``: the layers' routers can choose it. ``none``: it has no rows there, and they never do.
    """

    name: ExpertName
    digest: Digest
    rank: PositiveInt
    alpha: Annotated[float, Field(allow_inf_nan=False)]
    rslora: bool
    targets: tuple[str, ...]
    gate: GateOrigin = "trained"
    router: RouterRow = "none"


class BankManifest(StrictModel):
    """The content of bank.json.

    Attributes:
        schema_version: Of this format.
        base_model: Name of the base model, for people.
        base_fingerprint: Of the base model, see ``fingerprint``.
        experts: In the order of the gates' rows.
        gate_digest: sha256 of gates.safetensors.
        generation: Grows by one with every change of the bank.
        routing: Defaults of requests.
        routers: Of its layer routers; None for a bank without.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    base_model: Annotated[str, Field(min_length=1)]
    base_fingerprint: Digest
    experts: Annotated[tuple[ExpertEntry, ...], Field(min_length=1)]
    gate_digest: Digest
    generation: PositiveInt
    routing: RoutingDefaults
    routers: RouterSettings | None = None


def read_manifest(path: Path) -> BankManifest:
    """Reads and checks bank.json.

    Args:
        path: The file.

    Raises:
        BankError: When it is missing, no JSON, of another schema version, or has missing, unknown or wrong fields.
    """
    text = read_bytes(path, BankError)
    fields = parse_json_object(text, path, "the file", BankError)
    version = fields.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BankError(path, f"schema_version is {version!r}; this release reads {SCHEMA_VERSION}")
    try:
        manifest = BankManifest.model_validate_json(text, strict=True)
    except ValidationError as cause:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in cause.errors()
        )
        raise BankError(path, faults) from cause
    names = [expert.name for expert in manifest.experts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BankError(path, f"expert names must be unique; {', '.join(twice)} occur more than once")
    return manifest


def experts_digest(experts: Iterable[tuple[str, str]]) -> str:
    """sha256, in hex, of the ordered (name, adapter digest) pairs: what rows of gates and routers stand for."""
    pairs = [[name, digest] for name, digest in experts]
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()
