#include "latents.hpp"

#include <algorithm>

#include "kvplane/latent/coder.hpp"
#include "kvplane/latent/fit.hpp"
#include "kvplane/latent/statistics.hpp"

namespace kvplane_python {

using kvplane::KeyFrame;
using kvplane::tile_tokens;

Latents::Latents(const Matrix& keys, Index kv_heads, const Matrix* queries, Index query_heads,
                 const LatentOptions& options)
    : tokens_(keys.rows()), first_position_(options.first_position) {
    require(first_position_ >= 0, ErrorCode::index, "first_position: ", first_position_,
            ", expected 0 or more");
    kvplane::detail::require_divisible(keys.cols(), kv_heads);
    const Index head_dim = keys.cols() / kv_heads;
    const auto embedding = options.rope ? kvplane::RotaryEmbedding(head_dim, *options.rope)
                                        : kvplane::RotaryEmbedding::none(head_dim);
    kvplane::LatentStatistics statistics(kv_heads, query_heads, head_dim);
    statistics.add_keys(embedding.before({keys, first_position_}));
    kvplane::LatentRecipe recipe;
    recipe.bits = options.bits;
    recipe.basis.frame = options.frame;
    recipe.basis.heads_together = options.heads_together;
    recipe.basis.query_weighted = queries != nullptr;
    recipe.basis.context = options.context;
    if (queries) {
        require(queries->rows() <= tokens_ && queries->cols() == query_heads * head_dim, ErrorCode::shape,
                "queries: ", queries->rows(), " x ", queries->cols(), ", expected at most ", tokens_, " x ",
                query_heads * head_dim, ", those of the last keys' tokens");
        Matrix before = *queries;
        embedding.rotate_back(before, first_position_ + tokens_ - before.rows());
        statistics.add_queries(before);
    }
    keys_ = kvplane::fit_latent_keys(statistics, options.rope, recipe, options.context, true);
    kvplane::LatentCoder coder(keys_);
    for (Index s = 0; s < keys_->subspaces(); ++s)
        subspaces_.emplace_back(static_cast<std::size_t>(tiles() * keys_->format(s).bytes()));
    for (Index tile = 0; tile < tiles(); ++tile) {
        const Index first = tile * tile_tokens, count = std::min(tile_tokens, tokens_ - first);
        std::vector<std::byte*> to;
        for (Index s = 0; s < keys_->subspaces(); ++s)
            to.push_back(subspaces_[static_cast<std::size_t>(s)].data() + tile * keys_->format(s).bytes());
        coder.encode({keys.middleRows(first, count), first_position_ + first}, to);
    }
}

Index Latents::tiles() const noexcept {
    return (tokens_ + tile_tokens - 1) / tile_tokens;
}

Index Latents::bytes() const noexcept {
    Index sum = keys_->bytes();
    for (const auto& tiles : subspaces_) sum += static_cast<Index>(tiles.size());
    return sum;
}
double Latents::bits_per_element() const noexcept {
    return 8.0 * static_cast<double>(bytes()) / static_cast<double>(tokens_ * channels());
}
std::vector<Index> Latents::kept() const {
    std::vector<Index> all;
    for (Index s = 0; s < keys_->subspaces(); ++s) all.push_back(keys_->subspace(s).kept());
    return all;
}

Matrix Latents::dequantize(Index most) const {
    require(most >= 0, ErrorCode::option, "latents: ", most, ", expected 0 or more");
    kvplane::LatentCoder coder(keys_);
    const Index dim = keys_->head_dim();
    Matrix all(tokens_, channels());
    for (Index tile = 0; tile < tiles(); ++tile) {
        const Index first = tile * tile_tokens, count = std::min(tile_tokens, tokens_ - first);
        for (Index h = 0; h < keys_->kv_heads(); ++h) {
            const Index s = keys_->subspace_of_head(h);
            const std::byte* from =
                subspaces_[static_cast<std::size_t>(s)].data() + tile * keys_->format(s).bytes();
            all.block(first, h * dim, count, dim) =
                coder.reconstruct(h, from, count, first_position_ + first, most);
        }
    }
    return all;
}

}  // namespace kvplane_python
