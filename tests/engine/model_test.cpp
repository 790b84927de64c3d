// The forward pass: a small random model against plain loops in double, the real one against the reference.
#include "engine/model.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "engine/engine_support.hpp"
#include "kvplane/io/safetensors.hpp"
#include "test_support.hpp"

namespace {

using engine::Gguf;
using engine::LayerCaches;
using engine::Logits;
using engine::Matrix;
using engine::Model;
using engine::TokenId;
using engine::ValueType;
using kvplane::ErrorCode;
using kvplane::Index;
using kvplane::MatrixD;
using kvplane::ThreadExecutor;
using kvplane_test::GgufWriter;
using kvplane_test::refusal;
using kvplane_test::SmallModel;

// ---------------------------------------------------------------------------------------------------------
// A small model
// ---------------------------------------------------------------------------------------------------------

MatrixD weight(const Gguf& file, const std::string& name) {
    const engine::Tensor& tensor = *file.find_tensor(name);
    Matrix values(tensor.rows, tensor.columns);
    tensor.to_float(0, tensor.rows, values.data());
    return values.cast<double>();
}

MatrixD normed(const MatrixD& x, const Gguf& file, const std::string& name) {
    MatrixD result = x;
    const MatrixD scale = weight(file, name);
    for (Index t = 0; t < x.rows(); ++t) {
        double sum = 0;
        for (Index c = 0; c < x.cols(); ++c) sum += x(t, c) * x(t, c);
        for (Index c = 0; c < x.cols(); ++c)
            result(t, c) *=
                scale(0, c) / std::sqrt(sum / static_cast<double>(x.cols()) + double{SmallModel::epsilon});
    }
    return result;
}

/// RoPE, in pairs (2i, 2i + 1) or, with halves, (i, i + head_dim / 2).
MatrixD turned(MatrixD rows, bool halves = false, double base = SmallModel::rope_base) {
    constexpr Index dim = SmallModel::head_dim;
    for (Index t = 0; t < rows.rows(); ++t)
        for (Index head = 0; head < rows.cols(); head += dim)
            for (Index i = 0; i < dim / 2; ++i) {
                const double angle =
                    static_cast<double>(t) / std::pow(base, 2.0 * static_cast<double>(i) / dim);
                double& first = rows(t, head + (halves ? i : 2 * i));
                double& second = rows(t, head + (halves ? i + dim / 2 : 2 * i + 1));
                const std::complex<double> pair = std::complex(first, second) * std::polar(1.0, angle);
                first = pair.real(), second = pair.imag();
            }
    return rows;
}

/// Causal grouped-query attention over all tokens or a window of them, one weight at a time.
MatrixD attention(const MatrixD& queries, const MatrixD& keys, const MatrixD& values, Index query_heads,
                  Index kv_heads, Index window = 0) {
    const Index head_dim = keys.cols() / kv_heads;
    MatrixD out = MatrixD::Zero(queries.rows(), queries.cols());
    for (Index h = 0; h < query_heads; ++h) {
        const Index q = h * head_dim, kv = h / (query_heads / kv_heads) * head_dim;
        for (Index t = 0; t < queries.rows(); ++t) {
            const Index seen = keys.rows() - queries.rows() + t + 1;
            double total = 0;
            for (Index s = window > 0 ? std::max<Index>(0, seen - window) : 0; s < seen; ++s) {
                double score = 0;
                for (Index c = 0; c < head_dim; ++c) score += queries(t, q + c) * keys(s, kv + c);
                const double mass = std::exp(score / std::sqrt(static_cast<double>(head_dim)));
                for (Index c = 0; c < head_dim; ++c) out(t, q + c) += mass * values(s, kv + c);
                total += mass;
            }
            for (Index c = 0; c < head_dim; ++c) out(t, q + c) /= total;
        }
    }
    return out;
}

/// The pass written out for one architecture after the other, with none of the engine's table.
MatrixD reference_logits(const Gguf& file, const std::vector<TokenId>& tokens) {
    const auto architecture = file.value("general.architecture").text();
    const bool gemma = architecture == "gemma3", qwen = architecture == "qwen2";
    const MatrixD embedding = weight(file, "token_embd.weight");
    MatrixD x(static_cast<Index>(tokens.size()), SmallModel::width);
    for (Index t = 0; t < x.rows(); ++t) x.row(t) = embedding.row(tokens[static_cast<std::size_t>(t)]);
    if (gemma) x *= 16;  // sqrt(256)
    for (Index layer = 0; layer < (gemma ? SmallModel::gemma_layers : SmallModel::layers); ++layer) {
        const std::string block = "blk." + std::to_string(layer) + ".";
        const bool windowed = gemma && layer != 5;
        const auto w = [&](const char* name) { return weight(file, block + name + ".weight"); };
        const auto projected = [&](const MatrixD& rows, const std::string& name) {
            MatrixD result = rows * weight(file, block + name + ".weight").transpose();
            if (qwen) result.rowwise() += weight(file, block + name + ".bias").row(0);
            return result;
        };
        const auto heads_normed = [&](MatrixD rows, const std::string& name) {
            for (Index head = 0; gemma && head < rows.cols(); head += SmallModel::head_dim)
                rows.middleCols(head, SmallModel::head_dim) =
                    normed(rows.middleCols(head, SmallModel::head_dim), file, block + name + ".weight");
            return turned(rows, gemma || qwen, windowed ? 10000.0 : double{SmallModel::rope_base});
        };
        const auto added = [&](const MatrixD& rows, const std::string& name) {
            return gemma ? normed(rows, file, block + name + ".weight") : rows;
        };
        MatrixD n = normed(x, file, block + "attn_norm.weight");
        const MatrixD q = heads_normed(projected(n, "attn_q"), "attn_q_norm");
        const MatrixD k = heads_normed(projected(n, "attn_k"), "attn_k_norm"), v = projected(n, "attn_v");
        x += added(attention(q, k, v, SmallModel::query_heads, SmallModel::kv_heads,
                             windowed ? SmallModel::window : 0) *
                       w("attn_output").transpose(),
                   "post_attention_norm");
        n = normed(x, file, block + "ffn_norm.weight");
        MatrixD gate = n * w("ffn_gate").transpose();
        const MatrixD up = n * w("ffn_up").transpose();
        for (Index i = 0; i < gate.size(); ++i) {
            double& g = gate.data()[i];
            const double inner = std::sqrt(2 / 3.14159265358979323846) * (g + .044715 * g * g * g);
            g = (gemma ? g / 2 * (1 + std::tanh(inner)) : g / (1 + std::exp(-g))) * up.data()[i];
        }
        x += added(gate * w("ffn_down").transpose(), "post_ffw_norm");
    }
    const std::string output = file.find_tensor("output.weight") ? "output.weight" : "token_embd.weight";
    return normed(x, file, "output_norm.weight") * weight(file, output).transpose();
}

std::vector<TokenId> random_tokens(std::size_t count) {
    std::mt19937 random(11);
    std::vector<TokenId> tokens(count);
    for (TokenId& token : tokens) token = static_cast<TokenId>(random() % SmallModel::vocabulary);
    return tokens;
}

float difference(const Matrix& a, const Matrix& b) {
    EXPECT_EQ(a.rows(), b.rows());
    EXPECT_EQ(a.cols(), b.cols());
    return (a - b).cwiseAbs().maxCoeff();
}

class SmallModelTest : public testing::Test {
  protected:
    kvplane_test::Bytes bytes = SmallModel::file().bytes();
    ThreadExecutor threads{3};
    Model model{Gguf(bytes), threads};

    /// The logits of all tokens, in chunks of the given sizes, the last one repeated as often as needed.
    Matrix in_chunks(const std::vector<TokenId>& tokens, const std::vector<std::size_t>& sizes) const {
        LayerCaches caches = model.exact_caches();
        Matrix all(static_cast<Index>(tokens.size()), model.config().vocabulary);
        for (std::size_t first = 0, i = 0; first < tokens.size(); ++i) {
            const std::size_t count = std::min(sizes[std::min(i, sizes.size() - 1)], tokens.size() - first);
            all.middleRows(static_cast<Index>(first), static_cast<Index>(count)) =
                model.forward({tokens.data() + first, count}, caches, Logits::all);
            first += count;
        }
        return all;
    }
};

TEST_F(SmallModelTest, AgreesWithPlainLoopsInDouble) {
    const auto tokens = random_tokens(90);
    for (const auto& [own_output_matrix, architecture] :
         {std::pair{false, "llama"}, {true, "llama"}, {false, "gemma3"}, {true, "qwen2"}}) {
        SCOPED_TRACE(architecture);
        const auto file_bytes = SmallModel::file(own_output_matrix, architecture).bytes();
        const Gguf file(file_bytes);
        const Model other(Gguf(file_bytes), threads);
        const MatrixD expected = reference_logits(file, tokens);
        EXPECT_GT(expected.cwiseAbs().mean(), .2);  // logits of any size, else agreement says nothing
        EXPECT_LT(expected.cwiseAbs().maxCoeff(), 1000);
        LayerCaches caches = other.exact_caches();
        const Matrix logits = other.forward(tokens, caches, Logits::all);
        ASSERT_EQ(logits.rows(), expected.rows());
        const double scale = expected.cwiseAbs().maxCoeff();
        EXPECT_LT((logits.cast<double>() - expected).cwiseAbs().maxCoeff(), 3e-6 * scale);
    }
}

TEST_F(SmallModelTest, GivesTheSameInAnyChunks) {
    const auto tokens = random_tokens(150);
    const Matrix at_once = in_chunks(tokens, {150});
    const float tolerance = 3e-6f * at_once.cwiseAbs().maxCoeff();
    EXPECT_LT(difference(in_chunks(tokens, {1}), at_once), tolerance);
    EXPECT_LT(difference(in_chunks(tokens, {32}), at_once), tolerance);
    EXPECT_LT(difference(in_chunks(tokens, {100, 1, 1, 7}), at_once), tolerance);
}

TEST_F(SmallModelTest, LongInputsRunInSeveralChunks) {
    const auto tokens = random_tokens(Model::max_chunk + 30);
    const Matrix all = in_chunks(tokens, {tokens.size()});
    EXPECT_LT(difference(in_chunks(tokens, {37}), all), 3e-6f * all.cwiseAbs().maxCoeff());
    LayerCaches caches = model.exact_caches();
    const Matrix last = model.forward(tokens, caches, Logits::last);
    EXPECT_LT(difference(last, all.bottomRows(1)), 3e-6f * all.cwiseAbs().maxCoeff());
    caches = model.exact_caches();
    EXPECT_EQ(model.forward(tokens, caches, Logits::none).rows(), 0);
    EXPECT_EQ(caches[1]->tokens(), static_cast<Index>(tokens.size()));
    EXPECT_EQ(model.forward({}, caches, Logits::all).rows(), 0);
}

TEST_F(SmallModelTest, DoesNotDependOnTheNumberOfThreads) {
    const auto tokens = random_tokens(70);
    ThreadExecutor one(1);
    const Model alone(Gguf(bytes), one);
    for (const std::size_t count : {1u, 70u}) {
        LayerCaches caches = model.exact_caches(), other = alone.exact_caches();
        const std::span<const TokenId> some(tokens.data(), count);
        EXPECT_EQ(
            difference(model.forward(some, caches, Logits::all), alone.forward(some, other, Logits::all)), 0);
    }
}

TEST_F(SmallModelTest, RunsOnSeveralThreadsAtATime) {
    const auto tokens = random_tokens(40);
    const Matrix expected = in_chunks(tokens, {8});
    std::vector<Matrix> results(3);
    std::vector<std::thread> callers;
    for (Matrix& result : results) callers.emplace_back([&] { result = in_chunks(tokens, {8}); });
    for (std::thread& caller : callers) caller.join();
    for (const Matrix& result : results) EXPECT_EQ(difference(result, expected), 0);
}

TEST_F(SmallModelTest, ShowsItsObserverWhatGoesIntoTheCache) {
    const auto tokens = random_tokens(20);
    LayerCaches caches = model.exact_caches();
    model.forward({tokens.data(), 5}, caches, Logits::none);
    std::vector<Index> layers;
    model.forward({tokens.data() + 5, 15}, caches, Logits::none, [&](const engine::LayerActivations& seen) {
        layers.push_back(seen.layer);
        EXPECT_EQ(seen.first_position, 5);
        EXPECT_EQ(caches[static_cast<std::size_t>(seen.layer)]->tokens(), 5);  // called before the append
        EXPECT_EQ(seen.values.rows(), 15);
        EXPECT_EQ(seen.values.cols(), SmallModel::kv_heads * SmallModel::head_dim);
        EXPECT_EQ(seen.queries.cols(), SmallModel::query_heads * SmallModel::head_dim);
        for (const auto& [before, after] : {std::pair{&seen.keys_before_rope, &seen.keys},
                                            std::pair{&seen.queries_before_rope, &seen.queries}}) {
            MatrixD shifted = MatrixD::Zero(20, before->cols());
            shifted.bottomRows(15) = before->cast<double>();
            EXPECT_LT(difference(turned(shifted).bottomRows(15).cast<float>(), *after), 1e-5f);
            EXPECT_GT(difference(*before, *after), .1f);
        }
    });
    EXPECT_EQ(layers, (std::vector<Index>{0, 1}));
}

TEST_F(SmallModelTest, RefusesBadInputBeforeAnythingChanges) {
    LayerCaches caches = model.exact_caches();
    model.forward(random_tokens(3), caches, Logits::none);
    const auto forward = [&](const std::vector<TokenId>& tokens) {
        model.forward(tokens, caches, Logits::last);
    };
    EXPECT_NE(refusal(ErrorCode::index,
                      [&] {
                          forward({1, SmallModel::vocabulary});
                      })
                  .find("token 262"),
              std::string::npos);
    refusal(ErrorCode::index, [&] { forward({-1}); });
    EXPECT_NE(
        refusal(ErrorCode::index, [&] { forward(random_tokens(SmallModel::context - 2)); }).find("1100"),
        std::string::npos);
    for (const auto& cache : caches) EXPECT_EQ(cache->tokens(), 3);

    LayerCaches other = model.exact_caches();
    std::swap(other[0], caches[0]);  // layers of two sequences
    refusal(ErrorCode::shape, [&] { forward({1}); });
    caches.pop_back();
    refusal(ErrorCode::shape, [&] { forward({1}); });
    EXPECT_EQ(caches[0]->tokens(), 0);
}

TEST(SmallModelFile, RefusesWhatTheEngineCannotRun) {
    ThreadExecutor threads(1);
    const auto expect_refused = [&](ErrorCode code, const std::string& said, auto&& change) {
        GgufWriter writer = SmallModel::file();
        change(writer);
        const auto bytes = writer.bytes();
        const std::string sentence = refusal(code, [&] { Model(Gguf(bytes), threads); });
        EXPECT_NE(sentence.find(said), std::string::npos) << sentence << "\n" << said;
    };
    const auto replace = [](GgufWriter& writer, const std::string& from, const std::string& to) {
        std::string values(reinterpret_cast<const char*>(writer.values.data()), writer.values.size());
        values.replace(values.find(from), from.size(), to);
        std::memcpy(writer.values.data(), values.data(), values.size());
    };
    const auto mismatch = ErrorCode::mismatch, format = ErrorCode::format;
    expect_refused(mismatch, "the architecture is 'gpt-2'; this engine knows llama, qwen2, gemma3",
                   [&](GgufWriter& w) { replace(w, "llama", "gpt-2"); });
    expect_refused(mismatch, "no metadata 'llama.block_count'",
                   [&](GgufWriter& w) { replace(w, "block_count", "block_kount"); });
    expect_refused(format, "llama.block_count is 0", [&](GgufWriter& w) {
        replace(w, std::string("block_count\4\0\0\0\2", 16), std::string("block_count\4\0\0\0\0", 16));
    });
    expect_refused(mismatch, "no tensor 'blk.2.", [&](GgufWriter& w) {
        replace(w, std::string("block_count\4\0\0\0\2", 16), std::string("block_count\4\0\0\0\3", 16));
    });
    expect_refused(mismatch, "no tensor 'blk.1.ffn_up.weight'",
                   [](GgufWriter& w) { w.tensors[w.tensors.size() - 2].name = "blk.1.ffn_over.weight"; });
    expect_refused(mismatch, "'blk.1.ffn_up.weight' is 256 x 96, expected 96 x 256",
                   [](GgufWriter& w) { std::ranges::reverse(w.tensors[w.tensors.size() - 2].dimensions); });
    expect_refused(mismatch, "21 tensors, of which this engine knows 20",
                   [](GgufWriter& w) { w.add_tensor("blk.0.attn_q.bias", {8}, 0, kvplane_test::Bytes(32)); });
    expect_refused(mismatch, "llama.expert_count",
                   [](GgufWriter& w) { w.add("llama.expert_count", ValueType::uint32, std::uint32_t{8}); });
    expect_refused(mismatch, "llama.rope.scaling.type",
                   [](GgufWriter& w) { w.add_text("llama.rope.scaling.type", "yarn"); });
    expect_refused(mismatch, "RoPE over a part", [](GgufWriter& w) {
        w.add("llama.rope.dimension_count", ValueType::uint32, std::uint32_t{4});
    });
    expect_refused(format, "4 query heads, 3 key/value heads", [&](GgufWriter& w) {
        replace(w, std::string("head_count_kv\4\0\0\0\2", 18), std::string("head_count_kv\4\0\0\0\3", 18));
    });
}

TEST(ExactCache, AttendsLikePlainLoopsInDouble) {
    std::srand(static_cast<unsigned>(kvplane_test::seed()));
    ThreadExecutor threads(2);
    for (const auto& [query_heads, kv_heads, head_dim] : {std::tuple{6, 2, 16}, {3, 3, 10}, {5, 1, 64}}) {
        const Index width = kv_heads * head_dim;
        const Matrix keys = 2 * Matrix::Random(200, width), values = Matrix::Random(200, width);
        engine::ExactCache cache(query_heads, kv_heads, head_dim, threads);
        for (const Index count : {1, 3, 32, 33, 64, 66}) {
            const Index first = cache.tokens();
            cache.append(keys.middleRows(first, count), values.middleRows(first, count), {});
            const Index seen = cache.tokens();
            for (const Index rows : {Index{1}, count}) {
                const Matrix queries = 3 * Matrix::Random(rows, query_heads * head_dim);
                Matrix out;
                cache.attend(queries, out);
                const MatrixD expected =
                    attention(queries.cast<double>(), keys.topRows(seen).cast<double>(),
                              values.topRows(seen).cast<double>(), query_heads, kv_heads);
                EXPECT_LT(difference(out, expected.cast<float>()), 3e-6f);
            }
        }
        Matrix out;
        const Matrix too_many = Matrix::Zero(201, query_heads * head_dim);
        refusal(ErrorCode::shape, [&] { cache.append(keys.leftCols(1), values, {}); });
        refusal(ErrorCode::shape, [&] { cache.append(keys.topRows(2), values.topRows(1), {}); });
        refusal(ErrorCode::shape, [&] { cache.attend(Matrix::Zero(1, 1), out); });
        refusal(ErrorCode::shape, [&] { cache.attend(too_many, out); });
        EXPECT_EQ(cache.tokens(), 199);
    }
    refusal(ErrorCode::shape, [&] { engine::ExactCache(4, 3, 8, threads); });
}

/// The cache drops what no query sees any more, and attention is as over all keys.
TEST(ExactCache, KeepsTheWindowThatALayerSees) {
    std::srand(static_cast<unsigned>(kvplane_test::seed()));
    ThreadExecutor threads(2);
    const Matrix keys = 2 * Matrix::Random(400, 20), values = Matrix::Random(400, 20);
    for (const Index window : {1, 5, 40, 500}) {
        engine::ExactCache cache(4, 2, 10, threads, window);
        for (Index i = 0; cache.tokens() < 350; ++i) {
            const Index first = cache.tokens(),
                        count = std::array{1, 7, 33, 50}[static_cast<std::size_t>(i % 4)];
            cache.append(keys.middleRows(first, count), values.middleRows(first, count), {});
            const Matrix queries = 3 * Matrix::Random(count, 40);
            Matrix out;
            cache.attend(queries, out);
            const MatrixD expected =
                attention(queries.cast<double>(), keys.topRows(first + count).cast<double>(),
                          values.topRows(first + count).cast<double>(), 4, 2, window);
            ASSERT_LT(difference(out, expected.cast<float>()), 3e-6f) << window << " at " << first;
        }
        Matrix out;
        const Matrix all = Matrix::Zero(cache.tokens(), 40);
        if (window <= 40) refusal(ErrorCode::shape, [&] { cache.attend(all, out); });
    }
}

TEST(ExactCache, LargeScoresDoNotOverflow) {
    ThreadExecutor threads(1);
    engine::ExactCache cache(1, 1, 2, threads);
    Matrix keys(3, 2), values(3, 2), out;
    keys << 1000, 0, -1000, 0, 0, 0;
    values << 1, 2, 3, 4, 5, 6;
    cache.append(keys, values, {});
    cache.attend(Matrix::Constant(1, 2, 100), out);
    EXPECT_EQ(out(0, 0), 1);
    EXPECT_EQ(out(0, 1), 2);
}

TEST(ParallelLoops, CallEveryIndexOnce) {
    for (const int count : {1, 2, 5}) {
        ThreadExecutor threads(count);
        EXPECT_EQ(threads.workers(), count);
        for (int round = 0; round < 2000; ++round) {
            std::vector<std::atomic<int>> calls(static_cast<std::size_t>(round % 40));
            engine::parallel_for(threads, round % 40, [&](Index i) { ++calls[static_cast<std::size_t>(i)]; });
            for (const auto& number : calls) ASSERT_EQ(number, 1);
        }
    }
    refusal(ErrorCode::option, [] { engine::thread_count(-1); });
}

// ---------------------------------------------------------------------------------------------------------
// The real model
// ---------------------------------------------------------------------------------------------------------

struct Reference {
    kvplane::SafetensorsFile logits =
        kvplane::SafetensorsFile::open(KVPLANE_TEST_DATA "/smollm2_reference_logits.safetensors");
    kvplane::SafetensorsFile second =
        kvplane::SafetensorsFile::open(KVPLANE_TEST_DATA "/smollm2_second_window.safetensors");
    nlohmann::json json = nlohmann::json::parse(std::ifstream(KVPLANE_TEST_DATA "/smollm2_reference.json"));

    std::vector<TokenId> window(int number) const {
        std::vector<TokenId> tokens(2048);
        for (Index i = 0; i < 2048; ++i)
            tokens[static_cast<std::size_t>(i)] =
                number == 0 ? static_cast<TokenId>(logits.matrix<std::int64_t>("token_ids", 1, 2048)(0, i))
                            : second.matrix<std::int32_t>("token_ids", 1, 2048)(0, i);
        return tokens;
    }
};

class RealModel : public testing::Test {
  protected:
    static const Model& model() {
        static ThreadExecutor threads(engine::thread_count(0));
        static const Model shared(Gguf::open(kvplane_test::model_path()), threads);
        return shared;
    }
    /// log softmax(logits)[token], in double.
    static double log_likelihood(const Eigen::RowVectorXf& logits, TokenId token) {
        const Eigen::RowVectorXd row = logits.cast<double>();
        const double largest = row.maxCoeff();
        return row(token) - largest - std::log((row.array() - largest).exp().sum());
    }
    /// The continuation of a prompt, always the likeliest token, and the gaps to the second likeliest.
    static std::pair<std::vector<TokenId>, std::vector<float>> greedy(std::vector<TokenId> tokens,
                                                                      std::size_t count) {
        std::vector<TokenId> continuation;
        std::vector<float> gaps;
        LayerCaches caches = model().exact_caches();
        while (continuation.size() < count) {
            Matrix logits = model().forward(tokens, caches, Logits::last);
            Index best = 0;
            const float largest = logits.row(0).maxCoeff(&best);
            logits(0, best) = -1e30f;
            gaps.push_back(largest - logits.maxCoeff());
            tokens = {static_cast<TokenId>(best)};
            continuation.push_back(tokens[0]);
        }
        return {continuation, gaps};
    }
};

TEST_F(RealModel, GivesTheReferenceLogitsAndLikelihoods) {
    KVPLANE_NEEDS_MODEL();
    const Reference reference;
    const auto rows = reference.logits.matrix<std::int64_t>("rows", 1, 8);
    const auto expected = reference.logits.matrix<float>("logits");
    const auto likelihoods = reference.logits.matrix<float>("target_log_likelihood", 1, 2047);
    const auto tokens = reference.window(0);
    LayerCaches caches = model().exact_caches();
    const auto start = std::chrono::steady_clock::now();
    const Matrix logits = model().forward(tokens, caches, Logits::all);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

    float logit_error = 0, likelihood_error = 0;
    for (Index i = 0; i < 8; ++i)
        logit_error = std::max(logit_error, difference(logits.row(rows(0, i)), expected.row(i)));
    for (Index i = 0; i < 2047; ++i) {
        const auto likelihood =
            static_cast<float>(log_likelihood(logits.row(i), tokens[static_cast<std::size_t>(i) + 1]));
        likelihood_error = std::max(likelihood_error, std::abs(likelihood - likelihoods(0, i)));
    }
    EXPECT_LT(logit_error, 1e-2f);
    EXPECT_LT(likelihood_error, 1e-2f);
    std::cout << "logits differ by at most " << logit_error << ", log-likelihoods by " << likelihood_error
              << "; 2048 tokens in " << seconds.count() << " s\n";
}

TEST_F(RealModel, GivesTheReferencePerplexities) {
    KVPLANE_NEEDS_MODEL();
    const Reference reference;
    for (int number : {0, 1}) {
        const auto tokens = reference.window(number);
        LayerCaches caches = model().exact_caches();
        double sum = 0, sum_from_256 = 0;
        for (std::size_t first = 0; first < tokens.size(); first += 256) {
            const Matrix logits = model().forward({tokens.data() + first, 256}, caches, Logits::all);
            for (std::size_t i = first; i < std::min(first + 256, tokens.size() - 1); ++i) {
                const double loss = -log_likelihood(logits.row(static_cast<Index>(i - first)), tokens[i + 1]);
                sum += loss;
                if (i >= 256) sum_from_256 += loss;
            }
        }
        const auto& window = reference.json["perplexity_windows"][static_cast<std::size_t>(number)];
        const double all = window["perplexity_all"], from_256 = window["perplexity_from_256"];
        EXPECT_NEAR(std::exp(sum / 2047), all, 1e-3 * all);
        EXPECT_NEAR(std::exp(sum_from_256 / (2047 - 256)), from_256, 1e-3 * from_256);
        std::cout << "perplexity " << std::exp(sum / 2047) << " (" << all << "), from 256 on "
                  << std::exp(sum_from_256 / (2047 - 256)) << " (" << from_256 << ")\n";
    }
}

TEST_F(RealModel, OneTokenAtATimeGivesTheLogitsOfAChunk) {
    KVPLANE_NEEDS_MODEL();
    const auto tokens = Reference().window(0);
    LayerCaches together = model().exact_caches(), apart = model().exact_caches();
    const Matrix expected = model().forward({tokens.data(), 96}, together, Logits::all);
    for (std::size_t i = 0; i < 32; ++i)
        EXPECT_LT(difference(model().forward({tokens.data() + i, 1}, apart, Logits::last),
                             expected.row(static_cast<Index>(i))),
                  1e-3f);
    const Matrix rest = model().forward({tokens.data() + 32, 64}, apart, Logits::all);
    EXPECT_LT(difference(rest, expected.bottomRows(64)), 1e-3f);
}

TEST_F(RealModel, ContinuesLikeTheReference) {
    KVPLANE_NEEDS_MODEL();
    const Reference reference;
    for (const char* name : {"greedy", "greedy_long"}) {
        const auto& example = reference.json[name];
        const auto expected = example["continuation_ids"].get<std::vector<TokenId>>();
        const auto prompt = example["prompt_ids"].get<std::vector<TokenId>>();
        const auto [continuation, gaps] = greedy(prompt, expected.size());
        // The two best logits are nowhere closer than this in the reference; a tenth of it would be a tie.
        const float smallest_gap = example.value("smallest_gap_between_top_two_logits", .05f);
        for (std::size_t i = 0; i < expected.size(); ++i) {
            if (continuation[i] == expected[i]) continue;
            EXPECT_LT(gaps[i], smallest_gap / 10) << name << ": another token at place " << i;
            break;
        }
        EXPECT_NEAR(*std::ranges::min_element(gaps), name == std::string("greedy") ? gaps[0] : smallest_gap,
                    name == std::string("greedy") ? 1e9 : 1e-2);
    }
}

// ---------------------------------------------------------------------------------------------------------
// The other architectures' models, against transformers on the same files
// ---------------------------------------------------------------------------------------------------------

class OtherModel : public testing::TestWithParam<const char*> {};

/// Every 64th logit of some tokens, and the log-likelihoods of all targets, in which every logit takes part.
/// Gemma's text is longer than its windows.
TEST_P(OtherModel, GivesTheReferenceLogitsAndLikelihoods) {
    KVPLANE_NEEDS_MODEL_OF(GetParam());
    const auto reference = kvplane::SafetensorsFile::open(std::string(KVPLANE_TEST_DATA "/") + GetParam() +
                                                          "_reference_logits.safetensors");
    const auto stored = reference.matrix<std::int32_t>("token_ids");
    const std::vector<TokenId> tokens(stored.data(), stored.data() + stored.size());
    ThreadExecutor threads(engine::thread_count(0));
    const Model model(Gguf::open(kvplane_test::model_path(GetParam())), threads);
    LayerCaches caches = model.exact_caches();
    Matrix logits(0, model.config().vocabulary);
    const auto rows = reference.matrix<std::int32_t>("rows");
    const auto expected = reference.matrix<float>("logits_of_every_64th_token");
    const auto likelihoods = reference.matrix<float>("target_log_likelihood");
    ASSERT_EQ(likelihoods.cols(), stored.cols() - 1);
    float logit_error = 0, likelihood_error = 0;
    Index compared = 0;
    for (Index first = 0; first < stored.cols(); first += 96) {
        const auto part = std::span(tokens).subspan(static_cast<std::size_t>(first));
        logits = model.forward(part.first(std::min<std::size_t>(96, part.size())), caches, Logits::all);
        for (Index i = 0; i < logits.rows(); ++i) {
            for (Index r = 0; r < rows.cols(); ++r) {
                if (rows(0, r) != first + i) continue;
                ++compared;
                for (Index c = 0; c < expected.cols(); ++c)
                    logit_error = std::max(logit_error, std::abs(logits(i, 64 * c) - expected(r, c)));
            }
            if (first + i + 1 == stored.cols()) break;
            const auto row = logits.row(i).cast<double>().array();
            const double sum = std::log((row - row.maxCoeff()).exp().sum()) + row.maxCoeff();
            const double likelihood = row(tokens[static_cast<std::size_t>(first + i + 1)]) - sum;
            likelihood_error = std::max(likelihood_error,
                                        std::abs(static_cast<float>(likelihood) - likelihoods(0, first + i)));
        }
    }
    EXPECT_EQ(compared, rows.cols());
    EXPECT_LT(logit_error, 1e-2f);
    EXPECT_LT(likelihood_error, 1e-2f);
    std::cout << GetParam() << ": logits differ by at most " << logit_error << ", log-likelihoods by "
              << likelihood_error << '\n';
}
INSTANTIATE_TEST_SUITE_P(, OtherModel, testing::Values("gemma3", "qwen2"),
                         [](const auto& each) { return std::string(each.param); });

}  // namespace
