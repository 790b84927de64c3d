#!/usr/bin/env bash
# Sets up, builds and tests the Python package. Its part on numpy always; that on torch and transformers where they
# can be installed, which takes 6 GB the first time. KVPLANE_TORCH=0 leaves it out, and it is said what was not tested.
# `python.sh packages` only installs what they need, which is mostly waiting for downloads.
set -euo pipefail
cd "$(dirname "$0")/.."

not_tested() { echo "NOT TESTED: $*" >&2; }
torch_loads() { build/python/venv/bin/python -c 'import torch, transformers, gguf' 2>/dev/null; }
# Whether torch and transformers are there, or could be installed.
has_torch() {
    if [ "${KVPLANE_TORCH:-1}" = 0 ]; then
        not_tested "kvplane.transformers, because KVPLANE_TORCH=0"
        return 1
    fi
    torch_loads && return
    local space
    space=$(df --output=avail -k build | tail -n 1)
    if [ "$space" -lt 12000000 ]; then
        not_tested "kvplane.transformers: torch takes 6 GB installed, and $((space / 1000000)) GB are left"
        return 1
    fi
    if ! timeout 600 bash examples/transformers/environment.sh packages torch || ! torch_loads; then
        not_tested "kvplane.transformers: torch and transformers do not install or load here"
        return 1
    fi
}

if [ "${1-}" = packages ]; then
    bash examples/transformers/environment.sh packages
    has_torch || true
    exit
fi
python=$(bash examples/transformers/environment.sh)
tests() { "$python" -m pytest -q -rs -W ignore::FutureWarning -p no:cacheprovider "$@"; }

tests tests/python/test_quantize.py tests/python/test_cache.py
if has_torch; then
    tests tests/python/test_transformers.py tests/python/test_models.py tests/python/test_compare.py \
        tests/python/test_cuda.py
fi
