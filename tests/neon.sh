#!/usr/bin/env bash
# Cross-compiles the kernels' tests for aarch64 and runs them under qemu: the same bytes, the same integers.
set -euo pipefail
cd "$(dirname "$0")/.."

bash tests/install_packages.sh g++-aarch64-linux-gnu qemu-user googletest
export folder=build/neon
mkdir -p "$folder"
compile() {
    aarch64-linux-gnu-g++ -std=c++20 -O1 -Wno-maybe-uninitialized -I include -I tests -I examples \
        -isystem /usr/include/eigen3 -I /usr/src/googletest/googletest/include -I /usr/src/googletest/googletest "$@"
}
run() {
    set -euo pipefail
    local program=$folder/${1//\//_}_test
    compile "tests/$1_test.cpp" /usr/src/googletest/googletest/src/gtest_main.cc "$folder/gtest.o" -o "$program" \
        -static -pthread
    # Some tests start the program again, or compare with the kernel of the machine that emulates.
    qemu-aarch64 -cpu max "$program" --gtest_brief=1 \
        --gtest_filter=-KvplaneIsaVariable.*:IsaList.AgreesWithTheKernel | tail -n 3 | sed "s|^|$1: |"
}
export -f compile run
[ -e "$folder/gtest.o" ] || compile -c /usr/src/googletest/googletest/src/gtest-all.cc -o "$folder/gtest.o"
printf '%s\n' simd/isa simd/half simd/vector attention/kernels/plane_dot attention/softmax attention/tile_attention \
    quantize/kernels quantize/shaped quantize/unbiased storage/token_runs storage/half_bytes \
    storage/tile_planes latent/products | xargs -P "$(nproc)" -I TEST bash -c 'run TEST'
