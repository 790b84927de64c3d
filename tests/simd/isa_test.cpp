// Instruction sets: what is listed, what a name stands for, that forcing one makes it run, and what the
// environment variable KVPLANE_ISA does to a process that starts with it.
#include "kvplane/simd/isa.hpp"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

#include "test_support.hpp"

namespace {

using kvplane::current_isa;
using kvplane::ErrorCode;
using kvplane::force_isa;
using kvplane::Isa;
using kvplane::isa_named;
using kvplane::supported_isas;
using kvplane_test::refusal;

TEST(IsaList, IsAscendingWithEveryNameOnce) {
    int expected = 0;
    for (const auto& description : kvplane::all_isas) {
        EXPECT_EQ(static_cast<int>(description.isa), expected++) << "ordered, so that the last is the best";
        EXPECT_EQ(name(description.isa), description.name);
        EXPECT_FALSE(description.features.empty());
        for (const auto& other : kvplane::all_isas) {
            EXPECT_EQ(other.name == description.name, other.isa == description.isa);
        }
    }
    EXPECT_EQ(kvplane::name(Isa::scalar), "scalar");
    EXPECT_EQ(kvplane::name(Isa::avx2), "avx2");
    EXPECT_EQ(kvplane::name(Isa::avx512), "avx512");
    EXPECT_EQ(kvplane::name(static_cast<Isa>(99)), "unknown");
    EXPECT_EQ(kvplane::name(static_cast<Isa>(-1)), "unknown");
}

TEST(IsaList, SupportsScalarAndWhatIsSupported) {
    const auto supported = supported_isas();
    ASSERT_FALSE(supported.empty());
    EXPECT_EQ(supported.front(), Isa::scalar);
    EXPECT_TRUE(std::is_sorted(supported.begin(), supported.end()));
    for (const auto& description : kvplane::all_isas) {
        const bool listed = std::count(supported.begin(), supported.end(), description.isa) == 1;
        EXPECT_EQ(listed, kvplane::is_supported(description.isa)) << description.name;
    }
    EXPECT_FALSE(kvplane::is_supported(static_cast<Isa>(99)));
}

/// What the kernel says of the processor, for the features that each instruction set names.
TEST(IsaList, AgreesWithTheKernel) {
    std::ifstream file("/proc/cpuinfo");
    std::string line, flags;
    while (flags.empty() && std::getline(file, line))
        if (line.rfind("flags", 0) == 0) flags = line + " ";
    if (flags.empty()) GTEST_SKIP() << "no x86 flags in /proc/cpuinfo";
    for (const auto& description : kvplane::all_isas) {
        if (description.isa == Isa::scalar) continue;
        bool all = true;
        std::istringstream features{std::string(description.features)};
        for (std::string feature; features >> feature;) {
            std::transform(feature.begin(), feature.end(), feature.begin(),
                           [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
            all = all && flags.find(" " + feature + " ") != std::string::npos;
        }
        EXPECT_EQ(kvplane::is_supported(description.isa), all) << description.name;
    }
}

TEST(IsaNamed, FindsOrRefuses) {
    for (const Isa isa : supported_isas()) EXPECT_EQ(isa_named(name(isa)), isa);
    for (const std::string wrong : {"", "sse9", "AVX2", "avx", "avx512 ", "scalar,avx2"}) {
        const std::string sentence = refusal(ErrorCode::option, [&] { isa_named(wrong); });
        EXPECT_NE(sentence.find("'" + wrong + "'"), std::string::npos) << sentence;
        for (const auto& description : kvplane::all_isas)
            EXPECT_NE(sentence.find(description.name), std::string::npos) << sentence;
    }
    for (const auto& description : kvplane::all_isas) {
        if (kvplane::is_supported(description.isa)) continue;
        for (const std::string& sentence :
             {refusal(ErrorCode::option, [&] { isa_named(description.name); }),
              refusal(ErrorCode::option, [&] { force_isa(description.isa); })}) {
            EXPECT_NE(sentence.find(description.name), std::string::npos) << sentence;
            EXPECT_NE(sentence.find("lacks"), std::string::npos) << sentence;
        }
    }
}

TEST(ForceIsa, MakesThatOneCurrent) {
    const Isa before = current_isa();
    for (const Isa isa : supported_isas()) {
        force_isa(isa);
        EXPECT_EQ(current_isa(), isa);
    }
    force_isa(Isa::scalar);
    const std::string sentence = refusal(ErrorCode::option, [] { force_isa(static_cast<Isa>(99)); });
    EXPECT_NE(sentence.find("unknown"), std::string::npos) << sentence;
    EXPECT_EQ(current_isa(), Isa::scalar) << "a refusal changes nothing";
    force_isa(before);
}

/// Each instruction set compiles the body for its own number of lanes: the proof of which one ran.
TEST(RunOn, RunsTheBodyOfThatInstructionSet) {
    for (const Isa isa : supported_isas()) {
        const int lanes = kvplane::detail::run_on(isa, [](auto count) KVPLANE_BODY { return int{count}; });
        EXPECT_EQ(lanes, isa >= Isa::avx512 ? 16 : isa >= Isa::avx2 ? 8 : 4) << name(isa);
        EXPECT_EQ(lanes, kvplane::all_isas[static_cast<std::size_t>(isa)].lanes) << name(isa);
    }
    EXPECT_EQ(
        kvplane::detail::run_on(static_cast<Isa>(99), [](auto count) KVPLANE_BODY { return int{count}; }), 4);
}

// -- KVPLANE_ISA ------------------------------------------------------------------------------------------

/// Ends the process with the instruction set it came up with, or with 100 and the sentence of the refusal.
[[noreturn]] void exit_with_current_isa() {
    try {
        std::exit(static_cast<int>(current_isa()));
    } catch (const kvplane::Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        std::exit(100);
    }
}

/// The program is run anew for each of these ("threadsafe" death tests), with the environment set here.
class KvplaneIsaVariable : public testing::Test {
  protected:
    void SetUp() override { testing::FLAGS_gtest_death_test_style = "threadsafe"; }
    static void expect_exit(const char* value, int code, const std::string& sentence) {
        const char* before = std::getenv("KVPLANE_ISA");
        const std::string kept = before ? before : "";
        if (value)
            setenv("KVPLANE_ISA", value, 1);
        else
            unsetenv("KVPLANE_ISA");
        EXPECT_EXIT(exit_with_current_isa(), testing::ExitedWithCode(code), sentence);
        if (before)
            setenv("KVPLANE_ISA", kept.c_str(), 1);
        else
            unsetenv("KVPLANE_ISA");
    }
};

TEST_F(KvplaneIsaVariable, UnsetOrEmptyTakesTheBest) {
    const int best = static_cast<int>(supported_isas().back());
    expect_exit(nullptr, best, "");
    expect_exit("", best, "");
}
TEST_F(KvplaneIsaVariable, NamesTheOneToUse) {
    for (const auto& description : kvplane::all_isas) {
        if (kvplane::is_supported(description.isa))
            expect_exit(std::string(description.name).c_str(), static_cast<int>(description.isa), "");
        else
            expect_exit(std::string(description.name).c_str(), 100, "lacks");
    }
}
TEST_F(KvplaneIsaVariable, IsRefusedWhenUnknown) {
    expect_exit("sse9", 100, "instruction set 'sse9': expected scalar, neon, avx2, avx2_vnni, avx512 or amx");
    expect_exit("AVX2", 100, "'AVX2'");
}
/// A program that ends because the first to ask must not throw ends with the sentence all the same.
TEST_F(KvplaneIsaVariable, IsRefusedWithASentenceWhereNothingMayBeThrown) {
    setenv("KVPLANE_ISA", "sse9", 1);
    const auto ask = []() noexcept { return current_isa(); };
    EXPECT_EXIT(ask(), testing::KilledBySignal(SIGABRT), "kvplane: KVPLANE_ISA: instruction set 'sse9'");
    unsetenv("KVPLANE_ISA");
}

}  // namespace
