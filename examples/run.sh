#!/usr/bin/env bash
# Sets up, builds and runs an example: the quickstart on the tensors that ship with kvplane, or
#   run.sh quickstart|synthetic [ARGUMENTS]
set -euo pipefail
folder=$PWD
cd "$(dirname "$0")/.."

bash tests/install_packages.sh
example=${1:-quickstart}
[ $# -gt 0 ] && shift
case $example in
    quickstart|synthetic) ;;
    *) echo "run.sh: no example '$example'; expected quickstart or synthetic" >&2; exit 2 ;;
esac
cmake --preset release >/dev/null
cmake --build --preset release --target "$example" >&2
cd "$folder"
exec "$OLDPWD/build/release/examples/$example" "$@"
