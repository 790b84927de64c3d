// Everything compiles and works with -fno-exceptions; bad input aborts with the sentence.
#include "kvplane/kvplane.hpp"

int main(int count, char**) {
    const kvplane::Matrix keys = kvplane::Matrix::Random(200, 64);
    const kvplane::Quantized packed = kvplane::per_channel(keys, {.bits = count > 1 ? 9 : 4});
    return kvplane::relative_error(keys, packed.dequantize()) < 0.1 ? 0 : 1;
}
