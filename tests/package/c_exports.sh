#!/usr/bin/env bash
# The shared library shows the functions of the C interface, at its version, and nothing else. Arguments: the library, the
# header.
set -euo pipefail
declared=$(grep -o 'kvplane_[a-z_]*(' "$2" | tr -d '(' | sort -u)
exported=$(nm -D --defined-only "$1" | awk '$2 == "T" { print $3 }' | sort -u)
expected=$(while read -r name; do echo "$name@@KVPLANE_1"; done <<<"$declared" | sort -u)
diff <(echo "$expected") <(echo "$exported")
if nm -D --defined-only "$1" | awk '$2 != "T" && $2 != "A"' | grep .; then exit 1; fi
