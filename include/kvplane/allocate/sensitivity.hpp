// kvplane/allocate/sensitivity.hpp: bits by what they were measured to do to a model's predictions.
//
// A part of a cache, such as the keys of a layer, can be stored in several ways. Each takes some bits an
// element and does some harm: the KL divergence of the model's predictions when this part alone is stored so
// and all else is exact. Errors of different parts are nearly independent and small, so that harms add up.
// The best choice for all parts is then the one allocator's problem (bit_allocation.hpp), solved exactly.
//
//     std::vector<SensitivityPart> parts;       // two for each layer: its keys and its values
//     for (...) parts.push_back({"keys of layer 3", elements, {{2.25, .0031}, {3.25, .0007}, ...}});
//     const SensitivityAllocation best = allocate_sensitivity(parts, /*mean_bits=*/2.3);
//
// Norms and squared errors of tensors (key_favored.hpp) need no model, but say little about predictions: on
// SmolLM2-135M bits that follow from them are worse than the same bits in every layer.
//
// Measured harms are noisy, because they are means over few predictions. Two functions deal with that, both
// for the options of ONE method at several widths. Options of different methods are not compared by them: a
// dearer method may well be worse.
//
//   falling_harms   no wider option of a method does more harm than a narrower one. Neighbours that
//                   contradict this are averaged (pool adjacent violators). A running minimum would keep
//                   whichever figure chance made small, and the allocation would go for just those.
//   harm_at         harms of widths that were not measured: log-linear between two that were, and by
//                   4^-bits beyond them, the law of the step of a uniform quantizer.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "kvplane/allocate/bit_allocation.hpp"
#include "kvplane/compiled.hpp"

namespace kvplane {

/// A way to store a part. Both numbers are finite and not negative.
struct SensitivityOption {
    double bits = 0;  ///< true bits an element, grids counted
    double harm = 0;  ///< KL divergence in nats, on average over predictions, where all other parts are exact
};

/// What is stored in one of several ways.
struct SensitivityPart {
    std::string name;                        ///< for sentences: "keys of layer 3"
    double elements = 1;                     ///< how many there are; only ratios matter
    std::vector<SensitivityOption> options;  ///< in any order
};

/// One option for every part.
struct SensitivityAllocation {
    std::vector<std::size_t> choice;  ///< by part: index into its options
    double bits = 0;                  ///< mean over the elements of all parts
    double harm = 0;                  ///< sum over all parts
    /// The harm that one more bit for every element would save at the margin; 0 where the budget buys all
    /// there is to gain.
    double price = 0;
};

/// The harms [option] of one method, made to fall with the bits. The options stand in ascending order of
/// bits. Throws Error: option (no options, bits that do not ascend, negative numbers), not_finite.
std::vector<double> falling_harms(std::span<const SensitivityOption> options);

/// The harm of one method at `bits`, from what was measured at some widths, in ascending order of bits.
/// Between two of which one does no harm at all it is linear. Throws Error as falling_harms(), and for
/// `bits` likewise.
double harm_at(std::span<const SensitivityOption> measured, double bits);

/// The choice of least total harm whose bits are `mean_bits` at most, on average over all elements. It is
/// exact, and the same for the same input. Throws Error: option (no parts, a part without options or
/// without elements, a negative number, a budget below the cheapest choice), not_finite; the sentence names
/// the part.
SensitivityAllocation allocate_sensitivity(std::span<const SensitivityPart> parts, double mean_bits,
                                           const AllocationSettings& settings = {});

/// The mean bits of the cheapest choice: the smallest budget that allocate_sensitivity() accepts. Throws
/// Error as it does.
double cheapest_mean_bits(std::span<const SensitivityPart> parts);

}  // namespace kvplane

#if !defined(KVPLANE_COMPILED)
#include "kvplane/allocate/impl/sensitivity.hpp"
#endif
