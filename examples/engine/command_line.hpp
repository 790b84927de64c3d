// examples/engine/command_line.hpp: options of the engine's programs: --name VALUE, --flag, and the rest.
#pragma once

#include <charconv>
#include <fstream>
#include <initializer_list>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "kvplane/error.hpp"
#include "kvplane/matrix.hpp"

namespace engine {

using kvplane::ErrorCode;

class CommandLine {
  public:
    /// Throws Error (option) for an option that is not listed, or one of `valued` without a value.
    CommandLine(int count, char** arguments, std::initializer_list<std::string_view> valued,
                std::initializer_list<std::string_view> flags) {
        const auto listed = [](const auto& names, std::string_view name) {
            return std::find(names.begin(), names.end(), name) != names.end();
        };
        for (int i = 1; i < count; ++i) {
            const std::string argument = arguments[i];
            if (!argument.starts_with("--")) {
                rest_.push_back(argument);
            } else if (listed(flags, argument)) {
                options_[argument] = "1";
            } else {
                kvplane::require(listed(valued, argument), ErrorCode::option, "unknown option '", argument,
                                 "'; --help lists them");
                kvplane::require(i + 1 < count, ErrorCode::option, "a value is missing after '", argument,
                                 "'");
                options_[argument] = arguments[++i];
            }
        }
    }

    bool has(const std::string& name) const { return options_.contains(name); }
    std::string text(const std::string& name, const std::string& standard = "") const {
        const auto found = options_.find(name);
        return found == options_.end() ? standard : found->second;
    }
    std::string required(const std::string& name) const {
        kvplane::require(has(name), ErrorCode::option, "option ", name, " is missing; --help explains it");
        return text(name);
    }
    /// Throws Error (option) unless it is a number from `least` on.
    kvplane::Index number(const std::string& name, kvplane::Index standard, kvplane::Index least = 0) const {
        if (!has(name)) return standard;
        const std::string& digits = options_.at(name);
        kvplane::Index value = 0;
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
        kvplane::require(error == std::errc() && end == digits.data() + digits.size() && value >= least,
                         ErrorCode::option, name, ": '", digits, "', expected a number from ", least, " on");
        return value;
    }
    double real(const std::string& name, double standard) const {
        if (!has(name)) return standard;
        char* end = nullptr;
        const double value = std::strtod(options_.at(name).c_str(), &end);
        kvplane::require(*end == '\0' && value >= 0.0 && end != options_.at(name).c_str(), ErrorCode::option,
                         name, ": '", options_.at(name), "', expected a number from 0 on");
        return value;
    }
    /// What stands between commas.
    std::vector<std::string> list(const std::string& name) const {
        std::vector<std::string> items;
        std::istringstream stream(required(name));
        for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
        kvplane::require(!items.empty(), ErrorCode::option, name, ": empty, expected a list A,B,C");
        return items;
    }
    const std::vector<std::string>& rest() const noexcept { return rest_; }

  private:
    std::map<std::string, std::string> options_;
    std::vector<std::string> rest_;
};

/// A whole file. Throws Error (io).
inline std::string read_text(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    kvplane::require(file.good() && !text.fail(), ErrorCode::io, path, ": cannot be read");
    return text.str();
}

}  // namespace engine
