// kvplane/io/json_text.hpp: JSON that is written part by part.
//
// Not as a document of nlohmann::json: its destructor is noexcept and allocates to take objects and lists
// apart, so that the program would end where memory does. Numbers and texts alone are safe.
#pragma once

#include <concepts>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvplane/io/safetensors_text.hpp"

namespace kvplane::detail {

inline std::string json_text(bool value) {
    return value ? "true" : "false";
}
template <std::integral Number>
std::string json_text(Number value) {
    return std::to_string(value);
}
inline std::string json_text(double value) {
    return nlohmann::json(value).dump();
}
inline std::string json_text(const std::string& text) {
    return nlohmann::json(text).dump();
}
inline std::string json_text(const char* text) {
    return json_text(std::string(text));
}
template <class Element>
std::string json_text(const std::vector<Element>& list) {
    std::string text = "[";
    for (std::size_t i = 0; i < list.size(); ++i)
        text.append(i > 0 ? "," : "").append(json_text(Element(list[i])));
    return text += "]";
}

/// An object whose members stand in byte order of their keys.
class JsonObject {
  public:
    template <class Value>
    JsonObject& add(std::string_view key, const Value& value) {
        return add_text(key, json_text(value));
    }
    /// A value that is JSON already.
    JsonObject& add_text(std::string_view key, std::string json) {
        members_.insert_or_assign(std::string(key), std::move(json));
        return *this;
    }
    std::string text() const {
        std::string text = "{";
        for (const auto& [key, value] : members_)
            text.append(text.size() > 1 ? "," : "").append(json_text(key)).append(":").append(value);
        return text += "}";
    }

  private:
    std::map<std::string, std::string, std::less<>> members_;
};

}  // namespace kvplane::detail
