// JSON by parts is what nlohmann's documents give.
#include "kvplane/io/json_text.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cache/cache_support.hpp"
#include "kvplane/io/cache_file.hpp"

namespace {

using namespace kvplane;
using namespace kvplane_test;

TEST(JsonText, IsThatOfADocument) {
    const std::string odd = "a \"b\" \\ \n\t\x01 \xC3\xA9 \x7F";
    const nlohmann::json document{
        {"text", odd},        {"yes", true},         {"no", false},
        {"negative", -3},     {"large", ~0ull},      {"real", 10000.0},
        {"small", 1.0 / 3.0}, {"list", {1.5, 2e-9}}, {"empty", nlohmann::json::array()},
        {odd, "key"}};
    detail::JsonObject object;
    object.add("yes", true).add("no", false).add("negative", -3).add("large", ~0ull);
    object.add("real", 10000.0).add("small", 1.0 / 3.0).add("list", std::vector{1.5, 2e-9});
    object.add("empty", std::vector<int>{}).add("text", odd).add(odd, "key");
    EXPECT_EQ(object.text(), document.dump());
    EXPECT_EQ(detail::JsonObject().text(), "{}");
}

/// Older files are recognized by this text.
TEST(JsonText, ConfigurationsAreWrittenAsEver) {
    CacheConfiguration c = configuration("latent:2.5:4+fit_tokens=200");
    c.rope->frequencies.assign(16, 0.001);
    std::string frequencies = "0.001";
    for (int i = 1; i < 16; ++i) frequencies += ",0.001";
    TilePool pool;
    const std::vector<std::byte> bytes = to_bytes(KvCache(c, pool));
    const auto file = SafetensorsFile::from_bytes(bytes);
    const std::string& text = file.metadata().find("kvplane.configuration")->second;
    EXPECT_EQ(nlohmann::json::parse(text).dump(), text);
    EXPECT_EQ(
        text,
        std::string(R"({"every_token":false,"key_head_dim":32,"keys":{"bits":16,"clip":false,"granularity":)"
                    R"("per_channel","group":128,"rotate":false,"scheme":"min_max"},"kv_heads":2,"latents":)"
                    R"({"basis":{"channels":false,"context":4096,"frame":"tile","heads_together":true,"quer)"
                    R"(y_weighted":true,"tile_tokens":128},"bits":2.5,"fit_tokens":200,"given":null,"groups)"
                    R"(":[],"own_heads_together":false,"rope":{"base":10000.0,"dims":0,"frequencies":)"
                    "[") +
            frequencies +
            "]"
            R"(,"layout":"interleaved"}},"query_heads":4,"recent_bits":16,"recent_tokens":32,"rotat)"
            R"(ion_seed":0,"sink_tokens":4,"value_head_dim":48,"values":{"bits":4,"clip":false,"gra)"
            R"(nularity":"per_token","group":1073741824,"rotate":true,"scheme":"unbiased"}})");
}

}  // namespace
