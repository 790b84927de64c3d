// Prints the instruction sets that this machine can run, ascending: the last one is what kernels use by
// themselves.
#include <cstdio>
#include <string>

#include "kvplane/simd/isa.hpp"

int main() {
    for (const kvplane::Isa isa : kvplane::supported_isas())
        std::printf("%s\n", std::string(kvplane::name(isa)).c_str());
}
