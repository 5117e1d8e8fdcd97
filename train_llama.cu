// train_llama.cu: the program. Options, data, the training loop, evaluation, sampling, checkpoints, logging.
//
//     make run                                   trains the default model on generated stories
//     ./train_llama --data my.txt --out run1     trains on your text, logs and checkpoints into run1/
//     ./train_llama --out run1 --resume          goes on where it stopped, bit for bit
//
// main() reads from top to bottom: parse, resolve, plan memory, load, loop. One table of options makes the parser, --help, the
// README's list and what a checkpoint remembers.
#include "data.h"           // Corpus, Split, permuted, Tokenizer, printable
#include "llama.cuh"        // Model, forward, classify, backward, adamw_step, presets; checkpoint.h: save_checkpoint, open_checkpoint ...
#include <sys/file.h>       // flock
#include <csignal>          // sigaction
#include <map>              // std::map
#include <set>              // std::set
#include <variant>          // std::variant

#ifndef BUILD               // the Makefile says: compiler, flags, commit
#define BUILD "unknown build"
#endif

// ---------------------------------------------------------------------------------------------------------------------------
// Options

struct Options {
    std::string model = on_gpu ? "125m" : "tiny";
    int layers = 0, dim = 0, heads = 0, kv_heads = 0, ffn = 0, vocab = 0;                 // 0: the preset's; vocab: the data's
    std::string recipe = "metis", set, eval_recipe, recompute = "none";
    int bf16_first = 0, bf16_last = -1;
    std::string bf16_layers, bf16_end_gemms = "fprop";
    double bf16_end = 0;
    int64_t shadow_every = 0, stats_every = 10;
    bool list_recipes = false;
    std::string data = "data/stories.txt", val, tokenizer;
    int64_t steps = 1500;
    int batch = 0, seq = 0, accum = 1;
    double lr = 0, min_lr = -1;
    int64_t warmup = -1;
    std::string schedule = "cosine";
    double clip = 1, decay = 0.1;
    std::string moments = "f32";
    int64_t seed = 1;
    int threads = 0;
    int64_t eval_every = 250;
    int eval_batches = 8;
    int64_t sample_every = 0;
    int sample_tokens = 200;
    std::string prompt;
    double temperature = 0.8;
    int top_k = 0;
    double top_p = 0.95;
    int64_t save_every = 250;
    int keep = 2;
    std::string out, resume;
    bool eval_only = false, sample_only = false, graphs = false, dry_run = false, help = false;
    int profile = 0;
};

// What a checkpoint does with an option: `run` is part of the trajectory (a resumed run must not change it), `kept` is remembered
// but may be changed, `here` belongs to this invocation alone.
enum class Lives { run, kept, here };

struct Option {
    const char* name;
    const char* value;                        // what --help calls its value; null: a flag. "[...]": may be left out
    std::variant<bool*, int*, int64_t*, double*, std::string*> at;
    Lives lives;
    double low, high;                         // bounds of numbers
    const char* usual;                        // the default as --help says it; null: the initial value
    const char* help;
    const char* section;                      // starts a section of --help
};

static std::vector<Option> option_table(Options& o) {
    const double big = 1e15;
    const auto run = Lives::run, kept = Lives::kept, here = Lives::here;
    return {
        {"--model", "NAME|PATH", &o.model, run, 0, 0, "tiny; 125m on a GPU", "a preset (see below), a Hugging Face config.json, or a folder with one and its weights", "Model"},
        {"--layers", "N", &o.layers, run, 1, 1000, "the preset's", "transformer blocks", nullptr},
        {"--dim", "N", &o.dim, run, 2, 1 << 20, "the preset's", "width of the residual stream", nullptr},
        {"--heads", "N", &o.heads, run, 1, 1024, "the preset's", "query heads", nullptr},
        {"--kv-heads", "N", &o.kv_heads, run, 1, 1024, "the preset's", "key/value heads", nullptr},
        {"--ffn", "N", &o.ffn, run, 1, 1 << 20, "the preset's", "inner width of SwiGLU", nullptr},
        {"--vocab", "N", &o.vocab, run, 2, 1 << 24, "the data's", "vocabulary, padded to a multiple of 128 unless given", nullptr},
        {"--recipe", "NAME", &o.recipe, run, 0, 0, "metis; bf16 for --eval-only and --sample-only of a model's weights", "how GEMM operands are prepared: a row of --list-recipes", "Precision"},
        {"--set", "CHANGES", &o.set, run, 0, 0, "none", "change cells of the recipe: wgrad_d.rounding=stochastic,all.scale=headroom", nullptr},
        {"--list-recipes", nullptr, &o.list_recipes, here, 0, 0, nullptr, "print the recipe table (with --set: changed) and exit", nullptr},
        {"--bf16-first", "N", &o.bf16_first, run, 0, 1000, nullptr, "blocks at the start whose linear layers stay in bf16", nullptr},
        {"--bf16-last", "N", &o.bf16_last, run, 0, 1000, "the recipe's", "blocks at the end whose linear layers stay in bf16", nullptr},
        {"--bf16-layers", "LIST", &o.bf16_layers, run, 0, 0, "none", "layers that stay in bf16 in every block, of qkv,o,gate_up,down; the head always does", nullptr},
        {"--bf16-end", "X", &o.bf16_end, run, 0, 1, nullptr, "the last part of training, 0 to 1, that goes on in bf16", nullptr},
        {"--bf16-end-gemms", "WHICH", &o.bf16_end_gemms, run, 0, 0, nullptr, "what --bf16-end turns to bf16: fprop or all", nullptr},
        {"--eval-recipe", "NAME", &o.eval_recipe, kept, 0, 0, "the run's, rounded to nearest", "evaluate and sample by another row", nullptr},
        {"--shadow-every", "N", &o.shadow_every, kept, 0, big, "0: never", "steps between shadow steps: the batch once more in bf16, gradients compared", nullptr},
        {"--stats-every", "N", &o.stats_every, kept, 0, big, nullptr, "steps between quantisation statistics in log.jsonl; 0: none", nullptr},
        {"--data", "FILES", &o.data, run, 0, 0, nullptr, "text or llm.c .bin shards: paths or quoted globs, comma-separated", "Data"},
        {"--val", "FILES", &o.val, run, 0, 0, "the last 1% of --data", "held-out data", nullptr},
        {"--tokenizer", "FILE", &o.tokenizer, kept, 0, 0, "bytes", "tiktoken ranks or llm.c's gpt2_tokenizer.bin, to show samples of token data as text", nullptr},
        {"--steps", "N", &o.steps, run, 1, big, nullptr, "optimiser steps in the whole run", "Training"},
        {"--batch", "N", &o.batch, run, 1, 1 << 20, "the preset's", "sequences per micro-batch", nullptr},
        {"--seq", "N", &o.seq, run, 1, 1 << 20, "the preset's", "tokens per sequence", nullptr},
        {"--accum", "N", &o.accum, run, 1, 65535, nullptr, "micro-batches per step", nullptr},
        {"--lr", "X", &o.lr, run, 1e-12, 1e3, "the preset's", "peak learning rate", nullptr},
        {"--min-lr", "X", &o.min_lr, run, 0, 1e3, "a tenth of --lr", "learning rate at the end", nullptr},
        {"--warmup", "N", &o.warmup, run, 0, big, "5% of --steps", "steps of linear warmup", nullptr},
        {"--schedule", "NAME", &o.schedule, run, 0, 0, nullptr, "after warmup: cosine, wsd (linear over the last 20%) or constant", nullptr},
        {"--clip", "X", &o.clip, run, 0, 1e9, nullptr, "largest norm of the gradient; 0: no clipping", nullptr},
        {"--decay", "X", &o.decay, run, 0, 1e3, nullptr, "AdamW's weight decay, on matrices only", nullptr},
        {"--moments", "TYPE", &o.moments, run, 0, 0, nullptr, "AdamW's m and v: f32, or bf16, rounded stochastically, in half the memory", nullptr},
        {"--seed", "N", &o.seed, run, 0, big, nullptr, "of initialisation, data order and rounding", nullptr},
        {"--threads", "N", &o.threads, here, 1, 4096, "all cores", "CPU threads; results do not depend on it", nullptr},
        {"--recompute", "WHAT", &o.recompute, kept, 0, 0, nullptr, "activations computed again in backward: none, norms (and SwiGLU) or block; same results", nullptr},
        {"--graphs", nullptr, &o.graphs, here, 0, 0, nullptr, "on a GPU: record each block's launches as a CUDA graph and replay it; same results", nullptr},
        {"--eval-every", "N", &o.eval_every, kept, 0, big, nullptr, "steps between evaluations; 0: only at the end", "Watching"},
        {"--eval-batches", "N", &o.eval_batches, kept, 1, 1 << 20, nullptr, "batches per evaluation", nullptr},
        {"--eval-only", nullptr, &o.eval_only, here, 0, 0, nullptr, "evaluate a checkpoint (--resume) or a model's weights (--model PATH) and exit", nullptr},
        {"--sample-every", "N", &o.sample_every, kept, 0, big, nullptr, "steps between samples; 0: only at the end", nullptr},
        {"--sample-tokens", "N", &o.sample_tokens, kept, 0, 1 << 20, nullptr, "tokens per sample; 0: no samples", nullptr},
        {"--sample-only", nullptr, &o.sample_only, here, 0, 0, nullptr, "print one sample of a checkpoint or of a model's weights and exit", nullptr},
        {"--prompt", "TEXT", &o.prompt, kept, 0, 0, "a document's start", "what samples begin with", nullptr},
        {"--temperature", "X", &o.temperature, kept, 0, 100, nullptr, "of sampling; 0: the likeliest token", nullptr},
        {"--top-k", "N", &o.top_k, kept, 0, 1 << 24, nullptr, "sample from the k likeliest; 0: from all", nullptr},
        {"--top-p", "X", &o.top_p, kept, 1e-6, 1, nullptr, "sample from the likeliest that hold this probability", nullptr},
        {"--profile", "N", &o.profile, here, 1, 1 << 20, "off", "profile N steps, print a table of kernels and exit", nullptr},
        {"--out", "DIR", &o.out, here, 0, 0, "none", "folder for log.jsonl and checkpoints; must be empty or new, unless resuming", "Files"},
        {"--save-every", "N", &o.save_every, kept, 0, big, nullptr, "steps between checkpoints (with --out); 0: only at the end", nullptr},
        {"--keep", "N", &o.keep, kept, 1, 1 << 20, nullptr, "checkpoints kept", nullptr},
        {"--resume", "[DIR]", &o.resume, here, 0, 0, "off", "continue the run in --out (or in DIR, or from the checkpoint DIR, removing later ones)", nullptr},
        {"--dry-run", nullptr, &o.dry_run, here, 0, 0, nullptr, "print memory, FLOPs and disk needed, and exit", nullptr},
        {"--help", nullptr, &o.help, here, 0, 0, nullptr, "this text", nullptr},
    };
}

static std::string to_text(const Option& option) {
    if (auto p = std::get_if<bool*>(&option.at)) return **p ? "1" : "0";
    if (auto p = std::get_if<int*>(&option.at)) return std::to_string(**p);
    if (auto p = std::get_if<int64_t*>(&option.at)) return std::to_string(**p);
    if (auto p = std::get_if<double*>(&option.at)) return nlohmann::json(**p).dump();     // the shortest text that reads back the same
    return **std::get_if<std::string*>(&option.at);
}

static void set_option(const Option& option, const std::string& text) {
    auto refuse = [&](const char* why) { fail("%s %s: %s; see --help", option.name, printable(text).c_str(), why); };
    if (auto p = std::get_if<std::string*>(&option.at)) {
        **p = text;
        return;
    }
    if (auto p = std::get_if<bool*>(&option.at)) {
        **p = text == "1";
        return;
    }
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

// The options given on the command line; everything not in it is a default.
static std::set<std::string> parse(int argc, char** argv, std::vector<Option>& table) {
    std::set<std::string> given;
    for (int i = 1; i < argc; i++) {
        std::string name = argv[i], value;
        size_t equals = name.find('=');
        bool has_value = equals != std::string::npos && name.compare(0, 2, "--") == 0;
        if (has_value) value = name.substr(equals + 1), name = name.substr(0, equals);
        const Option* option = nullptr;
        std::string close;
        for (const Option& t : table) {
            if (name == t.name) option = &t;
            else if (name.size() > 3 && !strncmp(t.name, name.c_str(), name.size())) close += std::string(close.empty() ? "" : " or ") + t.name;
        }
        if (!option) fail("unknown option %s%s%s; see --help", printable(name).c_str(), close.empty() ? "" : ", did you mean ", close.c_str());
        if (!given.insert(name).second) fail("%s is given twice", name.c_str());
        if (!option->value) {
            if (has_value) fail("%s takes no value", name.c_str());
            value = "1";
        } else if (!has_value) {
            bool next = i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0;
            if (!next && option->value[0] != '[') fail("%s needs a value: %s %s", name.c_str(), name.c_str(), option->value);
            if (next) value = argv[++i];
        }
        if (option->value && value.empty() && option->value[0] != '[') fail("%s needs a value: %s %s", name.c_str(), name.c_str(), option->value);
        set_option(*option, value);
    }
    return given;
}

static void print_help(const std::vector<Option>& table) {
    printf("usage: train_llama [options]\n");
    for (const Option& t : table) {
        if (t.section) printf("\n%s\n", t.section);
        std::string usual = t.usual ? t.usual : t.value ? to_text(t) : "";
        printf("  %-16s %-9s  %s%s%s%s\n", t.name, t.value ? t.value : "", t.help, usual.empty() ? "" : " (", usual.c_str(), usual.empty() ? "" : ")");
    }
    printf("\nPresets (named by parameters without embedding and head)\n  %-12s layers  dim heads kv   ffn batch  seq   lr\n", "name");
    for (const Preset& p : presets)
        printf("  %-12s %6d %4d %5d %2d %5d %5d %4d %g\n", p.name, p.layers, p.dim, p.heads, p.kv_heads, p.ffn, p.batch, p.seq, p.lr);
}

// The table as README.md shows it.
static void list_recipes(const std::string& changes) {
    std::vector<std::vector<std::string>> lines = {{"recipe", "fprop X", "fprop W", "dgrad D", "dgrad W", "wgrad D", "wgrad X", "blocks in bf16"}, {}};
    std::string about;
    for (Recipe r : recipes()) {
        set_cells(r, changes);
        lines.push_back({r.name});
        for (const Operand& c : r.cell) lines.back().push_back(cell_text(c));
        lines.back().push_back(r.last_share > 0 ? "last " + std::to_string((int)std::lround(100 * r.last_share)) + "%" : "");
        std::string error = recipe_error(r);
        about += "- `" + r.name + "`: " + (error.empty() ? r.about : "cannot be changed so, " + error) + "\n";
    }
    for (auto& line : lines) {
        for (size_t i = 0; i < lines[0].size(); i++) {
            size_t width = 0;
            for (auto& other : lines) width = std::max(width, i < other.size() ? other[i].size() : 0);
            std::string text = line.empty() ? std::string(width, '-') : line[i];
            printf("| %s%s ", text.c_str(), std::string(width - text.size(), ' ').c_str());
        }
        printf("|\n");
    }
    printf("\n%s", about.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------------
// From options to a run

// A run: the resolved options and everything the loop needs.
struct Run {
    Options o;
    Ctx ctx;
    Model model;
    Corpus train_data, val_data;
    Split train, val;
    Tokenizer tokenizer;
    std::vector<int> prompt;       // what samples begin with
    double peak = 0;               // measured matmul FLOP/s for this recipe's operands
    int64_t step = 0;              // optimiser steps done
    int bad_steps = 0;             // skipped in a row
    const Corpus& held_out() const { return o.val.empty() ? train_data : val_data; }
    int64_t tokens_per_step() const { return (int64_t)o.batch * o.seq * o.accum; }
};

static bool is_directory(const std::string& path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
}

// The model's shape from --model and the single dimensions. `weights`: a folder whose weights training starts from, or "".
static Config resolve_config(Options& o, const std::set<std::string>& given, int data_vocab, std::string& weights) {
    if (const Preset* preset = find_preset(o.model)) {
        const Preset& p = *preset;
        if (!o.vocab) o.vocab = data_vocab == 256 ? 256 : (data_vocab + 127) / 128 * 128;
        if (!o.batch) o.batch = p.batch;
        if (!o.seq) o.seq = p.seq;
        if (!o.lr) o.lr = p.lr;
        Config c = config_of(p, o.vocab);
        if (o.layers) c.layers = o.layers;
        if (o.dim) c.dim = o.dim;
        if (o.heads) c.heads = o.heads;
        if (o.kv_heads) c.kv_heads = o.kv_heads;
        if (o.ffn) c.ffn = o.ffn;
        if (c.dim % c.heads) fail("--dim %d is not a multiple of --heads %d", c.dim, c.heads);
        c.head_dim = c.dim / c.heads;
        return c;
    }
    std::string file = is_directory(o.model) ? o.model + "/config.json" : o.model;
    struct stat st;
    if (stat(file.c_str(), &st) != 0) {
        std::string names;
        for (const Preset& p : presets) names += std::string(names.empty() ? "" : ", ") + p.name;
        fail("--model %s is neither a preset (%s) nor a file or folder with a config.json", o.model.c_str(), names.c_str());
    }
    for (const char* name : {"--layers", "--dim", "--heads", "--kv-heads", "--ffn", "--vocab"})
        if (given.count(name)) fail("%s contradicts --model %s, which fixes it: edit the config.json instead", name, o.model.c_str());
    if (is_directory(o.model)) weights = o.model;
    Config c = read_config(file);
    if (!o.batch) o.batch = 8;
    if (!o.seq) o.seq = std::min(c.max_seq, 1024);
    if (!o.lr) o.lr = 3e-4;
    return c;
}

static void check_options(const Options& o, const std::set<std::string>& given) {
    auto one_of = [](const char* name, const std::string& value, std::vector<std::string> allowed) {
        std::string all;
        for (const std::string& a : allowed) {
            if (value == a) return;
            all += (all.empty() ? "" : ", ") + a;
        }
        fail("%s %s is not one of: %s", name, printable(value).c_str(), all.c_str());
    };
    one_of("--schedule", o.schedule, {"cosine", "wsd", "constant"});
    one_of("--moments", o.moments, {"f32", "bf16"});
    one_of("--recompute", o.recompute, {"none", "norms", "block"});
    one_of("--bf16-end-gemms", o.bf16_end_gemms, {"fprop", "all"});
    for (const char* name : {"--recipe", "--eval-recipe"}) {
        const std::string& row = name[2] == 'r' ? o.recipe : o.eval_recipe;
        if (!find_recipe(row) && (name[2] == 'r' || !row.empty())) fail("%s %s is not in the table; see --list-recipes", name, printable(row).c_str());
    }
    if (given.count("--bf16-end-gemms") && o.bf16_end == 0) fail("--bf16-end-gemms has no effect without --bf16-end X");
    if (o.eval_only && o.sample_only) fail("--eval-only contradicts --sample-only: run them one after the other");
    if (o.profile && (o.eval_only || o.sample_only)) fail("--profile contradicts %s: it profiles steps of training", o.eval_only ? "--eval-only" : "--sample-only");
    bool resuming = given.count("--resume");
    if (o.profile && !o.out.empty() && !resuming) fail("--profile writes nothing: leave --out away");
    if ((o.eval_only || o.sample_only) && !resuming && !is_directory(o.model))
        fail("%s needs trained weights: add --resume DIR, or --model with a folder that has model.safetensors", o.eval_only ? "--eval-only" : "--sample-only");
    if (o.out.empty() && !resuming)
        for (const char* name : {"--save-every", "--keep"})
            if (given.count(name)) fail("%s has no effect without --out DIR", name);
}

// The rows that the run's linear layers use, from --recipe, --set, --eval-recipe and the --bf16 options.
static Precision resolve_precision(Options& o) {
    Precision p(find_recipe(o.recipe));
    set_cells(p.recipe, o.set);
    check_recipe(p.recipe);
    for (const std::string& name : {o.recipe, o.eval_recipe})
        for (int i = 0; i < operand_count && !name.empty(); i++) {
            const Recipe& r = name == o.recipe ? p.recipe : *find_recipe(name);
            if (on_gpu && type_of<act_t>() == Type::bf16 && is_float_stored(r.cell[i].format))
                fail("recipe %s needs float activations, which this GPU build does not have: build with `make ACT=float`, or use --recipe bf16", name.c_str());
        }
    p.high = is_quantised(p.recipe) ? *find_recipe("bf16") : p.recipe;
    p.late = o.bf16_end_gemms == "all" ? p.high : p.recipe;
    p.late.cell[fprop_x] = p.high.cell[fprop_x], p.late.cell[fprop_w] = p.high.cell[fprop_w];
    p.end = o.bf16_end;
    p.eval_own = !o.eval_recipe.empty();
    p.eval = p.eval_own ? *find_recipe(o.eval_recipe) : p.recipe;
    for (Matrix matrix : {matrix_x, matrix_w}) {                                 // those that fprop multiplies
        bool wants = false, keeps = false;
        for (int i = 0; i < operand_count; i++)
            if (matrix_of[i] == matrix) wants = wants || (i <= fprop_w && p.eval.cell[i].split), keeps = keeps || p.recipe.cell[i].split;
        if (wants && !keeps) fail("--eval-recipe %s needs bases of %s, which a run by --recipe %s does not keep", o.eval_recipe.c_str(), matrix == matrix_x ? "X" : "W",
                                  (o.recipe + (o.set.empty() ? "" : " with --set " + o.set)).c_str());
    }
    if (o.bf16_last < 0) o.bf16_last = (int)std::lround(p.recipe.last_share * o.layers);
    p.first = o.bf16_first, p.last = o.bf16_last;
    for (auto [name, blocks] : {std::pair<const char*, int>{"--bf16-first", p.first}, {"--bf16-last", p.last}})
        if (blocks > o.layers) fail("%s %d: the model has %d blocks", name, blocks, o.layers);
    for (size_t at = 0, comma; at < o.bf16_layers.size(); at = comma + 1) {
        comma = std::min(o.bf16_layers.find(',', at), o.bf16_layers.size());
        std::string name = o.bf16_layers.substr(at, comma - at);
        int kind = 0;
        while (kind < 4 && name != linear_classes[kind]) kind++;
        if (kind == 4) fail("--bf16-layers %s: %s is not one of qkv, o, gate_up, down", o.bf16_layers.c_str(), name.c_str());
        p.kept[kind] = true;
    }
    return p;
}

// A Hadamard needs whole groups along the contracted axis: of every linear layer's in and out, and of the tokens.
static void check_shapes(const Options& o, const Precision& p, const Config& c) {
    std::pair<const char*, int64_t> widths[] = {{"--dim", c.dim}, {"heads x head size", (int64_t)c.heads * c.head_dim}, {"--ffn", c.ffn},
        {"the rows of qkv", ((int64_t)c.heads + 2 * c.kv_heads) * c.head_dim}}, tokens[] = {{"--batch x --seq", (int64_t)o.batch * o.seq}};
    auto check = [&](int i, const char* name, int64_t size) {
        int h = p.recipe.cell[i].hadamard;
        if (h && size % h)
            fail("the hadamard of %d in %s of recipe %s needs a multiple of %d, and %s is %lld", h, operand_names[i], p.recipe.name.c_str(), h, name, (long long)size);
    };
    for (auto [name, size] : widths)
        for (int i = 0; i < wgrad_d; i++) check(i, name, size);
    for (auto [name, size] : tokens) check(wgrad_d, name, size);
    int k = split_rank(p.recipe.split, c.dim);
    for (auto [name, size] : widths)
        if ((is_split(p.recipe) || is_split(p.eval)) && k > size)
            fail("a split of rank %d needs matrices at least as wide, and %s is %lld: lower %s, or widen the model", k, name, (long long)size, p.recipe.split.k ? "split.k" : "split.rank");
}

// Peak to min_lr: linear warmup, then the schedule. The step counts from 1.
static double learning_rate(const Options& o, int64_t step) {
    if (step <= o.warmup) return o.lr * step / o.warmup;
    double end = o.steps, at = step;
    if (o.schedule == "constant") return o.lr;
    if (o.schedule == "wsd") {
        double start = std::max<double>(o.warmup, std::floor(0.8 * end));
        return at <= start ? o.lr : o.lr + (o.min_lr - o.lr) * (at - start) / (end - start);
    }
    float s, c;
    sincos_((float)(M_PI * (at - o.warmup) / std::max<double>(1, end - o.warmup)), &s, &c);
    return o.min_lr + 0.5 * (o.lr - o.min_lr) * (1 + c);
}

// Sequence `index` of the run (counted over micro-batches and steps) is a window of the training split, every epoch in a new order.
static void training_batch(const Run& run, int64_t micro, std::vector<int>& tokens, std::vector<int>& targets) {
    const Options& o = run.o;
    tokens.resize((size_t)o.batch * o.seq), targets.resize((size_t)o.batch * o.seq);
    for (int b = 0; b < o.batch; b++) {
        int64_t index = micro * o.batch + b, epoch = index / run.train.count;
        Words w = philox({run.ctx.seed, 0, 0, 0, 0, Purpose::data_order}, (uint64_t)epoch);
        int64_t window = run.train.first + permuted(index % run.train.count, run.train.count, w.w[0] | (uint64_t)w.w[1] << 32);
        run.train_data.window(window, o.seq, &tokens[(size_t)b * o.seq], &targets[(size_t)b * o.seq]);
    }
}

// Mean loss in nats per token over the first --eval-batches of held-out windows, the same ones every time, spread over the split.
static double evaluate(Run& run) {
    Ctx& ctx = run.ctx;
    Model& m = run.model;
    const Options& o = run.o;
    int64_t windows = std::min<int64_t>((int64_t)o.eval_batches * o.batch, run.val.count);
    std::vector<int> tokens((size_t)o.batch * o.seq), targets((size_t)o.batch * o.seq);
    double total = 0;
    set_recipes(m, Use::evaluate, (double)run.step / o.steps);
    ctx.step = (uint32_t)run.step, ctx.micro = 0;                                // random signs are those of this step, in the run and of its checkpoint
    for (int64_t i = 0; i < windows; i += o.batch) {
        int B = (int)std::min<int64_t>(o.batch, windows - i);
        for (int b = 0; b < B; b++)
            run.held_out().window(run.val.first + (i + b) * run.val.count / windows, o.seq, &tokens[(size_t)b * o.seq], &targets[(size_t)b * o.seq]);
        set_zero(ctx, m.sums, 2 * sizeof(acc_t));
        forward(ctx, m, tokens.data(), B, o.seq);
        classify(ctx, m, targets.data(), (int64_t)B * o.seq, 0);
        acc_t sum;
        to_host(ctx, &sum, m.sums, sizeof sum);
        total += (double)sum;
    }
    return total / ((double)windows * o.seq);
}

static double print_evaluation(Run& run) {
    double loss = evaluate(run);
    printf("eval %lld/%lld | val loss %.9g", (long long)run.step, (long long)run.o.steps, loss);
    if (run.train_data.kind == Corpus::TEXT) printf(" | %.4f bits per byte", loss / M_LN2);
    printf("\n");
    fflush(stdout);
    return loss;
}

// What a shadow step found: the loss above bf16's on the same batch, the relative error and the cosine of the gradient, of all
// quantised weights together and of every tensor.
struct Shadow {
    double loss_gap = 0, error = 0, cosine = 0;
    std::vector<std::pair<double, double>> tensors;
};
struct StepResult {
    float loss, norm;
    bool skipped = false, shadowed = false;
    double shadow_seconds = 0;
    Shadow shadow;
    std::vector<Tally> tally;           // of every operand class; empty: not this step
};

// The mean loss of this step's micro-batches; their gradients, added up, in m.grads.
static float accumulate(Run& run, Use use) {
    Ctx& ctx = run.ctx;
    Model& m = run.model;
    const Options& o = run.o;
    int64_t N = (int64_t)o.batch * o.seq;
    std::vector<int> tokens, targets;
    set_recipes(m, use, (double)run.step / o.steps);
    set_zero(ctx, m.grads, m.arena * sizeof(acc_t));
    set_zero(ctx, m.sums, 2 * sizeof(acc_t));
    for (int i = 0; i < o.accum; i++) {
        ctx.step = (uint32_t)run.step, ctx.micro = (uint32_t)i;
        training_batch(run, run.step * o.accum + i, tokens, targets);
        forward(ctx, m, tokens.data(), o.batch, o.seq);
        classify(ctx, m, targets.data(), N, acc_t(1) / (N * o.accum));
        backward(ctx, m, tokens.data(), o.batch, o.seq);
    }
    acc_t sum;
    to_host(ctx, &sum, m.sums, sizeof sum);
    return (float)(sum / (N * o.accum));
}

// The same batch again in bf16, its gradient against the one in m.grads, which is there again afterwards. Nothing else changes.
static Shadow shadow_step(Run& run, float loss) {
    Ctx& ctx = run.ctx;
    Model& m = run.model;
    Shadow s;
    copy(ctx, m.shadow, m.grads, m.arena);
    s.loss_gap = (double)loss - accumulate(run, Use::reference);
    double all[3] = {};
    for (const Tensor& t : m.tensors) {
        int64_t n = (int64_t)t.size(), chunks = chunks_of(n);
        products(ctx, m.norm_partial, m.shadow + t.offset, m.grads + t.offset, n);
        std::vector<acc_t> parts(3 * chunks);
        to_host(ctx, parts.data(), m.norm_partial, parts.size() * sizeof(acc_t));
        double sums[3] = {};                                                    // q q, h h, q h: quantised and high
        for (int64_t i = 0; i < 3 * chunks; i++) sums[i / chunks] += parts[i];
        auto error = [](const double* p) { return std::sqrt(std::max(0., p[0] + p[1] - 2 * p[2]) / p[1]); };
        auto cosine = [](const double* p) { return p[2] / std::sqrt(p[0] * p[1]); };
        s.tensors.push_back({error(sums), cosine(sums)});
        for (int i = 0; i < 3 && t.quantised; i++) all[i] += sums[i];
        s.error = error(all), s.cosine = cosine(all);
    }
    copy(ctx, m.grads, m.shadow, m.arena);
    return s;
}

// One optimiser step over --accum micro-batches. A step whose loss or gradient is not finite changes nothing.
static StepResult train_step(Run& run, double lr) {
    Ctx& ctx = run.ctx;
    Model& m = run.model;
    const Options& o = run.o;
    bool tally = o.stats_every && (run.step + 1) % o.stats_every == 0 && is_quantised(m.precision.recipe);
    if (tally) set_zero(ctx, m.tally, operand_count * sizeof(Tally));
    m.operands.tally = tally ? m.tally : nullptr;
    StepResult r;
    r.loss = accumulate(run, Use::train);
    for_trained(m, [&](const Linear& lin) { factor_gradients(ctx, lin); });
    m.operands.tally = nullptr;
    if (tally) r.tally.resize(operand_count), to_host(ctx, r.tally.data(), m.tally, operand_count * sizeof(Tally));
    sum_squares(ctx, m.norm_partial, m.grads, m.arena);
    add_sum(ctx, m.sums + 1, m.norm_partial, chunks_of(m.arena));
    acc_t sums[2];
    to_host(ctx, sums, m.sums, sizeof sums);
    r.norm = (float)std::sqrt(sums[1]);
    if (!is_finite(r.loss) || !is_finite(r.norm)) {
        r.skipped = true;
        return r;
    }
    if (o.shadow_every && (run.step + 1) % o.shadow_every == 0) {
        double begin = seconds();
        r.shadow = shadow_step(run, r.loss), r.shadowed = true;
        r.shadow_seconds = seconds() - begin;
    }
    double t = (double)(run.step + 1);
    AdamW adam = {(acc_t)lr, acc_t(0.9), acc_t(0.95), acc_t(1e-8), 0, 1, (acc_t)(1 - std::pow(0.9, t)), (acc_t)(1 - std::pow(0.95, t))};
    if (o.clip > 0) adam.clip = std::min<acc_t>(1, (acc_t)(o.clip / (r.norm + 1e-6)));
    for (size_t i = 0; i < m.trained.size(); i++) adamw_step(ctx, m, i, adam, (acc_t)o.decay);
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Sampling

// The next token after logits (V): temperature, then top-k, then top-p, then one uniform draw. On the host: V is small beside a step.
static int draw(const Options& o, std::vector<acc_t>& logits, RandomKey key, uint64_t index) {
    std::vector<int> order(logits.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = (int)i;
    std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
    if (o.temperature == 0) return order[0];
    size_t n = o.top_k > 0 ? std::min<size_t>(o.top_k, order.size()) : order.size();
    std::vector<double> p(n);
    double total = 0, mass = 0;
    for (size_t i = 0; i < n; i++) total += p[i] = exp_((float)((logits[order[i]] - logits[order[0]]) / o.temperature));
    size_t kept = 0;
    while (kept < n && (kept == 0 || mass < o.top_p * total)) mass += p[kept++];
    double u = uniform(philox(key, index).w[0]) * mass;
    for (size_t i = 0; i < kept; i++)
        if ((u -= p[i]) < 0) return order[i];
    return order[kept - 1];
}

// Prints a sample. There is no key/value cache: every token runs the model over what precedes it, up to --seq tokens.
static void sample(Run& run) {
    const Options& o = run.o;
    Model& m = run.model;
    int V = m.config.vocab;
    std::vector<int> ids = run.prompt;
    std::vector<acc_t> logits(V);
    size_t prompt = ids.size();
    set_recipes(m, Use::evaluate, (double)run.step / o.steps);
    run.ctx.step = (uint32_t)run.step, run.ctx.micro = 0;
    for (int i = 0; i < o.sample_tokens; i++) {
        size_t first = ids.size() > (size_t)m.T ? ids.size() - m.T : 0, length = ids.size() - first;
        // Padding saves plans of matmuls, and attention, being causal, does not see it; but a tensor's scale and its split would.
        int T = is_quantised(m.precision.eval) ? (int)length : std::min<int>(m.T, (int)(length + 63) / 64 * 64);
        std::vector<int> window(ids.begin() + first, ids.end());
        window.resize(T, 0);
        forward(run.ctx, m, window.data(), 1, T);
        linear_forward(run.ctx, m.head, m.operands, m.logits, mat(m.h_final + (length - 1) * m.config.dim, m.config.dim), 1);
        to_host(run.ctx, logits.data(), m.logits, V * sizeof(acc_t));
        if (!std::all_of(logits.begin(), logits.end(), [](acc_t v) { return is_finite(v); })) {
            if (o.sample_only) fail("nothing to sample: the model's logits are not finite");
            printf("--- no sample: the model's logits are not finite\n");
            return;
        }
        RandomKey key = {run.ctx.seed, (uint32_t)run.step, 0, 0, 0, Purpose::sampling};
        ids.push_back(draw(o, logits, key, i));
        if (ids.back() == run.tokenizer.end) break;
    }
    std::string text = run.tokenizer.decode(std::vector<int>(ids.begin() + (o.prompt.empty() ? 1 : 0), ids.end()));
    printf("--- sample after step %lld, %zu tokens\n%s\n---\n", (long long)run.step, ids.size() - prompt, printable(text).c_str());
    fflush(stdout);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Reports: memory, machine, profile

// Bytes this process may still take.
static double available_memory() {
#ifdef __CUDACC__
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    return (double)free_bytes;
#else
    double available = 0;
    char line[256];
    if (FILE* f = fopen("/proc/meminfo", "r")) {
        while (fgets(line, sizeof line, f))
            if (sscanf(line, "MemAvailable: %lf", &available) == 1) break;
        fclose(f);
    }
    available *= 1024;
    double group[2] = {NAN, NAN};                                                // a container's limit, and what it has taken of it
    const char* files[] = {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"};
    for (int i = 0; i < 2; i++)
        if (FILE* f = fopen(files[i], "r")) {
            if (fscanf(f, "%lf", &group[i]) != 1) group[i] = NAN;                // "max": none
            fclose(f);
        }
    if (double left = group[0] - group[1]; left < available) available = std::max(left, 0.);
    return available;
#endif
}

// Beside the arenas: tiles of attention scores and the library's packing buffers of every thread; the program itself.
static double overhead_bytes(const Run& run, int T) {
    if (on_gpu) return 64e6;                                                    // free memory is counted after the context was made
    return 24e6 + run.ctx.threads * (2.0 * 64 * T * sizeof(acc_t) + 4e6);
}

static double planned_bytes(const Run& run, int B, bool train) {
    Model m;
    MemoryPlan p = measure(m, run.model.config, B, run.o.seq, run.model.recompute, run.model.precision, train, run.model.shadows,
                           run.model.moments);
    return p.total() + overhead_bytes(run, run.o.seq);
}

static void print_memory(const Run& run, bool train, FILE* to) {
    const MemoryPlan& p = run.model.plan;
    double total = p.total() + overhead_bytes(run, run.o.seq), available = available_memory();
    auto row = [&](const char* name, double bytes) { fprintf(to, "  %-14s %9.3f GB\n", name, bytes * 1e-9); };
    fprintf(to, "memory\n");
    row("parameters", p.parameters), row("gradients", p.gradients), row("optimiser", p.optimiser), row("activations", p.activations);
    row("scratch", p.scratch + p.tables), row("process", overhead_bytes(run, run.o.seq)), row("total", total), row("available", available);
    int64_t fits = 0;
    for (int64_t step = 1 << 20; step > 0; step /= 2)
        if ((double)(fits + step) * run.o.seq < 2e9 && planned_bytes(run, (int)(fits + step), train) <= available) fits += step;
    fprintf(to, "  largest --batch that fits: %lld\n", (long long)fits);
}

// FLOP/s of one large matmul with operands as this format is stored, and bytes/s (read and write) of a large copy: the ceilings.
static double measure_matmul(Ctx& ctx, Format format) {
    int64_t n = on_gpu ? 8192 : 1024, m = on_gpu ? 8192 : std::max<int64_t>(1024, 256 * ctx.threads);
    Type type = operand_type(format);
    size_t size_a = m * n * size_of(type), size_b = n * n * size_of(type), total = size_a + size_b + m * n * sizeof(acc_t);
    char* p = (char*)device_alloc(total, "measuring the matmul peak");
    // Random operands: zeros would flatter (less power drawn, higher clocks).
    RandomKey key = {1, 0, 0, 0, 0, Purpose::test};
    if (type == Type::bf16) initialise(ctx, (bf16*)p, m * n + n * n, 1, key);
    else initialise(ctx, (acc_t*)p, m * n + n * n, 1, key);
    double best = 1e9, begin = seconds();
    for (int i = 0; i < 50 && (i < 3 || seconds() - begin < 0.15); i++) {
        ctx.synchronise();
        double t = seconds();
        matmul(ctx, "peak", (acc_t*)(p + size_a + size_b), n, {p, type, n}, Mat{p + size_a, type, n}.transposed(), m, n, n, 0);
        ctx.synchronise();
        best = std::min(best, seconds() - t);
    }
    device_free(p, total);
    return 2.0 * m * n * n / best;
}

struct copy_rows;
static double measure_copy(Ctx& ctx) {
    const int64_t rows = on_gpu ? 65536 : 8192;
    const int cols = 4096;
    size_t bytes = rows * cols * sizeof(acc_t);
    acc_t* p = (acc_t*)device_alloc(2 * bytes, "measuring the copy bandwidth");
    acc_t* q = p + rows * cols;
    double best = 1e9;
    for (int i = 0; i < 6; i++) {
        ctx.synchronise();
        double t = seconds();
        for_rows<copy_rows, 256>(ctx, {}, rows, KERNEL(Group<256> g, int64_t r) {
            g.map(cols, [](acc_t& o, acc_t v) { o = v; }, out(q + r * cols), (const acc_t*)p + r * cols);
        });
        ctx.synchronise();
        if (i > 0) best = std::min(best, seconds() - t);
    }
    device_free(p, 2 * bytes);
    return 2.0 * bytes / best;
}

static void print_profile(Run& run, int64_t steps) {
    double peak = run.peak, copy = measure_copy(run.ctx), total = 0;
    std::vector<Profiler::Row> rows = run.ctx.profiler.rows;
    std::sort(rows.begin(), rows.end(), [](auto& a, auto& b) { return a.seconds > b.seconds; });
    for (auto& r : rows) total += r.seconds;
    printf("profile of %lld step%s: %.1f ms of kernels a step; ceilings measured: matmul %.0f GFLOP/s, copy %.1f GB/s\n", (long long)steps, steps == 1 ? "" : "s",
           1e3 * total / steps, peak * 1e-9, copy * 1e-9);
    printf("  %-26s %8s %10s %6s %9s %6s %10s %6s\n", "kernel", "calls", "ms/step", "share", "GB/s", "% copy", "GFLOP/s", "% peak");
    for (auto& r : rows)
        printf("  %-26s %8.1f %10.3f %5.1f%% %9.2f %5.0f%% %10.1f %5.0f%%\n", r.name, (double)r.calls / steps, 1e3 * r.seconds / steps,
               100 * r.seconds / total, 1e-9 * r.bytes / r.seconds, 100 * r.bytes / r.seconds / copy, 1e-9 * r.flops / r.seconds,
               100 * r.flops / r.seconds / peak);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Checkpoints and the log

// Every option that outlives this invocation, by name, as text.
static nlohmann::ordered_json saved_options(Options& o) {
    nlohmann::ordered_json j = nlohmann::ordered_json::object();
    for (const Option& t : option_table(o))
        if (t.lives != Lives::here) j[t.name + 2] = to_text(t);
    return j;
}

// As safetensors calls it.
static const char* stored_type(Type moments) { return moments == Type::bf16 ? "BF16" : "F32"; }

static void save(Run& run, FILE* log) {
    Model& m = run.model;
    fsync(fileno(log));                                                          // a checkpoint never outlives the log of its steps
    std::vector<float> buffer;
    auto source = [&](const acc_t* arena) -> FloatSource {
        return [&, arena](size_t first, size_t count) {
            if (!on_gpu) return (const float*)(arena + first);
            buffer.resize(count);
            to_host(run.ctx, buffer.data(), arena + first, count * sizeof(float));
            return (const float*)buffer.data();
        };
    };
    bool half = m.moments == Type::bf16;
    std::vector<bf16> stored;
    auto moment = [&](const void* arena) -> FloatSource {
        if (!half) return source((const acc_t*)arena);
        return [&, arena](size_t first, size_t count) {
            stored.resize(count), buffer.resize(count);
            to_host(run.ctx, stored.data(), (const bf16*)arena + first, count * sizeof(bf16));
            for (size_t i = 0; i < count; i++) buffer[i] = load(&stored[i]);
            return (const float*)buffer.data();
        };
    };
    // model.safetensors holds W as everybody else knows it: merged, a whole tensor at a time, when its first piece is asked for.
    const Linear* merged = nullptr;
    auto weights = [&, plain = source(m.params), whole = source(m.operands.merged)](size_t first, size_t count) {
        const Linear* of = nullptr;
        for_trained(m, [&](const Linear& lin) { if (lin.w <= m.params + first && m.params + first < lin.w + lin.in * lin.out) of = &lin; });
        if (of && of != merged) merge_factors(run.ctx, m.operands.merged, *of, 1);
        merged = of;
        return of ? whole(m.params + first - of->w, count) : plain(first, count);
    };
    nlohmann::ordered_json state = {{"options", saved_options(run.o)}, {"bad_steps", run.bad_steps}, {"build", BUILD},
        {"data", std::to_string(run.train_data.fingerprint())}};
    std::vector<CheckpointFile> files = {
        {"model.safetensors", tensor_entries(m.tensors, {{"", weights}})},
        {"optimizer.safetensors", tensor_entries(m.trained, {{".exp_avg", moment(m.m)}, {".exp_avg_sq", moment(m.v)}}, stored_type(m.moments))}};
    if (m.k) files.push_back({"bases.safetensors", tensor_entries(m.bases, {{"", source(m.basis)}})});
    if (!m.factors.empty()) files.push_back({"factors.safetensors", tensor_entries(m.factors, {{"", source(m.params)}})});
    std::string dir = save_checkpoint(run.o.out, run.step, write_config(m.config), files, state);
    prune_checkpoints(run.o.out, run.o.keep);
    printf("saved %s\n", dir.c_str());
}

template <class T> FloatSink sink(Ctx& ctx, T* arena) {
    return [&ctx, arena](size_t first, const float* values, size_t count) {
        std::vector<T> converted(count);
        for (size_t i = 0; i < count; i++) store(&converted[i], values[i]);
        to_device(ctx, arena + first, converted.data(), count * sizeof(T));
    };
}
static FloatSink moment_sink(Run& run, void* arena) {
    return run.model.moments == Type::bf16 ? sink(run.ctx, (bf16*)arena) : sink(run.ctx, (acc_t*)arena);
}

static FILE* open_log(Run& run) {
    std::string path = run.o.out + "/log.jsonl";
    struct stat st;
    if (stat(path.c_str(), &st) == 0) truncate_log(path, run.step);
    else {
        nlohmann::ordered_json first = {{"options", saved_options(run.o)}, {"build", BUILD}, {"machine", MatmulPlans::library()}};
        write_file_atomically(path, first.dump() + "\n");
    }
    FILE* log = fopen(path.c_str(), "a");
    if (!log) fail("cannot append to %s: %s", path.c_str(), strerror(errno));
    return log;
}

__attribute__((format(printf, 2, 3))) static void log_line(FILE* log, const char* format, ...) {
    if (!log) return;
    va_list args;
    va_start(args, format);
    int n = vfprintf(log, format, args);
    va_end(args);
    if (n < 0 || fflush(log) != 0) fail("cannot write log.jsonl: %s; free space, then go on with --resume", strerror(errno));
}

// JSON has no NaN.
static std::string json_number(double v) {
    char text[32];
    snprintf(text, sizeof text, "%.9g", v);
    return is_finite(v) ? text : "null";
}

// Ctrl-C and SIGTERM ask the loop to finish its step, save and exit. A second Ctrl-C kills. (A signal handler can reach nothing
// but static storage.)
static volatile sig_atomic_t stop_requested = 0;
static void request_stop(int) { stop_requested = 1; }

// "a.txt,b/*.bin" with every path made absolute, so that a run can be resumed from anywhere.
static std::string absolute(const std::string& spec) {
    std::string all;
    for (size_t at = 0, comma; at <= spec.size() && !spec.empty(); at = comma + 1) {
        comma = std::min(spec.find(',', at), spec.size());
        if (comma == at) fail("there is an empty name in \"%s\"", spec.c_str());
        all += (at ? "," : "") + std::filesystem::absolute(spec.substr(at, comma - at)).lexically_normal().string();
    }
    return all;
}

// A run's folder belongs to the one process that trains in it: two would delete each other's checkpoints and mix their logs. The lock
// is on the folder itself, which no rename replaces; it is never given back, so it ends with the process, however that ends. A file
// system that cannot lock a folder (NFS) refuses for another reason, and is trusted.
static void lock_folder(const std::string& dir) {
    int fd = open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) fail("cannot open %s: %s", dir.c_str(), strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        fail("another process is training in %s: wait for it or stop it, or start a new run in another folder", dir.c_str());
}

// The options of the run to resume, from its newest checkpoint or, if it was killed before the first, from its log. Sets o.out,
// returns the checkpoint's folder ("" for a fresh start of the same run) and fills `state`. `writes`: locks the run before it looks.
static std::string find_run(Options& o, nlohmann::ordered_json& state, bool writes) {
    std::string dir = o.resume.empty() ? o.out : o.resume;
    if (dir.empty()) fail("--resume needs the run's folder: --resume DIR, or --out DIR --resume");
    while (dir.size() > 1 && dir.back() == '/') dir.pop_back();
    if (!is_directory(dir)) fail("nothing to resume: %s is not a folder", dir.c_str());
    std::string checkpoint;
    if (checkpoint_step(dir) >= 0) checkpoint = dir, dir = folder_of(dir);
    if (!o.out.empty() && !o.resume.empty() && absolute(o.out) != absolute(dir)) fail("--out %s contradicts --resume %s: leave --out away", o.out.c_str(), o.resume.c_str());
    o.out = dir;
    if (writes) lock_folder(dir);
    if (checkpoint.empty()) checkpoint = latest_checkpoint(dir);
    if (!checkpoint.empty()) {
        state = open_checkpoint(checkpoint);
        return checkpoint;
    }
    std::string path = dir + "/log.jsonl";
    struct stat st;
    if (stat(path.c_str(), &st) != 0) fail("nothing to resume in %s: it has no checkpoint and no log.jsonl", dir.c_str());
    MappedFile log(path);
    const uint8_t* end = std::find(log.data, log.data + log.size, '\n');
    state = nlohmann::ordered_json::parse(log.data, end, nullptr, false);
    if (!state.is_object() || !state["options"].is_object()) fail("%s is damaged: its first line should be the options of the run", path.c_str());
    return "";
}

// Takes over a saved run's options. One that is part of the trajectory and was given with another value is an error.
static void adopt_options(const std::vector<Option>& table, const std::set<std::string>& given, const nlohmann::ordered_json& saved) {
    for (const Option& t : table) {
        if (t.lives == Lives::here) continue;
        auto it = saved.find(t.name + 2);
        if (it == saved.end() || !it->is_string()) fail("the checkpoint does not know %s: it was written by another version", t.name);
        std::string value = it->get<std::string>();
        bool was_given = given.count(t.name);
        if (was_given && t.lives == Lives::run && value != to_text(t))
            fail("%s %s contradicts the run to resume, which has %s: leave it away, or start a new run", t.name, to_text(t).c_str(), value.empty() ? "none" : value.c_str());
        if (!was_given) set_option(t, value);
    }
}

// An empty or new folder for a new run.
static void claim_folder(const std::string& out) {
    std::error_code ec;
    std::filesystem::create_directories(out, ec);
    if (ec || !is_directory(out)) fail("cannot create --out %s: %s", out.c_str(), ec ? ec.message().c_str() : "it is not a folder");
    lock_folder(out);
    unlink((out + "/log.jsonl.tmp").c_str());                                   // a run killed before it had begun
    if (!std::filesystem::is_empty(out, ec)) fail("--out %s is not empty: add --resume to go on with the run in it, or name a new folder", out.c_str());
    if (access(out.c_str(), W_OK) != 0) fail("cannot write to --out %s: %s", out.c_str(), strerror(errno));
}

// ---------------------------------------------------------------------------------------------------------------------------
// The run

// Which GEMMs of which layers run in which format, how, and the share of the step's FLOPs in 4 bits.
static void report_precision(const Run& run) {
    const Model& m = run.model;
    const Precision& p = m.precision;
    const Recipe& r = p.recipe;
    int layers = m.config.layers;
    if (run.o.set.empty()) printf("recipe   | %s: %s\n", r.name.c_str(), r.about.c_str());
    else printf("recipe   | %s with %s\n", r.name.c_str(), run.o.set.c_str());
    if (is_split(r)) printf("         | split: rank %d of a width of %d (%.1f%%)\n", m.k, m.config.dim, 100. * m.k / m.config.dim);
    if (!is_quantised(r)) return;
    const char* gemms[] = {"fprop", "dgrad", "wgrad"};
    for (int g = 0; g < 3; g++) {
        const Operand &a = r.cell[2 * g], &b = r.cell[2 * g + 1];
        bool quantised = is_quantised(a.format) || is_quantised(b.format);
        int native = 0;                                                          // of a block's four linear layers
        for (const Linear* lin : m.linears[0].all) {
            int64_t rows = (int64_t)run.o.batch * run.o.seq, of[3][3] = {{rows, lin->out, lin->in}, {rows, lin->in, lin->out}, {lin->out, lin->in, rows}};
            native += runs_natively(run.ctx, r, Which(2 * g), of[g][0], of[g][1], of[g][2], g == 2 ? type_of<acc_t>() : type_of<act_t>(), g == 2);
        }
        std::string natively = native == 4 ? "natively" : "natively in " + std::to_string(native) + " of a block's 4 linear layers, else emulated exactly as a bf16 GEMM";
        printf("         | %s: %s %s, %s %s; %s\n", gemms[g], g ? "D" : "X", cell_text(a).c_str(), g == 2 ? "X" : "W", cell_text(b).c_str(),
               !quantised ? "as they are" : is_float_stored(a.format) ? "multiplied as float: float scales fit no bf16"
               : native ? natively.c_str() : MatmulPlans::bf16_units() ? "emulated exactly as a bf16 GEMM" : "emulated exactly as a float GEMM (faster here than bf16)");
    }
    int64_t high = 0;
    double four = 0, tokens = (double)run.tokens_per_step();
    for (int l = 0; l < layers; l++)
        for (int kind = 0; kind < 4; kind++) {
            const Linear& lin = *m.linears[l].all[kind];
            const Recipe* row = recipe_of(p, layers, l, kind, Use::train, 0);
            high += row == &p.high;
            for (int g = 0; g < 3; g++) four += is_4bit(row->cell[2 * g].format) && is_4bit(row->cell[2 * g + 1].format) ? 2 * tokens * lin.in * lin.out : 0;
        }
    printf("         | bf16: the head");
    if (high) printf(" and %lld of %d linear layers", (long long)high, 4 * layers);
    if (p.first) printf(", of the first %d block%s", p.first, p.first > 1 ? "s" : "");
    if (p.last) printf(", of the last %d block%s", p.last, p.last > 1 ? "s" : "");
    for (int kind = 0; kind < 4; kind++)
        if (p.kept[kind]) printf(", every %s", linear_classes[kind]);
    if (p.end > 0) printf("; from step %lld %s", (long long)std::ceil((1 - p.end) * run.o.steps) + 1, run.o.bf16_end_gemms == "all" ? "everything" : "all fprop");
    if (!m.factors.empty()) printf("; W_R, U, s and V are trained: %.2fM parameters more", (parameter_count(m.trained) - parameter_count(m.tensors)) * 1e-6);
    printf("\n         | %.1f%% of the step's FLOPs in 4 bits\n", 100 * four / (flops_per_token(m.config, run.o.seq) * tokens));
}

static void report(Run& run, const std::string& checkpoint) {
    const Options& o = run.o;
    const Config& c = run.model.config;
#ifdef __CUDACC__
    cudaDeviceProp device;
    CUDA(cudaGetDeviceProperties(&device, 0));
    printf("machine  | %s (sm_%d%d), %s", device.name, device.major, device.minor, MatmulPlans::library());
#else
    printf("machine  | CPU, %d thread%s, %s", run.ctx.threads, run.ctx.threads == 1 ? "" : "s", MatmulPlans::library());
#endif
    printf(", bf16 operands %s; matmul peak %.0f GFLOP/s (measured, %s)\n", MatmulPlans::bf16_units() ? "multiplied natively" : "held as float (faster here)",
           run.peak * 1e-9, o.recipe.c_str());
    printf("model    | %s: %d layers, dim %d, %d/%d heads of %d, ffn %d, vocab %d; %.2fM parameters, %.2fM without embedding and head\n", o.model.c_str(),
           c.layers, c.dim, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab, parameter_count(run.model.tensors) * 1e-6,
           parameter_count(run.model.tensors, true) * 1e-6);
    report_precision(run);
    printf("data     | %s: %s, %.2fM tokens, %lld windows of %d to train on, %lld held out%s\n", o.data.c_str(), Corpus::format(run.train_data.kind).name,
           run.train_data.tokens * 1e-6, (long long)run.train.count, o.seq, (long long)run.val.count, o.val.empty() ? "" : " from --val");
    if (run.train_data.kind == Corpus::TEXT && c.vocab == 256) printf("         | tokens are bytes: bits per byte = loss / ln 2\n");
    printf("schedule | %lld steps of %lld tokens (%.2f epochs), lr %g to %g, %s, %lld warmup steps%s\n", (long long)o.steps, (long long)run.tokens_per_step(),
           (double)o.steps * o.batch * o.accum / run.train.count, o.lr, o.min_lr, o.schedule.c_str(), (long long)o.warmup,
           run.model.moments == Type::bf16 ? "; m and v in bf16" : "");
    printf("memory   | %.2f GB of %.2f GB available; %.1f GFLOP a step\n", (run.model.plan.total() + overhead_bytes(run, o.seq)) * 1e-9,
           available_memory() * 1e-9, flops_per_token(c, o.seq) * run.tokens_per_step() * 1e-9);
    if (!o.out.empty()) printf("output   | %s%s%s\n", o.out.c_str(), checkpoint.empty() ? "" : ", resumed from ", checkpoint.c_str());
}

static std::string duration(double s) {
    char text[32];
    if (s < 60) snprintf(text, sizeof text, "%.0fs", s);
    else if (s < 3600) snprintf(text, sizeof text, "%dm%02ds", (int)s / 60, (int)s % 60);
    else snprintf(text, sizeof text, "%dh%02dm", (int)(s / 3600), (int)s / 60 % 60);
    return text;
}

// The lines of log.jsonl that not every step has. shadow_tensors: relative error and cosine of each tensor's gradient; quant: per
// operand class, over sampled tiles, the relative error, and the shares of elements that became zero and that met the largest code.
static void log_details(const Run& run, FILE* log, const StepResult& r) {
    auto pair = [](double a, double b) { return "[" + json_number(a) + "," + json_number(b) + "]"; };
    if (r.shadowed) {
        std::string tensors;
        for (size_t i = 0; i < r.shadow.tensors.size(); i++)
            tensors += (i ? ",\"" : "\"") + run.model.tensors[i].name + "\":" + pair(r.shadow.tensors[i].first, r.shadow.tensors[i].second);
        log_line(log, "{\"step\":%lld,\"shadow_loss_gap\":%s,\"shadow_grad_rel_err\":%s,\"shadow_grad_cos\":%s,\"shadow_tensors\":{%s}}\n", (long long)run.step,
                 json_number(r.shadow.loss_gap).c_str(), json_number(r.shadow.error).c_str(), json_number(r.shadow.cosine).c_str(), tensors.c_str());
    }
    std::string classes;
    for (size_t i = 0; i < r.tally.size(); i++) {
        const Tally& t = r.tally[i];
        if (t.count == 0) continue;                                              // not quantised
        classes += std::string(classes.empty() ? "\"" : ",\"") + operand_names[i] + "\":{\"error\":" + json_number(t.energy > 0 ? std::sqrt(t.error / t.energy) : 0) +
                   ",\"zero\":" + json_number(t.zero / t.count) + ",\"saturated\":" + json_number(t.saturated / t.count) +
                   (is_carried(run.model.precision.recipe.cell[i]) ? ",\"lost\":" + json_number(t.lost / t.count) : "") + "}";
    }
    if (!classes.empty()) log_line(log, "{\"step\":%lld,\"quant\":{%s}}\n", (long long)run.step, classes.c_str());
}

// Trains from run.step to --steps, or profiles: one step that warms caches and plans, then --profile steps, or what is left of them.
static void train(Run& run, FILE* log) {
    const Options& o = run.o;
    const int stop_after = 10;                                                   // non-finite steps in a row
    double flops = flops_per_token(run.model.config, o.seq) * run.tokens_per_step(), average = 0;
    struct sigaction action = {};
    action.sa_handler = request_stop;
    action.sa_flags = SA_RESETHAND | SA_RESTART;                                // or a write that waits would lose its line
    sigaction(SIGINT, &action, nullptr), sigaction(SIGTERM, &action, nullptr);
    signal(SIGXFSZ, SIG_IGN);                                                    // a file-size limit is an error from write(), with its line
    int64_t last = o.profile ? std::min(o.steps, run.step + 1 + o.profile) : o.steps, first = run.step + 1;
    while (run.step < last && !stop_requested) {
        run.ctx.profiler.on = o.profile && run.step >= first;
        double begin = seconds(), lr = learning_rate(o, run.step + 1);
        StepResult r = train_step(run, lr);
        run.ctx.synchronise();
        double s = seconds() - begin - r.shadow_seconds;
        run.ctx.profiler.on = false;
        run.step++;
        run.bad_steps = r.skipped ? run.bad_steps + 1 : 0;
        average = average == 0 || run.step == first + 1 ? s : 0.9 * average + 0.1 * s;   // the first step also makes plans

        std::string shadow;
        if (r.shadowed) {
            char text[128];
            snprintf(text, sizeof text, " | shadow: loss %+.4f, gradient error %.4f, cosine %.4f", r.shadow.loss_gap, r.shadow.error, r.shadow.cosine);
            shadow = text;
        }
        printf("step %lld/%lld | loss %.9g | norm %.4g | lr %.3g | %.0f ms | %.0f tok/s | %s of peak | eta %s%s%s\n", (long long)run.step, (long long)o.steps,
               r.loss, r.norm, lr, s * 1e3, run.tokens_per_step() / s, run.peak > 0 ? (std::to_string((int)(100 * flops / s / run.peak + 0.5)) + "%").c_str() : "n/a",
               duration(average * (o.steps - run.step)).c_str(), shadow.c_str(), r.skipped ? " | NOT FINITE, step skipped" : "");
        fflush(stdout);
        log_line(log, "{\"step\":%lld,\"loss\":%s,\"lr\":%.9g,\"grad_norm\":%s,\"ms\":%.3f,\"tokens_per_s\":%.1f%s}\n", (long long)run.step, json_number(r.loss).c_str(),
                 lr, json_number(r.norm).c_str(), s * 1e3, run.tokens_per_step() / s, r.skipped ? ",\"skipped\":true" : "");
        if (log) log_details(run, log, r);
        if (run.bad_steps >= stop_after)
            fail("loss or gradient was not finite %d steps in a row: start a new run with a lower --lr (%g) or a longer --warmup, and check the data", stop_after, o.lr);
        if (o.profile) continue;

        bool end = run.step == o.steps;
        if (end || (o.eval_every && run.step % o.eval_every == 0))
            log_line(log, "{\"step\":%lld,\"val_loss\":%s}\n", (long long)run.step, json_number(print_evaluation(run)).c_str());
        if (o.sample_tokens && (end || (o.sample_every && run.step % o.sample_every == 0))) sample(run);
        if (log && (end || stop_requested || (o.save_every && run.step % o.save_every == 0))) save(run, log);
    }
    if (stop_requested && run.step < last)
        printf("stopped after step %lld%s\n", (long long)run.step, log ? ": go on with --resume" : "; nothing was saved (no --out)");
    if (o.profile && run.step > first) print_profile(run, run.step - first);
}

#ifndef __CUDACC__
// libgomp's waiting threads spin for milliseconds before they sleep. Alone on the machine that is free; beside another busy process
// the spinner holds the core that its own peer is waiting for, and a step takes 10 times as long. Some microseconds of spinning
// keep the speed without that (dev/LOG.md). The library reads its environment before main, hence the second start.
static void calm_openmp(char** argv) {
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    setenv("GOMP_SPINCOUNT", "2000", 1);
    execv("/proc/self/exe", argv);                                              // if it fails we go on as we are
}
#else
static void calm_openmp(char**) {}
#endif

int main(int argc, char** argv) {
    calm_openmp(argv);
    Run run;
    Options& o = run.o;
    Ctx& ctx = run.ctx;
    std::vector<Option> table = option_table(o);
    std::set<std::string> given = parse(argc, argv, table);
    if (o.help) return print_help(table), 0;
    if (o.list_recipes) return list_recipes(o.set), 0;
    bool resuming = given.count("--resume"), training = !o.eval_only && !o.sample_only;
    o.data = absolute(o.data), o.val = absolute(o.val), o.tokenizer = absolute(o.tokenizer);
    if (!find_preset(o.model) && access(o.model.c_str(), F_OK) == 0) o.model = absolute(o.model);
    while (o.out.size() > 1 && o.out.back() == '/') o.out.pop_back();

    nlohmann::ordered_json state;
    std::string checkpoint;
    if (resuming) {
        checkpoint = find_run(o, state, training && !o.dry_run && !o.profile);
        adopt_options(table, given, state["options"]);
        if (!checkpoint.empty()) run.step = checkpoint_step(checkpoint);
        else if (!training) fail("%s has no checkpoint yet: there is nothing to %s", o.out.c_str(), o.eval_only ? "evaluate" : "sample");
    }
    if (!resuming && !training && !given.count("--recipe")) o.recipe = "bf16";   // weights alone have no bases
    check_options(o, given);
    if (o.profile && o.steps - run.step < 2)
        fail("nothing to profile: the first step only warms up, and --steps %lld leaves %lld; %s", (long long)o.steps, (long long)(o.steps - run.step),
             resuming ? "resume an older checkpoint, or profile a new run" : "raise --steps");
    if (o.threads > std::max(64, 4 * omp_get_num_procs())) fail("--threads %d: this machine has %d cores; leave it away", o.threads, omp_get_num_procs());
    ctx.threads = o.threads ? o.threads : on_gpu ? 1 : omp_get_num_procs();
    ctx.seed = (uint64_t)o.seed;
#ifdef __CUDACC__
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) fail("this is the GPU build and no GPU answers: build for the CPU with `make GPU=0`");
    CUDA(cudaStreamCreate(&ctx.stream));
    if (o.graphs) ctx.graphs = std::make_shared<Graphs>();
#else
    if (o.graphs) fail("--graphs is for the GPU build: a CPU starts its loops itself");
#endif
    ctx.plans = std::make_shared<MatmulPlans>(ctx);

    // Data, then the model's shape (its vocabulary may come from the data), then the split (its windows come from --seq).
    struct stat st;
    if (!given.count("--data") && stat(o.data.c_str(), &st) != 0)
        fail("there is no %s yet: `make run` writes it, or name your own text with --data FILE", o.data.c_str());
    run.train_data = Corpus::open(o.data, o.vocab);
    if (!o.val.empty()) run.val_data = Corpus::open(o.val, o.vocab);
    if (!o.val.empty() && run.val_data.kind != run.train_data.kind) fail("--val holds %s, --data holds %s: give data of one kind",
        Corpus::format(run.val_data.kind).name, Corpus::format(run.train_data.kind).name);
    std::string weights;
    Config config = checkpoint.empty() ? resolve_config(o, given, run.train_data.vocab, weights) : read_config(checkpoint + "/config.json");
    check_config(config);
    o.layers = config.layers, o.dim = config.dim, o.heads = config.heads, o.kv_heads = config.kv_heads, o.ffn = config.ffn, o.vocab = config.vocab;
    if (run.train_data.vocab > config.vocab) fail("the data's vocabulary of %d is larger than the model's %d: give --vocab %d, or other data",
        run.train_data.vocab, config.vocab, config.vocab);
    if (o.min_lr < 0) o.min_lr = o.lr / 10;
    if (o.min_lr > o.lr) fail("--min-lr %g is above --lr %g", o.min_lr, o.lr);
    if (o.warmup < 0) o.warmup = o.steps / 20;
    if (o.warmup > o.steps) fail("--warmup %lld is longer than --steps %lld", (long long)o.warmup, (long long)o.steps);
    if (o.seq > config.max_seq) fail("--seq %d is over the model's %d positions", o.seq, config.max_seq);
    run.train = o.val.empty() ? run.train_data.training(o.seq) : run.train_data.all(o.seq);
    run.val = o.val.empty() ? run.train_data.held_out(o.seq) : run.val_data.all(o.seq);
    bool text = run.train_data.kind == Corpus::TEXT;
    if (text && !o.tokenizer.empty()) fail("--tokenizer contradicts --data %s: it is text, whose tokens are bytes", o.data.c_str());
    if (!text && o.tokenizer.empty()) {
        if (o.sample_only || !o.prompt.empty()) fail("%s needs --tokenizer FILE: the data are token ids", o.sample_only ? "--sample-only" : "--prompt");
        o.sample_tokens = 0;                                                     // ids say nothing to people
    }
    if (!o.tokenizer.empty()) run.tokenizer = Tokenizer::open(o.tokenizer);
    run.prompt = o.prompt.empty() ? std::vector<int>{run.tokenizer.begin} : run.tokenizer.encode(o.prompt);
    for (int id : run.prompt)
        if (o.sample_tokens && id >= config.vocab) fail("samples would begin with token %d, beyond the model's vocabulary of %d: give another --prompt", id, config.vocab);

    // Memory: planned, shown or refused, allocated.
    Recompute recompute = o.recompute == "block" ? Recompute::block : o.recompute == "norms" ? Recompute::norms : Recompute::none;
    Precision precision = resolve_precision(o);
    check_shapes(o, precision, config);
    if ((o.eval_only || o.sample_only) && !resuming && is_split(precision.eval))
        fail("recipe %s needs bases, which only the checkpoint of a run by it has: give --resume DIR, or another --recipe", precision.eval.name.c_str());
    measure(run.model, config, o.batch, o.seq, recompute, precision, training, o.shadow_every > 0, o.moments == "bf16" ? Type::bf16 : type_of<acc_t>());
    double needed = run.model.plan.total() + overhead_bytes(run, o.seq), disk = 4.0 * (parameter_count(run.model.tensors) +
        parameter_count(run.model.bases) + parameter_count(run.model.factors)) + 2.0 * size_of(run.model.moments) * parameter_count(run.model.trained);
    if (o.dry_run) {
        print_memory(run, training, stdout);
        printf("compute\n  %-14s %9.3f TFLOP a step (6 per weight and token, and causal attention)\n", "training", flops_per_token(config, o.seq) * run.tokens_per_step() * 1e-12);
        printf("disk\n  %-14s %9.3f GB each, %.3f GB at most with --keep %d\n", "checkpoint", disk * 1e-9, disk * (o.keep + 1) * 1e-9, o.keep);
        return 0;
    }
    if (needed > available_memory()) {
        print_memory(run, training, stderr);
        fail("this run does not fit: lower --batch (and raise --accum), shorten --seq, or use --recompute block%s",
             training && o.moments == "f32" ? " or --moments bf16" : "");
    }
    if (resuming && training && state.contains("data") && state["data"] != std::to_string(run.train_data.fingerprint()))
        fail("%s is not the data this run was trained on: put the original back, or start a new run", o.data.c_str());
    run.peak = measure_matmul(ctx, precision.recipe.cell[fprop_x].format);
    allocate(ctx, run.model, training);

    if (!checkpoint.empty()) {
        run.bad_steps = state.value("bad_steps", 0);
        load_parameters(WeightFiles(checkpoint), run.model.tensors, sink(ctx, run.model.params));
        if (training) load_tensors(WeightFiles(checkpoint + "/optimizer.safetensors"), run.model.trained,
            {{".exp_avg", moment_sink(run, run.model.m)}, {".exp_avg_sq", moment_sink(run, run.model.v)}}, stored_type(run.model.moments));
        if (run.model.k) load_tensors(WeightFiles(checkpoint + "/bases.safetensors"), run.model.bases, {{"", sink(ctx, run.model.basis)}});
        if (!run.model.factors.empty()) load_tensors(WeightFiles(checkpoint + "/factors.safetensors"), run.model.factors, {{"", sink(ctx, run.model.params)}});
    } else {
        if (!weights.empty()) load_parameters(WeightFiles(weights), run.model.tensors, sink(ctx, run.model.params));
        else initialise(ctx, run.model);
        for_trained(run.model, [&](const Linear& lin) { split_weight(ctx, lin, run.model.operands); });
    }

    if (!o.out.empty() && !resuming && training) claim_folder(o.out);

    report(run, checkpoint);
    if (o.sample_only) return sample(run), 0;
    if (o.eval_only) {
        if (!is_finite(print_evaluation(run))) fail("the loss is not finite: the weights are damaged, or the recipe does not carry them");
        return 0;
    }
    FILE* log = nullptr;
    if (!o.out.empty() && !o.profile) {
        if (resuming) {
            remove_leftovers(o.out);
            for (const std::string& dir : remove_checkpoints_after(o.out, run.step)) 
                printf("resume   | removed %s: this run goes on from step %lld\n", dir.c_str(), (long long)run.step);
        }
        log = open_log(run);
    }
    if (run.step >= o.steps) printf("the run has already done its %lld steps\n", (long long)o.steps);
    train(run, log);
    if (log && fclose(log) != 0) fail("cannot write log.jsonl: %s", strerror(errno));
    return 0;
}
