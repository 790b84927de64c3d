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
# The real models under the sanitizers would take hours.
[ "$preset" = release ] || export GTEST_FILTER='-RealModel.*:RealTokenizer.*:OtherModel.*:OtherTokenizer.*:Programs.*:*.ReadsTheRealModel'
ctest --preset "$preset" -j "$(nproc)"
not_tested() {
    [ "$preset" != release ] || [ -e "$2" ] ||
        echo "NOT TESTED: the engine on $1, which is not there; bash examples/engine/fetch.sh $1 fetches it" >&2
}
not_tested smollm2 "$model"
not_tested gemma3 "${KVPLANE_MODEL_GEMMA3:-models/gemma-3-270m-q4_k_m.gguf}"
not_tested qwen2 "${KVPLANE_MODEL_QWEN2:-models/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf}"
