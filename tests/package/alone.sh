#!/usr/bin/env bash
# Compiles every contract without an impl/ header alone and twice: no header leans on what another one happens to
# include. (The library compiles every impl/ header by itself, its contract first.) Arguments: include folder, compiler,
# its arguments.
set -euo pipefail
folder=$1
shift
precompiled=$(mktemp -d)
trap 'rm -r "$precompiled"' EXIT
export precompiled

# Eigen, half of the time, is read once for those that include it themselves or through another contract. The rest
# compile without it.
echo '#include <Eigen/Core>' >"$precompiled/eigen.hpp"
"$@" -std=c++20 -DKVPLANE_COMPILED -I "$folder" -x c++-header "$precompiled/eigen.hpp" -o "$precompiled/eigen.hpp.gch"
headers=$(cd "$folder" && find . -name '*.hpp' -not -path '*/impl/*' -printf '%P\n' | sort)
(cd "$folder" && xargs grep -H '^ *# *include' <<<"$headers") | sed -E 's/^([^:]*):[^<"]*[<"]([^>"]*).*/\1 \2/' | awk '
    { from[NR] = $1; to[NR] = $2 }
    $2 ~ /^(unsupported\/)?Eigen\// { eigen[$1] }
    END {
        do {
            more = 0
            for (i in from) if ((to[i] in eigen) && !(from[i] in eigen)) { eigen[from[i]]; more = 1 }
        } while (more)
        for (header in eigen) print header
    }' | sort >"$precompiled/with_eigen"
[ -s "$precompiled/with_eigen" ]  # that they are found at all

alone=$(while read -r header; do
    [ -e "$folder/$(sed -E 's#([^/]*)$#impl/\1#' <<<"$header")" ] || echo "$header"
done <<<"$headers")
# Of those that are left out, it is not seen otherwise.
twice=$(cd "$folder" && xargs grep -L '^#pragma once$' <<<"$headers" || true)
[ -z "$twice" ] || { echo "no #pragma once in $twice" >&2; exit 1; }

# shellcheck disable=SC2016
xargs -P "$(nproc)" -I HEADER bash -c '
        grep -qxF "$1" "$precompiled/with_eigen" && eigen=(-include "$precompiled/eigen.hpp") || eigen=()
        printf "#include \"%s\"\n#include \"%s\"\n" "$1" "$1" | "${@:2}" "${eigen[@]}" -fsyntax-only -x c++ - ||
            { echo "$1 does not compile alone" >&2; exit 255; }' bash HEADER \
    "$@" -std=c++20 -DKVPLANE_COMPILED -I "$folder" <<<"$alone"
