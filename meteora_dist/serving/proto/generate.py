"""Writes the Python stubs beside their proto: ``python -m meteora_dist.serving.proto.generate``.

Needs ``grpcio-tools``. Generated code refuses an older ``grpcio`` or ``protobuf`` than the one it was made with.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent
PROTOS = (Path("meteora/v1/inference.proto"), Path("meteora/v1/admin.proto"))
PACKAGE = "meteora_dist.serving.proto"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(target: Path) -> list[Path]:
    """Generates the stubs.

    protoc names its output after the proto's path. Here that path has a prefix, which both the import and the messages
    have to know: Serve pickles them.

    Args:
        target: Folder that gets ``meteora/v1/*``.

    Returns:
        The files written.

    Raises:
        RuntimeError: protoc refused a proto; it has said why on stderr.
    """
    from grpc_tools import protoc

    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"--proto_path={ROOT}", *outputs, *map(str, PROTOS)]) != 0:
        raise RuntimeError(f"protoc refused the protos in {ROOT}")
    stubs = [target / proto.with_name(proto.stem + suffix) for proto in PROTOS for suffix in SUFFIXES]
    for stub in stubs:
        code = stub.read_text()
        for name in ("from meteora.v1 import", *(f"'meteora.v1.{proto.stem}_pb2'" for proto in PROTOS)):
            code = code.replace(name, name.replace("meteora.v1", f"{PACKAGE}.meteora.v1"))
        stub.write_text(f"# mypy: ignore-errors\n{code}")
    return stubs


def main() -> None:
    """Regenerates the committed stubs."""
    with TemporaryDirectory() as folder:
        for stub in generate(Path(folder)):
            home = ROOT / stub.relative_to(folder)
            shutil.copyfile(stub, home)
            sys.stdout.write(f"{home}\n")


if __name__ == "__main__":
    main()
