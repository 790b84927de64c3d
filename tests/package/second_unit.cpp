#include "kvplane/kvplane.hpp"

kvplane::Index tokens_in_second_unit();

kvplane::Index tokens_in_second_unit() {
    const kvplane::Matrix keys = kvplane::Matrix::Ones(3, 16);
    return kvplane::per_token(keys).tokens();
}
