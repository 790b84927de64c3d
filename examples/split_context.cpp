// One sequence in two processes: each holds half of its tokens and attends over them, and what the second one
// finds comes over a pipe and is merged with the first one's. Over a network it is the same.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <random>

#include "kvplane/attention/merge.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/recipes.hpp"

namespace {

using kvplane::Index;
using kvplane::Matrix;

constexpr Index tokens = 8192, split = 4100, query_heads = 32, kv_heads = 8, head_dim = 128;

Matrix normal_numbers(Index rows, Index cols, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    return Matrix::NullaryExpr(rows, cols, [&] { return normal(random); });
}

/// What one process finds: the outputs of its tokens and the logarithms of their weights' sums.
struct Part {
    Matrix output{1, query_heads* head_dim};
    Matrix log_sum_exp{1, query_heads};
};

/// Attention of the last token of the sequence over tokens [first, end) of it.
Part attend(const Matrix& keys, const Matrix& values, const Matrix& query, Index first, Index end) {
    kvplane::CacheConfiguration layer;
    layer.kv_heads = kv_heads, layer.query_heads = query_heads;
    layer.key_head_dim = layer.value_head_dim = head_dim;
    layer.recipe = kvplane::recipes::key_favored(8, 8);
    kvplane::TilePool pool;
    kvplane::KvCache cache(layer, pool);
    cache.append(keys.middleRows(first, end - first), values.middleRows(first, end - first));
    kvplane::AttentionParameters parameters;
    // Positions count from the first token of the cache; the query may stand beyond its last one.
    parameters.position = tokens - 1 - first;
    kvplane::AttentionWorkspace workspace;
    Part part;
    cache.attend(query, part.output, parameters, workspace, {.log_sum_exp = &part.log_sum_exp});
    return part;
}

bool write_all(int to, const Matrix& numbers) {
    const auto* from = reinterpret_cast<const char*>(numbers.data());
    for (auto left = static_cast<std::size_t>(numbers.size()) * sizeof(float); left > 0;) {
        const ssize_t done = write(to, from, left);
        if (done <= 0) return false;
        from += done;
        left -= static_cast<std::size_t>(done);
    }
    return true;
}
bool read_all(int from, Matrix& numbers) {
    auto* to = reinterpret_cast<char*>(numbers.data());
    for (auto left = static_cast<std::size_t>(numbers.size()) * sizeof(float); left > 0;) {
        const ssize_t done = read(from, to, left);
        if (done <= 0) return false;
        to += done;
        left -= static_cast<std::size_t>(done);
    }
    return true;
}

}  // namespace

int main() {
    const Matrix keys = normal_numbers(tokens, kv_heads * head_dim, 1),
                 values = normal_numbers(tokens, kv_heads * head_dim, 2),
                 query = normal_numbers(1, query_heads * head_dim, 3);
    int ends[2];
    if (pipe(ends) != 0) return std::perror("pipe"), 1;
    const pid_t child = fork();
    if (child < 0) return std::perror("fork"), 1;
    if (child == 0) {
        const Part second = attend(keys, values, query, split, tokens);
        _exit(write_all(ends[1], second.output) && write_all(ends[1], second.log_sum_exp) ? 0 : 1);
    }
    close(ends[1]);
    Part merged = attend(keys, values, query, 0, split), second;
    if (!read_all(ends[0], second.output) || !read_all(ends[0], second.log_sum_exp)) {
        std::cerr << "the second process sent too little\n";
        return 1;
    }
    int status = 0;
    waitpid(child, &status, 0);
    kvplane::merge_attention(merged.output, merged.log_sum_exp, second.output, second.log_sum_exp);

    const Part whole = attend(keys, values, query, 0, tokens);
    const float off = (merged.output - whole.output).norm() / whole.output.norm();
    std::cout << "two processes, " << split << " and " << tokens - split << " tokens of 8 bits, "
              << (second.output.size() + second.log_sum_exp.size()) * 4 << " bytes over the pipe\n"
              << "merged, against one cache of all tokens: off by " << off << " of the output's norm\n";
    // The caches pack other tokens and keep other sinks and recent ones in fp16.
    return off < 0.02f ? 0 : 1;
}
