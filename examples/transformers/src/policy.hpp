// examples/transformers/src/policy.hpp: policies for heads whose channels stand in another order.
#pragma once

#include "kvplane/io/policy_file.hpp"
#include "kvplane/transform/rope.hpp"

namespace kvplane_python {

/// The same policy for keys and queries whose rotary pairs are laid out so. GGUF stores the heads of llama
/// models interleaved, transformers has halves; a model is the same either way. Means, columns and moments
/// move with their channels, so latents of a key are those that they were. A rotated head stays as good,
/// not the same. Throws Error (option) where values are in keys.
kvplane::ModelPolicy with_layout(const kvplane::ModelPolicy& policy, kvplane::RopeLayout layout);

}  // namespace kvplane_python
