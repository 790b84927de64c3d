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
# A program of the tests of a folder, whose headers are read and compiled once.
run() {
    set -euo pipefail
    local program=$folder/$1_tests
    printf '#include "%s"\n' "${@:2}" | sed "s#\"\(.*\)\"#\"$1/\1_test.cpp\"#" >"$program.cpp"
    compile -include "$folder/headers.hpp" "$program.cpp" "$folder/gtest.o" "$folder/main.o" -o "$program" \
        -static -pthread
    # Some tests start the program again, or compare with the kernel of the machine that emulates.
    qemu-aarch64 -cpu max "$program" --gtest_brief=1 \
        --gtest_filter=-KvplaneIsaVariable.*:IsaList.AgreesWithTheKernel | tail -n 3 | sed "s|^|$1: |"
}
export -f compile run

# Headers of others, read once; and googletest, compiled meanwhile.
gtest=/usr/src/googletest/googletest/src
printf '#include <gtest/gtest.h>\n#include <Eigen/Core>\n' >"$folder/headers.hpp"
[ -e "$folder/gtest.o" ] || compile -pthread -c $gtest/gtest-all.cc -o "$folder/gtest.o" &
compile -pthread -x c++-header "$folder/headers.hpp" -o "$folder/headers.hpp.gch"
compile -pthread -c $gtest/gtest_main.cc -o "$folder/main.o"
wait $!

# The longest first, so that no core waits for it at the end.
xargs -P "$(nproc)" -L 1 bash -c 'run "$@"' bash <<'TESTS'
attention tile_attention softmax kernels/plane_dot
quantize shaped kernels unbiased
storage token_runs tile_planes half_bytes
simd vector half isa
latent products
TESTS
