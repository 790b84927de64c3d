// libFuzzer target: a saved cache, compressed or not, altered at will. The checksum is made right again
// first, so that the fuzzer gets behind it. Whatever loads must be usable.
#include <cstdint>
#include <span>

#include "kvplane/io/cache_file.hpp"
#include "kvplane/recipe_names.hpp"

using namespace kvplane;

namespace {

CacheConfiguration configuration(int kind) {
    static const char* const recipes[] = {"block32:4", "key_favored:2:1+sinks=2+recent=0",
                                          "latent:2:1+sinks=2+recent=0+fit_tokens=64+context=100000",
                                          "weighted:2:1+sinks=2+recent=0+fit_tokens=300",
                                          "key_favored:2:1+sinks=2+recent=9+value_widths=32x4/96x1"};
    CacheConfiguration c;
    c.kv_heads = 1;
    c.query_heads = 2;
    c.key_head_dim = c.value_head_dim = 16;
    c.recipe = recipes::parse(recipes[kind % 5]);
    c.rope = RopeSettings{};
    return c;
}

void use(KvCache& cache) {
    const Index tokens = std::min<Index>(cache.tokens(), 2);
    Matrix output(tokens, 32);
    cache.attend(Matrix::Ones(tokens, 32), output);
    cache.append(Matrix::Ones(40, 16), Matrix::Ones(40, 16), Matrix::Ones(40, 32));
    (void)cache.error_bound();
    cache.truncate(cache.tokens() - 1);
    (void)to_bytes(cache);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < 2) return 0;
    TilePool pool;
    const CacheConfiguration c = configuration(data[0]);
    KvCache cache(c, pool);
    const Index tokens = data[1] * 2;
    cache.append(Matrix::Random(tokens, 16), Matrix::Random(tokens, 16), Matrix::Random(tokens, 32));
    // Numbers of the file, replaced by what the fuzzer says.
    detail::CacheContent content = detail::CacheContent::of(cache);
    std::size_t at = 2;
    const auto next = [&](auto& number) {
        if (at + 2 > size) return;
        number += static_cast<std::int16_t>(data[at] | data[at + 1] << 8);
        at += 2;
    };
    next(content.tokens);
    next(content.dropped);
    next(content.window_first);
    for (auto& number : content.tile_first) next(number);
    for (auto* list : {&content.tile_tokens, &content.tile_row, &content.tile_shift, &content.tile_bits})
        for (auto& number : *list) next(number);
    for (auto& number : content.attention) next(number);
    const bool compress = (data[0] & 4) != 0 && can_compress();
    try {
        if (compress) content.pack(cache);
        SafetensorsWriter writer;
        content.add_to(writer);
        KvCache loaded = load_cache(writer.to_bytes(), c, pool);
        use(loaded);
    } catch (const Error&) {
    }
    std::vector<std::byte> bytes = to_bytes(cache, {.compress = compress});
    for (; at + 3 <= size; at += 3)
        bytes[static_cast<std::size_t>(data[at] | data[at + 1] << 8) % bytes.size()] ^=
            static_cast<std::byte>(data[at + 2]);
    try {
        KvCache loaded = load_cache(bytes, c, pool);
        use(loaded);
    } catch (const Error&) {
    }
    return 0;
}
