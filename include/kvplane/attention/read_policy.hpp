// kvplane/attention/read_policy.hpp: how much of what is stored an attention reads, as data.
//
// Each kind has a planner in read/, which turns it into planes for every tile.
#pragma once

#include "kvplane/error.hpp"

namespace kvplane {

/// How far below the largest term's exponent a term must lie to be read at 12 and at 8 of 16 bits.
struct AlignmentThresholds {
    static constexpr int never = 1000;

    int twelve = 4;
    int eight = 8;
    int none = 12;  ///< not read at all: beyond the paper, which always reads 8 bits

    /// What the bound of T11 supports.
    static constexpr AlignmentThresholds supported() noexcept { return {4, 8, 12}; }
    /// A quarter of that error for each term: outputs are sums over thousands of tokens.
    static constexpr AlignmentThresholds accurate() noexcept { return {6, 10, 14}; }
    /// What the published code ships, where that code differs from its paper: no bound holds.
    static constexpr AlignmentThresholds published() noexcept { return {1, 2, never}; }

    constexpr bool operator==(const AlignmentThresholds&) const = default;
};

/// How much of what is stored a read takes: planes, most significant first. One cache serves every policy.
struct ReadPolicy {
    enum class Kind {
        all,
        fixed,      ///< of every code as many planes as fit into so many bits
        aligned,    ///< so many bits on average, where the query and the softmax weights make them count
        tolerance,  ///< what keeps every head's output within an error, by T13 (theory/bounds.hpp)
        exponents   ///< of fp16, by T11: AlignedKV (arXiv 2409.16546)
    };
    Kind kind = Kind::all;
    double key_bits = 16.0, value_bits = 16.0;
    /// |o - o'|_2 / max |v|_2 of a head: o of a read of everything, the largest value that the head's grids
    /// can hold. 0 reads all that has a part in the output.
    double error = 0.0;
    AlignmentThresholds thresholds = AlignmentThresholds::accurate();
    /// Whether aligned reads have one budget for keys and values, of which each side gets what it makes most
    /// of.
    bool shared = false;

    static constexpr ReadPolicy all() noexcept { return {}; }
    static constexpr ReadPolicy fixed(double bits) noexcept {
        return {Kind::fixed, bits, bits, 0.0, {}, false};
    }
    static constexpr ReadPolicy aligned(double mean_bits) noexcept {
        return {Kind::aligned, mean_bits, mean_bits, 0.0, {}, true};
    }
    static constexpr ReadPolicy aligned(double mean_key_bits, double mean_value_bits) noexcept {
        return {Kind::aligned, mean_key_bits, mean_value_bits, 0.0, {}, false};
    }
    static constexpr ReadPolicy tolerance(double error) noexcept {
        return {Kind::tolerance, 16.0, 16.0, error, {}, false};
    }
    static constexpr ReadPolicy exponents(
        const AlignmentThresholds& thresholds = AlignmentThresholds::accurate()) noexcept {
        return {Kind::exponents, 16.0, 16.0, 0.0, thresholds, false};
    }
};

/// What an attention read of the packed tokens.
struct ReadReport {
    /// Bits read on average of an element, grids aside; of latents, of those that have bits. 0 where it read
    /// none.
    double key_bits = 0.0;
    double value_bits = 0.0;
    double mean_bits = 0.0;  ///< of both together
    /// With ReadPolicy::tolerance, what T13 guarantees: the largest |o - o'|_2 of a head and query token, o
    /// being the output of a read of everything; and the same divided by the largest norm of a value that the
    /// head's grids can hold, which is at most the tolerance. Both hold up to the rounding of factors (T14).
    /// Otherwise 0.
    double error_bound = 0.0;
    double relative_error_bound = 0.0;
};

namespace detail {

/// Throws Error (option) for thresholds that do not rise.
inline void require_thresholds(const AlignmentThresholds& thresholds) {
    require(thresholds.twelve >= 0 && thresholds.eight >= thresholds.twelve &&
                thresholds.none >= thresholds.eight,
            ErrorCode::option, "alignment thresholds: ", thresholds.twelve, ", ", thresholds.eight, " and ",
            thresholds.none, ", expected 0 <= twelve <= eight <= none");
}
/// Throws Error (option) for a policy that cannot be.
inline void require_policy(const ReadPolicy& read) {
    require(read.kind == ReadPolicy::Kind::all || (read.key_bits >= 0.0 && read.key_bits <= 16.0 &&
                                                   read.value_bits >= 0.0 && read.value_bits <= 16.0),
            ErrorCode::option, "attention: reads of ", read.key_bits, " bits of keys and ", read.value_bits,
            " of values, expected 0 to 16");
    // NaN and infinity fail both comparisons.
    require(read.error >= 0.0 && read.error <= 1e300, ErrorCode::option, "attention: a tolerance of ",
            read.error, ", expected a finite number, 0 or more");
    require_thresholds(read.thresholds);
}

}  // namespace detail
}  // namespace kvplane
