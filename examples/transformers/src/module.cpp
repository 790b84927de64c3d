// examples/transformers/src/module.cpp: the Python module kvplane._kvplane.
#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <variant>

#include "cuda_cache.hpp"
#include "host_cache.hpp"
#include "kvplane/cache/capabilities.hpp"
#include "kvplane/recipe_names.hpp"
#include "kvplane/storage/quantized.hpp"
#include "latents.hpp"
#include "policy.hpp"

namespace kvplane_python {

using namespace nb::literals;
using kvplane::KeyFrame;
using kvplane::Quantized;
using kvplane::RopeSettings;

using Recipes = std::variant<std::string, std::vector<std::string>>;
using Counts = std::variant<Index, std::vector<Index>>;
using Padding = std::optional<std::vector<Index>>;

namespace {

// Errors ---------------------------------------------------------------------------------------------------

/// kvplane.Error, a ValueError with the sentence, and with the kind of input that was refused in `code`.
PyObject* error_type = nullptr;

void make_error(nb::module_& m) {
    error_type = PyErr_NewExceptionWithDoc("kvplane.Error",
                                           "What kvplane refuses. The sentence says what was found and what "
                                           "was expected; `code` is the kind of input: "
                                           "'shape', 'option', 'index', 'not finite', 'beyond fp16', "
                                           "'format', 'mismatch', 'io' or 'out of memory'.",
                                           PyExc_ValueError, nullptr);
    if (!error_type) nb::raise_python_error();
    m.attr("Error") = nb::borrow(error_type);
    nb::register_exception_translator([](const std::exception_ptr& p, void*) {
        try {
            std::rethrow_exception(p);
        } catch (const kvplane::Error& error) {
            const nb::object raised = nb::borrow(error_type)(error.what());
            raised.attr("code") = kvplane::name(error.code());
            PyErr_SetObject(error_type, raised.ptr());
        }
    });
}

// Conversions ----------------------------------------------------------------------------------------------

std::vector<std::string> names(const Recipes& recipes) {
    if (const auto* one = std::get_if<std::string>(&recipes)) return {*one};
    return std::get<std::vector<std::string>>(recipes);
}
std::vector<Index> numbers(const Counts& counts) {
    if (const auto* one = std::get_if<Index>(&counts)) return {*one};
    return std::get<std::vector<Index>>(counts);
}

using NumpyMatrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

NumpyMatrix numpy_matrix(const Matrix& matrix) {
    const auto rows = static_cast<std::size_t>(matrix.rows()), cols = static_cast<std::size_t>(matrix.cols());
    std::unique_ptr<float[]> data(new float[std::max<std::size_t>(1, rows * cols)]);
    std::copy_n(matrix.data(), rows * cols, data.get());
    float* const memory = data.release();
    return NumpyMatrix(memory, {rows, cols}, owner_of(memory));
}

template <class Kind>
Kind one_of(const char* argument, const std::string& text, std::initializer_list<Kind> kinds) {
    std::string expected;
    for (const Kind kind : kinds) {
        if (text == name(kind)) return kind;
        expected.append(expected.empty() ? "" : ", ").append(name(kind));
    }
    kvplane::fail(ErrorCode::option, argument, ": '", text, "', expected one of ", expected);
}
kvplane::Scheme scheme_named(const std::optional<std::string>& text, int bits) {
    using kvplane::Scheme;
    if (!text) return kvplane::scheme_for(bits);
    return one_of("scheme", *text,
                  {Scheme::cell, Scheme::min_max, Scheme::symmetric, Scheme::full_range, Scheme::unbiased});
}
kvplane::Clip clip_of(bool clip) {
    return clip ? kvplane::Clip::mse_optimal : kvplane::Clip::none;
}

/// body() without the GIL.
template <class Body>
decltype(auto) without_gil(const Body& body) {
    const nb::gil_scoped_release released;
    return body();
}

// Caches ---------------------------------------------------------------------------------------------------

/// What a call on a device works on: the stream that is given, or torch's current one. 0, CUDA's default, where torch
/// is not there.
void* stream_of(const Cache& cache, std::optional<std::uintptr_t> given) {
    if (given || cache.device() == on_cpu) return reinterpret_cast<void*>(given.value_or(0));
    const nb::object torch = nb::module_::import_("sys").attr("modules").attr("get")("torch");
    if (torch.is_none()) return nullptr;
    const nb::object current = torch.attr("cuda").attr("current_stream")(cache.device());
    return reinterpret_cast<void*>(nb::cast<std::uintptr_t>(current.attr("cuda_stream")));
}

std::span<const Index> span_of(const Padding& padding) {
    return padding ? std::span<const Index>(*padding) : std::span<const Index>();
}

void append(Cache& cache, nb::handle keys, nb::handle values, nb::handle queries, Index layer,
            const Padding& padding, bool provisional, bool check, std::optional<std::uintptr_t> stream) {
    const Array k(keys, "keys", false, cache.device()), v(values, "values", false, cache.device());
    std::optional<Array> q;
    SequenceRows query_rows;
    if (!queries.is_none()) query_rows = sequence_rows(q.emplace(queries, "queries", false, cache.device()));
    const SequenceRows key_rows = sequence_rows(k), value_rows = sequence_rows(v);
    const AppendOptions options{provisional, check, stream_of(cache, stream)};
    without_gil([&] {
        cache.append(layer, key_rows, value_rows, q ? &query_rows : nullptr, span_of(padding), options);
    });
}

/// Sink logits as a list, or on a device as a tensor of float32 there.
class SinkLogits {
  public:
    SinkLogits(const Cache& cache, nb::handle object) {
        if (object.is_none()) return;
        if (cache.device() == on_cpu || !nb::hasattr(object, "data_ptr")) {
            require(nb::try_cast(object, numbers_), ErrorCode::option,
                    "sink_logits: ", nb::str(object.type().attr("__name__")).c_str(),
                    ", expected a list of numbers, one a query head");
            return;
        }
        const Array& array = array_.emplace(object, "sink_logits", false, cache.device());
        require(array.dimensions() == 1 && array.stride(0) == 1, ErrorCode::shape, "sink_logits: shape ",
                array.shape_text(), ", expected (query heads,), numbers side by side");
        require(array.type() == ScalarType::float32, ErrorCode::option,
                "sink_logits: elements of 16 bits on a device, expected float32");
        there_ = {static_cast<const float*>(array.data()), static_cast<std::size_t>(array.shape(0))};
    }
    const std::vector<float>& numbers() const noexcept { return numbers_; }
    std::span<const float> there() const noexcept { return there_; }

  private:
    std::vector<float> numbers_;
    std::optional<Array> array_;
    std::span<const float> there_;
};

/// A new tensor of float32 beside `queries`, [batch][token][head][channel] in memory.
nb::object new_tensor(nb::handle queries, const SequenceRows& rows, Index channels) {
    require(nb::hasattr(queries, "new_empty"), ErrorCode::option, "out: none for queries of ",
            nb::str(queries.type().attr("__name__")).c_str(),
            " on a device, expected an array; one is made for tensors of torch alone");
    const nb::object made =
        queries.attr("new_empty")(nb::make_tuple(rows.batch, rows.tokens, rows.heads, channels),
                                  "dtype"_a = nb::module_::import_("torch").attr("float32"));
    return made.attr("transpose")(1, 2);
}

nb::any attend(Cache& cache, nb::handle queries, Index layer, nb::handle out, double scale, double softcap,
               nb::handle sink_logits, const Padding& padding, const std::string& read,
               std::optional<std::uintptr_t> stream) {
    const Array q(queries, "queries", false, cache.device());
    const SequenceRows query_rows = sequence_rows(q);
    SequenceRows output;
    std::optional<Array> given;
    std::unique_ptr<float[]> made;
    nb::object result = nb::borrow(out);
    if (!out.is_none()) {
        output = sequence_rows(given.emplace(out, "out", true, cache.device()));
    } else if (cache.device() != on_cpu) {
        result = new_tensor(queries, query_rows, cache.layer(layer).value_head_dim);
        output = sequence_rows(given.emplace(result, "out", true, cache.device()));
        if (q.dimensions() == 3) result = result[nb::int_(0)];
    } else {
        // [batch][token][head][channel], which attention writes as it comes.
        output.batch = query_rows.batch, output.heads = query_rows.heads, output.tokens = query_rows.tokens;
        output.channels = cache.layer(layer).value_head_dim;
        output.head_stride = output.channels;
        output.token_stride = output.heads * output.channels;
        output.batch_stride = output.tokens * output.token_stride;
        const Index size = output.batch * output.batch_stride;
        made.reset(new float[static_cast<std::size_t>(std::max<Index>(1, size))]);
        output.data = made.get();
    }
    const SinkLogits sinks(cache, sink_logits);
    const Attention attention{scale, softcap, sinks.numbers(), read, stream_of(cache, stream), sinks.there()};
    without_gil([&] { cache.attend(layer, query_rows, output, span_of(padding), attention); });
    if (!made) return nb::borrow<nb::any>(result);
    const auto at = [](Index n) { return static_cast<std::size_t>(n); };
    float* const memory = made.release();
    const nb::object array = nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<4>>(
        memory, {at(output.batch), at(output.tokens), at(output.heads), at(output.channels)},
        owner_of(memory)));
    nb::object transposed = array.attr("transpose")(0, 2, 1, 3);
    if (q.dimensions() == 3) transposed = transposed[nb::int_(0)];
    return nb::borrow<nb::any>(transposed);
}

/// The number of the device that "cuda", "cuda:0" and so on name, on_cpu for "cpu". Throws Error (option) for
/// other names, for devices that are not there, and for a build without them.
int device_of(const std::string& name) {
    if (name == "cpu" || name.rfind("cpu:", 0) == 0) return on_cpu;
    const bool cuda = name == "cuda" || (name.size() > 5 && name.size() < 10 && name.rfind("cuda:", 0) == 0 &&
                                         name.find_first_not_of("0123456789", 5) == std::string::npos);
    require(cuda, ErrorCode::option, "device: '", name, "', expected 'cpu', or 'cuda:0' and so on");
    require(cuda_is_built(), ErrorCode::option, "device: '", name, "', ", without_cuda);
    const int device = name == "cuda" ? 0 : std::stoi(name.substr(5)), count = cuda_device_count();
    require(device < count, ErrorCode::option, "device: '", name, "' of ", count,
            " CUDA devices that are there, expected ", count == 0 ? "the CPU" : "a number below that");
    return device;
}

/// A cache of these layers, on the CPU or a device.
std::unique_ptr<Cache> new_cache(std::vector<Layer> layers, const std::optional<Recipes>& recipe,
                                 const kvplane::ModelPolicy* policy, const std::string& model, Index batch,
                                 Index threads, std::uint64_t rotation_seed, nb::handle device) {
    require(!policy || (!recipe && rotation_seed == 0), ErrorCode::option,
            recipe ? "recipe" : "rotation_seed", ": given beside a policy, which has one for ",
            "each layer; expected one of the two");
    const int place = device_of(nb::str(device).c_str());  // torch.device has a name of its own
    Contents contents =
        policy ? Contents::of(std::move(layers), *policy, model)
               : Contents::of(std::move(layers), names(recipe.value_or("standard")), rotation_seed);
    if (place != on_cpu) return make_cuda_cache(std::move(contents), batch, threads, place);
    return std::make_unique<HostCache>(std::move(contents), batch, threads);
}

void bind_caches(nb::module_& m) {
    nb::class_<RopeSettings>(
        m, "Rope",
        "A rotary embedding: which pairs of channels turn, and by how much a position.\n\n"
        "base: angle of pair i is base ** (-2 i / dims) a position. dims: channels that turn, the "
        "first ones; 0: all. halves: pairs are channels i and i + dims / 2, as in transformers; "
        "otherwise 2 i and 2 i + 1, as GGUF stores llama models. frequencies: radians a "
        "position of each pair, instead of base.")
        .def(
            "__init__",
            [](RopeSettings* self, double base, Index dims, bool halves,
               const std::vector<double>& frequencies) {
                new (self)
                    RopeSettings{halves ? kvplane::RopeLayout::halves : kvplane::RopeLayout::interleaved,
                                 dims, base, frequencies};
            },
            "base"_a = 10000.0, nb::kw_only(), "dims"_a = 0, "halves"_a = true,
            "frequencies"_a = std::vector<double>())
        .def_ro("base", &RopeSettings::base)
        .def_ro("dims", &RopeSettings::dims)
        .def_prop_ro("halves", [](const RopeSettings& r) { return r.layout == kvplane::RopeLayout::halves; })
        .def_ro("frequencies", &RopeSettings::frequencies)
        .def(
            "__eq__", [](const RopeSettings& a, const RopeSettings& b) { return a == b; }, nb::is_operator());

    nb::class_<Layer>(
        m, "Layer",
        "What a cache must know of one layer of a model: its heads, their channels, the rotary embedding "
        "(None: there is none) and the sliding window (0: none), a query's own token counted.")
        .def(
            "__init__",
            [](Layer* self, Index kv_heads, std::optional<Index> query_heads, Index head_dim,
               std::optional<Index> value_head_dim, std::optional<RopeSettings> rope, Index sliding_window) {
                new (self) Layer{kv_heads,        query_heads.value_or(kv_heads),
                                 head_dim,        value_head_dim.value_or(head_dim),
                                 std::move(rope), sliding_window};
            },
            nb::kw_only(), "kv_heads"_a = 1, "query_heads"_a = nb::none(), "head_dim"_a = 64,
            "value_head_dim"_a = nb::none(), "rope"_a = nb::none(), "sliding_window"_a = 0)
        .def_ro("kv_heads", &Layer::kv_heads)
        .def_ro("query_heads", &Layer::query_heads)
        .def_ro("head_dim", &Layer::head_dim)
        .def_ro("value_head_dim", &Layer::value_head_dim)
        .def_ro("rope", &Layer::rope)
        .def_ro("sliding_window", &Layer::sliding_window)
        .def("__repr__", &Layer::text)
        .def(
            "__eq__", [](const Layer& a, const Layer& b) { return a == b; }, nb::is_operator());

    nb::class_<kvplane::ModelPolicy>(
        m, "Policy",
        "How every layer of one model is cached: a recipe for each, with its basis and "
        "moments. The program `tune` of kvplane's examples makes one.")
        .def(
            "__init__",
            [](kvplane::ModelPolicy* self, const std::string& model, const std::vector<Layer>& layers,
               const Recipes& recipes) {
                const auto all = names(recipes);
                require(all.size() == 1 || all.size() == layers.size(), ErrorCode::shape,
                        "recipe: ", all.size(), " names for ", layers.size(),
                        " layers, expected one for all or one for each");
                std::vector<kvplane::CacheConfiguration> configurations;
                for (std::size_t i = 0; i < layers.size(); ++i) {
                    configurations.push_back(layers[i].configuration());
                    configurations.back().recipe = kvplane::recipes::parse(all[all.size() == 1 ? 0 : i]);
                }
                new (self) kvplane::ModelPolicy(model, std::move(configurations));
            },
            "model"_a, "layers"_a, "recipe"_a,
            "A policy of recipes that need neither basis nor moments. Raises Error (option, mismatch).")
        .def_static(
            "load", [](const std::filesystem::path& path) { return kvplane::ModelPolicy::load(path); },
            "path"_a, nb::call_guard<nb::gil_scoped_release>(), "Raises Error (io, format, mismatch).")
        .def("save", &kvplane::ModelPolicy::save, "path"_a, nb::call_guard<nb::gil_scoped_release>(),
             "Raises Error (option, not finite, io); what was at `path` is then untouched.")
        .def_prop_ro(
            "model", [](const kvplane::ModelPolicy& p) { return p.model(); }, "The model's name.")
        .def_prop_ro(
            "recipes",
            [](const kvplane::ModelPolicy& p) {
                std::vector<std::string> all;
                for (const auto& c : p.configurations()) all.push_back(c.recipe.name);
                return all;
            },
            "The recipe of each layer, by name.")
        .def(
            "with_halves",
            [](const kvplane::ModelPolicy& p, bool halves) {
                return with_layout(p,
                                   halves ? kvplane::RopeLayout::halves : kvplane::RopeLayout::interleaved);
            },
            "halves"_a = true, nb::call_guard<nb::gil_scoped_release>(),
            "The same policy for keys and queries whose rotary pairs are channels i and i + dims / 2, as in "
            "transformers, or 2 i and 2 i + 1 (halves=False), as GGUF stores llama models: what is known of "
            "channels moves with them.")
        .def(
            "require_model",
            [](const kvplane::ModelPolicy& p, const std::string& model, const std::vector<Layer>& layers) {
                std::vector<kvplane::CacheConfiguration> own;
                for (const Layer& layer : layers) own.push_back(layer.configuration());
                p.require_model(model, own);
            },
            "model"_a, "layers"_a, "Raises Error (mismatch) for a model that the policy was not made for.");

    nb::class_<Cache>(
        m, "Cache",
        "The keys and values of all layers of a model for a batch of sequences, in few bits.\n\n"
        "Keys, values and queries are arrays (batch, heads, tokens, channels), or (heads, tokens, channels) "
        "for one "
        "sequence, of float32, float16 or bfloat16: numpy arrays, torch CPU tensors, and whatever else "
        "speaks DLPack; of a cache on a device torch CUDA tensors. "
        "They are read where they are, with any strides. Keys and queries are as attention takes them, after "
        "RoPE.\n\n"
        "Tokens are counted from 0 in each sequence. Several threads may use one cache; they take turns, and "
        "none "
        "holds the GIL while it works.")
        .def(
            nb::new_(&new_cache), "layers"_a, "recipe"_a = nb::none(), nb::kw_only(), "policy"_a = nb::none(),
            "model"_a = std::string(), "batch"_a = 1, "threads"_a = 1, "rotation_seed"_a = 0,
            "device"_a = "cpu",
            "layers: one Layer for each layer of the model. recipe: how they are stored, one name for all or "
            "one for "
            "each, by default 'standard'; recipes() lists the names. policy: instead of a recipe; `model` is "
            "then the model's name, "
            "which "
            "the policy must be of. threads: how many share the work of a call. device: 'cpu', or 'cuda:0' "
            "and "
            "so on, "
            "where cuda_devices() says that the build has it; keys, values, queries and outputs are then "
            "torch tensors there, and recipes that learn in the first tokens do so on the CPU.\n\nRaises "
            "Error (option, shape; mismatch for a policy of another model).")
        .def_prop_ro("layers", &Cache::layers, "Number of layers.")
        .def_prop_ro("batch", &Cache::batch, nb::call_guard<nb::gil_scoped_release>(), "Number of sequences.")
        .def_prop_ro("threads", &Cache::threads)
        .def_prop_ro(
            "device",
            [](const Cache& cache) {
                return cache.device() == on_cpu ? std::string("cpu")
                                                : "cuda:" + std::to_string(cache.device());
            },
            "'cpu', or the CUDA device.")
        .def_prop_ro("recipes", &Cache::recipes, "The recipe of each layer, by name.")
        .def("layer", &Cache::layer, "layer"_a = 0, nb::rv_policy::copy)
        .def("tokens", &Cache::tokens, "layer"_a = 0, nb::call_guard<nb::gil_scoped_release>(),
             "Tokens of each sequence in a layer.")
        .def("provisional_tokens", &Cache::provisional_tokens, "layer"_a = 0,
             nb::call_guard<nb::gil_scoped_release>(),
             "Of these, the last ones that were appended as provisional and are not accepted yet.")
        .def("packed_tokens", &Cache::packed_tokens, "layer"_a = 0, nb::call_guard<nb::gil_scoped_release>(),
             "Of these, the ones in packed tiles.")
        .def("first_kept", &Cache::first_kept, "layer"_a = 0, nb::call_guard<nb::gil_scoped_release>(),
             "The first token after the sinks that attention still sees, of each sequence.")
        .def("needs_queries", &Cache::needs_queries, "layer"_a = 0, nb::call_guard<nb::gil_scoped_release>(),
             "Whether append() must be given queries now, from which some recipes learn at first.")
        .def("uses_queries", &Cache::uses_queries, "layer"_a = 0, nb::call_guard<nb::gil_scoped_release>(),
             "Whether append() makes use of queries, which it then need not be given for good.")
        .def(
            "append", &append, "keys"_a, "values"_a, "queries"_a = nb::none(), nb::kw_only(), "layer"_a = 0,
            "padding"_a = nb::none(), "provisional"_a = false, "check"_a = true, "stream"_a = nb::none(),
            "Appends tokens to every sequence of a layer.\n\nqueries: those of the same tokens, where "
            "uses_queries(). "
            "padding: for each sequence how many of the first rows are no tokens (left padding). "
            "provisional: tokens "
            "that may yet be taken back: attention sees them, but what truncate() takes back of them leaves "
            "no trace. append() of others accepts them.\n\nOn a device: check: whether the call waits until "
            "the device has found that all numbers can be stored; without it numbers that cannot (NaN, "
            "infinity, beyond 32000, of fp16 beyond 65504) spoil the tokens that share a grid with them. "
            "stream: the number of the CUDA stream that the work goes to, None: torch's current one; "
            "tensors that belong to another stay until it is done, and the stream itself until a call names "
            "another. Tokens taken back leave no trace but in "
            "bounds of errors.\n\nRaises Error (shape, option, not finite, beyond fp16) and then has changed "
            "nothing.")
        .def("attend", &attend, "queries"_a, nb::kw_only(), "layer"_a = 0, "out"_a = nb::none(),
             "scale"_a = 0.0, "softcap"_a = 0.0, "sink_logits"_a = nb::none(), "padding"_a = nb::none(),
             "read"_a = std::string(), "stream"_a = nb::none(),
             "Attention of the last tokens of every sequence of a layer, causal among themselves.\n\nout: "
             "where the "
             "result goes, (batch, heads, tokens, value channels) of any strides; None: a new numpy array of "
             "float32, on a device a new tensor. "
             "scale: of q.k, 0: 1 / sqrt(head_dim). softcap: 0: none. sink_logits: one a query head. "
             "padding: rows that "
             "are no tokens; they become 0. read: a read policy, such as 'tolerance=0.01'; '': all "
             "bits. On a device: sink_logits may be a tensor of float32 there, channels of out are "
             "neighbours, and "
             "stream is that of append().\n\nReturns out. Raises Error (shape, option, not finite).")
        .def(
            "truncate",
            [](Cache& cache, const Counts& tokens) {
                const auto counts = numbers(tokens);
                without_gil([&] { cache.truncate(counts); });
            },
            "tokens"_a,
            "Forgets all but the first tokens: of every sequence so many, or of each its own number. Layers "
            "that have "
            "fewer, because an append failed between two layers, stay as they are. Raises Error (index, "
            "shape) and "
            "then has changed nothing.")
        .def("crop", &Cache::crop, "count"_a, nb::call_guard<nb::gil_scoped_release>(),
             "Takes the last tokens off every sequence, in every layer. Raises Error (index) and then has "
             "changed "
             "nothing.")
        .def("accept", &Cache::accept, nb::kw_only(), "keep"_a = 0, nb::call_guard<nb::gil_scoped_release>(),
             "Makes all but the last `keep` provisional tokens tokens like all others.")
        .def("clear", &Cache::clear, nb::call_guard<nb::gil_scoped_release>(), "Back to no tokens.")
        .def(
            "reorder",
            [](Cache& cache, const std::vector<Index>& indices) {
                without_gil([&] { cache.reorder(indices); });
            },
            "indices"_a,
            "Sequence i becomes a fork of what sequence indices[i] was. They may be more or fewer than "
            "before; pages "
            "are shared, none is copied. Raises Error (index) for sequences that are not there.")
        .def("fork", &Cache::fork, nb::call_guard<nb::gil_scoped_release>(),
             "A cache of the same content, which shares all pages.")
        .def_prop_ro(
            "bytes", &Cache::bytes, nb::call_guard<nb::gil_scoped_release>(),
            "Memory of keys and values of all layers and sequences, with everything that is stored beside "
            "them. What sequences share is counted once.")
        .def_prop_ro(
            "bits_per_element", &Cache::bits_per_element, nb::call_guard<nb::gil_scoped_release>(),
            "8 * bytes / numbers stored; a layer with a sliding window counts as its window's tokens.")
        .def(
            "stored_keys",
            [](const Cache& cache, Index layer, Index sequence) {
                return numpy_matrix(
                    without_gil([&] { return cache.stored(kvplane::TileSide::keys, layer, sequence); }));
            },
            "layer"_a = 0, "sequence"_a = 0,
            "Keys as attention sees them (tokens, kv_heads * head_dim), from the "
            "first that is not dropped. For tests and inspection; slow.")
        .def(
            "stored_values",
            [](const Cache& cache, Index layer, Index sequence) {
                return numpy_matrix(
                    without_gil([&] { return cache.stored(kvplane::TileSide::values, layer, sequence); }));
            },
            "layer"_a = 0, "sequence"_a = 0, "Values likewise.")
        .def("save", &Cache::save, "path"_a, nb::kw_only(), "compress"_a = false, "sync"_a = true,
             nb::call_guard<nb::gil_scoped_release>(),
             "Writes all layers and sequences to a safetensors file. compress: needs a build with libzstd. "
             "Raises "
             "Error (option for provisional tokens, io); what was at `path` is then untouched.")
        .def("load", &Cache::load, "path"_a, nb::call_guard<nb::gil_scoped_release>(),
             "Replaces the content by that of a file, which a cache of the same layers and recipes has "
             "saved. The batch "
             "becomes that of the file. Raises Error (io, format, mismatch) and then has changed nothing.");

    m.def(
        "capabilities",
        [](const std::string& recipe, const std::optional<Layer>& layer) {
            kvplane::CacheConfiguration c = layer.value_or(Layer{}).configuration();
            c.recipe = kvplane::recipes::parse(recipe);
            const kvplane::CacheCapabilities can = kvplane::capabilities(c);
            nb::dict all;
            all["decodes_packed"] = can.decodes_packed;
            all["decodes_tiles_because"] = can.decodes_tiles_because;
            all["truncates_exactly"] = can.truncates_exactly;
            all["fits_basis"] = can.fits_basis;
            all["wants_queries"] = can.wants_queries;
            all["weighs_tokens"] = can.weighs_tokens;
            return all;
        },
        "recipe"_a, "layer"_a = nb::none(),
        "What a cache of a recipe can do. Raises Error (option) for a recipe that cannot be.");
    m.def(
        "cuda_devices", [] { return cuda_is_built() ? std::optional(cuda_device_count()) : std::nullopt; },
        "How many CUDA devices are there; None of a build without them.");
    m.def("recipes", &kvplane::recipes::help,
          "All recipes, their settings and the read policies, as text of several lines.");
}

// Arrays ---------------------------------------------------------------------------------------------------

using Rule = kvplane::GridRule;

std::shared_ptr<Quantized> quantized(nb::handle array, Index heads, int bits,
                                     const std::optional<std::string>& scheme, bool clip,
                                     kvplane::Granularity granularity, Index group) {
    const Array input(array, "array");
    const kvplane::detail::AnyRows rows = matrix_rows(input, heads);
    const Rule rule{granularity, group, scheme_named(scheme, bits), clip_of(clip)};
    return without_gil([&] {
        return rows.visit([&](const auto& typed) {
            return std::make_shared<Quantized>(kvplane::quantize(typed, rule, bits, "array"));
        });
    });
}

nb::any dequantize(const Quantized& q, std::optional<int> depth, nb::handle out) {
    const int bits = depth.value_or(q.bits());
    if (out.is_none())
        return nb::borrow<nb::any>(nb::cast(numpy_matrix(without_gil([&] { return q.dequantize(bits); }))));
    const Array to(out, "out", true);
    require(to.dimensions() == 2, ErrorCode::shape, "out: shape ", to.shape_text(), ", expected (",
            q.tokens(), ", ", q.channels(), ")");
    require(to.shape(0) == q.tokens() && to.shape(1) == q.channels(), ErrorCode::shape, "out: shape ",
            to.shape_text(), ", expected (", q.tokens(), ", ", q.channels(), ")");
    without_gil([&] {
        with_scalar(to.type(), to.data(), [&]<class Scalar>(Scalar* data) {
            Eigen::Map<kvplane::RowMajorMatrix<Scalar>, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>> map(
                data, q.tokens(), q.channels(), {to.stride(0), to.stride(1)});
            q.dequantize_rows(0, bits, map);
        });
    });
    return nb::borrow<nb::any>(out);
}

std::shared_ptr<Latents> latents(nb::handle keys, nb::handle queries, double bits, Index heads,
                                 Index query_heads, const std::optional<RopeSettings>& rope,
                                 const std::string& frame, Index first_position, bool heads_together,
                                 Index context) {
    const auto matrix_of = [](const kvplane::detail::AnyRows& rows) {
        Matrix matrix(rows.tokens, rows.channels());
        rows.visit([&](const auto& typed) {
            for (Index h = 0; h < rows.heads; ++h)
                matrix.middleCols(h * rows.head_dim, rows.head_dim) = typed.head(h).template cast<float>();
        });
        return matrix;
    };
    const Array key_array(keys, "keys");
    const kvplane::detail::AnyRows key_rows = matrix_rows(key_array, heads);
    std::optional<Array> query_array;
    std::optional<kvplane::detail::AnyRows> query_rows;
    if (!queries.is_none()) query_rows = matrix_rows(query_array.emplace(queries, "queries"), query_heads);
    LatentOptions options;
    options.bits = bits;
    options.rope = rope;
    options.frame = one_of("frame", frame, {KeyFrame::tile, KeyFrame::before_rope, KeyFrame::after_rope});
    options.first_position = first_position;
    options.heads_together = heads_together;
    options.context = context;
    return without_gil([&] {
        const Matrix k = matrix_of(key_rows);
        std::optional<Matrix> q;
        if (query_rows) q = matrix_of(*query_rows);
        return std::make_shared<Latents>(k, key_rows.heads, q ? &*q : nullptr,
                                         query_rows ? query_rows->heads : key_rows.heads, options);
    });
}

void bind_arrays(nb::module_& m) {
    nb::class_<Quantized>(
        m, "Quantized",
        "Keys or values in packed bit planes with fp16 grids, as per_channel(), per_token() and "
        "per_group() make them.")
        .def_prop_ro(
            "shape", [](const Quantized& q) { return nb::make_tuple(q.tokens(), q.channels()); },
            "(tokens, channels of all heads)")
        .def_prop_ro("heads", &Quantized::heads)
        .def_prop_ro("bits", &Quantized::bits)
        .def_prop_ro("scheme", [](const Quantized& q) { return kvplane::name(q.rule().scheme); })
        .def_prop_ro("granularity", [](const Quantized& q) { return kvplane::name(q.rule().granularity); })
        .def_prop_ro("bytes", &Quantized::bytes, "Bytes of planes and grids.")
        .def_prop_ro("bits_per_element", &Quantized::bits_per_element, "True bits an element, grids counted.")
        .def("code", &Quantized::code, "token"_a, "channel"_a,
             "The code of one element. Raises Error (index).")
        .def(
            "grid",
            [](const Quantized& q, Index token, Index channel) {
                const kvplane::Grid grid = q.grid(token, channel);
                return nb::make_tuple(grid.lower, grid.step);
            },
            "token"_a, "channel"_a,
            "(lower, step) of one element: value = lower + step * (code + 1/2). Raises Error (index).")
        .def(
            "error_bound",
            [](const Quantized& q, std::optional<int> depth) {
                return q.error_bound(depth.value_or(q.bits()));
            },
            "depth"_a = nb::none(),
            "Bound of every |x - x'| when read at `depth` bits. Raises Error (option).")
        .def(
            "frobenius_error_bound",
            [](const Quantized& q, std::optional<int> depth) {
                return q.frobenius_error_bound(depth.value_or(q.bits()));
            },
            "depth"_a = nb::none(), "Bound of |X - X'|_F. Raises Error (option).")
        .def("dequantize", &dequantize, "depth"_a = nb::none(), nb::kw_only(), "out"_a = nb::none(),
             "(tokens, channels) as a new numpy array of float32, or in `out` of any float type and strides, "
             "from the "
             "first `depth` bits of every code. Raises Error (option, shape).");

    m.def(
        "per_channel",
        [](nb::object array, int bits, Index group_tokens, const std::optional<std::string>& scheme,
           bool clip, Index heads) {
            require(group_tokens >= 1, ErrorCode::option, "group_tokens: ", group_tokens,
                    ", expected at least 1");
            return quantized(array, heads, bits, scheme, clip, kvplane::Granularity::per_channel,
                             group_tokens);
        },
        "array"_a, "bits"_a = 4, nb::kw_only(), "group_tokens"_a = 128, "scheme"_a = nb::none(),
        "clip"_a = false, "heads"_a = 1,
        "One grid for `group_tokens` tokens of each channel: what keys want.\n\narray: (tokens, heads * "
        "channels) or "
        "(heads, tokens, channels). scheme: 'cell', 'min_max', 'symmetric', 'full_range' or 'unbiased'; "
        "None: the "
        "better of the first two at this width. clip: intervals of least squared error. Raises Error.");
    m.def(
        "per_token",
        [](nb::object array, int bits, const std::optional<std::string>& scheme, bool clip, Index heads) {
            return quantized(array, heads, bits, scheme, clip, kvplane::Granularity::per_token,
                             kvplane::whole_head);
        },
        "array"_a, "bits"_a = 4, nb::kw_only(), "scheme"_a = nb::none(), "clip"_a = false, "heads"_a = 1,
        "One grid for each head of each token. Arguments as per_channel().");
    m.def(
        "per_group",
        [](nb::object array, int bits, Index group_channels, const std::optional<std::string>& scheme,
           bool clip, Index heads) {
            require(group_channels >= 1, ErrorCode::option, "group_channels: ", group_channels,
                    ", expected at least 1");
            return quantized(array, heads, bits, scheme, clip, kvplane::Granularity::per_token,
                             group_channels);
        },
        "array"_a, "bits"_a = 4, nb::kw_only(), "group_channels"_a = 32, "scheme"_a = nb::none(),
        "clip"_a = false, "heads"_a = 1,
        "One grid for `group_channels` channels of each token: what common block formats have. Arguments as "
        "per_channel().");

    nb::class_<Latents>(m, "Latents",
                        "Keys of one layer in a latent basis that was fitted to them, as latents() makes "
                        "them.")
        .def_prop_ro(
            "shape", [](const Latents& l) { return nb::make_tuple(l.tokens(), l.channels()); },
            "(tokens, channels of all heads)")
        .def_prop_ro("heads", &Latents::kv_heads)
        .def_prop_ro("bytes", &Latents::bytes, "Bytes of tiles and basis.")
        .def_prop_ro("basis_bytes", &Latents::basis_bytes, "Of these, the basis.")
        .def_prop_ro("bits_per_element", &Latents::bits_per_element,
                     "True bits an element, grids and basis counted.")
        .def_prop_ro("kept", &Latents::kept, "Latents that have bits, of each subspace.")
        .def(
            "dequantize",
            [](const Latents& l, std::optional<Index> most) {
                return numpy_matrix(without_gil(
                    [&] { return l.dequantize(most.value_or(std::numeric_limits<Index>::max())); }));
            },
            "latents"_a = nb::none(),
            "(tokens, channels) after RoPE, from the first `latents` of each subspace. Raises Error "
            "(option).");
    m.def("latents", &latents, "keys"_a, "queries"_a = nb::none(), nb::kw_only(), "bits"_a = 3.0,
          "heads"_a = 1, "query_heads"_a = 1, "rope"_a = nb::none(), "frame"_a = std::string("tile"),
          "first_position"_a = 0, "heads_together"_a = false, "context"_a = 4096,
          "Keys in the query-weighted basis of their own covariance, with the best widths for a "
          "budget.\n\nkeys: after "
          "RoPE, (tokens, heads * channels) or (heads, tokens, channels). queries: those of the last of "
          "these tokens; "
          "without them the basis is that of SVDq (arXiv 2502.15304). bits: the budget, as the width of keys "
          "by channel "
          "that take as many bytes, with the basis spread over `context` tokens, over which queries look "
          "back. frame: "
          "'tile', 'before_rope' or 'after_rope'. first_position: of the first token. heads_together: one "
          "basis for "
          "all heads. Raises Error (shape, option, not finite).");
}

}  // namespace

NB_MODULE(_kvplane, m) {
    m.doc() = "kvplane: the KV cache of transformers in bit planes, and attention on the packed bits.";
    nb::set_leak_warnings(false);
    m.attr("__version__") = kvplane::version();
    make_error(m);
    bind_caches(m);
    nb::module_ arrays = m.def_submodule("quantize", "Keys and values as arrays in few bits.");
    bind_arrays(arrays);
}

}  // namespace kvplane_python
