// kvplane/cuda/aligned_rule.hpp: policies of reads as kernels take them, and what they have read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "kvplane/attention/read_policy.hpp"
#include "kvplane/cuda/tile_views.hpp"
#include "kvplane/error.hpp"

namespace kvplane::cuda {

/// What is read of a tile.
struct TilePlanes {
    std::int32_t keys, values;
};

/// How that is decided (aligned_math.cuh); plain numbers, made from ReadPolicy.
struct AlignedRule {
    enum Kind : std::int32_t { tolerance, exponents, budget };
    std::int32_t kind;
    std::int32_t key_planes, value_planes;  ///< that there are
    std::int32_t first_planes;              ///< of keys, which are read before anything is known of a tile

    // tolerance
    float reach;  ///< what a score is off by for |query| times step, where first planes of keys are read
    /// By planes of values: what they may be off by, of the largest norm.
    float share[PlaneSplit::max_planes + 1];
    float allowance;  ///< errors that are gathered, of the sum of weights

    // exponents and budget: by what the rule calls 0 to 3 planes
    /// A tile whose largest weight has no more octaves below the best gets 1, 2 or 3 planes.
    float below[3];
    std::int32_t keys_by[4], values_by[4];    ///< planes
    std::int32_t key_bits[4], value_bits[4];  ///< of a token
    std::int32_t allowed[2];  ///< bits of a token, of keys and of values, or of both in the first
    bool shared;
};

/// How many tiles were read by how many planes; a tile counts once for every eight query rows of a key head.
struct ReadCounts {
    unsigned long long keys[PlaneSplit::max_planes + 1], values[PlaneSplit::max_planes + 1];
};

/// Where attention puts what it says of its reads, in device memory. nullptr: nowhere.
struct DeviceReads {
    /// [query row][query head]: with ReadPolicy::tolerance, |o - o'|_2 over the largest norm of a value that
    /// the head's grids can hold (of fp16: over the largest norm, or that of numbers of 2^-14) is at most
    /// this, up to the rounding of factors; it is at most the tolerance. Otherwise 0.
    float* relative_error_bounds = nullptr;
    /// Calls add to it.
    ReadCounts* counts = nullptr;
};

/// Throws Error (option) for keys in latents, several widths in a tile, a policy that reads the same of all
/// tiles, a budget that the first planes of keys exceed, and what require_policy() refuses.
inline AlignedRule aligned_rule(const ReadPolicy& policy, const PlanePrefixes& prefixes, Index key_channels,
                                Index value_channels) {
    kvplane::detail::require_policy(policy);
    require(
        prefixes.key_planes > 0, ErrorCode::option,
        "cuda attention: a policy of reads of keys in latents or of several widths in a tile, expected one "
        "width of keys and one of values");
    const bool tolerance = policy.kind == ReadPolicy::Kind::tolerance,
               exponents = policy.kind == ReadPolicy::Kind::exponents;
    require(tolerance || exponents || policy.kind == ReadPolicy::Kind::aligned, ErrorCode::option,
            "cuda attention: a policy of fixed reads, expected PlanesRead of attend_layer()");
    AlignedRule rule{};
    rule.kind = tolerance ? AlignedRule::tolerance : exponents ? AlignedRule::exponents : AlignedRule::budget;
    rule.key_planes = prefixes.key_planes;
    rule.value_planes = prefixes.value_planes;
    const KeyTileView& all_keys = prefixes.keys[rule.key_planes - 1];
    const ValueTileView& all_values = prefixes.values[rule.value_planes - 1];
    const bool half_keys = all_keys.segment[0].bits == 16, half_values = all_values.all.bits == 16;
    const auto unread = [](const std::int32_t* bits, int read, int all) {
        return std::ldexp(1.0f, bits[all] - bits[read]);
    };
    rule.first_planes = exponents && !half_keys ? rule.key_planes : 1;

    // As unread_reach() of attention/plane_groups.hpp; in steps of what is read at most.
    const float cells = unread(prefixes.key_bits, rule.first_planes, rule.key_planes);
    if (rule.first_planes < rule.key_planes)
        rule.reach = half_keys ? 0.5f * std::ldexp(cells, 16 - prefixes.key_bits[rule.key_planes])
                               : 0.5f * (cells - 1.0f) * all_keys.segment[0].step_scale;
    for (int p = 0; p < rule.value_planes; ++p) {
        const int bits = prefixes.value_bits[rule.value_planes];
        rule.share[p] = p == 0 ? 1.0f
                        // Half of the place of the last bit that is read: 6 bits are sign and exponent.
                        : half_values ? std::ldexp(1.0f, 5 - prefixes.value_bits[p])
                                      : (unread(prefixes.value_bits, p, rule.value_planes) - 1.0f) *
                                            std::ldexp(1.0f, -bits);
    }
    rule.allowance = static_cast<float>(policy.error / (1.0 + 0.5 * policy.error));

    const int below[3] = {policy.thresholds.none, policy.thresholds.eight, policy.thresholds.twelve};
    for (int p = 0; p < 3; ++p) rule.below[p] = static_cast<float>(below[p] - 1);
    const auto of_codes = [&](int planes, int all) {
        return exponents || planes == 3 ? all : std::min(planes, 1);
    };
    for (int p = 0; p <= 3; ++p) {
        rule.keys_by[p] =
            std::clamp(half_keys ? p : of_codes(p, rule.key_planes), rule.first_planes, rule.key_planes);
        rule.values_by[p] = std::min(half_values ? p : of_codes(p, rule.value_planes), rule.value_planes);
        rule.key_bits[p] = prefixes.key_bits[rule.keys_by[p]] * static_cast<std::int32_t>(key_channels);
        rule.value_bits[p] =
            prefixes.value_bits[rule.values_by[p]] * static_cast<std::int32_t>(value_channels);
    }
    if (rule.kind != AlignedRule::budget) return rule;
    rule.shared = policy.shared;
    const double of_keys = policy.key_bits * static_cast<double>(key_channels),
                 of_values = policy.value_bits * static_cast<double>(value_channels);
    rule.allowed[0] = static_cast<std::int32_t>(policy.shared ? of_keys + of_values : of_keys);
    rule.allowed[1] = policy.shared ? 0 : static_cast<std::int32_t>(of_values);
    require(rule.allowed[0] >= rule.key_bits[0], ErrorCode::option, "cuda attention: a budget of ",
            policy.key_bits, " bits of keys", policy.shared ? " and as many of values" : "",
            ", expected that the first plane of keys, of ", prefixes.key_bits[1], " bits, fits into it");
    return rule;
}

/// What attention has read, and the largest of its bounds (both copied to the host). error_bound, which
/// would need values that were not read, stays 0.
inline ReadReport read_report(const PlanePrefixes& prefixes, Index key_channels, Index value_channels,
                              const ReadCounts& counts, std::span<const float> relative_error_bounds = {}) {
    ReadReport report;
    double keys = 0.0, values = 0.0, tiles = 0.0;
    for (int p = 0; p <= PlaneSplit::max_planes; ++p) {
        tiles += static_cast<double>(counts.keys[p]);
        keys += static_cast<double>(counts.keys[p]) * prefixes.key_bits[p];
        values += static_cast<double>(counts.values[p]) * prefixes.value_bits[p];
    }
    if (tiles == 0.0) return report;
    report.key_bits = keys / tiles;
    report.value_bits = values / tiles;
    report.mean_bits = (report.key_bits * static_cast<double>(key_channels) +
                        report.value_bits * static_cast<double>(value_channels)) /
                       static_cast<double>(key_channels + value_channels);
    for (const float bound : relative_error_bounds)
        report.relative_error_bound = std::max(report.relative_error_bound, static_cast<double>(bound));
    return report;
}

}  // namespace kvplane::cuda
