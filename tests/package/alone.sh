#!/usr/bin/env bash
# Compiles every contract alone and twice: no header leans on what another one happens to include. (The library
# compiles every impl/ header by itself.) Arguments: include folder, compiler, its arguments.
set -euo pipefail
folder=$1
shift
# shellcheck disable=SC2016
find "$folder" -name '*.hpp' -not -path '*/impl/*' -printf '%P\n' | sort |
    xargs -P "$(nproc)" -I HEADER bash -c 'printf "#include \"%s\"\n#include \"%s\"\n" "$1" "$1" |
        "${@:2}" -fsyntax-only -x c++ - || { echo "$1 does not compile alone" >&2; exit 255; }' bash HEADER \
        "$@" -std=c++20 -DKVPLANE_COMPILED -I "$folder"
