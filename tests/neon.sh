#!/usr/bin/env bash
# Cross-compiles the kernels' tests for aarch64 and runs them under qemu: the same bytes, the same integers.
set -euo pipefail
cd "$(dirname "$0")/.."

bash tests/install_packages.sh g++-aarch64-linux-gnu qemu-user googletest
folder=build/neon
mkdir -p "$folder"
compile=(aarch64-linux-gnu-g++ -std=c++20 -O1 -Wno-maybe-uninitialized -I include -I tests -I examples
    -isystem /usr/include/eigen3 -I /usr/src/googletest/googletest/include -I /usr/src/googletest/googletest)
[ -e "$folder/gtest.o" ] || "${compile[@]}" -c /usr/src/googletest/googletest/src/gtest-all.cc -o "$folder/gtest.o"
for test in simd/isa simd/half simd/vector attention/kernels/plane_dot attention/softmax attention/tile_attention quantize/kernels; do
    program=$folder/${test//\//_}_test
    "${compile[@]}" "tests/${test}_test.cpp" /usr/src/googletest/googletest/src/gtest_main.cc "$folder/gtest.o" \
        -o "$program" -static -pthread
    echo "-- $test"
    # Some tests start the program again, or compare with the kernel of the machine that emulates.
    qemu-aarch64 -cpu max "$program" --gtest_brief=1 --gtest_filter=-KvplaneIsaVariable.*:IsaList.AgreesWithTheKernel | tail -n 3
done
