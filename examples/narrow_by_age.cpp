// A context grows within a fixed budget: whenever the cache would take more, its oldest tiles lose their low planes.
// The newest tokens keep 7 bits, older ones 6, the oldest 4. What does that cost attention, beside storing all
// tokens in 4 bits from the start?
#include <cstdio>
#include <kvplane/kvplane.hpp>
#include <string>

using namespace kvplane;

namespace {

/// Keeps a cache of the recipe key_favored:7:7 within a budget, tile by tile.
class NarrowByAge {
  public:
    NarrowByAge(KvCache& cache, Index budget) : cache_(cache), budget_(budget) {}

    /// Narrows the oldest tiles of the widest width until the budget is kept; false where it cannot be.
    bool keep() {
        for (Step& step : steps_)
            for (; cache_.bytes() > budget_; step.done += tile_tokens) {
                if (step.done + tile_tokens > cache_.packed_tokens()) break;
                const Index first = cache_.configuration().recipe.sink_tokens + step.done;
                cache_.narrow(first, first + tile_tokens, step.bits, step.bits);
            }
        return cache_.bytes() <= budget_;
    }
    /// Tokens that have no more than 6 and 4 bits.
    Index at_most(int bits) const { return steps_[bits == 6 ? 0 : 1].done; }

  private:
    struct Step {
        int bits;
        Index done = 0;  ///< tokens behind the sinks that are narrowed to `bits`
    };
    KvCache& cache_;
    Index budget_;
    Step steps_[2] = {{6}, {4}};
};

}  // namespace

int main() {
    // SmolLM2-135M on 1024 tokens of a novel.
    const auto file = SafetensorsFile::open(KVPLANE_EXAMPLE_DATA "/smollm2_layers_16_24.safetensors");
    const auto tensor = [&](const char* name) {
        return file.to_float_matrix(std::string("layers.16.") + name);
    };
    const Matrix keys = tensor("keys"), values = tensor("values"), queries = tensor("queries");

    CacheConfiguration layer;
    layer.kv_heads = 3, layer.query_heads = 9;
    layer.key_head_dim = layer.value_head_dim = 64;
    layer.recipe = recipes::fp16();
    TilePool pool;
    KvCache exact(layer, pool);
    layer.recipe = recipes::key_favored(4, 4);
    KvCache plain(layer, pool);
    const Index budget = KvCache::predicted_bytes(layer, 1024) * 5 / 4;
    layer.recipe = recipes::key_favored(7, 7);
    KvCache cache(layer, pool);
    NarrowByAge policy(cache, budget);

    std::printf("budget: %ld bytes\n\n%7s %9s %12s %12s %15s %15s\n", static_cast<long>(budget), "tokens",
                "bytes", "in 6 bits", "in 4 bits", "attention error", "all in 4 bits");
    bool kept = true;
    for (Index first = 0; first < keys.rows(); first += 64) {
        const auto append = [&](KvCache& to) {
            to.append(keys.middleRows(first, 64), values.middleRows(first, 64));
        };
        append(exact), append(plain), append(cache);
        kept = policy.keep() && kept;
        if ((first + 64) % 128 != 0) continue;
        // The file has the queries of the last tokens; they ask from wherever the context ends.
        Matrix wanted(32, 9 * 64), got(32, 9 * 64), narrow(32, 9 * 64);
        exact.attend(queries.bottomRows(32), wanted);
        cache.attend(queries.bottomRows(32), got);
        plain.attend(queries.bottomRows(32), narrow);
        std::printf("%7ld %9ld %12ld %12ld %15.4f %15.4f\n", static_cast<long>(cache.tokens()),
                    static_cast<long>(cache.bytes()),
                    static_cast<long>(policy.at_most(6) - policy.at_most(4)),
                    static_cast<long>(policy.at_most(4)), relative_error(wanted, got),
                    relative_error(wanted, narrow));
    }
    return kept && std::fflush(stdout) == 0 ? 0 : 1;
}
