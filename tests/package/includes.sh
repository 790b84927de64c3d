#!/usr/bin/env bash
# No header includes, through whatever others, one that includes it; a header and its impl/ count as one.
# Argument: the folder of headers.
set -euo pipefail
cd "$1"
pairs=$(grep -r '^ *# *include "kvplane/' kvplane --include='*.hpp' --include='*.cuh' |
    sed -E 's/^([^:]*):.*"([^"]*)".*/\1 \2/; s#/impl/#/#g' | awk '$1 != $2')
[ "$(wc -l <<<"$pairs")" -gt 100 ]  # that they are found at all
tsort <<<"$pairs" >/dev/null
