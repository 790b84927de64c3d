// A part of the library alone, which header-only compiles in seconds.
#include <kvplane/metrics.hpp>
#include <kvplane/storage/quantized.hpp>

int main() {
    const kvplane::Matrix keys = kvplane::Matrix::Random(200, 64);
    return kvplane::relative_error(keys, kvplane::per_channel(keys).dequantize()) < 0.1 ? 0 : 1;
}
