#!/usr/bin/env bash
# Every file that a README links to or names as a test is there. Argument: the repository.
set -euo pipefail
cd "$1"
missing=0
is_there() {  # a name stands from its README's folder or from the repository on
    [ -e "$folder/$1" ] || [ -e "$1" ] || { echo "$readme: $1 is not there" >&2; missing=1; }
}
while read -r readme; do
    folder=$(dirname "$readme")
    for target in $(grep -oE '\]\([^)#]+' "$readme" | sed 's/^](//' | grep -v '^http') \
                  $(grep -oE '`[a-z_/]+_test\.cpp`' "$readme" | tr -d '`'); do
        is_there "$target"
    done
done < <(find . -name README.md -not -path './build/*' -not -path './models/*')
exit $missing
