#!/usr/bin/env bash
# Sets up build/python/venv, a virtual environment with kvplane in it, and prints the path of its Python.
#   environment.sh          numpy alone
#   environment.sh torch    also torch, transformers and what requirements.txt lists: 6 GB, for PyPI's torch brings
#                           CUDA's libraries, without which it does not load
#   environment.sh packages [torch]   what they need alone, without kvplane: nothing is compiled
# KVPLANE_LIBRARY is a libkvplane_compiled.a of this checkout to link; otherwise that of the release preset is built.
# KVPLANE_CUDA_LIBRARY, a libkvplane_cuda.a of it, adds caches on CUDA devices.
set -euo pipefail
cd "$(dirname "$0")/../.."

packages_alone=0
if [ "${1-}" = packages ]; then
    packages_alone=1
    shift
fi
venv=build/python/venv
python=$PWD/$venv/bin/python
log=build/python/log.txt
mkdir -p build/python
quietly() {
    "$@" >"$log" 2>&1 || { cat "$log" >&2; echo "environment.sh: failed: $*" >&2; exit 1; }
}

bash tests/install_packages.sh >&2
if [ ! -x "$python" ]; then
    python3 -c 'import ensurepip, os, sysconfig as s; assert os.path.exists(s.get_paths()["include"] + "/Python.h")' \
        2>/dev/null || bash tests/install_packages.sh python3-venv python3-dev >&2
    quietly python3 -m venv "$venv"
fi
quietly "$python" -m pip install --disable-pip-version-check 'scikit-build-core>=0.10' 'nanobind>=2.4' ninja numpy \
    pytest
if [ "${1-}" = torch ]; then
    echo "installing torch, transformers and quantizers to compare with, where they are not there yet (6 GB," \
        "some minutes; the log: $log)" >&2
    quietly "$python" -m pip install --disable-pip-version-check -r examples/transformers/requirements.txt
fi

[ "$packages_alone" = 0 ] || exit 0

library=${KVPLANE_LIBRARY-}
if [ -z "$library" ]; then
    cmake --preset release >/dev/null
    cmake --build --preset release --target kvplane_compiled >&2
    library=$PWD/build/release/libkvplane_compiled.a
fi
cuda=OFF
[ -n "${KVPLANE_CUDA_LIBRARY-}" ] && cuda=ON
echo "building the Python package, for a minute or two" >&2
quietly "$python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall \
    ./examples/transformers -C cmake.define.KVPLANE_LIBRARY="$library" -C cmake.define.KVPLANE_WARNINGS_AS_ERRORS=ON \
    -C cmake.define.KVPLANE_CUDA=$cuda -C cmake.define.KVPLANE_CUDA_LIBRARY="${KVPLANE_CUDA_LIBRARY-}"
echo "$python"
