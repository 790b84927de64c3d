#!/usr/bin/env bash
# Sets up, builds and runs all tests. Takes the name of a preset: release (standard), debug or sanitize.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-release}

bash tests/install_packages.sh
# Only the real model needs the engine compiled for this machine, which takes a library of its own.
model=${KVPLANE_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
native=OFF
[ -e "$model" ] && native=ON
cmake --preset "$preset" -DKVPLANE_WARNINGS_AS_ERRORS=ON -DKVPLANE_ENGINE_NATIVE=$native >/dev/null
# Everything, as users build it; elsewhere what the tests need.
target=kvplane_tests
[ "$preset" = release ] && target=all
cmake --build --preset "$preset" --target "$target"
# The real model under the sanitizers would take hours.
[ "$preset" = release ] || export GTEST_FILTER='-RealModel.*:RealTokenizer.*:Programs.*:*.ReadsTheRealModel'
ctest --preset "$preset" -j "$(nproc)"
if [ "$preset" = release ] && [ ! -e "$model" ]; then
    echo "NOT TESTED: the engine on its real model, which is not there; bash examples/engine/fetch.sh fetches it" >&2
fi
