#!/usr/bin/env bash
# Builds the wheel and uses it as a stranger would: a fresh environment, away from the checkout.
# The fresh environment borrows the checkout's installed dependencies, so that this takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work" build' EXIT
rm -rf build # setuptools would pack what an earlier build left there

"$python" -m build --wheel --no-isolation --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --python "$work/venv/bin/python" install --quiet --no-deps --no-index "$work"/dist/*.whl
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# a plain path entry: the borrowed folder's own .pth files, the editable checkout's among them, stay unread
echo "$site" >"$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"

cd "$work"
"$work/venv/bin/python" - "$work" <<'PYTHON'
import importlib.metadata, pathlib, sys, zipfile

work = pathlib.Path(sys.argv[1])
(wheel,) = work.glob("dist/*.whl")
expected = {"meteora_dist", "meteora_kernels", "meteora_cluster"}
tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
assert tops == expected, f"{wheel.name} holds {sorted(tops)}, not {sorted(expected)}"
for name in sorted(expected):
    module = __import__(name)
    home = pathlib.Path(module.__file__).resolve()
    assert home.is_relative_to((work / "venv").resolve()), f"{name} comes from {home}, not from the wheel"
    assert (home.parent / "py.typed").is_file(), f"{name} lacks its py.typed marker"
from meteora_dist.serving.playground.page import read_assets

page = {"/", "/playground/main.js", "/playground/style.css", "/playground/examples.json"}
assert page <= read_assets().keys(), f"{wheel.name} lacks files of the playground: {sorted(page - read_assets().keys())}"
print(f"{wheel.name}: {', '.join(sorted(expected))}; version {importlib.metadata.version('meteora-dist')}")
PYTHON
"$work/venv/bin/meteora" --version
"$work/venv/bin/meteora" --help >/dev/null
