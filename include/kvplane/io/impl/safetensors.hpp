// kvplane/io/impl/safetensors.hpp: tensors between memory and files.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>

#include "kvplane/error.hpp"
#include "kvplane/io/file.hpp"
#include "kvplane/io/safetensors.hpp"
#include "kvplane/io/safetensors_text.hpp"

namespace kvplane {

namespace detail {

/// A copy that is aligned for every dtype.
inline std::shared_ptr<const std::byte> aligned_copy(std::span<const std::byte> bytes,
                                                     const std::string& source) {
    constexpr std::align_val_t alignment{64};
    auto* const copy = static_cast<std::byte*>(::operator new(bytes.size() + 1, alignment, std::nothrow));
    require(copy != nullptr, ErrorCode::out_of_memory, source, ": no memory for a copy of ", bytes.size(),
            " bytes of misaligned data");
    std::shared_ptr<const std::byte> owner(
        copy, [](const std::byte* data) { ::operator delete(const_cast<std::byte*>(data), alignment); });
    if (!bytes.empty()) std::memcpy(copy, bytes.data(), bytes.size());
    return owner;
}

}  // namespace detail

// Reading --------------------------------------------------------------------------------------------------

KVPLANE_FUNCTION SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
    const MappedFile file = MappedFile::open(path);
    return parse(file.bytes(), path.string(), file.owner());
}

KVPLANE_FUNCTION SafetensorsFile SafetensorsFile::from_bytes(std::span<const std::byte> bytes,
                                                             std::string source) {
    return parse(bytes, std::move(source), nullptr);
}

KVPLANE_FUNCTION SafetensorsFile SafetensorsFile::parse(std::span<const std::byte> bytes, std::string source,
                                                        std::shared_ptr<const std::byte> owner) {
    SafetensorsFile file;
    file.source_ = std::move(source);
    detail::SafetensorsHeader header = detail::read_header(bytes, file.source_);
    file.tensors_ = std::move(header.tensors);
    file.metadata_ = std::move(header.metadata);
    const auto data = bytes.subspan(header.data_at);
    const bool aligned = reinterpret_cast<std::uintptr_t>(data.data()) % 8 == 0;
    file.owner_ = aligned ? std::move(owner) : detail::aligned_copy(data, file.source_);
    file.data_ = aligned ? data.data() : file.owner_.get();
    return file;
}

KVPLANE_FUNCTION std::vector<std::string> SafetensorsFile::names() const {
    std::vector<std::string> names;
    names.reserve(tensors_.size());
    for (const auto& tensor : tensors_) names.push_back(tensor.first);
    return names;
}

KVPLANE_FUNCTION const TensorInfo& SafetensorsFile::info(std::string_view name) const {
    const auto found = tensors_.find(name);
    if (found != tensors_.end()) return found->second;
    std::string present;
    for (const auto& tensor : tensors_) {
        if (present.size() > 200) {
            present += ", ...";
            break;
        }
        present.append(present.empty() ? "" : ", ").append(detail::printable(tensor.first));
    }
    fail(ErrorCode::index, source_, ": no ", detail::tensor_named(name), " among ", tensors_.size(),
         " tensors (", present, ")");
}

KVPLANE_FUNCTION std::span<const std::byte> SafetensorsFile::bytes(std::string_view name) const {
    const TensorInfo& tensor = info(name);
    return {data_ + tensor.begin, tensor.end - tensor.begin};
}

KVPLANE_FUNCTION const void* SafetensorsFile::elements(std::string_view name, DType dtype) const {
    const TensorInfo& tensor = info(name);
    require(tensor.dtype == dtype, ErrorCode::mismatch, source_, ": ", detail::tensor_named(name), " holds ",
            kvplane::name(tensor.dtype), ", expected ", kvplane::name(dtype));
    return data_ + tensor.begin;
}

KVPLANE_FUNCTION std::pair<Index, Index> SafetensorsFile::matrix_shape(std::string_view name) const {
    const std::vector<Index>& shape = info(name).shape;
    require(shape.size() == 2 || shape.size() == 3, ErrorCode::shape, source_, ": ",
            detail::tensor_named(name), " has the shape ", detail::shape_text(shape),
            ", expected [rows, cols] or [tokens, heads, head_dim]");
    return {shape[0], shape.size() == 2 ? shape[1] : shape[1] * shape[2]};
}

KVPLANE_FUNCTION void SafetensorsFile::require_elements(std::string_view name, Index rows, Index cols) const {
    const std::optional<std::size_t> wanted =
        detail::shape_bytes(std::vector<Index>{rows, cols}, bytes_of(info(name).dtype));
    require(wanted == bytes(name).size(), ErrorCode::shape, source_, ": ", detail::tensor_named(name),
            " has the shape ", detail::shape_text(info(name).shape), ", which is not ", rows, " x ", cols,
            " elements");
}

KVPLANE_FUNCTION void SafetensorsFile::require_rank(std::string_view name, std::size_t rank) const {
    const std::vector<Index>& shape = info(name).shape;
    require(shape.size() == rank, ErrorCode::shape, source_, ": ", detail::tensor_named(name),
            " has the shape ", detail::shape_text(shape), ", expected rank ", rank);
}

KVPLANE_FUNCTION Matrix SafetensorsFile::to_float_matrix(std::string_view name) const {
    switch (info(name).dtype) {
        case DType::float32:
            return matrix<float>(name);
        case DType::float16:
            return matrix<Eigen::half>(name).cast<float>();
        case DType::bfloat16:
            return matrix<Eigen::bfloat16>(name).cast<float>();
        case DType::float64:
            return matrix<double>(name).cast<float>();
        default:
            fail(ErrorCode::mismatch, source_, ": ", detail::tensor_named(name), " holds ",
                 kvplane::name(info(name).dtype), ", expected F32, F16, BF16 or F64");
    }
}

// Writing --------------------------------------------------------------------------------------------------

KVPLANE_FUNCTION std::size_t SafetensorsWriter::require_addable(const std::string& name,
                                                                const std::vector<Index>& shape,
                                                                DType dtype) const {
    const std::string subject = detail::concatenated("safetensors writer: ", detail::tensor_named(name));
    require(name != detail::metadata_key, ErrorCode::option, subject, ": this name is reserved");
    require(detail::is_utf8(name), ErrorCode::option, subject, ": the name is no UTF-8");
    require(!entries_.contains(name), ErrorCode::option, subject, ": this name was added before");
    require(std::all_of(shape.begin(), shape.end(), [](Index size) { return size >= 0; }), ErrorCode::shape,
            subject, ": shape ", detail::shape_text(shape), ", expected sizes of 0 or more");
    const std::optional<std::size_t> size = detail::shape_bytes(shape, bytes_of(dtype));
    require(size.has_value(), ErrorCode::shape, subject, ": shape ", detail::shape_text(shape), " overflows");
    return *size;
}

KVPLANE_FUNCTION void SafetensorsWriter::add(std::string name, std::vector<Index> shape, DType dtype,
                                             std::span<const std::byte> bytes) {
    const std::size_t size = require_addable(name, shape, dtype);
    require(size == bytes.size(), ErrorCode::shape, "safetensors writer: ", detail::tensor_named(name), ": ",
            bytes.size(), " bytes, expected ", size, " for ", kvplane::name(dtype), " ",
            detail::shape_text(shape));
    entries_.emplace(std::move(name),
                     Entry{dtype, std::move(shape), size, {bytes.begin(), bytes.end()}, nullptr});
}

KVPLANE_FUNCTION void SafetensorsWriter::add_streamed(std::string name, std::vector<Index> shape, DType dtype,
                                                      ByteSource source) {
    const std::size_t size = require_addable(name, shape, dtype);
    entries_.emplace(std::move(name), Entry{dtype, std::move(shape), size, {}, std::move(source)});
}

KVPLANE_FUNCTION void SafetensorsWriter::metadata(std::string key, std::string value) {
    const std::string subject =
        detail::concatenated("safetensors writer: metadata '", detail::printable(key), "'");
    require(detail::is_utf8(key), ErrorCode::option, subject, ": the key is no UTF-8");
    require(detail::is_utf8(value), ErrorCode::option, subject, ": the value is no UTF-8");
    require(!metadata_.contains(key), ErrorCode::option, subject, ": this key was added before");
    metadata_.emplace(std::move(key), std::move(value));
}

KVPLANE_FUNCTION std::vector<const SafetensorsWriter::Entries::value_type*> SafetensorsWriter::file_order()
    const {
    std::vector<const Entries::value_type*> order;
    order.reserve(entries_.size());
    for (const auto& entry : entries_) order.push_back(&entry);
    std::stable_sort(order.begin(), order.end(),
                     [](const auto* a, const auto* b) { return a->second.dtype > b->second.dtype; });
    return order;
}

KVPLANE_FUNCTION std::string SafetensorsWriter::header(
    const std::vector<const Entries::value_type*>& order) const {
    std::vector<detail::NamedTensor> tensors;
    tensors.reserve(order.size());
    std::size_t begin = 0;
    for (const auto* entry : order) {
        const Entry& tensor = entry->second;
        const std::size_t end = begin + tensor.size;
        tensors.push_back({&entry->first, {tensor.dtype, tensor.shape, begin, end}});
        begin = end;
    }
    return detail::written_header(tensors, metadata_);
}

KVPLANE_FUNCTION void SafetensorsWriter::each_piece(const ByteSink& take) const {
    const auto order = file_order();
    const std::string start = header(order);
    take(std::as_bytes(std::span(start)));
    for (const auto* entry : order) {
        const std::string& name = entry->first;
        const Entry& tensor = entry->second;
        if (!tensor.source) {
            take(tensor.bytes);
            continue;
        }
        std::size_t given = 0;
        const auto expect = [&](bool holds) {
            require(holds, ErrorCode::shape, "safetensors writer: ", detail::tensor_named(name),
                    ": its source gave ", given, " bytes, expected ", tensor.size);
        };
        tensor.source([&](std::span<const std::byte> piece) {
            given += piece.size();
            expect(given <= tensor.size);
            take(piece);
        });
        expect(given == tensor.size);
    }
}

KVPLANE_FUNCTION std::size_t SafetensorsWriter::data_bytes() const noexcept {
    std::size_t sum = 0;
    for (const auto& entry : entries_) sum += entry.second.size;
    return sum;
}

KVPLANE_FUNCTION std::vector<std::byte> SafetensorsWriter::to_bytes() const {
    std::vector<std::byte> file;
    each_piece([&](std::span<const std::byte> piece) {
        if (file.empty()) file.reserve(piece.size() + data_bytes());
        file.insert(file.end(), piece.begin(), piece.end());
    });
    return file;
}

KVPLANE_FUNCTION void SafetensorsWriter::write(const std::filesystem::path& path,
                                               const WriteOptions& options) const {
    std::optional<FileReplacement> file;  // made once nothing but the system can refuse
    each_piece([&](std::span<const std::byte> piece) {
        if (!file) file.emplace(path);
        file->write(piece);
    });
    file->commit(options);
}

}  // namespace kvplane
