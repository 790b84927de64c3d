#!/usr/bin/env bash
# Sets up, builds and tests the Python package. Its part on numpy always; that on torch and transformers where they
# can be installed, which takes 6 GB the first time. KVPLANE_TORCH=0 leaves it out, and it is said what was not tested.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(bash examples/transformers/environment.sh)
not_tested() { echo "NOT TESTED: $*" >&2; }
tests() { "$python" -m pytest -q -rs -W ignore::FutureWarning -p no:cacheprovider "$@"; }

tests tests/python/test_quantize.py tests/python/test_cache.py

torch_loads() { "$python" -c 'import torch, transformers, gguf' 2>/dev/null; }
if [ "${KVPLANE_TORCH:-1}" = 0 ]; then
    not_tested "kvplane.transformers, because KVPLANE_TORCH=0"
    exit
fi
if ! torch_loads; then
    space=$(df --output=avail -k build | tail -n 1)
    if [ "$space" -lt 12000000 ]; then
        not_tested "kvplane.transformers: torch takes 6 GB installed, and $((space / 1000000)) GB are left"
        exit
    fi
    if ! timeout 600 bash examples/transformers/environment.sh torch >/dev/null || ! torch_loads; then
        not_tested "kvplane.transformers: torch and transformers do not install or load here"
        exit
    fi
fi
tests tests/python/test_transformers.py tests/python/test_models.py tests/python/test_compare.py tests/python/test_cuda.py
