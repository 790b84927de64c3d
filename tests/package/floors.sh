#!/usr/bin/env bash
# Arrows of includes point down: no header includes one of a floor above its own (include/kvplane/README.md). Takes
# the folder of the headers, include/kvplane.
set -euo pipefail
cd "$1"

# From the lowest floor to the highest. A header beside the folders is a floor of its own; impl/X.hpp counts as X.hpp.
floors=(version.hpp compiled.hpp error.hpp simd matrix.hpp metrics.hpp quantize storage theory transform allocate latent
        attention read cache recipes.hpp recipe_names.hpp cuda io kvplane.hpp c)
declare -A rank
for i in "${!floors[@]}"; do rank[${floors[$i]}]=$i; done

floor_of() {
    local path=${1/#impl\//}
    echo "${path%%/*}"
}
wrong=0 arrows=0
while IFS=: read -r file include; do
    to=${include#*\"kvplane/} to=${to%\"*}
    from_floor=$(floor_of "$file") to_floor=$(floor_of "$to")
    for floor in "$from_floor" "$to_floor"; do
        [ -n "${rank[$floor]:-}" ] || { echo "$file: no floor '$floor' in tests/package/floors.sh"; exit 1; }
    done
    arrows=$((arrows + 1))
    if [ "${rank[$to_floor]}" -gt "${rank[$from_floor]}" ]; then
        echo "$file includes $to, which stands on a higher floor"
        wrong=1
    fi
done < <(grep -rH '^#include "kvplane/' --include='*.hpp' . | sed 's#^\./##')
[ "$arrows" -gt 100 ] || { echo "only $arrows includes were found in $1"; exit 1; }
exit $wrong
