#include "drafted_sequence.hpp"

#include <algorithm>
#include <utility>

namespace kvplane_python {

using kvplane::cuda::AppendCheck;

void DraftedSequence::require_kept(const SequenceRows& rows, const char* name) const {
    if (truncates_exactly_) return;
    require(rows.channel_stride == 1 || rows.channels == 1, ErrorCode::shape, name,
            ": provisional tokens whose channels are ", rows.channel_stride,
            " apart on a device, expected neighbours");
    require(rows.tokens <= 1 || rows.token_stride >= rows.channels, ErrorCode::shape, name,
            ": provisional tokens that are ", rows.token_stride, " numbers apart on a device, expected ",
            rows.channels, " or more: rows of memory of their own");
}

void DraftedSequence::append(const DeviceRows& keys, const DeviceRows& values, bool provisional,
                             AppendCheck check, cudaStream_t stream) {
    if (provisional && !truncates_exactly_) {
        if (!before_ && makes_tile(keys.tokens)) before_.emplace(cache_.fork(stream));
        if (before_) drafts_.push_back(kept(keys, values, stream));
    }
    cache_.append(keys, values, stream, check);
    if (provisional) provisional_ += keys.tokens;
}

void DraftedSequence::take_back(Index tokens, bool provisional, DeviceCache* before, cudaStream_t stream) {
    if (provisional) provisional_ -= cache_.tokens() - tokens;
    if (before)
        cache_ = std::move(*before);
    else if (tokens < cache_.tokens())
        cache_.truncate(tokens, stream);
    forget_drafts_from(tokens);
}

void DraftedSequence::truncate(Index count, cudaStream_t stream) {
    const Index settled = cache_.tokens() - provisional_;
    if (before_) {
        // The drafts that stay are appended once more, to what was before them.
        DeviceCache again = before_->fork(stream);
        if (count < again.tokens()) again.truncate(count, stream);
        for (const Draft& draft : drafts_) {
            DeviceRows keys = draft.keys, values = draft.values;
            keys.tokens = values.tokens = std::min(keys.tokens, count - again.tokens());
            if (keys.tokens <= 0) break;
            again.append(keys, values, stream, AppendCheck::none);
        }
        cache_ = std::move(again);
        forget_drafts_from(count);
    } else {
        cache_.truncate(count, stream);
    }
    provisional_ = std::max<Index>(0, count - settled);
    if (provisional_ == 0) accept_all();
}

void DraftedSequence::accept(Index count) {
    provisional_ -= count;
    if (provisional_ > 0) return;
    before_.reset();
    drafts_.clear();
}

DraftedSequence DraftedSequence::fork(cudaStream_t stream) const {
    DraftedSequence copy(cache_.fork(stream), truncates_exactly_);
    copy.provisional_ = provisional_;
    copy.drafts_ = drafts_;
    if (before_) copy.before_.emplace(before_->fork(stream));
    return copy;
}

/// Whether a tile is made, or one that was cut is opened, when so many tokens come.
bool DraftedSequence::makes_tile(Index more) const {
    const auto& state = cache_.state();
    const auto& recipe = cache_.configuration().recipe;
    const Index outside =
        std::max(state.tokens + more, recipe.sink_tokens) - std::max(state.recent_first, recipe.sink_tokens);
    return state.cut() || outside - recipe.recent_tokens >= kvplane::tile_tokens;
}

DraftedSequence::Draft DraftedSequence::kept(const DeviceRows& keys, const DeviceRows& values,
                                             cudaStream_t stream) const {
    Draft draft;
    const auto keep = [&](const DeviceRows& rows, Index channels, kvplane::PageReference& memory) {
        const Index bytes = rows.tokens * rows.heads * channels * static_cast<Index>(size_of(rows.type));
        // Of few sizes, because the pool keeps pages by size.
        memory = cache_.pool().unfilled((bytes + 4095) / 4096 * 4096);
        const DeviceOutput to{memory.data(),         rows.type, rows.tokens, rows.heads,
                              rows.heads * channels, channels};
        copy_rows(rows, to, channels, cudaMemcpyDeviceToDevice, stream);
        return DeviceRows{to.data, to.type, to.tokens, to.heads, to.token_stride, to.head_stride, 1};
    };
    draft.keys = keep(keys, cache_.configuration().key_head_dim, draft.memory[0]);
    draft.values = keep(values, cache_.configuration().value_head_dim, draft.memory[1]);
    return draft;
}

/// Forgets the drafts of tokens from `count` on, and the fork where there are none before.
void DraftedSequence::forget_drafts_from(Index count) {
    if (!before_) return;
    Index at = before_->tokens();
    std::size_t kept = 0;
    for (Draft& draft : drafts_) {
        if (at >= count) break;
        draft.keys.tokens = draft.values.tokens = std::min(draft.keys.tokens, count - at);
        at += draft.keys.tokens;
        ++kept;
    }
    drafts_.resize(kept);
    if (kept == 0) before_.reset();
}

}  // namespace kvplane_python
