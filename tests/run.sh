#!/usr/bin/env bash
# Sets up, builds and runs all tests. Takes the name of a preset: release (standard), debug or sanitize.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-release}

bash tests/install_packages.sh
cmake --preset "$preset" -DKVPLANE_WARNINGS_AS_ERRORS=ON >/dev/null
cmake --build --preset "$preset"
ctest --preset "$preset" -j "$(nproc)"
