// config.h: the shape of a LLaMA-3: what a configuration holds, presets, Hugging Face's config.json read and written.
// Knows nothing of CUDA, tensors or training.
//
// Seven integers fix every tensor (llama.cuh, tensor_table). With C = dim, H = heads, KV = kv_heads, D = head_dim, F = ffn, V = vocab:
//
//     embed (V x C)                                               and head (V x C), unless it is tied to the embedding
//     a block: qkv ((H + 2 KV) D x C), o (C x H D), gate_up (2 F x C), down (C x F), two norms (C)
//
// For example llama3-8b: C 4096, H 32, KV 8, D 128, F 14336 are 218 million parameters a block, 6.98 billion in 32 of them; embedding
// and head of 128256 x 4096 add 1.05 billion. A preset's name counts the blocks only, since small models are mostly embedding.
//
// Errors end the program with one line and status 2 (fail() in host.h) that names the key or the option to change.
#pragma once
#include <algorithm>    // std::find
#include <cmath>        // std::floor, std::isnan
#include <nlohmann/json.hpp>
#include "host.h"       // fail, MappedFile

// Llama-3.1's way to reach longer texts than it was trained on (rope.cuh, rope_table): wavelengths, in tokens, above original / low
// are stretched by `factor`, those below original / high are left alone, and between them lies a linear blend.
// "rope_type": "llama3" in config.json; factor 0: none.
struct RopeScaling { double factor = 0, low = 1, high = 4, original = 8192; };

struct Config {
    int layers;                 // transformer blocks
    int dim;                    // C: width of the residual stream
    int heads, kv_heads;        // H, KV: query head h reads key/value head h / (H / KV)
    int head_dim;               // D: even, since RoPE turns pairs
    int ffn;                    // F: inner width of SwiGLU
    int vocab;                  // V
    bool tied;                  // the output head is the embedding
    RopeScaling scaling;
    double rope_theta = 500000, norm_eps = 1e-5;
    int max_seq = 8192;         // positions the model was made for: the longest --seq
};

// Presets, named by their parameters without embedding and head. Each has a micro-batch, a length and a peak learning rate that work.
struct Preset {
    const char* name;
    int layers, dim, heads, kv_heads, ffn;
    bool tied;
    double scaling;             // RopeScaling::factor; 0: none
    int max_seq, batch, seq;
    double lr;
};
constexpr Preset presets[] = {
    // name          L    C     H  KV    F      tied  rope   max_seq batch seq   lr
    {"tiny",         4,   192,  3,  1,   512,  true,  0,     8192,   8,  256, 3e-3},
    {"15m",          5,   512,  8,  2,  1536,  true,  0,     8192,   8,  256, 1e-3},
    {"125m",        12,  1024, 16,  4,  2560,  true,  0,     8192,   8, 1024, 6e-4},
    {"350m",        24,  1024, 16,  4,  3840,  true,  0,     8192,   8, 1024, 4e-4},
    {"llama3.2-1b", 16,  2048, 32,  8,  8192,  true,  32,  131072,   4, 2048, 3e-4},
    {"llama3.2-3b", 28,  3072, 24,  8,  8192,  true,  32,  131072,   4, 2048, 3e-4},
    {"llama3-8b",   32,  4096, 32,  8, 14336, false,  0,     8192,   2, 4096, 3e-4},
    {"llama3.1-8b", 32,  4096, 32,  8, 14336, false,  8,   131072,   2, 4096, 3e-4},
};

// The preset called `name`, or null.
inline const Preset* find_preset(const std::string& name) {
    for (const Preset& p : presets)
        if (name == p.name) return &p;
    return nullptr;
}

// A preset's shape with a vocabulary, which the data decide.
inline Config config_of(const Preset& p, int vocab) {
    Config c{p.layers, p.dim, p.heads, p.kv_heads, p.dim / p.heads, p.ffn, vocab, p.tied, {}};
    c.scaling.factor = p.scaling;
    c.max_seq = p.max_seq;
    return c;
}

// One line on the first thing that cannot work. largest_head: what this build's attention takes.
inline void check_config(const Config& c, int largest_head) {
    if (c.layers < 1 || c.dim < 1 || c.heads < 1 || c.kv_heads < 1 || c.ffn < 1 || c.vocab < 1) fail("every model dimension must be at least 1");
    if (c.layers > 1000) fail("%d layers are more than the 1000 that this program takes", c.layers);
    // At most 2^20: a product of two, times layers, batch and bytes an element, then stays far below 2^63.
    for (auto [name, size] : {std::pair<const char*, int>{"--dim", c.dim}, {"--ffn", c.ffn}, {"--vocab", c.vocab}})
        if (size > 1 << 20) fail("%s %d is more than the %d that this program takes", name, size, 1 << 20);
    if (!(c.norm_eps > 0 && c.norm_eps < 1)) fail("rms_norm_eps %g is not between 0 and 1", c.norm_eps);
    if (!(c.rope_theta > 1)) fail("rope_theta %g is not above 1", c.rope_theta);
    if (c.heads % c.kv_heads)
        fail("--heads %d is not a multiple of --kv-heads %d: each key/value head serves a whole group", c.heads, c.kv_heads);
    if (c.head_dim % 2) fail("head size %d is odd; RoPE rotates pairs: choose --dim and --heads with an even quotient", c.head_dim);
    if (c.head_dim > largest_head) fail("head size %d is over %d, the most this build's attention takes: use more --heads", c.head_dim, largest_head);
}

// ---------------------------------------------------------------------------------------------------------------------------
// config.json
//
// A key that changes the model and is not implemented must be an error that names it: a model read without its sliding window or its
// biases would load, run and be wrong. So every key has to be known, those without effect on the numbers by a list.

// A config.json being read. Its messages name the file and the key.
struct ConfigFile {
    std::string path;
    nlohmann::json j;

    // Any text may come: not JSON, not an object, a pipe (MappedFile refuses that).
    explicit ConfigFile(const std::string& file) : path(file) {
        MappedFile text(path);
        j = nlohmann::json::parse(text.data, text.data + text.size, nullptr, false);
        if (!j.is_object()) fail("%s is not a JSON object", path.c_str());
    }
    [[noreturn]] void refuse(const std::string& key, const std::string& why) const {
        fail("%s: \"%s\": %s", path.c_str(), key.c_str(), why.c_str());
    }
    // from[key], or `fallback` where the key is absent or null; NAN: it must be there.
    double number(const nlohmann::json& from, const char* key, double fallback) const {
        auto it = from.find(key);
        if (it == from.end() || it->is_null()) {
            if (std::isnan(fallback)) refuse(key, "is missing");
            return fallback;
        }
        if (!it->is_number()) refuse(key, "is not a number");
        return it->get<double>();
    }
    // A positive integer, up to 2^30: no dimension is larger, and an int holds it.
    int integer(const char* key, double fallback) const {
        double v = number(j, key, fallback);
        if (!(v >= 1 && v <= 1 << 30) || v != std::floor(v)) refuse(key, "is not a positive integer");
        return (int)v;
    }
    // A key of which one value is implemented; absent and null stand for that value.
    void must_be(const char* key, const nlohmann::json& value) const {
        auto it = j.find(key);
        if (it != j.end() && !it->is_null() && *it != value) refuse(key, "only " + value.dump() + " is implemented");
    }
    // Every key of `from` must be one of `known`.
    void only(const nlohmann::json& from, const std::vector<const char*>& known, const char* why) const {
        for (auto& [key, value] : from.items())
            if (std::find(known.begin(), known.end(), key) == known.end()) refuse(key, why);
    }
};

// Theta and scaling of the rotary embedding. Hugging Face's older files have rope_theta beside rope_scaling, newer ones both inside
// rope_parameters.
inline void read_rope(const ConfigFile& f, Config& c) {
    const double required = NAN;
    // {"rope_theta": 5e5, "rope_scaling": null}  or  {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    nlohmann::json rope = nlohmann::json::object();
    for (const char* key : {"rope_scaling", "rope_parameters"})
        if (f.j.contains(key) && !f.j[key].is_null()) {
            if (!f.j[key].is_object()) f.refuse(key, "is not an object");
            rope = f.j[key];
        }
    c.rope_theta = f.number(rope, "rope_theta", f.number(f.j, "rope_theta", 10000));
    std::string kind = "default";
    for (const char* key : {"rope_type", "type"})
        if (rope.contains(key)) kind = rope[key].is_string() ? rope[key].get<std::string>() : rope[key].dump();
    if (kind == "llama3") {
        RopeScaling& s = c.scaling;
        s.factor = f.number(rope, "factor", required);
        s.low = f.number(rope, "low_freq_factor", required);
        s.high = f.number(rope, "high_freq_factor", required);
        s.original = f.number(rope, "original_max_position_embeddings", required);
        if (!(s.factor >= 1 && s.high > s.low && s.low > 0 && s.original > 0)) f.refuse("rope_scaling", "has impossible factors");
    } else if (kind != "default") f.refuse("rope_type", "\"" + kind + "\" is not implemented, only \"llama3\" and \"default\"");
    f.only(rope, {"rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
           "is not implemented");
}

// Reads Hugging Face's config.json (of LlamaForCausalLM, whose defaults stand for what is absent).
inline Config read_config(const std::string& path) {
    ConfigFile f(path);
    const nlohmann::json& j = f.j;
    // What other models of the family change. A file that lacks these keys means LLaMA's values.
    f.must_be("model_type", "llama");
    f.must_be("hidden_act", "silu");
    f.must_be("attention_bias", false);
    f.must_be("mlp_bias", false);
    f.must_be("pretraining_tp", 1);
    auto dropout = j.find("attention_dropout");
    if (dropout != j.end() && !(dropout->is_number() && dropout->get<double>() == 0)) f.refuse("attention_dropout", "only 0 is implemented");

    // The shape. Without num_key_value_heads every query head has keys and values of its own, as in LLaMA-1.
    const double required = NAN;
    Config c;
    c.layers = f.integer("num_hidden_layers", required);
    c.dim = f.integer("hidden_size", required);
    c.heads = f.integer("num_attention_heads", required);
    c.kv_heads = f.integer("num_key_value_heads", c.heads);
    if (!j.contains("head_dim") && c.dim % c.heads)
        f.refuse("hidden_size", "is not a multiple of num_attention_heads, and there is no head_dim");
    c.head_dim = f.integer("head_dim", c.dim / c.heads);              // H D need not be C: o is (C x H D)
    c.ffn = f.integer("intermediate_size", required);
    c.vocab = f.integer("vocab_size", required);
    c.norm_eps = f.number(j, "rms_norm_eps", 1e-6);
    c.max_seq = f.integer("max_position_embeddings", 2048);
    // Hugging Face's default is false; the small LLaMA-3.2 models say true.
    auto tied = j.find("tie_word_embeddings");
    if (tied != j.end() && !tied->is_boolean()) f.refuse("tie_word_embeddings", "is not true or false");
    c.tied = tied != j.end() && tied->get<bool>();
    read_rope(f, c);
    f.only(j, {"model_type", "hidden_act", "attention_bias", "mlp_bias", "pretraining_tp", "attention_dropout", "num_hidden_layers",
               "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "rms_norm_eps",
               "max_position_embeddings", "tie_word_embeddings", "rope_scaling", "rope_parameters", "rope_theta",
               // without effect on the model
               "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version", "use_cache",
               "initializer_range", "_name_or_path"}, "is not implemented; remove it if it does not change the model");
    return c;
}

// The same as Hugging Face writes it, for checkpoints: read_config() of it gives c again.
inline std::string write_config(const Config& c) {
    nlohmann::ordered_json j = {
        {"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"hidden_size", c.dim}, {"intermediate_size", c.ffn},
        {"num_hidden_layers", c.layers}, {"num_attention_heads", c.heads}, {"num_key_value_heads", c.kv_heads}, {"head_dim", c.head_dim},
        {"vocab_size", c.vocab}, {"max_position_embeddings", c.max_seq}, {"rms_norm_eps", c.norm_eps}, {"rope_theta", c.rope_theta},
        {"rope_scaling", nullptr}, {"hidden_act", "silu"}, {"tie_word_embeddings", c.tied}, {"attention_bias", false}, {"mlp_bias", false},
        {"torch_dtype", "float32"}};
    if (c.scaling.factor > 0)
        j["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", c.scaling.factor}, {"low_freq_factor", c.scaling.low},
                             {"high_freq_factor", c.scaling.high}, {"original_max_position_embeddings", (int64_t)c.scaling.original}};
    return j.dump(2) + "\n";
}
