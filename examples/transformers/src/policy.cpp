#include "policy.hpp"

#include <memory>
#include <utility>
#include <vector>

#include "kvplane/error.hpp"

namespace kvplane_python {

namespace {

using kvplane::CacheConfiguration;
using kvplane::Index;
using kvplane::LatentKeys;
using kvplane::RopeSettings;
using kvplane::SecondMoments;

/// Of each channel of a head, or of several side by side, where it stood before.
std::vector<Index> former_channels(Index heads, Index head_dim, const RopeSettings& from,
                                   const RopeSettings& to) {
    const auto before = kvplane::RotaryEmbedding(head_dim, from).pairs();
    const auto after = kvplane::RotaryEmbedding(head_dim, to).pairs();
    std::vector<Index> former(static_cast<std::size_t>(heads * head_dim));
    for (Index head = 0; head < heads; ++head) {
        const Index first = head * head_dim;
        for (std::size_t i = 0; i < after.size(); ++i) {
            former[static_cast<std::size_t>(first + after[i].first)] = first + before[i].first;
            if (after[i].second >= 0)
                former[static_cast<std::size_t>(first + after[i].second)] = first + before[i].second;
        }
    }
    return former;
}

std::shared_ptr<const LatentKeys> moved(const LatentKeys& keys, const RopeSettings& to) {
    const std::vector<Index> former =
        former_channels(keys.kv_heads() / keys.subspaces(), keys.head_dim(), keys.rope().value_or(to), to);
    std::vector<std::int64_t> now(former.size());
    for (std::size_t c = 0; c < former.size(); ++c)
        now[static_cast<std::size_t>(former[c])] = static_cast<std::int64_t>(c);
    std::vector<LatentKeys::Subspace> subspaces;
    for (Index s = 0; s < keys.subspaces(); ++s) {
        LatentKeys::Subspace subspace = keys.subspace(s);
        subspace.mean = Eigen::RowVectorXf(keys.subspace(s).mean(former));
        for (auto* columns : {&subspace.from_latents, &subspace.to_latents})
            if (columns->size() > 0)
                *columns = kvplane::RowMajorMatrix<Eigen::half>((*columns)(former, Eigen::all));
        for (std::int64_t& channel : subspace.channels) channel = now[static_cast<std::size_t>(channel)];
        subspaces.push_back(std::move(subspace));
    }
    return std::make_shared<const LatentKeys>(keys.settings(), keys.kv_heads(), keys.query_heads(),
                                              keys.head_dim(), to, std::move(subspaces));
}

std::shared_ptr<const std::vector<SecondMoments>> moved(const std::vector<SecondMoments>& queries,
                                                        const std::vector<Index>& former) {
    std::vector<SecondMoments> all;
    for (const SecondMoments& head : queries)
        all.emplace_back(head.count(), head.mean()(former), head.scatter()(former, former));
    return std::make_shared<const std::vector<SecondMoments>>(std::move(all));
}

}  // namespace

kvplane::ModelPolicy with_layout(const kvplane::ModelPolicy& policy, kvplane::RopeLayout layout) {
    std::vector<CacheConfiguration> layers = policy.configurations();
    for (std::size_t i = 0; i < layers.size(); ++i) {
        CacheConfiguration& c = layers[i];
        if (!c.rope || c.rope->layout == layout) continue;
        kvplane::require(!c.values_in_keys, kvplane::ErrorCode::option, "policy: layer ", i,
                         ": values are in keys, expected keys whose channels may change places");
        RopeSettings to = *c.rope;
        to.layout = layout;
        if (c.latent_keys) c.latent_keys = moved(*c.latent_keys, to);
        if (c.query_moments)
            c.query_moments = moved(*c.query_moments, former_channels(1, c.key_head_dim, *c.rope, to));
        c.rope = to;
    }
    return {policy.model(), std::move(layers)};
}

}  // namespace kvplane_python
