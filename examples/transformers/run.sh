#!/usr/bin/env bash
# Sets up an environment, fetches SmolLM2-135M and Gemma 3 270M and compares KV caches of transformers on them. Options
# are those of compare.py; after `--models` come GGUF files instead of these two.
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
if [ "${1-}" = --help ]; then
    exec python3 "$folder/compare.py" --help
fi
python=$(bash "$folder/environment.sh" torch)
if [ "${1-}" = --models ]; then
    shift
    models=()
    while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do models+=("$1"); shift; done
else
    models=()
    for name in smollm2 gemma3; do
        file=$(bash "$folder/../engine/fetch.sh" "$name")  # on a line of its own, so that a failure ends this script
        models+=("$file")
    done
fi
exec "$python" "$folder/compare.py" "${models[@]}" "$@"
