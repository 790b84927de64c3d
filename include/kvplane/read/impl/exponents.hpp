// kvplane/read/impl/exponents.hpp: exponents of terms, one by one and a vector of channels at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvplane/attention/lanes.hpp"
#include "kvplane/error.hpp"
#include "kvplane/quantize/kernels.hpp"
#include "kvplane/read/exponents.hpp"

namespace kvplane {

KVPLANE_FUNCTION std::vector<int> aligned_key_bits(const Matrix& queries,
                                                   const Eigen::Ref<const Eigen::RowVectorXf>& largest,
                                                   const AlignmentThresholds& thresholds) {
    detail::require_thresholds(thresholds);
    require(queries.cols() == largest.size(), ErrorCode::shape, "aligned_key_bits: maxima of ",
            largest.size(), " channels, expected ", queries.cols());
    const Index channels = queries.cols();
    std::vector<int> bits(static_cast<std::size_t>(channels), detail::bits_of_nothing(thresholds));
    for (Index r = 0; r < queries.rows(); ++r) {
        if (!queries.row(r).allFinite()) return std::vector<int>(bits.size(), 16);
        int top = std::numeric_limits<int>::min();
        const auto exponent = [&](Index c) {
            return alignment_exponent(queries(r, c)) + alignment_exponent(largest[c]);
        };
        for (Index c = 0; c < channels; ++c) top = std::max(top, exponent(c));
        for (Index c = 0; c < channels; ++c) {
            // A channel that the query does not look at, or that holds nothing, has no term.
            if (queries(r, c) == 0.0f || largest[c] == 0.0f) continue;
            int& most = bits[static_cast<std::size_t>(c)];
            most = std::max(most, detail::aligned_bits(top - exponent(c), thresholds));
        }
    }
    return bits;
}

KVPLANE_FUNCTION std::vector<int> aligned_value_bits(const Matrix& weights,
                                                     const AlignmentThresholds& thresholds) {
    detail::require_thresholds(thresholds);
    std::vector<int> bits(static_cast<std::size_t>(weights.cols()), detail::bits_of_nothing(thresholds));
    for (Index r = 0; r < weights.rows(); ++r) {
        if (!weights.row(r).allFinite()) return std::vector<int>(bits.size(), 16);
        const float largest = weights.row(r).maxCoeff();
        if (largest <= 0.0f) continue;
        const int top = std::ilogb(largest);
        for (Index t = 0; t < weights.cols(); ++t) {
            if (weights(r, t) <= 0.0f) continue;
            int& most = bits[static_cast<std::size_t>(t)];
            most = std::max(most, detail::aligned_bits(top - std::ilogb(weights(r, t)), thresholds));
        }
    }
    return bits;
}

namespace detail {

/// The exponents of alignment_exponent(), and -700 of 0, which has no term: far below all others, and not as
/// far as AlignmentThresholds::never.
template <int Lanes>
KVPLANE_INLINE void exponents(const float* x, Ints<Lanes>& to) {
    Ints<Lanes> bits;
    load(bits, x);
    bits &= 0x7FFFFFFF;
    const Ints<Lanes> exponent = (bits >> 23) - 127, least = Ints<Lanes>{} - 14;
    const Ints<Lanes> some = exponent < least ? least : exponent;
    to = bits == 0 ? Ints<Lanes>{} - 700 : some;
}
/// below[c]: how far the largest term of channel c lies below the largest of its row, in exponents, for the
/// row where that is least. of_keys: exponents of the largest |k|, `padded` of them; x likewise padded.
template <int Lanes>
KVPLANE_INLINE void exponents_below(const float* x, Index stride, Index rows, const std::int32_t* of_keys,
                                    Index padded, std::int32_t* below) {
    for (Index r = 0; r < rows; ++r) {
        Ints<Lanes> most = Ints<Lanes>{} - 3000, q, k, least;
        for (Index c = 0; c < padded; c += Lanes) {
            exponents<Lanes>(x + r * stride + c, q);
            load(k, of_keys + c);
            q += k;
            most = most < q ? q : most;
        }
        int top = most[0];
        for (int i = 1; i < Lanes; ++i) top = std::max<int>(top, most[i]);
        for (Index c = 0; c < padded; c += Lanes) {
            exponents<Lanes>(x + r * stride + c, q);
            load(k, of_keys + c);
            q = top - (q + k);
            if (r > 0) {
                load(least, below + c);
                q = least < q ? least : q;
            }
            store(below + c, q);
        }
    }
}

KVPLANE_FUNCTION void align_keys(Isa isa, const TileFormat& format, const std::byte* tile,
                                 RowView<const float> queries, const AlignmentThresholds& thresholds,
                                 AttentionScratch& scratch, std::uint8_t* planes) noexcept {
    const Index rows = queries.rows;
    for (const TileFormat::Placed& s : format.segments()) {
        if (s.bits == 0) continue;
        const Index depth = plane_group_size(s.split), units = (s.channels + depth - 1) / depth,
                    padded = padded_channels(s.channels);
        if (!s.is_half()) {
            std::fill_n(planes, units, static_cast<std::uint8_t>(s.split.count));
            planes += units;
            continue;
        }
        std::int32_t *const of_keys = scratch.sums(), *const below = of_keys + padded;
        const std::uint8_t* const fields = largest_exponents(s, tile);
        for (Index c = 0; c < s.channels; ++c) of_keys[c] = std::max<int>(fields[c], 1) - 15;
        std::fill(of_keys + s.channels, of_keys + padded, 0);
        const float* x = queries.data + s.first_channel;
        Index stride = queries.stride;
        if (padded != s.channels) {
            for (Index r = 0; r < rows; ++r) {
                float* const row = scratch.rows()[r];
                std::copy_n(x + r * stride, s.channels, row);
                std::fill(row + s.channels, row + padded, 0.0f);
            }
            x = scratch.rows().data;
            stride = scratch.depth();
        }
        run_on(isa, [=](auto lanes)
                        KVPLANE_BODY { exponents_below<lanes>(x, stride, rows, of_keys, padded, below); });
        for (Index u = 0; u < units; ++u) {
            const std::int32_t* const first = below + u * depth;
            std::int32_t least = first[0];
            for (Index i = 1; i < std::min(depth, s.channels - u * depth); ++i)
                least = std::min(least, first[i]);
            *planes++ = static_cast<std::uint8_t>(aligned_planes(least, thresholds));
        }
    }
}

}  // namespace detail
}  // namespace kvplane
