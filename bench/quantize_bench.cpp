// bench/quantize_bench.cpp: quantize, dequantize, pack and unpack by width and granularity.
//
// Every benchmark works on 8192 tokens of 8 heads of 128 channels, read from memory. `bytes_per_second`
// counts what is named after it: fp16 input (quantize, encode), packed bytes (unpack) or codes (pack), or the
// numbers written (dequantize, decode). `bandwidth_share` is that over one core's read bandwidth, measured in
// the same run.
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "bandwidth.hpp"
#include "kvplane/storage/planes.hpp"
#include "kvplane/storage/quantized.hpp"
#include "kvplane/storage/tile_coder.hpp"

namespace {

using namespace kvplane;
using namespace kvplane::detail;

constexpr Index tokens = 8192, heads = 8, head_dim = 128;

const RowMajorMatrix<Eigen::half>& half_keys() {
    static const RowMajorMatrix<Eigen::half> keys = [] {
        std::mt19937 generator(1);
        std::normal_distribution<float> normal;
        RowMajorMatrix<Eigen::half> filled(tokens, heads * head_dim);
        for (Index i = 0; i < filled.size(); ++i) filled.data()[i] = Eigen::half(normal(generator));
        return filled;
    }();
    return keys;
}
const Matrix& float_keys() {
    static const Matrix keys = half_keys().cast<float>();
    return keys;
}

void report(benchmark::State& state, Index bytes) {
    const auto processed = static_cast<double>(bytes) * static_cast<double>(state.iterations());
    state.SetBytesProcessed(static_cast<std::int64_t>(processed));
    state.counters["bandwidth_share"] =
        benchmark::Counter(processed / kvplane_bench::read_bandwidth(1), benchmark::Counter::kIsRate);
}

enum class By { channel, token, group };

GridRule rule_of(By by) {
    switch (by) {
        case By::channel:
            return {Granularity::per_channel, 128};
        case By::token:
            return {Granularity::per_token, head_dim};
        default:
            return {Granularity::per_token, 32};
    }
}

template <class Scalar>
void quantize_by(benchmark::State& state, By by, const RowMajorMatrix<Scalar>& input) {
    const int bits = static_cast<int>(state.range(0));
    for (auto _ : state)
        benchmark::DoNotOptimize(quantize(head_rows(input, heads), rule_of(by), bits, "input"));
    report(state, input.size() * static_cast<Index>(sizeof(Scalar)));
}

void quantize_half(benchmark::State& state, By by) {
    quantize_by(state, by, half_keys());
}
void quantize_float(benchmark::State& state, By by) {
    quantize_by(state, by, float_keys());
}

void dequantize(benchmark::State& state, By by) {
    const Quantized packed =
        quantize(head_rows(half_keys(), heads), rule_of(by), static_cast<int>(state.range(0)), "input");
    Matrix values(tokens, heads * head_dim);
    for (auto _ : state) {
        packed.dequantize_rows(0, packed.bits(), values);
        benchmark::DoNotOptimize(values.data());
        benchmark::ClobberMemory();
    }
    report(state, values.size() * 4);
}

TileFormat format_of(TileSide side, int bits) {
    return {side, head_dim, bits, rule_of(side == TileSide::keys ? By::channel : By::token)};
}

void encode_tiles(benchmark::State& state, TileSide side) {
    const TileFormat format = format_of(side, static_cast<int>(state.range(0)));
    TileCoder coder(format);
    std::vector<std::byte> tile(static_cast<std::size_t>(format.bytes()));
    const auto rows = head_rows(half_keys(), heads);
    for (auto _ : state)
        for (Index token = 0; token < tokens; token += tile_tokens)
            for (Index head = 0; head < heads; ++head) {
                coder.encode(rows, "keys", {.head = head, .first = token}, tile.data());
                benchmark::ClobberMemory();
            }
    report(state, half_keys().size() * 2);
}

void decode_tiles(benchmark::State& state, TileSide side) {
    const TileFormat format = format_of(side, static_cast<int>(state.range(0)));
    TileCoder coder(format);
    std::vector<std::byte> tiles(static_cast<std::size_t>(format.bytes() * tokens / tile_tokens * heads));
    const auto rows = head_rows(half_keys(), heads);
    std::byte* at = tiles.data();
    for (Index token = 0; token < tokens; token += tile_tokens)
        for (Index head = 0; head < heads; ++head, at += format.bytes())
            coder.encode(rows, "keys", {.head = head, .first = token}, at);
    Matrix values(tile_tokens, head_dim);
    for (auto _ : state)
        for (std::size_t tile = 0; tile < tiles.size(); tile += static_cast<std::size_t>(format.bytes())) {
            coder.decode(tiles.data() + tile, tile_tokens, values.data(), head_dim);
            benchmark::ClobberMemory();
        }
    report(state, tokens * heads * head_dim * 4);
}

constexpr Index row_codes = heads * head_dim;

void pack(benchmark::State& state) {
    const auto split = plane_split(static_cast<int>(state.range(0)));
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(tokens * row_codes), 1);
    std::vector<std::byte> packed(static_cast<std::size_t>(row_bytes(row_codes, 8)));
    for (auto _ : state)
        for (Index t = 0; t < tokens; ++t)
            for (int p = 0; p < split.count; ++p) {
                pack_row(codes.data() + t * row_codes, row_codes, split[p], split.shift(p), packed.data());
                benchmark::ClobberMemory();
            }
    report(state, tokens * row_codes);
}

void unpack(benchmark::State& state) {
    const auto split = plane_split(static_cast<int>(state.range(0)));
    std::vector<std::vector<std::byte>> planes;
    for (int p = 0; p < split.count; ++p)
        planes.emplace_back(static_cast<std::size_t>(tokens * row_bytes(row_codes, split[p])),
                            std::byte{0x5A});
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(row_codes));
    for (auto _ : state)
        for (Index t = 0; t < tokens; ++t) {
            for (int p = 0; p < split.count; ++p)
                unpack_row(planes[static_cast<std::size_t>(p)].data() + t * row_bytes(row_codes, split[p]),
                           row_codes, split[p], p == 0, codes.data());
            benchmark::DoNotOptimize(codes.data());
            benchmark::ClobberMemory();
        }
    report(state, tokens * row_bytes(row_codes, split.bits()));
}

void every_width(benchmark::internal::Benchmark* bench) {
    for (int bits = 1; bits <= 8; ++bits) bench->Arg(bits);
    bench->ArgName("bits")->Unit(benchmark::kMillisecond);
}

}  // namespace

BENCHMARK_CAPTURE(quantize_half, per_channel, By::channel)->Apply(every_width);
BENCHMARK_CAPTURE(quantize_half, per_token, By::token)->Apply(every_width);
BENCHMARK_CAPTURE(quantize_half, per_group, By::group)->Apply(every_width);
BENCHMARK_CAPTURE(quantize_float, per_channel, By::channel)->Apply(every_width);
BENCHMARK_CAPTURE(quantize_float, per_token, By::token)->Apply(every_width);
BENCHMARK_CAPTURE(dequantize, per_channel, By::channel)->Apply(every_width);
BENCHMARK_CAPTURE(dequantize, per_token, By::token)->Apply(every_width);
BENCHMARK_CAPTURE(dequantize, per_group, By::group)->Apply(every_width);
BENCHMARK_CAPTURE(encode_tiles, keys, TileSide::keys)->Apply(every_width);
BENCHMARK_CAPTURE(encode_tiles, values, TileSide::values)->Apply(every_width);
BENCHMARK_CAPTURE(decode_tiles, keys, TileSide::keys)->Apply(every_width);
BENCHMARK_CAPTURE(decode_tiles, values, TileSide::values)->Apply(every_width);
BENCHMARK(pack)->Apply(every_width);
BENCHMARK(unpack)->Apply(every_width);

BENCHMARK_MAIN();
