// checkpoint.h: tensors on disk. Hugging Face safetensors files, read and written; checkpoints that are either whole or absent;
// the training log, cut back to where a resumed run starts. It knows nothing of CUDA: floats come from and go to callbacks.
//
// A safetensors file is                                              (github.com/huggingface/safetensors, "Format")
//     8 bytes    n, little-endian
//     n bytes    JSON: {"__metadata__": {..}, "NAME": {"dtype": "F32", "shape": [4, 8], "data_offsets": [begin, end]}, ..}
//     the rest   the tensors' bytes, row-major, without holes or overlaps; offsets count from the start of this part
//
// A run directory OUT holds
//     log.jsonl                   first line the options, then one object a step
//     step_00000100/              a checkpoint: the state after 100 optimiser steps
//         config.json             the model, as transformers' LlamaForCausalLM reads it
//         model.safetensors       float32 weights under their Hugging Face names
//         optimizer.safetensors   the same names + .exp_avg and .exp_avg_sq (AdamW's m and v), as they are kept: float32 or bfloat16
//         bases.safetensors       of recipes with a split: what they keep from step to step
//         factors.safetensors     of trained factors: W_R, U, s and V, whose merged W is in model.safetensors
//         state.json              whatever else a resumed run needs, and every other file's size and checksum; written last
//     *.tmp                       being written, or being deleted, when the program was killed; remove_leftovers() sweeps them
//
// A directory is only ever called step_NNNNNNNN while all of it is on disk: it is written as step_NNNNNNNN.tmp, every file and
// the directory are fsynced, and only then is it renamed. So a kill, a full disk or a power cut costs the newest checkpoint at
// most, never an older one; and a bit that flips later is found by open_checkpoint().
//
// Every error is one fail() line that names the file. Test: test/test_checkpoint.cpp
#pragma once
#include "host.h"       // fail, MappedFile, Checksum
#include <algorithm>    // std::sort, std::max
#include <filesystem>   // directory_iterator, remove_all
#include <functional>
#include <map>
#include <set>
#include <type_traits>
#include <utility>
#include <vector>
#include <nlohmann/json.hpp>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors data is copied as it lies in memory");

// ---------------------------------------------------------------------------------------------------------------------------
// The tensor table, shared with llama.cuh

// The program fuses what one GEMM multiplies, Hugging Face names the parts. Of `tiny` (dim 192, 3 query heads and 1 key/value head of 64)
// the row "layers.0.qkv", 320 x 192, has the parts
//
//     model.layers.0.self_attn.q_proj.weight   rows   0 .. 191
//     model.layers.0.self_attn.k_proj.weight   rows 192 .. 255
//     model.layers.0.self_attn.v_proj.weight   rows 256 .. 319
//
// which lie one behind the other in memory as in the row, so that reading and writing them copies runs of floats and nothing else.

struct TensorPart { std::string name; int64_t rows; };   // one Hugging Face tensor: `rows` consecutive rows of a fused one

struct Tensor {                    // one row of the model's tensor table
    std::string name;              // ours: "layers.0.qkv"
    int64_t rows, cols;            // row-major; a vector (norm weight) has rows == 1 and dims == 1
    int dims;                      // 1 or 2, as Hugging Face shapes it
    bool decay, quantised;         // weight decay applies; the recipe quantises it
    float init_std;                // N(0, init_std); 0: filled with ones (norm weights)
    size_t offset;                 // first element in the parameter arena (and in the gradient's, m's, v's)
    std::vector<TensorPart> parts; // Hugging Face names, in row order; rows add up to `rows`
    size_t size() const { return (size_t)(rows * cols); }
};

// An arena's floats leave through a source, which returns `count` of them from element `first` on (valid until the next call),
// and arrive through a sink. Neither is ever asked for more than `tensor_piece` elements, so a 30 GB model needs no second copy.
using FloatSource = std::function<const float*(size_t first, size_t count)>;
using FloatSink = std::function<void(size_t first, const float* values, size_t count)>;
template <class F> using Arenas = std::vector<std::pair<std::string, F>>;   // {suffix of the Hugging Face names, source or sink}
constexpr size_t tensor_piece = 4 << 20;                                    // 16 MiB

// ---------------------------------------------------------------------------------------------------------------------------
// Small things

// A message that quotes a damaged file, fit for one line.
inline std::string one_line(std::string s) {
    if (s.size() > 400) s = s.substr(0, 400) + "...";
    for (char& c : s) if ((unsigned char)c < 32 || c == 127) c = '?';
    return s;
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
    std::string s = "[";
    for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + "]";
}

inline std::string checksum_text(const Checksum& sum) {
    char hex[17];
    snprintf(hex, sizeof hex, "%016llx", (unsigned long long)sum.value());
    return hex;
}

inline std::string checksum_text(const void* data, size_t n) {
    Checksum sum;
    if (n) sum.update(data, n);
    return checksum_text(sum);
}

inline std::string folder_of(const std::string& path) {
    std::string folder = std::filesystem::path(path).parent_path().string();
    return folder.empty() ? "." : folder;
}

inline bool is_file(const std::string& path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0 && S_ISREG(st.st_mode);
}
inline bool is_directory(const std::string& path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
}

// Text that must be JSON; `what` names the file (and the part of it) in the message.
template <class Json> Json parse_json(const uint8_t* text, size_t n, const std::string& what) {
    try {
        return Json::parse(text, text + n);
    } catch (const typename Json::parse_error& e) {
        fail("%s is damaged: not JSON at byte %zu of %zu", what.c_str(), e.byte, n);
    } catch (const typename Json::exception&) {
        fail("%s is damaged: it holds a number that no double can hold", what.c_str());
    }
}

inline nlohmann::ordered_json read_json(const std::string& path) {
    MappedFile file(path);
    return parse_json<nlohmann::ordered_json>(file.data, file.size, path);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Reading

inline float float_from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline float float_from_bf16(uint16_t b) { return float_from_bits((uint32_t)b << 16); }
inline float float_from_f16(uint16_t h) {   // 1 sign, 5 exponent (bias 15), 10 mantissa bits: every value is a float, so exact
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000 | mantissa << 13);               // infinity, NaN
    if (exponent > 0) return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);     // 112 = 127 - 15
    float magnitude = (float)mantissa * 0x1p-24f;                                                 // zero, subnormal
    return sign ? -magnitude : magnitude;
}

inline size_t dtype_bytes(const std::string& dtype) {   // 0: unknown
    static const std::map<std::string, size_t> bytes = {
        {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"BOOL", 1},
        {"I64", 8}, {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U64", 8},     {"U32", 4},     {"U16", 2},  {"U8", 1}};
    auto it = bytes.find(dtype);
    return it == bytes.end() ? 0 : it->second;
}

struct StoredTensor {              // one tensor of an open file
    std::string file, name, dtype; // dtype as the file spells it: "BF16"
    std::vector<int64_t> shape;    // empty: a scalar
    size_t count = 1;              // elements
    const uint8_t* data = nullptr; // in the mapped file; not aligned, since a header may have any length

    [[noreturn]] void refuse(const std::string& why) const {
        fail("%s: tensor %s", file.c_str(), one_line(name + " " + why).c_str());
    }

    // n elements from `first` on. T = float or double reads F64, F32, BF16 and F16 (only F64 into float rounds); T = int64_t or
    // int32_t reads I64, I32, U8 and BOOL. Neither reads the other's: nobody who stored indices meant weights.
    template <class T> void read(size_t first, size_t n, T* out) const {
        if (first > count || n > count - first) refuse("has only " + std::to_string(count) + " elements");
        auto each = [&](auto zero, auto convert) {
            const uint8_t* p = data + first * sizeof zero;
            for (size_t i = 0; i < n; i++) {
                auto v = zero;
                memcpy(&v, p + i * sizeof v, sizeof v);
                out[i] = (T)convert(v);
            }
        };
        auto same = [](auto v) { return v; };
        auto fits = [&](int64_t v) {
            if ((int64_t)(T)v != v) refuse("holds " + std::to_string(v) + ", which does not fit in 32 bits");
            return v;
        };
        if constexpr (std::is_floating_point_v<T>) {
            if (dtype == "F32") return each(0.f, same);
            if (dtype == "BF16") return each((uint16_t)0, float_from_bf16);
            if (dtype == "F16") return each((uint16_t)0, float_from_f16);
            if (dtype == "F64") return each(0., same);
        } else {
            if (dtype == "I64") return each((int64_t)0, fits);
            if (dtype == "I32") return each((int32_t)0, same);
            if (dtype == "U8" || dtype == "BOOL") return each((uint8_t)0, same);
        }
        refuse("is " + dtype + (std::is_floating_point_v<T> ? ", not F32, BF16, F16 or F64" : ", not I64, I32, U8 or BOOL"));
    }
    template <class T> std::vector<T> read() const {
        std::vector<T> all(count);
        read(0, count, all.data());
        return all;
    }
};

// Files come from anywhere, so nothing in a header is believed before it is checked: that lengths multiply without overflow, that a
// tensor's bytes are what its type and shape take, and that all of them fill the file without a hole or an overlap. After the constructor
// every tensor's `data` is good for `count` elements.
struct SafeTensors {               // one file, mapped; its header is checked in full before anything is read
    MappedFile file;
    std::map<std::string, StoredTensor> tensors;
    std::map<std::string, std::string> metadata;

    const StoredTensor* find(const std::string& name) const {
        auto it = tensors.find(name);
        return it == tensors.end() ? nullptr : &it->second;
    }

    explicit SafeTensors(const std::string& path) : file(path) {
        using nlohmann::json;
        auto damaged = [&](const std::string& why) { fail("%s is damaged: %s", path.c_str(), one_line(why).c_str()); };
        auto truncated = [&](uint64_t bytes) {
            fail("%s is truncated: %llu bytes expected, %zu seen", path.c_str(), (unsigned long long)bytes, file.size);
        };
        if (file.size < 8) truncated(8);
        uint64_t length;
        memcpy(&length, file.data, 8);
        if (length > 100000000) damaged("a header of " + std::to_string(length) + " bytes is beyond the safetensors format");
        if (length > file.size - 8) truncated(8 + length);
        json header = parse_json<json>(file.data + 8, length, path + " (header)");
        if (!header.is_object()) damaged("its header is no JSON object");

        struct Span { uint64_t begin, end; StoredTensor* tensor; };
        std::vector<Span> spans;
        auto naturals = [](const json& a) {
            return a.is_array() && std::all_of(a.begin(), a.end(), [](const json& v) {
                return v.is_number_unsigned() && v.get<uint64_t>() <= INT64_MAX;
            });
        };
        for (auto& [name, entry] : header.items()) {
            if (!entry.is_object()) damaged(name + " in its header is no JSON object");
            if (name == "__metadata__") {
                for (auto& [key, value] : entry.items()) if (value.is_string()) metadata[key] = value.template get<std::string>();
                continue;
            }
            json &dtype = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];   // null if absent
            if (!dtype.is_string() || !naturals(shape) || !naturals(offsets) || offsets.size() != 2)
                damaged("tensor " + name + " lacks a valid dtype, shape or data_offsets");
            StoredTensor& t = tensors[name];
            t.file = path, t.name = name, t.dtype = dtype.get<std::string>(), t.shape = shape.get<std::vector<int64_t>>();
            uint64_t bytes = dtype_bytes(t.dtype), begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
            if (bytes == 0) t.refuse("has the unknown dtype " + t.dtype);
            bool overflow = false;
            for (uint64_t d : t.shape) {
                t.count *= d;          // in range if `bytes` is
                overflow |= __builtin_mul_overflow(bytes, d, &bytes);
            }
            if (overflow || end < begin || end - begin != bytes)
                damaged("tensor " + name + " cannot be " + t.dtype + " " + shape_text(t.shape) + " and lie at bytes " +
                        std::to_string(begin) + " to " + std::to_string(end));
            spans.push_back({begin, end, &t});
        }

        // Laid end to end, the tensors must fill the rest of the file exactly.
        std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
            return std::make_pair(a.begin, a.end) < std::make_pair(b.begin, b.end);
        });
        uint64_t end = 0, room = file.size - 8 - length;
        for (const Span& s : spans) {
            if (s.begin != end)
                damaged("tensor " + s.tensor->name + " starts at byte " + std::to_string(s.begin) + ", not at " +
                        std::to_string(end));
            end = s.end;
        }
        if (end > room) truncated(8 + length + end);
        if (end < room) damaged(std::to_string(room - end) + " bytes after the last tensor");
        for (const Span& s : spans) s.tensor->data = file.data + 8 + length + s.begin;
    }
};

// The weights of a model: one safetensors file, or a Hugging Face folder with model.safetensors or with shards and their index.
struct WeightFiles {
    std::string path;              // what messages call it
    std::vector<SafeTensors> files;
    std::map<std::string, const StoredTensor*> tensors;

    const StoredTensor* find(const std::string& name) const {
        auto it = tensors.find(name);
        return it == tensors.end() ? nullptr : it->second;
    }

    explicit WeightFiles(const std::string& file_or_folder) : path(file_or_folder) {
        std::string folder = path + "/", index = folder + "model.safetensors.index.json";
        std::error_code ec;
        if (std::filesystem::is_directory(path, ec)) {
            if (!is_file(folder + "model.safetensors")) { open_shards(folder, index); return; }
            path = folder + "model.safetensors";
        }
        files.emplace_back(path);
        for (const auto& [name, t] : files[0].tensors) tensors[name] = &t;
    }

    // {"weight_map": {"NAME": "model-00001-of-00004.safetensors", ..}}; a tensor's file is the one the index says.
    void open_shards(const std::string& folder, const std::string& index) {
        using nlohmann::json;
        if (!is_file(index)) fail("%s holds neither model.safetensors nor model.safetensors.index.json", path.c_str());
        MappedFile file(path = index);
        json root = parse_json<json>(file.data, file.size, index), map = root.is_object() ? root["weight_map"] : json();
        if (!map.is_object()) fail("%s is damaged: it has no weight_map", index.c_str());
        std::map<std::string, size_t> opened;   // shard's name -> its place in files
        for (auto& [name, value] : map.items()) {
            std::string shard = value.is_string() ? value.template get<std::string>() : "";
            if (shard.empty() || shard.find('/') != std::string::npos || one_line(shard) != shard)
                fail("%s is damaged: %s", index.c_str(), one_line("tensor " + name + " is in no file of this folder").c_str());
            if (opened.emplace(shard, files.size()).second) files.emplace_back(folder + shard);
            tensors[name] = files[opened[shard]].find(name);   // stays put when `files` grows: a moved map keeps its nodes
            if (!tensors[name])
                fail("%s%s lacks the tensor %s, which its index lists", folder.c_str(), shard.c_str(), one_line(name).c_str());
        }
    }
};

// Calls f(name, shape, offset) for each Hugging Face tensor of the table; offset: of its first element in an arena. In the table's order,
// which is that of the files.
template <class F> void for_parts(const std::vector<Tensor>& tensors, F f) {
    for (const Tensor& t : tensors) {
        size_t offset = t.offset;
        for (const TensorPart& part : t.parts) {
            f(part.name, t.dims == 1 ? std::vector<int64_t>{t.cols} : std::vector<int64_t>{part.rows, t.cols}, offset);
            offset += (size_t)(part.rows * t.cols);
        }
        if (offset != t.offset + t.size()) fail("internal error: the parts of tensor %s do not add up", t.name.c_str());
    }
}

// Reads each tensor of the table, under its Hugging Face name + suffix, into each of `arenas`. Missing tensors, wrong shapes, tensors
// of another type than `dtype` ("": any that holds floats) and tensors that the model has no place for fail before a sink is called.
inline void load_tensors(const WeightFiles& from, const std::vector<Tensor>& tensors, const Arenas<FloatSink>& arenas, const std::string& dtype = "") {
    // First everything is looked up and judged, then the unexpected is, and only then the first float moves.
    struct Load { const StoredTensor* stored; size_t offset; const FloatSink* sink; };
    std::vector<Load> loads;
    std::set<std::string> wanted;
    for (const auto& arena : arenas)
        for_parts(tensors, [&](const std::string& part, const std::vector<int64_t>& shape, size_t offset) {
            std::string name = part + arena.first;
            const StoredTensor* stored = from.find(name);
            if (!stored) fail("%s lacks the tensor %s", from.path.c_str(), name.c_str());
            if (stored->shape != shape)
                stored->refuse("is " + shape_text(stored->shape) + ", the model wants " + shape_text(shape));
            if (!dtype.empty() && stored->dtype != dtype) stored->refuse("is " + stored->dtype + ", this run keeps it as " + dtype);
            wanted.insert(name);
            loads.push_back({stored, offset, &arena.second});
        });

    const std::string rotary = "rotary_emb.inv_freq";   // follows from the config; old versions of transformers stored it
    for (const auto& [name, extra] : from.tensors) {
        if (wanted.count(name) || (name.size() >= rotary.size() && name.substr(name.size() - rotary.size()) == rotary)) continue;
        // A model that ties its head to the embedding has no lm_head. A stored copy is harmless; other values would be lost.
        const StoredTensor* tied = name == "lm_head.weight" ? from.find("model.embed_tokens.weight") : nullptr;
        if (!tied) extra->refuse("has no place in the model");
        if (tied->shape != extra->shape || tied->dtype != extra->dtype ||
            memcmp(tied->data, extra->data, tied->count * dtype_bytes(tied->dtype)) != 0)
            extra->refuse("differs from model.embed_tokens.weight, to which the model ties it");
    }

    // Piece by piece through one buffer; the file is mapped, so this is also where it is read from disk.
    std::vector<float> buffer;
    for (const Load& l : loads)
        for (size_t first = 0; first < l.stored->count; first += tensor_piece) {
            size_t n = std::min(tensor_piece, l.stored->count - first);
            buffer.resize(std::max(buffer.size(), n));
            l.stored->read(first, n, buffer.data());
            (*l.sink)(l.offset + first, buffer.data(), n);
        }
}

inline void load_parameters(const WeightFiles& from, const std::vector<Tensor>& tensors, const FloatSink& sink) {
    load_tensors(from, tensors, {{"", sink}});
}

// ---------------------------------------------------------------------------------------------------------------------------
// Writing

// A file being written, with its checksum. After the first error everything else is a no-op, so the writers below read straight
// through and only finish() need be asked. A write can succeed and its data still be lost: fsync and close count as well.
struct FileWriter {
    std::string path, error;       // error: empty, or a whole message
    uint64_t bytes = 0;
    Checksum sum;
    int fd;

    explicit FileWriter(const std::string& p) : path(p), fd(open(p.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
        if (fd < 0) refuse();
    }
    FileWriter(const FileWriter&) = delete;
    FileWriter& operator=(const FileWriter&) = delete;
    ~FileWriter() { if (fd >= 0) ::close(fd); }

    void refuse() { if (error.empty()) error = "cannot write " + path + ": " + strerror(errno); }
    void write(const void* data, size_t n) {
        if (!error.empty() || n == 0) return;
        sum.update(data, n), bytes += n;
        for (const char* p = (const char*)data; n > 0;) {
            ssize_t put = ::write(fd, p, n);
            if (put < 0 && errno == EINTR) continue;
            if (put <= 0) { refuse(); return; }
            p += put, n -= (size_t)put;
        }
    }
    void write(const std::string& text) { write(text.data(), text.size()); }
    // On disk, and closed. A file system may report a failed write only now.
    bool finish() {
        while (error.empty() && fsync(fd) != 0) if (errno != EINTR) refuse();
        if (fd >= 0 && ::close(fd) != 0) refuse();
        fd = -1;
        return error.empty();
    }
};

// Makes the names in a folder (a new file, a rename) survive a power cut. EINVAL: a file system that cannot, nor needs to.
inline bool sync_folder(const std::string& folder) {
    int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && (fsync(fd) == 0 || errno == EINVAL);
    int reason = errno;
    if (fd >= 0) ::close(fd);
    errno = reason;
    return ok;
}

// Another process sees the old text or the new one, never half of it; nor does this one after a kill or a power cut.
inline void write_file_atomically(const std::string& path, const std::string& text) {
    FileWriter file(path + ".tmp");
    file.write(text);
    if (file.finish() && (rename(file.path.c_str(), path.c_str()) != 0 || !sync_folder(folder_of(path)))) file.refuse();
    if (!file.error.empty()) {
        unlink(file.path.c_str());
        fail("%s", file.error.c_str());
    }
}

// A header needs every tensor's size, but no data: sources are asked for it later, piece by piece, while the file is being written.
struct TensorEntry {               // a tensor to write
    std::string name;
    std::vector<int64_t> shape;
    FloatSource source;            // counts from the tensor's first element
    std::string dtype = "F32";     // or BF16, of a source whose floats are bf16 values: their upper halves are written
};
struct Written { uint64_t bytes; Checksum sum; };

// The table's tensors as entries of a file, under their Hugging Face names + suffix: what load_tensors reads back.
inline std::vector<TensorEntry> tensor_entries(const std::vector<Tensor>& tensors, const Arenas<FloatSource>& arenas, const std::string& dtype = "F32") {
    std::vector<TensorEntry> entries;
    for (const auto& arena : arenas)
        for_parts(tensors, [&](const std::string& part, const std::vector<int64_t>& shape, size_t offset) {
            auto shifted = [offset, source = arena.second](size_t first, size_t count) { return source(offset + first, count); };
            entries.push_back({part + arena.first, shape, shifted, dtype});
        });
    return entries;
}

using Metadata = std::map<std::string, std::string>;

inline void write_safetensors(FileWriter& out, const std::vector<TensorEntry>& entries, const Metadata& metadata) {
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    if (!metadata.empty()) header["__metadata__"] = metadata;
    auto count = [](const TensorEntry& e) { size_t n = 1; for (int64_t d : e.shape) n *= (size_t)d; return n; };
    uint64_t end = 0;
    for (const TensorEntry& e : entries) {
        uint64_t begin = end;
        end += count(e) * dtype_bytes(e.dtype);
        header[e.name] = {{"dtype", e.dtype}, {"shape", e.shape}, {"data_offsets", {begin, end}}};
    }
    std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
    text.resize((text.size() + 7) / 8 * 8, ' ');   // so that the data is aligned for whoever maps it
    uint64_t length = text.size();
    out.write(&length, 8);
    out.write(text);
    // A float that is a bf16 value has its bits in the upper half; the lower half is zero. Little-endian: the upper half comes last.
    std::vector<uint16_t> half;
    for (const TensorEntry& e : entries)
        for (size_t first = 0, n = count(e); first < n && out.error.empty(); first += tensor_piece) {
            size_t m = std::min(tensor_piece, n - first);
            const float* values = e.source(first, m);
            if (e.dtype == "F32") {
                out.write(values, m * sizeof(float));
                continue;
            }
            half.resize(m);
            for (size_t i = 0; i < m; i++) memcpy(&half[i], (const char*)&values[i] + 2, 2);
            out.write(half.data(), m * sizeof(uint16_t));
        }
}

// In the order given; on disk when it returns.
inline Written write_safetensors(const std::string& path, const std::vector<TensorEntry>& entries, const Metadata& meta = {}) {
    FileWriter out(path);
    write_safetensors(out, entries, meta);
    if (!out.finish()) fail("%s", out.error.c_str());
    return {out.bytes, out.sum};
}

// ---------------------------------------------------------------------------------------------------------------------------
// Checkpoints

inline std::string checkpoint_path(const std::string& out, int64_t step) {
    char name[32];
    snprintf(name, sizeof name, "step_%08lld", (long long)step);
    return out + "/" + name;
}

// The step in a checkpoint's name, -1 for any other name ("step_00000100.tmp", "step_5").
inline int64_t checkpoint_step(const std::string& dir) {
    std::string name = std::filesystem::path(dir).filename().string();
    int64_t step = name.compare(0, 5, "step_") == 0 ? strtoll(name.c_str() + 5, nullptr, 10) : -1;
    return checkpoint_path("", step) == "/" + name ? step : -1;
}

// The complete checkpoints of a run, oldest first.
inline std::vector<std::string> list_checkpoints(const std::string& out) {
    std::map<int64_t, std::string> found;
    std::error_code ec;
    for (std::filesystem::directory_iterator it(out, ec), end; !ec && it != end; it.increment(ec)) {
        std::string dir = it->path().string();
        if (int64_t step = checkpoint_step(dir); step >= 0 && is_file(dir + "/state.json")) found[step] = dir;
    }
    std::vector<std::string> paths;
    for (const auto& f : found) paths.push_back(f.second);
    return paths;
}

inline std::string latest_checkpoint(const std::string& out) {   // "": none
    std::vector<std::string> all = list_checkpoints(out);
    return all.empty() ? "" : all.back();
}

// Deletes what a kill left behind: *.tmp directly under `out`. Only for the start of a run, when nobody else writes there.
inline void remove_leftovers(const std::string& out) {
    std::vector<std::filesystem::path> leftovers;   // listed first: deleting while iterating may skip entries
    std::error_code ec;
    for (std::filesystem::directory_iterator it(out, ec), end; !ec && it != end; it.increment(ec))
        if (it->path().extension() == ".tmp") leftovers.push_back(it->path());
    for (const auto& path : leftovers)
        if (std::filesystem::remove_all(path, ec); ec) fail("cannot remove %s: %s", path.c_str(), ec.message().c_str());
}

// A kill half-way through the deletion must leave nothing that looks complete, so the name goes first.
inline void remove_checkpoint(const std::string& dir) {
    std::string doomed = dir + ".old.tmp";
    std::error_code ec;
    std::filesystem::remove_all(doomed, ec);
    if (rename(dir.c_str(), doomed.c_str()) != 0 || !sync_folder(folder_of(dir)))
        fail("cannot remove %s: %s", dir.c_str(), strerror(errno));
    if (std::filesystem::remove_all(doomed, ec); ec) fail("cannot remove %s: %s", doomed.c_str(), ec.message().c_str());
}

// All but the newest `keep`; keep < 1 keeps all.
inline void prune_checkpoints(const std::string& out, int64_t keep) {
    std::vector<std::string> all = list_checkpoints(out);
    for (size_t i = 0; keep >= 1 && i + (size_t)keep < all.size(); i++) remove_checkpoint(all[i]);
}

// For a run resumed from an older checkpoint than the latest -> the folders removed: the later ones belong to a future that is being rewritten. Kept,
// they would be "the latest" to the next --resume, and prune_checkpoints would delete the new ones instead.
inline std::vector<std::string> remove_checkpoints_after(const std::string& out, int64_t step) {
    std::vector<std::string> removed;
    for (const std::string& dir : list_checkpoints(out))
        if (checkpoint_step(dir) > step) remove_checkpoint(dir), removed.push_back(dir);
    return removed;
}

// state.json guards the other files, so it must guard itself: its last line is the checksum of all that precedes it.
inline std::string seal(const std::string& body) {
    return ",\n  \"checksum\": \"" + checksum_text(body.data(), body.size()) + "\"\n}\n";
}

struct CheckpointFile { std::string name; std::vector<TensorEntry> entries; };   // one safetensors file of a checkpoint

// Writes OUT/step_NNNNNNNN and returns its path. `config` is the text of config.json, `state` a JSON object; "step" and "files"
// are added to it. A failing write removes what it wrote and fails with a line that says which checkpoint to resume from.
//
//     what is done                                          what a power cut right after it leaves
//     mkdir step_00000250.tmp; files, each fsynced          a .tmp: swept at the next start
//     state.json, last: sizes and checksums of the others   the same
//     fsync of the folder: its names are on disk            the same, now whole
//     rename to step_00000250                               either name, and whole under both
//     fsync of OUT: the rename is on disk                   step_00000250
//
// The caller deletes older checkpoints after that, never before.
inline std::string save_checkpoint(const std::string& out, int64_t step, const std::string& config,
                                   const std::vector<CheckpointFile>& files, nlohmann::ordered_json state) {
    std::string dir = checkpoint_path(out, step), tmp = dir + ".tmp", error;
    auto refuse = [&](const char* what, const std::string& path) {
        if (error.empty()) error = std::string("cannot ") + what + " " + path + ": " + strerror(errno);
    };
    std::error_code ec;
    std::filesystem::remove_all(tmp, ec);
    if (mkdir(tmp.c_str(), 0777) != 0) refuse("create", tmp);

    nlohmann::ordered_json table = nlohmann::ordered_json::array();
    auto put = [&](const std::string& name, const std::function<void(FileWriter&)>& body) {
        if (!error.empty()) return;
        FileWriter file(tmp + "/" + name);
        body(file);
        if (!file.finish()) error = file.error;
        table.push_back(nlohmann::ordered_json{{"name", name}, {"bytes", file.bytes}, {"checksum", checksum_text(file.sum)}});
    };
    put("config.json", [&](FileWriter& f) { f.write(config); });
    for (const CheckpointFile& file : files)   // transformers refuses a file whose metadata does not say "pt"
        put(file.name, [&](FileWriter& f) { write_safetensors(f, file.entries, {{"format", "pt"}}); });
    state["step"] = step;
    state["files"] = table;
    std::string body = state.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
    body.resize(body.size() - 2);              // the closing "\n}", which seal() adds again
    put("state.json", [&](FileWriter& f) { f.write(body + seal(body)); });

    if (error.empty() && !sync_folder(tmp)) refuse("write", tmp);
    if (error.empty() && is_file(dir + "/state.json")) remove_checkpoint(dir);   // the same step was saved before
    if (error.empty() && (rename(tmp.c_str(), dir.c_str()) != 0 || !sync_folder(out))) refuse("create", dir);
    if (error.empty()) return dir;

    std::filesystem::remove_all(tmp, ec);
    std::string intact = latest_checkpoint(out);
    if (intact.empty()) fail("%s; this checkpoint is not kept, and there is no earlier one", error.c_str());
    fail("%s; this checkpoint is not kept, %s is intact: mend the cause, then --resume it", error.c_str(), intact.c_str());
}

// Checks that every file of a checkpoint is there and is what was written, by size and checksum; returns its state.json. Reads all of it
// once: a flipped bit in a moment would otherwise show, if ever, as a run that is not the same.
inline nlohmann::ordered_json open_checkpoint(const std::string& directory) {
    std::string dir = directory;
    while (dir.size() > 1 && dir.back() == '/') dir.pop_back();
    std::string hint = "use an older checkpoint with --resume DIR";
    for (const std::string& other : list_checkpoints(folder_of(dir)))
        if (checkpoint_step(other) < checkpoint_step(dir)) hint = "use an older checkpoint with --resume " + other;
    const char* h = hint.c_str();

    std::string path = dir + "/state.json";
    if (!is_file(path)) fail("%s is no complete checkpoint: it has no state.json; %s", dir.c_str(), h);
    MappedFile file(path);
    std::string text((const char*)file.data, file.size);
    size_t tail = seal("").size(), body = text.size() > tail ? text.size() - tail : 0;
    if (text.compare(body, std::string::npos, seal(text.substr(0, body))) != 0)
        fail("%s is damaged: it does not end with its own checksum; %s", path.c_str(), h);
    nlohmann::ordered_json state = parse_json<nlohmann::ordered_json>(file.data, file.size, path);
    state.erase("checksum");

    // The seal holds, so what follows is what save_checkpoint wrote.
    for (const auto& f : state["files"]) {
        path = dir + "/" + f.value("name", "");
        if (!is_file(path)) fail("%s is missing; %s", path.c_str(), h);
        MappedFile content(path);
        uint64_t bytes = f.value("bytes", (uint64_t)0);
        if (content.size != bytes)
            fail("%s is %s: %llu bytes expected, %zu seen; %s", path.c_str(), content.size < bytes ? "truncated" : "damaged",
                 (unsigned long long)bytes, content.size, h);
        std::string expected = f.value("checksum", ""), seen = checksum_text(content.data, content.size);
        if (expected != seen)
            fail("%s is damaged: checksum %s expected, %s seen; %s", path.c_str(), expected.c_str(), seen.c_str(), h);
    }
    return state;
}

// Cuts log.jsonl back to a checkpoint's step: keeps the first line (the options, written atomically) and every line after it up
// to the first that is of a later step, or torn by a kill, or otherwise no JSON object with a "step". Resuming from step 2:
//
//     {"options":...}                   kept
//     {"step":1,...}  {"step":2,...}    kept
//     {"step":3,...}  {"step":4,"lo     cut: the resumed run writes them again, with the same losses
inline void truncate_log(const std::string& path, int64_t step) {
    MappedFile log(path);
    const char* text = (const char*)log.data;
    size_t kept = 0;
    while (kept < log.size) {
        const char* line = text + kept;
        const char* end = (const char*)memchr(line, '\n', log.size - kept);
        if (!end) break;
        if (kept > 0) {
            auto row = nlohmann::ordered_json::parse(line, end, nullptr, /*allow_exceptions=*/false);
            auto it = row.find("step");   // end() if row is no object
            if (it == row.end() || !it->is_number_unsigned() || it->get<uint64_t>() > (uint64_t)step) break;
        }
        kept = (size_t)(end + 1 - text);
    }
    if (kept == 0) fail("%s is damaged: its first line, the options, is incomplete", path.c_str());
    if (kept < log.size) write_file_atomically(path, std::string(text, kept));
}
