#!/usr/bin/env bash
# Fills .venv with the pinned requirements and this checkout (editable). Does nothing when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."

inputs=(pyproject.toml requirements.txt requirements-cpu.txt constraints.txt scripts/setup.sh)
stamp=.venv/setup.sha256
state=$({ pwd; cat "${inputs[@]}"; } | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer found; set PYTHON=/path/to/python" >&2
    return 1
}

# uv is several times faster than pip but reads none of pip's settings; where those make a difference, pip decides.
use_pip_settings() {
    local find_links
    find_links=${PIP_FIND_LINKS-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}
    export UV_FIND_LINKS="${UV_FIND_LINKS-${find_links// /,}}"
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT-${PIP_DEFAULT_TIMEOUT-60}}"
    if [ -n "${PIP_INDEX_URL-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX-$PIP_INDEX_URL}"; fi
    if [ -n "${PIP_CERT-}" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE-$PIP_CERT}"; fi
}

install() {
    if [ -x .venv/bin/uv ] && .venv/bin/uv pip install --python .venv/bin/python --compile-bytecode "$@"; then
        return
    fi
    echo "setup: installing with pip"
    .venv/bin/python -m pip install "$@"
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "setup: creating .venv with $("$python" --version)"
    "$python" -m venv .venv
fi

echo "setup: installing the pinned requirements into .venv"
.venv/bin/python -m pip install --quiet --constraint constraints.txt uv || echo "setup: uv is not to be had, pip does it all"
use_pip_settings
install --constraint constraints.txt "$(grep '^torch==' requirements.txt)"
if ! .venv/bin/python -c 'import importlib.metadata as m; m.version("triton")' 2>/dev/null; then
    install --constraint constraints.txt --requirement requirements-cpu.txt
fi
install --requirement requirements.txt
echo "$state" >"$stamp"
