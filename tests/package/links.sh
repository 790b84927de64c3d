#!/usr/bin/env bash
# Every file that a README links to or names as a test is there. Argument: the repository.
set -euo pipefail
cd "$1"
missing=0
while read -r readme; do
    folder=$(dirname "$readme")
    for target in $(grep -oE '\]\([^)#]+' "$readme" | sed 's/^](//' | grep -v '^http') \
                  $(grep -oE '`[a-z_/]+_test\.cpp`' "$readme" | tr -d '`'); do
        [ -e "$folder/$target" ] && continue
        echo "$readme: $target is not there" >&2
        missing=1
    done
done < <(find . -name README.md -not -path './build/*' -not -path './models/*')
exit $missing
