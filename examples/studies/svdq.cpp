// examples/studies/svdq.cpp: what SVDq (arXiv 2502.15304) claims about keys in latents, measured on keys of a real
// model: the spectrum, the error at a given size, and fewer bits together with fewer keys.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "dump_file.hpp"
#include "kvplane/allocate/bit_allocation.hpp"
#include "kvplane/attention/reference.hpp"
#include "kvplane/cache/kv_cache.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/metrics.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/theory/bounds.hpp"
#include "options.hpp"
#include "plot.hpp"

namespace {

using namespace kvplane;
using kvplane_examples::Options;

constexpr const char* summary =
    R"(Compares keys in latents (SVDq, arXiv 2502.15304, and kvplane's own recipes) with keys in channels, on every
layer of FILE that has layers.L.keys and .values [tokens, kv_heads, head_dim] and .queries [queries, heads,
head_dim], keys and queries after RoPE. Where layers.L.keys_before_rope is missing, keys are turned back. The
queries stand at the metadata's first_query_position, or at the last positions. Without FILE: four layers of
SmolLM2-135M on 1024 tokens of Northanger Abbey, which ship with kvplane.)";

const Index sink_tokens = CacheRecipe().sink_tokens;

// Input ----------------------------------------------------------------------------------------------------

struct Settings {
    std::vector<std::string> files;
    bool json = false;
    std::string plot, rope_layout = "interleaved";
    double rope_base = 0.0;  // 0: the file's
};

/// One layer's tensors, tokens x (heads * head_dim). Bases are fitted to the first half of the tokens and judged on the
/// second.
struct Layer {
    int number = 0;
    CacheConfiguration configuration;  ///< all but the recipe
    Matrix keys, keys_before_rope, values, queries;
    Index first_query_position = 0;

    Index fitted_keys() const noexcept { return keys.rows() / 2; }
    Index fitted_queries() const noexcept { return queries.rows() / 2; }
    Matrix judged_queries() const { return queries.bottomRows(queries.rows() - fitted_queries()); }
    AttentionShape judged_attention() const {
        return {configuration.query_heads, configuration.kv_heads, first_query_position + fitted_queries()};
    }
    bool queries_are_last() const { return first_query_position + queries.rows() == keys.rows(); }
};

template <class Number>
Number number(const std::string& name, const std::string& text) {
    Number value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    require(error == std::errc() && end == text.data() + text.size(), ErrorCode::option, name, ": '", text,
            "', expected a number");
    return value;
}

template <class Number>
std::optional<Number> metadata_number(const SafetensorsFile& file, const std::string& name) {
    const auto found = file.metadata().find(name);
    if (found == file.metadata().end()) return std::nullopt;
    return number<Number>("metadata " + name, found->second);
}

/// The layers of which a file has all that is needed, ascending; says on stderr which ones it lacks.
std::vector<int> complete_layers(const SafetensorsFile& file) {
    std::vector<int> complete;
    for (const int layer : kvplane_examples::layers_in(file)) {
        const std::string prefix = "layers." + std::to_string(layer) + ".";
        if (file.contains(prefix + "values") && file.contains(prefix + "queries"))
            complete.push_back(layer);
        else
            std::fprintf(stderr, "svdq: layer %d is left out: values or queries are missing\n", layer);
    }
    return complete;
}

/// The tensor, all of it finite.
Matrix load(const SafetensorsFile& file, const std::string& name, Index& heads) {
    Matrix rows = kvplane_examples::load(file, name, heads);
    require(rows.allFinite(), ErrorCode::not_finite, name, ": not all values are finite");
    return rows;
}

void require_layer(const Layer& layer, const std::string& prefix) {
    const CacheConfiguration& c = layer.configuration;
    const Index tokens = layer.keys.rows(), channels = layer.keys.cols();
    // As many keys as channels, so that every schedule has its latents; and a tile.
    const Index least = std::max(2 * (sink_tokens + channels + 1), sink_tokens + tile_tokens);
    require(tokens >= least, ErrorCode::shape, prefix, "keys: ", tokens, " tokens, expected at least ", least,
            ": a basis for ", channels, " channels is fitted to the first half of them");
    require(layer.queries.rows() >= 2, ErrorCode::shape, prefix, "queries: ", layer.queries.rows(),
            " token, expected at least 2: one half is fitted to, the other judged");
    require(c.query_heads % c.kv_heads == 0 && layer.queries.cols() == c.query_heads * c.key_head_dim,
            ErrorCode::shape, prefix, "queries: ", c.query_heads, " heads of ",
            layer.queries.cols() / c.query_heads, " channels, expected a multiple of ", c.kv_heads,
            " heads of ", c.key_head_dim, " as the keys have");
    require(layer.first_query_position >= 0 && layer.first_query_position <= tokens - layer.queries.rows(),
            ErrorCode::index, prefix, "queries: ", layer.queries.rows(), " from position ",
            layer.first_query_position, " on, over ", tokens, " keys");
}

/// The keys before RoPE: the file's, which must agree with its keys and this rotary embedding, or its keys turned back.
Matrix load_keys_before_rope(const SafetensorsFile& file, const std::string& prefix, const Layer& layer) {
    const RotaryEmbedding rope(layer.configuration.key_head_dim, *layer.configuration.rope);
    Matrix turned = layer.keys;
    rope.rotate_back(turned, 0);
    if (!file.contains(prefix + "keys_before_rope")) return turned;
    Index heads = 0;
    Matrix keys = load(file, prefix + "keys_before_rope", heads);
    require(
        heads == layer.configuration.kv_heads && keys.rows() == turned.rows() && keys.cols() == turned.cols(),
        ErrorCode::shape, prefix, "keys_before_rope: another shape than ", prefix, "keys");
    const double error = relative_error(keys, turned);
    require(error < 0.02, ErrorCode::mismatch, prefix, "keys, turned back with a base of ",
            layer.configuration.rope->base, " (", name(layer.configuration.rope->layout), "), are off from ",
            prefix, "keys_before_rope by ", error,
            " of their norm; expected the model's own rotary embedding: --rope-base, --rope-layout");
    return keys;
}

Layer load_layer(const SafetensorsFile& file, int number, const Settings& settings) {
    const std::string prefix = "layers." + std::to_string(number) + ".";
    Layer layer;
    layer.number = number;
    CacheConfiguration& c = layer.configuration;
    Index value_heads = 0;
    layer.keys = load(file, prefix + "keys", c.kv_heads);
    layer.values = load(file, prefix + "values", value_heads);
    layer.queries = load(file, prefix + "queries", c.query_heads);
    require(value_heads == c.kv_heads && layer.values.rows() == layer.keys.rows(), ErrorCode::shape, prefix,
            "values: ", layer.values.rows(), " tokens of ", value_heads, " heads, expected ",
            layer.keys.rows(), " of ", c.kv_heads, " as the keys have");
    c.key_head_dim = layer.keys.cols() / c.kv_heads;
    c.value_head_dim = layer.values.cols() / c.kv_heads;
    layer.first_query_position = metadata_number<Index>(file, "first_query_position")
                                     .value_or(layer.keys.rows() - layer.queries.rows());
    require_layer(layer, prefix);
    c.rope = RopeSettings{};
    c.rope->layout = settings.rope_layout == "halves" ? RopeLayout::halves : RopeLayout::interleaved;
    c.rope->base = settings.rope_base > 0.0 ? settings.rope_base
                                            : metadata_number<double>(file, "rope_theta").value_or(100000.0);
    layer.keys_before_rope = load_keys_before_rope(file, prefix, layer);
    return layer;
}

// Measuring ------------------------------------------------------------------------------------------------

/// Moments of the first `keys` keys, less the sinks, and the first `queries` queries, all before RoPE.
LatentStatistics statistics(const Layer& layer, Index keys, Index queries) {
    const CacheConfiguration& c = layer.configuration;
    LatentStatistics moments(c.kv_heads, c.query_heads, c.key_head_dim);
    moments.add_keys({layer.keys_before_rope.middleRows(sink_tokens, keys - sink_tokens), sink_tokens});
    Matrix before_rope = layer.queries.topRows(queries);
    RotaryEmbedding(c.key_head_dim, *c.rope).rotate_back(before_rope, layer.first_query_position);
    moments.add_queries(before_rope);
    return moments;
}

/// A way to store keys; values take 16 bits.
struct Method {
    std::string family, recipe;

    /// The recipe without the :16 that all have in common.
    std::string name() const {
        std::string text = recipe;
        if (const auto at = text.find(":16"); at != std::string::npos) text.erase(at, 3);
        return text;
    }
};

std::vector<Method> methods() {
    std::vector<Method> all;
    for (const char* bits : {"2", "3", "4"})
        all.push_back({"channels", "key_favored:" + std::string(bits) + ":16"});
    for (const char* bits : {"2", "3", "4"})
        all.push_back({"channels, rotated", "key_favored:" + std::string(bits) + ":16+rotate_keys=1"});
    for (const char* bits : {"1.25", "2"}) all.push_back({"SVDq", "svdq:" + std::string(bits)});
    for (const char* weighted : {"+query_weighted=0", ""})
        for (const char* frame : {"before_rope", "tile", "after_rope"})
            for (const char* bits : {"1.25", "2", "3"})
                all.push_back({"latents " + std::string(frame) + (*weighted ? ", C = I" : ", weighted"),
                               "latent:" + std::string(bits) + ":16" + weighted + "+frame=" + frame});
    for (const char* bits : {"2", "3"})
        all.push_back({"channels, weighted", "weighted:" + std::string(bits) + ":16"});
    return all;
}

/// A method's recipe with the settings that all have here: tokens go into a tile as soon as they fill it, and bases are
/// for a context of as many tokens as there are.
CacheRecipe recipe(const Layer& layer, const Method& method) {
    CacheRecipe recipe = recipes::parse(method.recipe + "+recent=0");
    if (!recipe.latents) return recipe;
    return recipes::parse(recipe.name + "+context=" + std::to_string(layer.keys.rows()));
}

/// A cache of all tokens, with a basis from the moments where the method has one.
KvCache filled(const Layer& layer, const Method& method, const LatentStatistics& moments, TilePool& pool) {
    CacheConfiguration c = layer.configuration;
    c.recipe = recipe(layer, method);
    if (c.recipe.latents) c.latent_keys = fit_latent_keys(moments, c.rope, *c.recipe.latents);
    KvCache cache(c, pool);
    cache.append(layer.keys, layer.values);
    return cache;
}

/// Bits that an element of a key takes in a tile: in planes, and with grids and padding.
struct KeyBits {
    double nominal = 0.0, real = 0.0;
};

KeyBits key_bits(const KvCache& cache) {
    const CacheConfiguration& c = cache.configuration();
    const PageLayout& layout = *cache.state().layout;
    const auto channels = static_cast<double>(c.kv_heads * c.key_head_dim);
    KeyBits bits;
    for (std::size_t part = 0; part < layout.key_at.size(); ++part) {
        const TileFormat& format = layout.key_format(static_cast<Index>(part));
        for (const TileFormat::Placed& segment : format.segments())
            bits.nominal += static_cast<double>(segment.channels * segment.bits) / channels;
        bits.real += 8.0 * static_cast<double>(format.bytes()) / static_cast<double>(tile_tokens) / channels;
    }
    return bits;
}

struct Measurement {
    Method method;
    std::string recipe;  ///< with all settings
    KeyBits bits;
    double key_error, output_error;
};

Measurement measure(const Layer& layer, const Method& method, const LatentStatistics& moments,
                    TilePool& pool) {
    const KvCache cache = filled(layer, method, moments, pool);
    const Matrix close = cache.stored_keys(0, cache.tokens());
    const Index first = std::max(sink_tokens, layer.fitted_keys()),
                count = sink_tokens + cache.packed_tokens() - first;
    return {method, cache.configuration().recipe.name, key_bits(cache),
            relative_error(layer.keys.middleRows(first, count), close.middleRows(first, count)),
            attention_output_error(layer.judged_attention(), layer.keys, layer.values, close, layer.values,
                                   layer.judged_queries())};
}

/// The share of the keys' variance that is lost at one rate, according to the theory of normal latents.
struct RateError {
    double bits, paper, best, limit;
};

struct SpectrumReport {
    double decay = 0.0, gain = 0.0;
    std::vector<RateError> rates;
    /// Squared key error of svdq:2 over that of keys by channel in 2 bits; and with a basis of all the keys.
    double measured_gain = 0.0, measured_own_gain = 0.0;
};

/// The least share that any widths of `bits` on average lose, a latent at a time.
double best_error(const Eigen::VectorXd& spectrum, double bits) {
    std::vector<AllocationItem> latents;
    for (const double variance : spectrum) {
        AllocationItem& latent = latents.emplace_back();
        latent.weight = variance;
        for (std::size_t width = 0; width < latent_grid_error.size(); ++width)
            latent.options.push_back({static_cast<double>(width), latent_grid_error[width]});
    }
    return allocate(latents, bits * static_cast<double>(spectrum.size())).error / spectrum.sum();
}

RateError rate_error(const Eigen::VectorXd& spectrum, const std::vector<int>& widths) {
    const double bits = theory::schedule_rate(widths), trace = spectrum.sum();
    return {bits, grouped_schedule(spectrum, widths).error / trace, best_error(spectrum, bits),
            theory::reverse_water_filling(spectrum, bits).distortion / trace};
}

const Measurement& find(const std::vector<Measurement>& all, const std::string& recipe) {
    return *std::find_if(all.begin(), all.end(),
                         [&](const Measurement& m) { return m.method.recipe == recipe; });
}

SpectrumReport report_spectrum(const Layer& layer, const std::vector<Measurement>& measured, TilePool& pool) {
    const Method svdq{"SVDq", "svdq:2"};
    const LatentRecipe two = *recipes::parse("svdq:2").latents, less = *recipes::parse("svdq:1.25").latents;
    const LatentStatistics all = statistics(layer, layer.keys.rows(), layer.queries.rows());
    const LatentBasis basis = fit_latent_basis(all, &*layer.configuration.rope, two.basis);
    const LatentBasis::Subspace& subspace = basis.subspaces().front();
    SpectrumReport report;
    report.decay = theory::fitted_decay(subspace.spectrum.head(subspace.rank));
    report.gain = theory::svdq_gain(report.decay);
    for (const LatentRecipe& recipe : {two, less})
        report.rates.push_back(rate_error(subspace.spectrum, recipe.groups));
    const double by_channel = find(measured, "key_favored:2:16").key_error;
    report.measured_gain = std::pow(find(measured, svdq.recipe).key_error / by_channel, 2);
    report.measured_own_gain = std::pow(measure(layer, svdq, all, pool).key_error / by_channel, 2);
    return report;
}

/// What is left where attention reads a share of the keys in tiles.
struct Sparsity {
    Method method;
    double fraction, ratio, recall, output_error;
    double exact_error;  ///< of exact keys, those of largest exact score
};

/// scores[query head][query, key]: q.k of the last queries and the `packed` keys after the sinks, -infinity where a
/// query does not see the key.
Matrix exact_scores(const Layer& layer, const Matrix& queries, Index packed) {
    const CacheConfiguration& c = layer.configuration;
    const Index dim = c.key_head_dim, tokens = queries.rows();
    Matrix scores(c.query_heads * tokens, packed);
    for (Index head = 0; head < c.query_heads; ++head)
        scores.middleRows(head * tokens, tokens) =
            queries.middleCols(head * dim, dim) *
            layer.keys.block(sink_tokens, head / c.group() * dim, packed, dim).transpose();
    for (Index row = 0; row < scores.rows(); ++row) {
        const Index seen = layer.keys.rows() - tokens + row % tokens + 1 - sink_tokens;
        if (seen < packed)
            scores.row(row).tail(packed - seen).setConstant(-std::numeric_limits<float>::infinity());
    }
    return scores;
}

/// The `count`th largest number of a row.
float largest(const Matrix& scores, Index row, Index count) {
    Eigen::RowVectorXf sorted = scores.row(row);
    std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(), std::greater<>());
    return sorted[count - 1];
}

/// The share of the selected tokens that are among as many of largest exact score.
double recall(const Matrix& scores, const std::vector<std::vector<Index>>& selected) {
    Index right = 0, all = 0;
    for (Index row = 0; row < scores.rows(); ++row) {
        const std::vector<Index>& tokens = selected[static_cast<std::size_t>(row)];
        const float least = largest(scores, row, static_cast<Index>(tokens.size()));
        for (const Index token : tokens) right += scores(row, token - sink_tokens) >= least;
        all += static_cast<Index>(tokens.size());
    }
    return static_cast<double>(right) / static_cast<double>(all);
}

/// Attention over exact keys; of those in tiles only the share that has the largest exact scores.
MatrixD attend_exact(const Layer& layer, const Matrix& queries, const Matrix& scores, double fraction) {
    const CacheConfiguration& c = layer.configuration;
    const auto kept = static_cast<Index>(std::ceil(fraction * static_cast<double>(scores.cols())));
    Matrix bias = Matrix::Zero(scores.rows(), layer.keys.rows());
    for (Index row = 0; row < scores.rows(); ++row) {
        const float least = largest(scores, row, kept);
        for (Index t = 0; t < scores.cols(); ++t)
            if (scores(row, t) < least) bias(row, sink_tokens + t) = -std::numeric_limits<float>::infinity();
    }
    AttentionParameters parameters;
    parameters.bias = &bias;
    return reference_attention(layer.keys, layer.values, queries, c.query_heads, c.kv_heads, parameters);
}

/// Empty where the queries are not the last ones, which attend() is for.
std::vector<Sparsity> report_sparsity(const Layer& layer, const LatentStatistics& moments, TilePool& pool) {
    std::vector<Sparsity> all;
    if (!layer.queries_are_last()) return all;
    const Matrix queries = layer.judged_queries();
    const std::vector<Method> methods{{"SVDq", "svdq:1.25"}, {"latents", "latent:2:16"}};
    std::vector<KvCache> caches;
    for (const Method& method : methods) caches.push_back(filled(layer, method, moments, pool));
    const Matrix scores = exact_scores(layer, queries, caches.front().packed_tokens());
    const MatrixD exact = attend_exact(layer, queries, scores, 1.0);
    for (const double fraction : {1.0, 1.0 / 8, 1.0 / 16, 1.0 / 32}) {
        AttentionParameters parameters;
        parameters.key_fraction = fraction;
        const double exact_error = relative_error(exact, attend_exact(layer, queries, scores, fraction));
        for (std::size_t m = 0; m < methods.size(); ++m) {
            Matrix output(queries.rows(), exact.cols());
            caches[m].attend(queries, output, parameters);
            all.push_back({methods[m], fraction,
                           theory::key_compression(key_bits(caches[m]).nominal, fraction),
                           recall(scores, caches[m].selected_keys(queries, parameters)),
                           relative_error(exact, output), exact_error});
        }
    }
    return all;
}

struct LayerReport {
    int layer;
    SpectrumReport spectrum;
    std::vector<Measurement> methods;
    std::vector<Sparsity> sparsity;
};

LayerReport report_layer(const Layer& layer, TilePool& pool) {
    const LatentStatistics moments = statistics(layer, layer.fitted_keys(), layer.fitted_queries());
    LayerReport report{layer.number, {}, {}, {}};
    for (const Method& method : methods()) report.methods.push_back(measure(layer, method, moments, pool));
    report.spectrum = report_spectrum(layer, report.methods, pool);
    report.sparsity = report_sparsity(layer, moments, pool);
    return report;
}

// Output ---------------------------------------------------------------------------------------------------

void print_spectra(const std::vector<LayerReport>& layers) {
    std::printf(
        "(a) Spectrum of the keys before RoPE, heads together (C = I)\n"
        "L         decay of the eigenvalues, e^(-L t) for t from 0 to 1; in the next column what that lets\n"
        "          SVDq gain over equal widths where rates are high: squared error x (L/2) / sinh(L/2)\n"
        "paper     share of the variance that the published widths lose, for normal latents on our grids\n"
        "best      the same with the best widths of as many bits in planes\n"
        "limit     no code at all loses less\n"
        "measured  squared key error of svdq:2 over that of keys by channel in 2 bits, with the basis of "
        "(b);\n"
        "          own: with a basis of all these keys, as the paper's. The paper claims x0.1\n\n"
        "%22s | %-23s | %-23s | svdq:2\n%5s %6s %9s | %7s %7s %7s | %7s %7s %7s | %8s %7s\n",
        "", "2 bits", "1.25 bits", "layer", "L", "high rate", "paper", "best", "limit", "paper", "best",
        "limit", "measured", "own");
    for (const LayerReport& layer : layers) {
        const SpectrumReport& s = layer.spectrum;
        std::printf("%5d %6.2f   x %.3f", layer.layer, s.decay, s.gain);
        for (const RateError& rate : s.rates)
            std::printf(" | %7.4f %7.4f %7.4f", rate.paper, rate.best, rate.limit);
        std::printf(" |  x %.3f x %.3f\n", s.measured_gain, s.measured_own_gain);
    }
}

void print_methods(const std::vector<LayerReport>& layers) {
    std::printf(
        "\n(b) Keys in tiles; values exact. Bases are fitted to the first half of the keys and queries,\n"
        "for a context of as many tokens as there are\n"
        "nominal     bits of the planes\n"
        "true bits   bits an element really takes, grids and padding counted; bases are part of the model\n"
        "key error   |K - K'| / |K| of the second half's tokens in tiles\n"
        "out. error  |O - O'| / |O| of the attention output of the second half of the queries, over all\n"
        "            tokens; the first %ld, and the last ones that fill no tile, are fp16\n",
        static_cast<long>(sink_tokens));
    for (const LayerReport& layer : layers) {
        std::printf("\n%5s %-46s %7s %9s %9s %10s\n", "layer", "method", "nominal", "true bits", "key error",
                    "out. error");
        for (const Measurement& m : layer.methods)
            std::printf("%5d %-46s %7.3f %9.3f %9.4f %10.5f\n", layer.layer, m.method.name().c_str(),
                        m.bits.nominal, m.bits.real, m.key_error, m.output_error);
    }
}

void print_sparsity(const std::vector<LayerReport>& layers) {
    std::printf(
        "\n(c) Fewer bits and fewer keys\n"
        "keys        share of the tokens in tiles that take part for each query; the others always do\n"
        "ratio       how much less of these keys is read than of fp16, by nominal bits: 16 / bits / share.\n"
        "            The paper's 410 is svdq:1.25 with 1/32\n"
        "recall      share of the selected tokens that are among as many of largest exact score\n"
        "out. error  of the attention output, selection and rounding together\n"
        "exact       the same of exact keys, those of largest exact score: what fewer keys cost by "
        "themselves\n\n"
        "%5s %-10s %5s %8s %7s %10s %9s\n",
        "layer", "method", "keys", "ratio", "recall", "out. error", "exact");
    for (const LayerReport& layer : layers) {
        for (const Sparsity& s : layer.sparsity) {
            const std::string keys =
                s.fraction == 1.0 ? "all" : "1/" + std::to_string(std::lround(1.0 / s.fraction));
            std::printf("%5d %-10s %5s %7.1fx %7.3f %10.5f %9.5f\n", layer.layer, s.method.name().c_str(),
                        keys.c_str(), s.ratio, s.recall, s.output_error, s.exact_error);
        }
        if (layer.sparsity.empty())
            std::printf("%5d not measured: the queries do not stand at the last positions\n", layer.layer);
    }
}

nlohmann::json to_json(const LayerReport& layer) {
    const SpectrumReport& s = layer.spectrum;
    nlohmann::json out{{"layer", layer.layer},
                       {"spectrum",
                        {{"decay", s.decay},
                         {"expected_gain", s.gain},
                         {"measured_gain", s.measured_gain},
                         {"measured_own_basis_gain", s.measured_own_gain},
                         {"rates", nlohmann::json::array()}}},
                       {"methods", nlohmann::json::array()},
                       {"sparsity", nlohmann::json::array()}};
    for (const RateError& rate : s.rates)
        out["spectrum"]["rates"].push_back({{"bits", rate.bits},
                                            {"paper_error", rate.paper},
                                            {"best_error", rate.best},
                                            {"limit", rate.limit}});
    for (const Measurement& m : layer.methods)
        out["methods"].push_back({{"method", m.method.name()},
                                  {"recipe", m.recipe},
                                  {"family", m.method.family},
                                  {"nominal_bits", m.bits.nominal},
                                  {"true_bits", m.bits.real},
                                  {"key_error", m.key_error},
                                  {"output_error", m.output_error}});
    for (const Sparsity& row : layer.sparsity)
        out["sparsity"].push_back({{"method", row.method.name()},
                                   {"key_fraction", row.fraction},
                                   {"ratio", row.ratio},
                                   {"recall", row.recall},
                                   {"output_error", row.output_error},
                                   {"exact_keys_output_error", row.exact_error}});
    return out;
}

/// A line for each family of methods: bits and errors on average over layers, errors by the geometric mean.
kvplane_examples::Plot to_plot(const std::vector<LayerReport>& layers) {
    kvplane_examples::Plot plot{"svdq",
                                "Attention-output error with quantized keys, mean over layers",
                                "true bits of an element of a key",
                                "|O - O'| / |O|",
                                {}};
    for (std::size_t m = 0; m < layers.front().methods.size(); ++m) {
        double bits = 0.0, log_error = 0.0;
        for (const LayerReport& layer : layers) {
            bits += layer.methods[m].bits.real / static_cast<double>(layers.size());
            log_error += std::log(layer.methods[m].output_error) / static_cast<double>(layers.size());
        }
        const Method& method = layers.front().methods[m].method;
        if (plot.series.empty() || plot.series.back().name != method.family)
            plot.series.push_back({method.family, {}});
        plot.series.back().points.push_back({bits, std::exp(log_error)});
    }
    return plot;
}

void run(const Settings& settings) {
    std::vector<std::filesystem::path> files(settings.files.begin(), settings.files.end());
    if (files.empty()) files = kvplane_examples::shipped_files();
    std::vector<Layer> layers;
    for (const auto& path : files) {
        const SafetensorsFile file = SafetensorsFile::open(path);
        for (const int layer : complete_layers(file)) layers.push_back(load_layer(file, layer, settings));
    }
    require(!layers.empty(), ErrorCode::index, files.front().string(),
            ": no layer has layers.L.keys, .values and .queries, expected at least one");
    TilePool pool;
    std::vector<LayerReport> reports;
    for (const Layer& layer : layers) reports.push_back(report_layer(layer, pool));
    if (settings.json) {
        nlohmann::json out{{"layers", nlohmann::json::array()}};
        for (const LayerReport& report : reports) out["layers"].push_back(to_json(report));
        std::printf("%s\n", out.dump().c_str());
    } else {
        print_spectra(reports);
        print_methods(reports);
        print_sparsity(reports);
    }
    std::fflush(stdout);
    if (!settings.plot.empty()) kvplane_examples::write_plot(settings.plot, to_plot(reports));
}

}  // namespace

int main(int count, char** arguments) {
    Settings s;
    Options options("svdq", summary);
    options.arguments("FILE", s.files, Options::Count::at_most_one, "as dump writes it");
    options.flag("--json", s.json, "one JSON object and nothing else");
    options.output_folder("--plot DIR", s.plot,
                          "also write DIR/svdq.csv and, where gnuplot is installed, DIR/svdq.svg");
    options.real("--rope-base B", s.rope_base,
                 "of the rotary embedding; 0: the metadata's rope_theta, or 100000");
    options.choice("--rope-layout L", s.rope_layout, {"interleaved", "halves"},
                   "which channels turn together");
    return options.run(count, arguments, [&] { run(s); });
}
