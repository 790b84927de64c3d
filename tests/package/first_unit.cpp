#include "kvplane/kvplane.hpp"

kvplane::Index tokens_in_second_unit();

int main() {
    const kvplane::Matrix keys = kvplane::Matrix::Ones(3, 16);
    return kvplane::per_channel(keys).tokens() == tokens_in_second_unit() ? 0 : 1;
}
