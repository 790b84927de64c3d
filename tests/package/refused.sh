#!/usr/bin/env bash
# Passes where a compiler refuses with a sentence: refused.sh SENTENCE COMPILER ARGUMENTS...
set -uo pipefail
sentence=$1
shift
if output=$("$@" 2>&1); then
    echo "compiled, expected a refusal: $*"
    exit 1
fi
grep -F -- "$sentence" <<<"$output" || { echo "$output"; exit 1; }
