// kvplane/impl/recipe_names.hpp: the table of recipes, and its parser.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>

#include "kvplane/error.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/recipes.hpp"
#include "kvplane/simd/half.hpp"

namespace kvplane::recipes {

namespace detail {

inline std::vector<std::string_view> split(std::string_view text, char separator) {
    std::vector<std::string_view> parts;
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t end = std::min(text.find(separator, at), text.size());
        parts.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    return parts;
}

template <class Number>
Number number_of(std::string_view recipe, std::string_view text) {
    Number value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    require(error == std::errc() && end == text.data() + text.size(), ErrorCode::option, "recipe '", recipe,
            "': '", text, "', expected a number");
    return value;
}

/// Widths of equal groups of latents: 2, 1.25 (the paper's schedules) or 8-4-2-1-1-0-0-0.
inline std::vector<int> groups(const NameWords& words, std::size_t i) {
    if (words[i] == "2") return {8, 4, 2, 1, 1, 0, 0, 0};
    if (words[i] == "1.25") return {4, 4, 2, 0, 0, 0, 0, 0};
    std::vector<int> widths;
    for (const std::string_view width : split(words[i], '-'))
        widths.push_back(number_of<int>(words.recipe(), width));
    require(widths.size() >= 2, ErrorCode::option, "recipe '", words.recipe(), "': schedule '", words[i],
            "', expected 2, 1.25 or widths, 8-4-2-1-1-0-0-0");
    return widths;
}

inline constexpr std::array<NamedRecipe, 10> rows{{
    {"fp16", "two bytes a number", [](const NameWords&) { return fp16(); }},
    {"block32:BITS[:rotated]", "blocks of 32 channels around zero (4 or 8 bits): common engines' formats",
     [](const NameWords& words) {
         require(words.size() < 3 || words[2] == "rotated", ErrorCode::option, "recipe '", words.recipe(),
                 "': '", words[words.size() - 1], "', expected rotated or nothing");
         return block32(words.number(1), words.size() == 3);
     }},
    {"kivi:BITS[:GROUP]", "keys by channel, values by token, one width (arXiv 2402.02750)",
     [](const NameWords& words) { return kivi(words.number(1), words.number(2, 128)); }},
    {"key_favored:KEY:VALUE",
     "more bits for keys (arXiv 2502.15075), values rotated, sinks and recents apart",
     [](const NameWords& words) { return key_favored(words.number(1), words.number(2)); }},
    {"standard", "the default without calibration, 4.2 true bits at long contexts",
     [](const NameWords&) { return standard(); }},
    {"compact", "smaller without calibration, 3.2 true bits at long contexts",
     [](const NameWords&) { return compact(); }},
    {"smallest", "smaller still, by the sequence's own queries, 2.7 true bits at long contexts",
     [](const NameWords&) { return smallest(); }},
    {"svdq:SCHEDULE[:VALUE]",
     "keys before RoPE in their SVD basis (arXiv 2502.15304); values fp16 or VALUE bits",
     [](const NameWords& words) { return svdq(groups(words, 1), words.number(2, 16)); }},
    {"latent:KEY:VALUE", "keys in the query-weighted basis of the tile frame, KEY bits in the best schedule",
     [](const NameWords& words) { return latent(words.real(1), words.number(2)); }},
    {"weighted:KEY:VALUE", "the same without a basis: widths by channel, from the queries' second moment",
     [](const NameWords& words) { return weighted(words.real(1), words.number(2)); }},
}};

/// The method's name, and how many words may follow it.
struct Grammar {
    std::string_view name;
    std::ptrdiff_t least, most;
};
inline Grammar grammar_of(const NamedRecipe& recipe) {
    const std::string_view all = recipe.grammar, needed = all.substr(0, all.find('['));
    return {all.substr(0, all.find(':')), std::count(needed.begin(), needed.end(), ':'),
            std::count(all.begin(), all.end(), ':')};
}

inline CacheRecipe recipe_named(std::string_view text, std::string_view name) {
    const NameWords words(text, name);
    for (const NamedRecipe& recipe : rows) {
        const Grammar grammar = grammar_of(recipe);
        const auto more = static_cast<std::ptrdiff_t>(words.size()) - 1;
        if (words[0] == grammar.name && more >= grammar.least && more <= grammar.most)
            return recipe.make(words);
    }
    std::string expected;
    for (const NamedRecipe& recipe : rows)
        expected.append(expected.empty()          ? ""
                        : &recipe == &rows.back() ? " or "
                                                  : ", ")
            .append(recipe.grammar);
    fail(ErrorCode::option, "recipe '", text, "': expected ", expected);
}

inline KeyFrame frame(std::string_view recipe, std::string_view text) {
    for (const KeyFrame frame : {KeyFrame::before_rope, KeyFrame::after_rope, KeyFrame::tile})
        if (text == kvplane::name(frame)) return frame;
    fail(ErrorCode::option, "recipe '", recipe, "': frame '", text,
         "', expected before_rope, after_rope or tile");
}

inline Scheme scheme(std::string_view recipe, std::string_view text) {
    for (const Scheme scheme :
         {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range, Scheme::unbiased})
        if (text == name(scheme)) return scheme;
    fail(ErrorCode::option, "recipe '", recipe, "': scheme '", text,
         "', expected cell, min_max, symmetric, full_range or unbiased");
}

/// The name of a recipe, while a setting of it is read.
struct Setting {
    std::string_view recipe, key, value;

    Index number() const { return number_of<int>(recipe, value); }
    bool flag() const { return number() != 0; }
    Scheme as_scheme() const { return scheme(recipe, value); }
    Clip as_clip() const { return flag() ? Clip::mse_optimal : Clip::none; }
};
/// Widths of tokens: 32x4/32x2/64x1.
inline std::vector<TokenRun> widths(const Setting& setting) {
    std::vector<TokenRun> runs;
    for (const std::string_view part : split(setting.value, '/')) {
        const auto words = split(part, 'x');
        require(words.size() == 2, ErrorCode::option, "recipe '", setting.recipe, "': ", setting.key, " '",
                part, "', expected a number of tokens and their bits, such as 32x4");
        runs.push_back(
            {number_of<Index>(setting.recipe, words[0]), number_of<int>(setting.recipe, words[1])});
    }
    return runs;
}

struct NamedSetting {
    std::string_view name, values, summary;
    bool of_latents;
    void (*set)(CacheRecipe& recipe, const Setting& setting);
};
inline constexpr std::array<NamedSetting, 21> settings{{
    {"sinks", "N", "first tokens that stay fp16", false,
     [](CacheRecipe& r, const Setting& s) { r.sink_tokens = s.number(); }},
    {"recent", "N", "age at which a tile is quantized", false,
     [](CacheRecipe& r, const Setting& s) { r.recent_tokens = s.number(); }},
    {"recent_bits", "8|16", "of tokens until then", false,
     [](CacheRecipe& r, const Setting& s) {
         r.recent_bits = static_cast<int>(s.number());
         r.recent_key_bits = 0;
     }},
    {"recent_key_bits", "8|16", "of their keys, after recent_bits", false,
     [](CacheRecipe& r, const Setting& s) { r.recent_key_bits = static_cast<int>(s.number()); }},
    {"key_scheme", "cell|min_max|symmetric|full_range", "grids of keys", false,
     [](CacheRecipe& r, const Setting& s) { r.keys.rule.scheme = s.as_scheme(); }},
    {"value_scheme", "cell|min_max|...|unbiased", "grids of values", false,
     [](CacheRecipe& r, const Setting& s) { r.values.rule.scheme = s.as_scheme(); }},
    {"value_widths", "32x4/32x2/64x1", "so many tokens of a tile in so many bits", false,
     [](CacheRecipe& r, const Setting& s) {
         r.values.widths = widths(s);
         r.values.bits = r.values.widths[0].bits;
     }},
    {"shaped_keys", "0|1", "codes of keys by what queries look along", false,
     [](CacheRecipe& r, const Setting& s) { r.shaped_keys = s.flag(); }},
    {"key_clip", "0|1", "intervals of least squared error", false,
     [](CacheRecipe& r, const Setting& s) { r.keys.rule.clip = s.as_clip(); }},
    {"value_clip", "0|1", "the same of values", false,
     [](CacheRecipe& r, const Setting& s) {
         r.values.rule.clip = s.as_clip();
         // Unbiased grids clip already.
         if (s.flag() && r.values.rule.scheme == Scheme::unbiased)
             r.values.rule.scheme = scheme_for(r.values.bits);
     }},
    {"rotate_keys", "0|1|by_tile", "by a randomized Hadamard transform of each head", false,
     [](CacheRecipe& r, const Setting& s) {
         r.rotates_by_tile = s.value == "by_tile";
         r.keys.rotate = !r.rotates_by_tile && s.flag();
     }},
    {"rotate_values", "0|1", "the same of values", false,
     [](CacheRecipe& r, const Setting& s) { r.values.rotate = s.flag(); }},
    {"rotary_bits", "N", "of key channels behind values that are in keys; 0: those of the keys", false,
     [](CacheRecipe& r, const Setting& s) { r.rotary_bits = static_cast<int>(s.number()); }},
    {"key_group", "32|64|128", "tokens that share a grid of keys", false,
     [](CacheRecipe& r, const Setting& s) { r.keys.rule.group = s.number(); }},
    {"value_group", "N", "channels that share a grid of values; 0: the whole head", false,
     [](CacheRecipe& r, const Setting& s) {
         const Index group = s.number();
         r.values.rule.group = group == 0 ? whole_head : group;
     }},
    {"frame", "before_rope|after_rope|tile", "of the latents", true,
     [](CacheRecipe& r, const Setting& s) { r.latents->basis.frame = frame(s.recipe, s.value); }},
    {"query_weighted", "0|1", "whether queries weigh the basis", true,
     [](CacheRecipe& r, const Setting& s) { r.latents->basis.query_weighted = s.flag(); }},
    {"heads_together", "0|1", "one basis for all heads", true,
     [](CacheRecipe& r, const Setting& s) {
         r.latents->basis.heads_together = r.latents->own_heads_together = s.flag();
     }},
    {"layers_together", "0|1", "one budget for all layers", true,
     [](CacheRecipe& r, const Setting& s) { r.latents->layers_together = s.flag(); }},
    {"context", "N", "tokens over which a basis' bytes are spread", true,
     [](CacheRecipe& r, const Setting& s) { r.latents->basis.context = s.number(); }},
    {"fit_tokens", "N", "tokens that a basis of the cache's own is fitted to", true,
     [](CacheRecipe& r, const Setting& s) { r.latents->fit_tokens = s.number(); }},
}};

inline void set(CacheRecipe& recipe, std::string_view text, std::string_view setting) {
    const std::size_t equals = setting.find('=');
    const std::string_view key = setting.substr(0, equals);
    require(equals != std::string_view::npos || key.empty(), ErrorCode::option, "recipe '", text,
            "': setting '", key, "' needs a value: ", key, "=...");
    for (const NamedSetting& known : settings)
        if (known.name == key && (recipe.latents || !known.of_latents))
            return known.set(recipe, {text, key, setting.substr(equals + 1)});
    fail(ErrorCode::option, "recipe '", text, "': unknown setting '", key, "'");
}

/// "  left   right", the left side padded.
inline void add_line(std::string& to, std::string_view left, std::string_view right) {
    to.append("  ")
        .append(left)
        .append(left.size() < 27 ? 27 - left.size() : 1, ' ')
        .append(right)
        .append("\n");
}

}  // namespace detail

KVPLANE_FUNCTION NameWords::NameWords(std::string_view recipe, std::string_view name)
    : recipe_(recipe), words_(detail::split(name, ':')) {}
KVPLANE_FUNCTION int NameWords::number(std::size_t i) const {
    return detail::number_of<int>(recipe_, words_[i]);
}
KVPLANE_FUNCTION double NameWords::real(std::size_t i) const {
    return detail::number_of<double>(recipe_, words_[i]);
}

KVPLANE_FUNCTION std::span<const NamedRecipe> table() {
    return detail::rows;
}

KVPLANE_FUNCTION std::string help() {
    std::string text = "Recipes:\n";
    for (const NamedRecipe& recipe : detail::rows) detail::add_line(text, recipe.grammar, recipe.summary);
    text += "SCHEDULE is 2, 1.25 or the widths of equal groups of latents, 8-4-2-1-1-0-0-0.\n";
    for (const bool of_latents : {false, true}) {
        text += of_latents ? "and for latents\n" : "Settings, each after a +:\n";
        for (const detail::NamedSetting& setting : detail::settings)
            if (setting.of_latents == of_latents)
                detail::add_line(text, std::string(setting.name) + "=" + std::string(setting.values),
                                 setting.summary);
    }
    text += "Read policies, after an @:\n";
    detail::add_line(text, "4, 4:3", "so many bits on average, shared or of keys and of values");
    detail::add_line(text, "fixed4, fixed4:8", "so many bits of every code");
    detail::add_line(text, "tolerance=0.01", "what keeps every head's output within that");
    detail::add_line(text, "aligned, published", "fp16 by exponents (arXiv 2409.16546)");
    detail::add_line(text, "exponents=4:8:12", "the same at other thresholds");
    return text;
}

KVPLANE_FUNCTION CacheRecipe parse(std::string_view text) {
    const auto parts = detail::split(text, '+');
    CacheRecipe recipe = detail::recipe_named(text, parts[0]);
    for (std::size_t i = 1; i < parts.size(); ++i) detail::set(recipe, text, parts[i]);
    recipe.name = text;
    CacheConfiguration check;
    check.recipe = recipe;
    // Whether groups divide the latents depends on the model.
    if (recipe.latents && !recipe.latents->groups.empty())
        check.key_head_dim = static_cast<Index>(recipe.latents->groups.size());
    kvplane::detail::require_configuration(check);
    return recipe;
}

KVPLANE_FUNCTION ReadPolicy read_policy(std::string_view text) {
    if (text == "published") return ReadPolicy::exponents(AlignmentThresholds::published());
    if (text == "aligned") return ReadPolicy::exponents(AlignmentThresholds::accurate());
    const auto bad = [&] {
        fail(ErrorCode::option, "read policy '", text,
             "', expected 4 (mean bits), 4:3 (of keys and of values), fixed4, fixed4:8, tolerance=0.01, "
             "published, aligned or exponents=4:8:12");
    };
    const auto number = [&](std::string_view digits, double most) {
        double value = 0.0;
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
        if (error != std::errc() || end != digits.data() + digits.size() || !(value >= 0.0 && value <= most))
            bad();
        return value;
    };
    constexpr std::string_view tolerance = "tolerance=", fixed = "fixed";
    if (text.starts_with(tolerance))
        return ReadPolicy::tolerance(number(text.substr(tolerance.size()), fp16_max));
    constexpr std::string_view exponents = "exponents=";
    if (text.starts_with(exponents)) {
        const auto below = detail::split(text.substr(exponents.size()), ':');
        if (below.size() != 3) bad();
        const auto at = [&](std::size_t i) {
            return static_cast<int>(number(below[i], AlignmentThresholds::never));
        };
        const AlignmentThresholds thresholds{at(0), at(1), at(2)};
        if (thresholds.twelve > thresholds.eight || thresholds.eight > thresholds.none) bad();
        return ReadPolicy::exponents(thresholds);
    }
    const bool is_fixed = text.starts_with(fixed);
    const auto parts = detail::split(is_fixed ? text.substr(fixed.size()) : text, ':');
    if (parts.size() > 2) bad();
    const double first = number(parts.front(), 16.0), last = number(parts.back(), 16.0);
    ReadPolicy policy = parts.size() == 1 ? ReadPolicy::aligned(first) : ReadPolicy::aligned(first, last);
    if (is_fixed) {
        policy.kind = ReadPolicy::Kind::fixed;
        policy.shared = false;
    }
    return policy;
}

}  // namespace kvplane::recipes
