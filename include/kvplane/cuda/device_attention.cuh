// kvplane/cuda/device_attention.cuh: attention of a batch of sequences on packed tiles in device memory, by
// one launch.
//
//   AttendWorkspace workspace;
//   workspace.plan(layer, sequences, 1, parameters, stream);          // what each block does
//   workspace.attend(queries, output, nullptr, stream);               // may be captured in a CUDA graph
//
// A block takes some tiles of one sequence and key head, for eight query rows; each of its warps takes every
// so manyth of these. Which is which is fixed by the plan, so that results repeat bit for bit on one card.
// The last block of a head to end puts the parts together, in their order.
//
// For the host's compiler; the kernels are in cuda/attend.cuh and cuda/aligned.cuh, for nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "kvplane/attention/parameters.hpp"
#include "kvplane/cuda/aligned_arguments.hpp"
#include "kvplane/cuda/aligned_rule.hpp"
#include "kvplane/cuda/attend_arguments.hpp"
#include "kvplane/cuda/device_rows.hpp"
#include "kvplane/cuda/device_sequence.hpp"
#include "kvplane/cuda/error.cuh"
#include "kvplane/cuda/layer_view.hpp"

namespace kvplane::cuda {

/// Memory and plans of attention. Each call works on the stream that it is given; nothing waits for the
/// device, but for a plan whose predecessor has not been copied yet.
class AttendWorkspace {
  public:
    /// For the current device. Throws Error (io) where there is none.
    AttendWorkspace() {
        require_cuda(cudaGetDevice(&device_), "looking for a device");
        int most = 0;
        require_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_),
                     "asking the device");
        require_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_),
                     "asking the device");
        shared_bytes_ = static_cast<std::uint32_t>(most);
        require_cuda(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming), "making an event");
    }
    AttendWorkspace(const AttendWorkspace&) = delete;
    AttendWorkspace& operator=(const AttendWorkspace&) = delete;
    ~AttendWorkspace() {
        cudaEventDestroy(copied_);
        cudaFreeHost(staging_);
        cudaFree(memory_);
        for (const Uploaded& one : tables_) cudaFree(one.data);
    }

    /// Plans attention of `query_tokens` tokens of each sequence, 1 to 8, by default its last. Sequences stay
    /// as they are until attend() has run. What parameters point to, sink_logits and alibi_slopes, is in
    /// device memory. With a policy of reads, which of the layer's planes are read of a tile is decided while
    /// the kernel runs (cuda/aligned_math.cuh); keys have one width then. bias: in device memory, nullptr for
    /// none; of each sequence [query tokens][tokens], one after another, added to the scores of all heads;
    /// -infinity masks. Throws Error (shape, option, out_of_memory).
    void plan(const AttendLayer& layer, std::span<const DeviceSequence> sequences, Index query_tokens,
              const AttentionParameters& parameters, cudaStream_t stream, const float* bias = nullptr) {
        require_parameters(parameters, layer.view.query_heads);
        require(query_tokens >= 1 && query_tokens <= 8, ErrorCode::shape, "cuda attention: ", query_tokens,
                " query tokens of each sequence, expected 1 to 8");
        require(!sequences.empty(), ErrorCode::shape, "cuda attention: no sequences");
        blocks_ = 0;  // where this fails there is no plan
        take(layer, parameters, query_tokens, stream);
        decides_ = parameters.read.kind != ReadPolicy::Kind::all;
        if (decides_) take_policy(layer, parameters.read);
        arguments_.bias = bias;
        std::uint64_t bias_at = 0;
        query_rows_ = static_cast<Index>(sequences.size()) * query_tokens;
        std::vector<detail::SequenceTask> tasks;
        std::vector<const std::byte*> recent;
        Index row = 0;
        for (const DeviceSequence& sequence : sequences) {
            require(sequence.page_bytes == layer.page_bytes, ErrorCode::mismatch, "cuda attention: pages of ",
                    sequence.page_bytes, " bytes, expected those of the layer, ", layer.page_bytes);
            require(!sequence.narrowed, ErrorCode::option,
                    "cuda attention: tiles that were narrowed, expected the widths of the recipe");
            require(
                sequence.latent == layer.latent.get(), ErrorCode::mismatch,
                "cuda attention: keys in latents of another basis than the layer's; caches that fit bases of "
                "their own are attended one by one");
            tasks.push_back(task(sequence, parameters, query_tokens, row));
            tasks.back().recent_page = static_cast<std::int32_t>(recent.size());
            tasks.back().bias_at = static_cast<std::uint32_t>(bias_at);
            bias_at += static_cast<std::uint64_t>(query_tokens * sequence.tokens);
            require(!bias || bias_at < (std::uint64_t{1} << 32), ErrorCode::shape,
                    "cuda attention: a bias of ", bias_at, " numbers and more, expected fewer than 2^32");
            row += query_tokens;
            recent.insert(recent.end(), sequence.recent.begin(), sequence.recent.end());
        }
        std::vector<detail::WorkItem> items = share_out(sequences, tasks);
        upload(items, recent, layer, stream);
    }

    /// Attends: queries [sum of query tokens][query_heads][key_head_dim], output
    /// [..][query_heads][value_head_dim], log_sum_exp (nullptr: none) [..][query_heads]. Can be captured in a
    /// CUDA graph, whose launches then use the plan that is there. reads: where it says what was read, if the
    /// plan has a policy of reads. Throws Error (io).
    void attend(const DeviceRows& queries, const DeviceOutput& output, float* log_sum_exp,
                cudaStream_t stream, const DeviceReads& reads = {}) {
        require(blocks_ > 0, ErrorCode::option, "cuda attention: no plan");
        const LayerView& layer = arguments_.layer;
        const auto fits = [&](const auto& rows, const char* what) {
            require(rows.data && rows.tokens == query_rows_ && rows.heads == layer.query_heads,
                    ErrorCode::shape, "cuda attention: ", what, " of ", rows.tokens, " tokens and ",
                    rows.heads, " heads, expected ", query_rows_, " and ", layer.query_heads, ", as planned");
        };
        fits(queries, "queries");
        fits(output, "output");
        arguments_.queries = {const_cast<void*>(queries.data), static_cast<std::int32_t>(queries.type),
                              queries.token_stride, queries.head_stride, queries.channel_stride};
        arguments_.output = {output.data, static_cast<std::int32_t>(output.type), output.token_stride,
                             output.head_stride, 1};
        arguments_.log_sum_exp = log_sum_exp;
        require(decides_ || (!reads.relative_error_bounds && !reads.counts), ErrorCode::option,
                "cuda attention: what is read was asked for of a plan without a policy of reads");
        arguments_.error_bounds = reads.relative_error_bounds;
        aligned_.counts = reads.counts;
        require_cuda(
            static_cast<cudaError_t>(
                decides_ ? detail::launch_aligned(arguments_, aligned_, blocks_, warps_, bytes_, stream)
                         : detail::launch(arguments_, blocks_, warps_, bytes_, stream)),
            "starting attention");
    }

    /// Blocks and warps a block of the plan.
    int blocks() const noexcept { return blocks_; }
    int warps() const noexcept { return warps_; }

  private:
    static void require_parameters(const AttentionParameters& p, Index query_heads) {
        require(p.scale >= 0.0 && p.scale <= 1e30 && std::isfinite(p.softcap) && p.softcap >= 0.0,
                ErrorCode::option, "cuda attention: a scale of ", p.scale, " and a softcap of ", p.softcap,
                ", expected positive numbers, or 0 for 1 / sqrt(head_dim) and for none");
        require(p.sliding_window >= 0 && p.sinks >= 0 && (p.causal || p.sliding_window == 0),
                ErrorCode::option, "cuda attention: a sliding window of ", p.sliding_window, " with ",
                p.sinks, " sinks, expected neither below 0, and none for queries that see all tokens");
        const auto of_heads = [&](std::span<const float> numbers, const char* what) {
            require(numbers.empty() || static_cast<Index>(numbers.size()) == query_heads, ErrorCode::shape,
                    "cuda attention: ", numbers.size(), " ", what, ", expected ", query_heads,
                    ", one a query head");
        };
        of_heads(p.sink_logits, "sink logits");
        of_heads(p.alibi_slopes, "ALiBi slopes");
        require(!p.bias, ErrorCode::option,
                "cuda attention: a bias in the host's memory, expected one of the device");
        require(p.key_fraction == 1.0 && !p.decode_tiles, ErrorCode::option,
                "cuda attention: a key_fraction, or tiles to be decoded, expected neither");
        require(!p.position || (*p.position >= 0 && *p.position < (Index{1} << 31)), ErrorCode::index,
                "cuda attention: queries at position ", p.position.value_or(0), ", expected 0 to 2^31 - 1");
    }
    void take(const AttendLayer& of, const AttentionParameters& parameters, Index query_tokens,
              cudaStream_t stream) {
        const LayerView& layer = of.view;
        detail::AttendArguments& a = arguments_;
        blocks_ = 0;
        a = {};
        a.layer = layer;
        a.most_rows = static_cast<std::int32_t>(query_tokens * (layer.query_heads / layer.kv_heads));
        if (of.table) a.layer.latents.table = table_of(of.table, stream);
        a.scale = static_cast<float>(parameters.scale > 0.0
                                         ? parameters.scale
                                         : 1.0 / std::sqrt(static_cast<double>(layer.key_head_dim)));
        a.softcap = parameters.softcap < 1e30 ? static_cast<float>(parameters.softcap) : 0.0f;
        a.window = static_cast<std::int32_t>(parameters.sliding_window);
        a.window_sinks = static_cast<std::int32_t>(parameters.sinks);
        a.causal = parameters.causal;
        a.sink_logits = parameters.sink_logits.empty() ? nullptr : parameters.sink_logits.data();
        a.alibi_slopes = parameters.alibi_slopes.empty() ? nullptr : parameters.alibi_slopes.data();
        // The warps' outputs go through their slots, and the numbers of all parts of a head.
        a.slot_bytes =
            lines(std::max({layer.keys.bytes, layer.values.bytes, layer.value_head_dim * 16, 1024}));
        const LatentView& latents = layer.latents;
        a.query_stride = static_cast<std::uint32_t>(std::max(layer.key_head_dim, latents.channels) + 4) * 4;
        const std::uint32_t run_bytes = layer.values.runs > 0 ? ValueTileView::run_bytes : 0;
        a.warp_bytes = of.table             ? latents.warp_bytes()
                       : detail::is_made(a) ? run_bytes
                                            : std::max(run_bytes, 8u * layer.keys.factor_stride());
        // Behind the slots, for now from 0 on.
        std::uint32_t end = query_bytes();
        const auto place = [&](std::uint32_t bytes) {
            const std::uint32_t at = end;
            end += (bytes + 15) / 16 * 16;
            return at;
        };
        a.partners_at = place(of.table ? detail::rows_of_block * a.query_stride : 0);
        a.head_at = place(latents.head_bytes);
        a.warps_at = place(0);
        const auto needed = [&](int warps) {
            return static_cast<std::uint32_t>(2 * warps) * a.slot_bytes +
                   std::max(end + static_cast<std::uint32_t>(warps) * a.warp_bytes, output_bytes());
        };
        warps_ = 0;
        for (const int warps : {8, 6, 4, 3, 2, 1})
            if (warps_ == 0 && kernel_bytes + needed(warps) <= shared_bytes_) warps_ = warps;
        require(warps_ > 0, ErrorCode::option, "cuda attention: tiles of ", a.slot_bytes,
                " bytes, of which two do not fit the memory of a block (", shared_bytes_, ")");
        bytes_ = needed(warps_);
        const std::uint32_t slots = static_cast<std::uint32_t>(2 * warps_) * a.slot_bytes;
        for (std::uint32_t* at : {&a.partners_at, &a.head_at, &a.warps_at}) *at += slots;
    }

    /// The table of a layer's latents in device memory. Those whose layers are gone make room.
    const std::byte* table_of(const std::shared_ptr<const LatentTable>& table, cudaStream_t stream) {
        for (const Uploaded& one : tables_)
            if (one.table == table) return static_cast<const std::byte*>(one.data);
        for (std::size_t i = tables_.size(); i-- > 0;)
            if (tables_[i].table.use_count() == 1) {
                require_cuda(cudaFree(std::exchange(tables_[i].data, nullptr)), "giving memory back");
                tables_.erase(tables_.begin() + static_cast<std::ptrdiff_t>(i));
            }
        tables_.reserve(tables_.size() + 1);
        Uploaded one{table, nullptr};
        require_cuda(cudaMalloc(&one.data, table->bytes().size()), "taking memory for a basis");
        // From memory that the device does not read: on return it has been taken.
        const cudaError_t copied = cudaMemcpyAsync(one.data, table->bytes().data(), table->bytes().size(),
                                                   cudaMemcpyHostToDevice, stream);
        if (copied != cudaSuccess) cudaFree(one.data);
        require_cuda(copied, "copying a basis");
        tables_.push_back(one);
        return static_cast<const std::byte*>(one.data);
    }

    /// Memory of a block beside what plans give it.
    static constexpr std::uint32_t kernel_bytes = 2048;
    /// Bytes from a number of bytes up to whole lines.
    static std::uint32_t lines(Index bytes) { return static_cast<std::uint32_t>((bytes + 127) / 128 * 128); }
    /// Queries in the memory of a block, as they are and rotated.
    std::uint32_t query_bytes() const {
        return (arguments_.layer.rotates_keys == Rotation::none ? 1u : 2u) * detail::rows_of_block *
               arguments_.query_stride;
    }
    /// Outputs there, when queries are done with.
    std::uint32_t output_bytes() const {
        return detail::rows_of_block * static_cast<std::uint32_t>(arguments_.layer.value_head_dim + 2) * 4u;
    }
    /// The memory of a block whose warps decide what they read.
    void take_policy(const AttendLayer& layer, const ReadPolicy& policy) {
        detail::AlignedArguments& a = aligned_;
        a = {};
        a.prefixes = layer.prefixes;
        a.rule = aligned_rule(policy, layer.prefixes, layer.view.key_head_dim, layer.view.value_head_dim);
        const Index first = a.prefixes.keys[a.rule.first_planes - 1].bytes,
                    keys = a.prefixes.keys[a.rule.key_planes - 1].bytes,
                    values = a.prefixes.values[a.rule.value_planes - 1].bytes;
        a.rest_at = 2 * lines(first);
        a.even_at = a.rest_at - static_cast<std::uint32_t>(first);
        a.kept_at = a.rest_at + lines(std::max({first, keys - first, values}));
        // Of each lane the weights of two tiles, up to 32, and four numbers more; factors; and eight tiles.
        a.factors_at = a.kept_at + 128 * (2 * 32 + 4);
        const std::uint32_t factors =
            detail::is_made(arguments_, a) ? 0 : lines(8 * layer.view.keys.factor_stride());
        a.warp_bytes = std::max(a.factors_at + factors + 256, lines(32 * layer.view.value_head_dim));
        for (int p = 0; p < a.rule.key_planes; ++p) {
            a.apart[p] = a.prefixes.keys[p];
            for (int plane = a.rule.first_planes; plane <= p; ++plane)
                a.apart[p].segment[0].plane_at[plane] += static_cast<std::int32_t>(a.even_at);
        }
        const std::uint32_t rows = std::max(query_bytes(), output_bytes());
        warps_ = 0;
        for (int warps = detail::most_warps; warps > 0 && warps_ == 0; --warps)
            if (kernel_bytes + rows + static_cast<std::uint32_t>(warps) * a.warp_bytes <= shared_bytes_)
                warps_ = warps;
        require(warps_ > 0, ErrorCode::option, "cuda attention: ", a.warp_bytes,
                " bytes for tiles, which do not fit the memory of a block (", shared_bytes_, ")");
        bytes_ = rows + static_cast<std::uint32_t>(warps_) * a.warp_bytes;
    }

    detail::SequenceTask task(const DeviceSequence& sequence, const AttentionParameters& parameters,
                              Index query_tokens, Index row) const {
        const Index position = parameters.first_position(sequence.tokens, query_tokens);
        require(position >= 0 || !parameters.causal, ErrorCode::shape, "cuda attention: ", query_tokens,
                " query tokens over ", sequence.tokens,
                " cached ones, expected the last of them, or a position");
        detail::SequenceTask task{};
        task.tiles = sequence.device_tiles;
        // Tiles that lie before every window, and behind what stays visible in spite of it.
        task.skip_from = static_cast<std::int32_t>(sequence.tiles.size());
        if (parameters.sliding_window > 0) {
            const Index seen = position - parameters.sliding_window + 1;
            std::size_t from = 0, to = 0;
            while (from < sequence.tiles.size() && sequence.tiles[from].first < parameters.sinks) ++from;
            for (to = from;
                 to < sequence.tiles.size() && sequence.tiles[to].first + sequence.tiles[to].tokens <= seen;)
                ++to;
            task.skip_from = static_cast<std::int32_t>(from);
            task.skip = static_cast<std::int32_t>(to - from);
        }
        task.tile_count = static_cast<std::int32_t>(sequence.tiles.size()) - task.skip;
        for (const DeviceTile& tile : sequence.tiles)
            require(tile.shift == 0, ErrorCode::option,
                    "cuda attention: tiles whose tokens have moved since they were stored");
        task.sinks = sequence.sinks;
        task.sink_count = static_cast<std::int32_t>(sequence.sink_count);
        task.recent_first = static_cast<std::int32_t>(sequence.recent_first);
        task.recent_count = static_cast<std::int32_t>(sequence.tokens - sequence.recent_first);
        if (sequence.recent.empty()) task.recent_count = 0;
        task.hidden_from = static_cast<std::int32_t>(sequence.hidden_from);
        task.hidden_to = static_cast<std::int32_t>(sequence.hidden_to);
        task.position = static_cast<std::int32_t>(position);
        task.query_row = static_cast<std::int32_t>(row);
        task.query_tokens = static_cast<std::int32_t>(query_tokens);
        task.tokens = static_cast<std::int32_t>(sequence.tokens);
        return task;
    }

    std::vector<detail::WorkItem> share_out(std::span<const DeviceSequence> sequences,
                                            std::span<const detail::SequenceTask> tasks) {
        const LayerView& layer = arguments_.layer;
        const Index rows = arguments_.most_rows;
        const Index heads = layer.kv_heads * ((rows + detail::rows_of_block - 1) / detail::rows_of_block);
        const auto tiles = [&](std::size_t i) {
            return static_cast<Index>(sequences[i].tiles.size()) - tasks[i].skip;
        };
        Index all = 0;
        for (std::size_t i = 0; i < tasks.size(); ++i) all += heads * tiles(i);
        const auto parts = [&](std::size_t i, Index most) {
            return std::max<Index>(1, (tiles(i) + most - 1) / most);
        };
        const auto count = [&](Index most) {
            Index sum = 0;
            for (std::size_t i = 0; i < tasks.size(); ++i) sum += heads * parts(i, most);
            return sum;
        };
        // As few tiles a part as give no more parts than there are multiprocessors.
        const Index wanted = std::max<Index>(multiprocessors_, heads * static_cast<Index>(tasks.size()));
        Index most = std::max<Index>(1, (all + multiprocessors_ - 1) / multiprocessors_);
        while (count(most) > wanted) ++most;

        std::vector<detail::WorkItem> items;
        partials_ = counters_ = 0;
        for (std::size_t i = 0; i < tasks.size(); ++i)
            for (std::int32_t head = 0; head < layer.kv_heads; ++head)
                for (Index row = 0; row < rows; row += detail::rows_of_block) {
                    const Index n = parts(i, most);
                    for (Index p = 0; p < n; ++p)
                        items.push_back({tasks[i], head, static_cast<std::int32_t>(row),
                                         static_cast<std::int32_t>(tiles(i) * p / n),
                                         static_cast<std::int32_t>(tiles(i) * (p + 1) / n),
                                         static_cast<std::int32_t>(p), static_cast<std::int32_t>(n),
                                         static_cast<std::int32_t>(partials_),
                                         static_cast<std::int32_t>(counters_)});
                    partials_ += n;
                    ++counters_;
                }
        // The longest first, so that the last ones to start are short.
        std::stable_sort(items.begin(), items.end(),
                         [](const detail::WorkItem& a, const detail::WorkItem& b) {
                             return a.end_tile - a.first_tile > b.end_tile - b.first_tile;
                         });
        return items;
    }

    /// Puts the plan, the pages of recent tokens and the signs of rotations into device memory. `recent`: in
    /// items, the number of a sequence's first page.
    void upload(std::vector<detail::WorkItem>& items, const std::vector<const std::byte*>& recent,
                const AttendLayer& layer, cudaStream_t stream) {
        Index end = 0;
        const auto place = [&](std::size_t count, std::size_t size) {
            const Index at = end;
            end += static_cast<Index>((count * size + 255) / 256 * 256);
            return at;
        };
        const Index items_at = place(items.size(), sizeof(items[0])),
                    recent_at = place(recent.size(), sizeof(recent[0])),
                    signs_at = place(layer.key_signs.size() + layer.value_signs.size(), sizeof(float)),
                    copied = end, counters_at = place(static_cast<std::size_t>(counters_), 4),
                    partials_at = place(static_cast<std::size_t>(partials_) * detail::rows_of_block,
                                        static_cast<std::size_t>(arguments_.layer.value_head_dim + 3) * 4);
        blocks_ = 0;
        reserve(static_cast<std::size_t>(copied), static_cast<std::size_t>(end));
        std::byte* const device = static_cast<std::byte*>(memory_);
        for (detail::WorkItem& item : items)
            item.sequence.recent =
                reinterpret_cast<const std::byte* const*>(device + recent_at) + item.sequence.recent_page;
        const auto stage = [&](const auto& numbers, Index at) {
            std::memcpy(static_cast<std::byte*>(staging_) + at, numbers.data(),
                        numbers.size() * sizeof(numbers[0]));
        };
        stage(items, items_at);
        if (!recent.empty()) stage(recent, recent_at);
        if (!layer.key_signs.empty()) stage(layer.key_signs, signs_at);
        const auto value_signs_at = signs_at + static_cast<Index>(layer.key_signs.size() * sizeof(float));
        if (!layer.value_signs.empty()) stage(layer.value_signs, value_signs_at);
        require_cuda(cudaMemcpyAsync(device, staging_, static_cast<std::size_t>(copied),
                                     cudaMemcpyHostToDevice, stream),
                     "copying a plan");
        pending_ = true;
        require_cuda(cudaEventRecord(copied_, stream), "marking a plan as copied");
        require_cuda(
            cudaMemsetAsync(device + counters_at, 0, static_cast<std::size_t>(counters_) * 4, stream),
            "clearing counters");
        arguments_.items = reinterpret_cast<const detail::WorkItem*>(device + items_at);
        arguments_.key_signs = reinterpret_cast<const float*>(device + signs_at);
        arguments_.value_signs = reinterpret_cast<const float*>(device + value_signs_at);
        arguments_.counters = reinterpret_cast<std::uint32_t*>(device + counters_at);
        arguments_.partials = reinterpret_cast<float*>(device + partials_at);
        blocks_ = static_cast<int>(items.size());
    }
    /// Memory on both sides. That of the host may be read by the plan before, which is waited for.
    void reserve(std::size_t staged, std::size_t all) {
        if (pending_) require_cuda(cudaEventSynchronize(copied_), "waiting for the plan before");
        pending_ = false;
        if (staged > staging_bytes_) {
            staging_bytes_ = 0;
            require_cuda(cudaFreeHost(std::exchange(staging_, nullptr)), "giving memory back");
            require_cuda(cudaMallocHost(&staging_, 2 * staged), "taking memory for a plan");
            staging_bytes_ = 2 * staged;
        }
        if (all > memory_bytes_) {
            memory_bytes_ = 0;
            // It waits for what still uses the memory.
            require_cuda(cudaFree(std::exchange(memory_, nullptr)), "giving memory back");
            require_cuda(cudaMalloc(&memory_, 2 * all), "taking memory for attention");
            memory_bytes_ = 2 * all;
        }
    }

    struct Uploaded {
        std::shared_ptr<const LatentTable> table;
        void* data;
    };

    int device_ = 0, multiprocessors_ = 0;
    std::uint32_t shared_bytes_ = 0, bytes_ = 0;
    int warps_ = 0, blocks_ = 0;
    Index partials_ = 0, counters_ = 0, query_rows_ = 0;
    detail::AttendArguments arguments_{};
    detail::AlignedArguments aligned_{};
    bool decides_ = false;  ///< whether the plan has a policy of reads
    void *staging_ = nullptr, *memory_ = nullptr;
    std::size_t staging_bytes_ = 0, memory_bytes_ = 0;
    std::vector<Uploaded> tables_;
    cudaEvent_t copied_{};
    bool pending_ = false;
};

}  // namespace kvplane::cuda
