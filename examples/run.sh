#!/usr/bin/env bash
# Sets up, builds and runs an example: the quickstart on the tensors that ship with kvplane, or
#   run.sh quickstart|synthetic|svdq|attention|aligned [ARGUMENTS]
#   run.sh engine "PROMPT" [OPTIONS of generate]     fetches a small model and lets it answer
#   run.sh evaluate|dump|calibrate|speed [OPTIONS]         the same with the engine's other programs
set -euo pipefail
folder=$PWD
cd "$(dirname "$0")/.."
repository=$PWD

bash tests/install_packages.sh
example=${1:-quickstart}
[ $# -gt 0 ] && shift
options=()
case $example in
    quickstart|synthetic|svdq|attention|aligned) program=$example path=$example ;;
    engine|evaluate|dump|calibrate|speed)
        program=${example/engine/generate} path=engine/$program
        options=(--model "$(bash examples/engine/fetch.sh)")
        [ "$example" = engine ] && options+=(--chat) ;;
    *) echo "run.sh: no example '$example'; expected quickstart, synthetic, svdq, attention, aligned, engine, evaluate, dump, calibrate or speed" >&2; exit 2 ;;
esac
cmake --preset release >/dev/null
cmake --build --preset release --target "$program" >&2
cd "$folder"
exec "$repository/build/release/examples/$path" "${options[@]}" "$@"
