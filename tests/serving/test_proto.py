"""The committed stubs are those of the committed protos."""

from __future__ import annotations

import pickle
from pathlib import Path

from meteora_dist.serving.proto.generate import ROOT, generate
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb


def test_messages_can_be_pickled_and_keep_their_wire_name() -> None:
    message = pb.GenerateRequest(prompt="Hi")
    assert pickle.loads(pickle.dumps(message)) == message
    assert pb.DESCRIPTOR.name == "meteora/v1/inference.proto"


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    stubs = generate(tmp_path)
    assert len(stubs) == 6
    for stub in stubs:
        assert stub.read_text() == (ROOT / stub.relative_to(tmp_path)).read_text(), f"run make proto: {stub.name}"
