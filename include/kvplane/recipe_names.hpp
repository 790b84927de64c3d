// kvplane/recipe_names.hpp: recipes and read policies by name, as command lines take them.
//
// A name is that of a method and its numbers, separated by colons, and goes on with settings, each after a
// '+':
//
//   kivi:4:32    key_favored:5:3+sinks=8+recent_bits=8    latent:3:3+context=100000
//
// The table of methods is the only list of them: the parser, the sentences of its errors and help() print it.
// Adding one is a function in recipes.hpp and a row of the table (impl/recipe_names.hpp).
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvplane/attention/read_policy.hpp"
#include "kvplane/cache/configuration.hpp"
#include "kvplane/compiled.hpp"

namespace kvplane::recipes {

/// The words of a name between colons, the method first, each read as what the recipe wants.
class NameWords {
  public:
    /// Looks at both, which must outlive it. recipe: the name with its settings, for sentences.
    NameWords(std::string_view recipe, std::string_view name);

    std::size_t size() const noexcept { return words_.size(); }
    std::string_view operator[](std::size_t i) const { return words_[i]; }
    /// Throws Error (option) where the word is not one.
    int number(std::size_t i) const;
    double real(std::size_t i) const;
    /// That of a word, or `otherwise` where the name ends before it.
    int number(std::size_t i, int otherwise) const { return i < size() ? number(i) : otherwise; }
    /// The whole name.
    std::string_view recipe() const noexcept { return recipe_; }

  private:
    std::string_view recipe_;
    std::vector<std::string_view> words_;
};

/// One method of the table.
struct NamedRecipe {
    /// As in "kivi:BITS[:GROUP]": the method's name, then its words; those in brackets may be left out.
    std::string_view grammar;
    std::string_view summary;  ///< what it is, in a line
    CacheRecipe (*make)(const NameWords& words);
};

/// All methods that have a name.
std::span<const NamedRecipe> table();

/// The table, the settings and the read policies as text of several lines, for --help.
std::string help();

/// The recipe of a name. Throws Error (option) saying what is wrong with it, and for numbers that no cache
/// can have.
CacheRecipe parse(std::string_view text);

/// A read policy by the name that follows a recipe's after an @:
///
///     4                       aligned at so many bits on average, which keys and values share
///     4:3                     aligned at so many on average, of keys and of values
///     fixed4, fixed4:8        so many bits of every code
///     tolerance=0.01          whatever keeps every head's output within that (ReadPolicy::tolerance)
///     published, aligned      fp16 by exponents, at the thresholds that AlignedKV ships, and at 6, 10, 14
///     exponents=4:8:12        at others: 12 bits, 8 bits and nothing from so many below the largest on
///
/// Throws Error (option) saying what is wrong with it.
ReadPolicy read_policy(std::string_view text);

}  // namespace kvplane::recipes

#if !defined(KVPLANE_COMPILED)
#include "kvplane/impl/recipe_names.hpp"
#endif
