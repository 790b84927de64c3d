#!/usr/bin/env bash
# Compiles the CUDA part for every architecture that it is made for, where nvcc is there, and refuses spills of
# registers in kernels that are made for a width. Runs its programs too: without a device they say that they test
# nothing. Argument: the folder to build in, build/cuda; one that is there already spares compiling the library again.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:/usr/local/cuda/bin
if ! command -v nvcc >/dev/null; then
    echo "NOT COMPILED: the CUDA part, for there is no nvcc" >&2
    exit 0
fi
bash tests/install_packages.sh
build=${1:-build/cuda}
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DKVPLANE_BUILD_CUDA=ON -DKVPLANE_WARNINGS_AS_ERRORS=ON \
    >/dev/null
log=$build/kernels.log
cmake --build "$build" --target kvplane_cuda >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
cmake --build "$build" --target device_cache_gpu attend_gpu aligned_gpu integer_sums_gpu cuda_append_bench \
    cuda_attend_bench cuda_aligned_bench cuda_decode readme_device

# "Function properties for NAME", then the line of spills. A kernel for widths known at run time has 0 or -1 for those
# of keys, and 256 channels.
if grep -q "Function properties" "$log"; then
    # (Nor is a little of spills looked at where fp16 tiles are read as their scores say.)
    awk '/Function properties for/ {name = $NF}
         /bytes spill stores/ && name ~ /attend_kernel|aligned_kernel/ && name !~ /DeviceWarpELi(0|n1)ELi256E/ &&
             name !~ /aligned_kernel.*DeviceWarpELi16E/ && !/ 0 bytes spill stores/ {
             print "spills registers: " name; bad = 1 }
         /bytes spill stores/ {kernels++}
         END {print kernels " kernels compiled"; exit bad || kernels == 0}' "$log"
fi
for program in device_cache_gpu attend_gpu aligned_gpu integer_sums_gpu; do
    "$build/tests/cuda/$program" --gtest_brief=1
done
if ! said=$("$build/examples/cuda/decode" --recipes standard --tokens 2048 2>&1); then
    # Without a device it says so.
    [[ $said == *"no CUDA device"* ]] || { echo "$said" >&2; exit 1; }
fi
