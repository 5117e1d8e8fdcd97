// options.h: what the command line can say. One table makes the parser, --help, the README's list and what a checkpoint remembers.
//
//     parse()          words -> Options, and which options were given
//     saved_options()  Options -> JSON of texts, for state.json and the first line of log.jsonl
//     adopt_options()  that JSON -> Options, at --resume
//     find_useless()   the first option that was given and has no effect in this kind of invocation
//
// A new option is a field of Options and a row of option_table(); whether a resumed run may change it, and whether it means anything to
// --eval-only, are columns of the row. Errors end the program with one line and status 2 (fail() in host.h).
#pragma once
#include "config.h"         // presets
#include "data.h"           // printable
#include "device.cuh"       // on_gpu, is_finite
#include <set>              // std::set
#include <variant>          // std::variant

// 0, -1 and "" often stand for a default that other options decide; main() fills them in before anything is computed or saved.
struct Options {
    // The model
    std::string model = on_gpu ? "125m" : "tiny";
    int layers = 0, dim = 0, heads = 0, kv_heads = 0, ffn = 0, vocab = 0;                 // 0: the preset's; vocab: the data's
    // Precision
    std::string recipe = "metis", set, eval_recipe;                                       // eval_recipe "": the run's
    int bf16_first = 0, bf16_last = -1;                                                   // blocks; -1: the recipe's
    std::string bf16_layers, bf16_end_gemms = "fprop";
    double bf16_end = 0;                                                                  // a share of --steps
    int64_t shadow_every = 0, stats_every = 10;                                           // steps; 0: never
    bool list_recipes = false;
    // Data; tokenizer "": tokens are bytes, or ids that nobody reads
    std::string data = "data/stories.txt", val, tokenizer;
    // Training
    int64_t steps = 1500;
    int batch = 0, seq = 0, accum = 1;                                                    // sequences, tokens, micro-batches
    double lr = 0, min_lr = -1;                                                           // 0: the preset's; -1: a tenth of lr
    int64_t warmup = -1;                                                                  // steps; -1: 5% of them
    std::string schedule = "cosine";
    double clip = 1, decay = 0.1;
    std::string moments = "f32", recompute = "none";
    int64_t seed = 1;
    int threads = 0;                                                                      // 0: all cores
    bool graphs = false;
    // Watching; "every": steps, 0: at the end only
    int64_t eval_every = 250;
    int eval_batches = 8;
    int64_t sample_every = 0;
    int sample_tokens = 200;
    std::string prompt;                                                                   // "": the token that opens a document
    double temperature = 0.8;
    int top_k = 0;                                                                        // 0: all
    double top_p = 0.95;
    int profile = 0;                                                                      // steps; 0: off
    bool eval_only = false, sample_only = false;
    // Files
    int64_t save_every = 250;
    int keep = 2;
    std::string out, resume;                                                              // resume "" and given: the run in `out`
    bool dry_run = false, help = false;
    bool trains() const { return !eval_only && !sample_only; }
};

// What a checkpoint does with an option:
//     run     part of the trajectory, such as --lr: a resumed run has it from the checkpoint and must not change it
//     kept    remembered, but may be changed, such as --save-every or --recompute: no loss depends on it
//     here    of this invocation alone, such as --threads or --out
enum class Lives { run, kept, here };

// What an option means something to, a sum of: training, --eval-only, --sample-only. (--steps says how far a checkpoint has come,
// --sample-tokens 0 is true of an evaluation.)
enum Serves { trains = 1, evaluates = 2, samples = 4, always = 7 };

struct Option {
    const char* name;
    const char* value;                        // what --help calls its value; null: a flag. "[...]": may be left out
    std::variant<bool*, int*, int64_t*, double*, std::string*> at;
    Lives lives;
    int serves;
    double low, high;                         // bounds of numbers
    const char* usual;                        // the default as --help says it; null: the initial value
    const char* help;
    const char* section = nullptr;            // starts a section of --help
};

// The rows point into `o`, which must outlive them. Their order is that of --help.
inline std::vector<Option> option_table(Options& o) {
    const double big = 1e15;                  // below 2^53: every whole number up to it is a double
    const int most = 1 << 20;
    const auto run = Lives::run, kept = Lives::kept, here = Lives::here;
    return {
        {"--model", "NAME|PATH", &o.model, run, always, 0, 0, "tiny; 125m on a GPU",
            "a preset (see below), a Hugging Face config.json, or a folder with one and its weights", "Model"},
        {"--layers", "N", &o.layers, run, always, 1, 1000, "the preset's", "transformer blocks"},
        {"--dim", "N", &o.dim, run, always, 2, most, "the preset's", "width of the residual stream"},
        {"--heads", "N", &o.heads, run, always, 1, 1024, "the preset's", "query heads"},
        {"--kv-heads", "N", &o.kv_heads, run, always, 1, 1024, "the preset's", "key/value heads"},
        {"--ffn", "N", &o.ffn, run, always, 1, most, "the preset's", "inner width of SwiGLU"},
        {"--vocab", "N", &o.vocab, run, always, 2, 1 << 24, "the data's", "vocabulary, padded to a multiple of 128 unless given"},

        {"--recipe", "NAME", &o.recipe, run, always, 0, 0, "metis; bf16 for --eval-only and --sample-only of a model's weights",
            "how GEMM operands are prepared: a row of --list-recipes", "Precision"},
        {"--set", "CHANGES", &o.set, run, always, 0, 0, "none",
            "change cells of the recipe: wgrad_d.rounding=stochastic,all.scale=headroom"},
        {"--list-recipes", nullptr, &o.list_recipes, here, always, 0, 0, nullptr, "print the recipe table (with --set: changed) and exit"},
        {"--bf16-first", "N", &o.bf16_first, run, always, 0, 1000, nullptr, "blocks at the start whose linear layers stay in bf16"},
        {"--bf16-last", "N", &o.bf16_last, run, always, 0, 1000, "the recipe's", "blocks at the end whose linear layers stay in bf16"},
        {"--bf16-layers", "LIST", &o.bf16_layers, run, always, 0, 0, "none",
            "layers that stay in bf16 in every block, of qkv,o,gate_up,down; the head always does"},
        {"--bf16-end", "X", &o.bf16_end, run, always, 0, 1, nullptr, "the last part of training, 0 to 1, that goes on in bf16"},
        {"--bf16-end-gemms", "WHICH", &o.bf16_end_gemms, run, always, 0, 0, nullptr, "what --bf16-end turns to bf16: fprop or all"},
        {"--eval-recipe", "NAME", &o.eval_recipe, kept, always, 0, 0, "the run's, rounded to nearest", "evaluate and sample by another row"},
        {"--shadow-every", "N", &o.shadow_every, kept, trains, 0, big, "0: never",
            "steps between shadow steps: the batch once more in bf16, gradients compared"},
        {"--stats-every", "N", &o.stats_every, kept, trains, 0, big, nullptr,
            "steps between quantisation statistics in log.jsonl; 0: none"},

        {"--data", "FILES", &o.data, run, always, 0, 0, nullptr,
            "text or llm.c .bin shards: paths or quoted globs, comma-separated", "Data"},
        {"--val", "FILES", &o.val, run, trains | evaluates, 0, 0, "the last 1% of --data", "held-out data"},
        {"--tokenizer", "FILE", &o.tokenizer, kept, always, 0, 0, "bytes",
            "tiktoken ranks or llm.c's gpt2_tokenizer.bin, to show samples of token data as text"},

        {"--steps", "N", &o.steps, run, always, 1, big, nullptr, "optimiser steps in the whole run", "Training"},
        {"--batch", "N", &o.batch, run, always, 1, most, "the preset's", "sequences per micro-batch"},
        {"--seq", "N", &o.seq, run, always, 1, most, "the preset's", "tokens per sequence"},
        {"--accum", "N", &o.accum, run, trains, 1, 65535, nullptr, "micro-batches per step"},
        {"--lr", "X", &o.lr, run, trains, 1e-12, 1e3, "the preset's", "peak learning rate"},
        {"--min-lr", "X", &o.min_lr, run, trains, 0, 1e3, "a tenth of --lr", "learning rate at the end"},
        {"--warmup", "N", &o.warmup, run, trains, 0, big, "5% of --steps", "steps of linear warmup"},
        {"--schedule", "NAME", &o.schedule, run, trains, 0, 0, nullptr,
            "after warmup: cosine, wsd (linear over the last 20%) or constant"},
        {"--clip", "X", &o.clip, run, trains, 0, 1e9, nullptr, "largest norm of the gradient; 0: no clipping"},
        {"--decay", "X", &o.decay, run, trains, 0, 1e3, nullptr, "AdamW's weight decay, on matrices only"},
        {"--moments", "TYPE", &o.moments, run, trains, 0, 0, nullptr,
            "AdamW's m and v: f32, or bf16, rounded stochastically, in half the memory"},
        {"--seed", "N", &o.seed, run, always, 0, big, nullptr, "of initialisation, data order and rounding"},
        {"--threads", "N", &o.threads, here, always, 1, 4096, "all cores", "CPU threads; results do not depend on it"},
        {"--recompute", "WHAT", &o.recompute, kept, trains, 0, 0, nullptr,
            "activations computed again in backward: none, norms (and SwiGLU) or block; same results"},
        {"--graphs", nullptr, &o.graphs, here, trains, 0, 0, nullptr,
            "on a GPU: record each block's launches as a CUDA graph and replay it; same results"},

        {"--eval-every", "N", &o.eval_every, kept, trains, 0, big, nullptr, "steps between evaluations; 0: only at the end", "Watching"},
        {"--eval-batches", "N", &o.eval_batches, kept, trains | evaluates, 1, most, nullptr, "batches per evaluation"},
        {"--eval-only", nullptr, &o.eval_only, here, always, 0, 0, nullptr,
            "evaluate a checkpoint (--resume) or a model's weights (--model PATH) and exit"},
        {"--sample-every", "N", &o.sample_every, kept, trains, 0, big, nullptr, "steps between samples; 0: only at the end"},
        {"--sample-tokens", "N", &o.sample_tokens, kept, always, 0, most, nullptr, "tokens per sample; 0: no samples"},
        {"--sample-only", nullptr, &o.sample_only, here, always, 0, 0, nullptr,
            "print one sample of a checkpoint or of a model's weights and exit"},
        {"--prompt", "TEXT", &o.prompt, kept, trains | samples, 0, 0, "a document's start", "what samples begin with"},
        {"--temperature", "X", &o.temperature, kept, trains | samples, 0, 100, nullptr, "of sampling; 0: the likeliest token"},
        {"--top-k", "N", &o.top_k, kept, trains | samples, 0, 1 << 24, nullptr, "sample from the k likeliest; 0: from all"},
        {"--top-p", "X", &o.top_p, kept, trains | samples, 1e-6, 1, nullptr, "sample from the likeliest that hold this probability"},
        {"--profile", "N", &o.profile, here, trains, 1, most, "off", "profile N steps, print a table of kernels and exit"},

        {"--out", "DIR", &o.out, here, trains, 0, 0, "none",
            "folder for log.jsonl and checkpoints; must be empty or new, unless resuming", "Files"},
        {"--save-every", "N", &o.save_every, kept, trains, 0, big, nullptr, "steps between checkpoints (with --out); 0: only at the end"},
        {"--keep", "N", &o.keep, kept, trains, 1, most, nullptr, "checkpoints kept"},
        {"--resume", "[DIR]", &o.resume, here, always, 0, 0, "off",
            "continue the run in --out (or in DIR, or from the checkpoint DIR, removing later ones)"},
        {"--dry-run", nullptr, &o.dry_run, here, always, 0, 0, nullptr, "print memory, FLOPs and disk needed, and exit"},
        {"--help", nullptr, &o.help, here, always, 0, 0, nullptr, "this text"},
    };
}

// The option's value as text: what set_option() reads back to the same value.
inline std::string to_text(const Option& option) {
    if (auto p = std::get_if<bool*>(&option.at)) return **p ? "1" : "0";
    if (auto p = std::get_if<int*>(&option.at)) return std::to_string(**p);
    if (auto p = std::get_if<int64_t*>(&option.at)) return std::to_string(**p);
    if (auto p = std::get_if<double*>(&option.at)) return nlohmann::json(**p).dump();     // the shortest text that reads back the same
    return **std::get_if<std::string*>(&option.at);
}

// Errors name the option, the text and what is allowed.
inline void set_option(const Option& option, const std::string& text) {
    auto refuse = [&](const char* why) { fail("%s %s: %s; see --help", option.name, printable(text).c_str(), why); };
    if (auto p = std::get_if<std::string*>(&option.at)) {
        **p = text;
        return;
    }
    if (auto p = std::get_if<bool*>(&option.at)) {
        **p = text == "1";
        return;
    }
    // All numbers are read as doubles first: one place that sees tails ("1e-3x"), blanks, nan, and what is too large for any type.
    char* end;
    errno = 0;
    double v = strtod(text.c_str(), &end);
    if (text.empty() || *end || !is_finite(v) || isspace((unsigned char)text[0])) refuse("not a number");
    char range[96];
    bool real = std::holds_alternative<double*>(option.at);
    snprintf(range, sizeof range, real ? "must be between %g and %g" : "must be between %.0f and %.0f", option.low, option.high);
    if (v < option.low || v > option.high) refuse(range);
    if (auto p = std::get_if<double*>(&option.at)) {
        **p = v;
        return;
    }
    if (v != std::floor(v) || text.find_first_not_of("0123456789+-") != std::string::npos) refuse("must be a whole number");
    if (auto p = std::get_if<int*>(&option.at)) **p = (int)v;
    if (auto p = std::get_if<int64_t*>(&option.at)) **p = (int64_t)v;
}

// Sets what the command line gives: --name value or --name=value, in any order, none abbreviated and none twice. Returns the names;
// everything not among them is a default.
inline std::set<std::string> parse(int argc, char** argv, const std::vector<Option>& table) {
    std::set<std::string> given;
    for (int i = 1; i < argc; i++) {
        std::string name = argv[i], value;
        size_t equals = name.find('=');
        bool has_value = equals != std::string::npos && name.compare(0, 2, "--") == 0;
        if (has_value) value = name.substr(equals + 1), name = name.substr(0, equals);
        const Option* option = nullptr;
        std::string close;                                    // options that begin so: abbreviations are refused, but understood
        for (const Option& t : table) {
            if (name == t.name) option = &t;
            else if (name.size() > 3 && !strncmp(t.name, name.c_str(), name.size())) close += std::string(close.empty() ? "" : " or ") + t.name;
        }
        if (!option)
            fail("unknown option %s%s%s; see --help", printable(name).c_str(), close.empty() ? "" : ", did you mean ", close.c_str());
        if (!given.insert(name).second) fail("%s is given twice", name.c_str());
        bool optional = option->value && option->value[0] == '[';
        if (!option->value) {
            if (has_value) fail("%s takes no value", name.c_str());
            value = "1";
        } else if (!has_value) {
            // The next word, unless it is an option: "--lr --steps 5" lacks a value, "--lr -1" has a bad one.
            bool next = i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0;
            if (next) value = argv[++i];
        }
        if (option->value && value.empty() && !optional) fail("%s needs a value: %s %s", name.c_str(), name.c_str(), option->value);
        set_option(*option, value);
    }
    return given;
}

inline void print_help(const std::vector<Option>& table) {
    printf("usage: train_llama [options]\n");
    for (const Option& t : table) {
        if (t.section) printf("\n%s\n", t.section);
        std::string usual = t.usual ? t.usual : t.value ? to_text(t) : "";
        if (!usual.empty()) usual = " (" + usual + ")";
        printf("  %-16s %-9s  %s%s\n", t.name, t.value ? t.value : "", t.help, usual.c_str());
    }
    printf("\nPresets (named by parameters without embedding and head)\n  %-12s layers  dim heads kv   ffn batch  seq   lr\n", "name");
    for (const Preset& p : presets)
        printf("  %-12s %6d %4d %5d %2d %5d %5d %4d %g\n", p.name, p.layers, p.dim, p.heads, p.kv_heads, p.ffn, p.batch, p.seq, p.lr);
}

// The first option that was given and cannot have an effect with --eval-only or --sample-only, or null. With --resume an option of the
// trajectory is no such: adopt_options() has compared it with the run's. Nor is --out, which then names the run.
inline const Option* find_useless(const Options& o, const std::vector<Option>& table, const std::set<std::string>& given) {
    int job = o.eval_only ? evaluates : o.sample_only ? samples : trains;
    bool resuming = given.count("--resume");
    for (const Option& t : table) {
        bool repeated = resuming && (t.lives == Lives::run || !strcmp(t.name, "--out"));
        if (given.count(t.name) && !(t.serves & job) && !repeated) return &t;
    }
    return nullptr;
}

// Every option that outlives this invocation, by name, as text: {"model": "tiny", "lr": "0.003", ...}. Text, since it is compared with
// what the command line says, and since a number then comes back exactly.
inline nlohmann::ordered_json saved_options(Options& o) {
    nlohmann::ordered_json j = nlohmann::ordered_json::object();
    for (const Option& t : option_table(o))
        if (t.lives != Lives::here) j[t.name + 2] = to_text(t);
    return j;
}

// Takes over a saved run's options. One that is part of the trajectory and was given with another value is an error: the run would no
// longer be the one that an unbroken process would have made.
inline void adopt_options(const std::vector<Option>& table, const std::set<std::string>& given, const nlohmann::ordered_json& saved) {
    for (const Option& t : table) {
        if (t.lives == Lives::here) continue;
        auto it = saved.find(t.name + 2);
        if (it == saved.end() || !it->is_string()) fail("the checkpoint does not know %s: it was written by another version", t.name);
        std::string value = it->get<std::string>();
        bool was_given = given.count(t.name);
        if (was_given && t.lives == Lives::run && value != to_text(t))
            fail("%s %s contradicts the run to resume, which has %s: leave it away, or start a new run", t.name, to_text(t).c_str(),
                 value.empty() ? "none" : value.c_str());
        if (!was_given) set_option(t, value);
    }
}
