#!/usr/bin/env bash
# Sets up, builds and runs an example: the quickstart on tensors that ship with kvplane, or
#   run.sh report|attention|synthetic|svdq|aligned [OPTIONS]
#   run.sh split_context                                  a sequence in two processes, merged over a pipe
#   run.sh narrow_by_age                                  a context that grows within a budget
#   run.sh engine "PROMPT" [OPTIONS of generate]          fetches a small model and lets it answer
#   run.sh evaluate|dump|calibrate|tune|speed [OPTIONS]   the engine's other programs
#   run.sh engine|evaluate|... gemma3|qwen2 ...           the same of another model (engine/fetch.sh)
#   run.sh transformers [OPTIONS]                         KV caches of Hugging Face transformers side by side
#   run.sh cuda [OPTIONS]                                 decoding on a GPU (needs nvcc, whose kernels take minutes)
# Each says with --help what it does and takes.
set -euo pipefail
folder=$PWD
cd "$(dirname "$0")/.."
repository=$PWD

example=${1:-quickstart}
[ $# -gt 0 ] && shift
options=() settings=()
if [ "$example" = transformers ]; then
    cd "$folder"
    exec bash "$repository/examples/transformers/run.sh" "$@"
fi
case $example in
    quickstart|report|attention|split_context|narrow_by_age) program=$example path=$example ;;
    synthetic|svdq|aligned) program=$example path=studies/$example ;;
    engine|evaluate|dump|calibrate|tune|speed) program=${example/engine/generate} path=engine/$program ;;
    cuda) program=cuda_decode path=cuda/decode ;;
    *) echo "run.sh: no example '$example'; expected quickstart, report, attention, split_context, narrow_by_age," \
            "synthetic, svdq, aligned, engine, evaluate, dump, calibrate, tune, speed, transformers or cuda" >&2
       exit 2 ;;
esac
bash tests/install_packages.sh
if [ "$example" = cuda ]; then
    PATH=$PATH:/usr/local/cuda/bin
    command -v nvcc >/dev/null ||
        { echo "run.sh: cuda needs nvcc, which is neither in PATH nor in /usr/local/cuda/bin" >&2; exit 1; }
    # For the GPU that is here; where there is none, for all that kvplane is made for.
    nvidia-smi -L >/dev/null 2>&1 && settings=(-DCMAKE_CUDA_ARCHITECTURES=native)
    cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DKVPLANE_BUILD_CUDA=ON "${settings[@]}" >/dev/null
    cmake --build build/cuda --target "$program" >&2
    cd "$folder"
    exec "$repository/build/cuda/examples/$path" "$@"
fi
if [ "${path%/*}" = engine ]; then
    model=smollm2
    case ${1-} in smollm2|gemma3|qwen2) model=$1; shift ;; esac
    options=(--model "$(bash examples/engine/fetch.sh "$model")")
    [ "$example" = engine ] && options+=(--chat)
    settings=(-DKVPLANE_ENGINE_NATIVE=ON)
fi
cmake --preset release "${settings[@]}" >/dev/null
cmake --build --preset release --target "$program" >&2
cd "$folder"
exec "$repository/build/release/examples/$path" "${options[@]}" "$@"
