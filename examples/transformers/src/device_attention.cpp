#include "device_attention.hpp"

#include <algorithm>
#include <utility>

namespace kvplane_python {

using kvplane::AttentionParameters;
using kvplane::cuda::AttendLayer;
using kvplane::cuda::DeviceSequence;
using kvplane::cuda::require_cuda;

namespace {

/// The query tokens of a sequence that one plan takes (AttendWorkspace::plan). More of them go as several
/// sequences, each of which ends with its queries; of these one launch takes so many.
constexpr Index most_query_tokens = 8, most_parts = 64;

/// A sequence that ends after `tokens` tokens, for queries that stand before its end.
DeviceSequence ended_at(DeviceSequence sequence, Index tokens) {
    std::size_t count = sequence.tiles.size();
    while (count > 0 && sequence.tiles[count - 1].first >= tokens) --count;
    sequence.tiles = sequence.tiles.first(count);
    if (sequence.recent_first >= tokens) sequence.recent = {};
    sequence.recent_first = std::min(sequence.recent_first, tokens);
    sequence.sink_count = std::min(sequence.sink_count, tokens);
    sequence.tokens = tokens;
    return sequence;
}

/// Attention of one layer by one workspace, on one stream.
struct Launches {
    const AttentionParameters& parameters;
    DeviceAttention::Workspace& workspace;
    cudaStream_t stream;

    void attend(const AttendLayer& layer, std::span<const DeviceSequence> sequences, Index query_tokens,
                const DeviceRows& queries, const DeviceOutput& output) const {
        if (!workspace) workspace = std::make_unique<kvplane::cuda::AttendWorkspace>();
        workspace->plan(layer, sequences, query_tokens, parameters, stream);
        workspace->attend(queries, output, nullptr, stream);
    }
    /// The last tokens of one sequence.
    void attend_one(const AttendLayer& layer, const DeviceSequence& sequence, const DeviceRows& queries,
                    const DeviceOutput& output) const {
        const Index before = sequence.tokens - queries.tokens;
        for (Index at = 0; at < queries.tokens;) {
            // Those that fill no part come first.
            const Index rest = (queries.tokens - at) % most_query_tokens,
                        each = rest > 0 ? rest : most_query_tokens,
                        parts = rest > 0 ? 1 : std::min((queries.tokens - at) / each, most_parts);
            std::vector<DeviceSequence> sequences;
            for (Index p = 1; p <= parts; ++p)
                sequences.push_back(ended_at(sequence, before + at + p * each));
            DeviceRows from = queries;
            DeviceOutput to = output;
            from.tokens = to.tokens = parts * each;
            from.data = static_cast<const std::byte*>(queries.data) +
                        to_size(at * queries.token_stride) * size_of(queries.type);
            to.data = static_cast<std::byte*>(output.data) +
                      to_size(at * output.token_stride) * size_of(output.type);
            attend(layer, sequences, each, from, to);
            at += parts * each;
        }
    }
};

/// Whether the tokens of all sequences are as far apart as if they were of one.
bool in_a_row(const SequenceRows& rows) {
    return rows.batch == 1 || rows.tokens == 1 || rows.batch_stride == rows.tokens * rows.token_stride;
}

}  // namespace

void DeviceAttention::attend(std::span<const Attended> sequences, const SequenceRows& queries,
                             const SequenceRows& output, std::span<const Index> padding,
                             AttentionParameters parameters, Workspace& long_calls, cudaStream_t stream) {
    const bool is_long = queries.tokens > most_query_tokens;
    // As on the CPU, calls of more tokens read everything.
    if (is_long) parameters.read = kvplane::ReadPolicy::all();
    const Launches launches{parameters, is_long ? long_calls : workspace_, stream};
    const bool padded = std::any_of(padding.begin(), padding.end(), [](Index rows) { return rows > 0; });
    const bool one_basis = std::all_of(sequences.begin(), sequences.end(), [&](const Attended& one) {
        return one.sequence.latent == sequences[0].sequence.latent;
    });
    if (!is_long && !padded && one_basis && in_a_row(queries) && in_a_row(output)) {
        std::vector<DeviceSequence> all;
        for (const Attended& one : sequences) all.push_back(one.sequence);
        DeviceRows from = device_rows(queries, 0, 0);
        DeviceOutput to = device_output(output, 0, 0);
        from.tokens = to.tokens = queries.batch * queries.tokens;
        if (queries.tokens == 1)
            from.token_stride = queries.batch_stride, to.token_stride = output.batch_stride;
        return launches.attend(view(sequences[0], sequences.size()), all, queries.tokens, from, to);
    }
    for (Index b = 0; b < queries.batch; ++b) {
        const Attended& one = sequences[to_size(b)];
        const Index first = padding.empty() ? 0 : padding[to_size(b)];
        if (first > 0) clear_rows(output, b, first, stream);
        if (first == queries.tokens) continue;
        launches.attend_one(view(one, sequences.size()), one.sequence, device_rows(queries, b, first),
                            device_output(output, b, first));
    }
}

const AttendLayer& DeviceAttention::view(const Attended& sequence, std::size_t sequences) {
    const auto basis = sequence.shape->configuration.fits_basis() ? sequence.latent : nullptr;
    for (const View& one : views_)
        if (one.basis == basis) return one.layer;
    // No sequence has these bases any more: a view refers to its own twice.
    if (views_.size() > 2 * sequences)
        std::erase_if(views_, [](const View& one) { return one.basis.use_count() <= 2; });
    views_.push_back({basis, kvplane::cuda::attend_layer(*sequence.shape, {}, basis)});
    return views_.back().layer;
}

std::span<const float> DeviceAttention::sink_logits(const Attention& attention, kvplane::TilePool& pool,
                                                    cudaStream_t stream) {
    if (!attention.device_sink_logits.empty() || attention.sink_logits.empty())
        return attention.device_sink_logits;
    const std::size_t count = attention.sink_logits.size();
    if (sink_logits_ != attention.sink_logits) {
        const std::size_t bytes = count * sizeof(float);
        if (!sink_logits_there_ || to_size(sink_logits_there_.bytes()) < bytes)
            sink_logits_there_ = pool.unfilled(static_cast<Index>((bytes + 255) / 256 * 256));
        sink_logits_.clear();
        require_cuda(cudaMemcpyAsync(sink_logits_there_.data(), attention.sink_logits.data(), bytes,
                                     cudaMemcpyHostToDevice, stream),
                     "copying sink logits");
        sink_logits_ = attention.sink_logits;
    }
    return {reinterpret_cast<const float*>(sink_logits_there_.data()), count};
}

}  // namespace kvplane_python
