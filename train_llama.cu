// train_llama.cu: the program. Data, the training loop, evaluation, sampling, checkpoints, logging.
//
//     make run                                   trains the default model on generated stories
//     ./train_llama --data my.txt --out run1     trains on your text, logs and checkpoints into run1/
//     ./train_llama --out run1 --resume          goes on where it stopped, bit for bit
//
// Read main() at the end, which goes from top to bottom: parse, resolve, plan memory, load, loop; then the training loop, from outside
// to inside:
//
//     train()                     until --steps: a step, its line, now and then an evaluation, a sample, a checkpoint
//         train_step()            gradients, their norm, AdamW
//             accumulate()        for each of --accum micro-batches: forward(), classify(), backward(), all three of llama.cuh
//
// The options are options.h, what is measured and counted is report.cuh.
//
// Exit status: 0 when the run is done, or was stopped by a signal and saved; 2 when something is refused, with one line on stderr that
// says what and how to mend it.
//
// A run is a function of its options, its data and the build: nothing that is computed depends on time, on the number of threads or on
// how often the run was stopped. Three things make that true: random numbers and the order of data are functions of (seed, step, ...)
// and have no state to save; every sum has a fixed order (llama.cuh); and a checkpoint holds all that a step reads (save()).
#include "data.h"           // Corpus, Split, permuted, Tokenizer, printable
#include "llama.cuh"        // Model, forward, classify, backward, adamw_step; checkpoint.h: save_checkpoint, open_checkpoint ...
#include "options.h"        // Options, option_table, parse, saved_options, adopt_options
#include "report.cuh"       // measure_matmul, available_memory, print_memory, report_precision, print_profile, list_recipes
#include <sys/file.h>       // flock
#include <csignal>          // sigaction

#ifndef BUILD               // the Makefile says: compiler, flags, commit
#define BUILD "unknown build"
#endif

// A run: the resolved options and everything the loop needs. There is one, in main(); functions take it in place of global state.
struct Run {
    Options o;
    Ctx ctx;                       // the machine, and step and micro-batch as random draws know them
    Model model;
    Corpus train_data, val_data;   // empty for --sample-only
    Split train, val;              // windows of seq + 1 tokens: to train on, and held out
    bool bytes = false;            // tokens are bytes
    Tokenizer tokenizer;
    std::vector<int> prompt;       // what samples begin with
    double peak = 0;               // measured matmul FLOP/s for this recipe's operands
    int64_t step = 0;              // optimiser steps done
    int bad_steps = 0;             // skipped in a row
    // Without --val the end of --data is held out: the same corpus, other windows.
    const Corpus& held_out() const { return o.val.empty() ? train_data : val_data; }
    int64_t tokens_per_step() const { return (int64_t)o.batch * o.seq * o.accum; }
};

// ---------------------------------------------------------------------------------------------------------------------------
// From options to a run. Everything that can be refused is refused here, cheap checks before slow ones, before a file is written.

// What can be judged by the options alone. After adopt_options(): a resumed run's options are judged like new ones.
// Names before combinations: a mistyped --schedule should not be reported as something else.
static void check_options(const Options& o, const std::vector<Option>& table, const std::set<std::string>& given) {
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
    auto known = [](const char* name, const std::string& row) {
        if (!find_recipe(row)) fail("%s %s is not in the table; see --list-recipes", name, printable(row).c_str());
    };
    // The row with its changes is judged here, and made once more by resolve_precision(): a mistyped cell should not be found only after
    // a large corpus has been scanned, nor hide behind a data file that is missing.
    known("--recipe", o.recipe);
    if (!o.eval_recipe.empty()) known("--eval-recipe", o.eval_recipe);
    Recipe row = *find_recipe(o.recipe);
    set_cells(row, o.set);
    check_recipe(row);
    if (given.count("--bf16-end-gemms") && o.bf16_end == 0) fail("--bf16-end-gemms has no effect without --bf16-end X");
    if (o.eval_only && o.sample_only) fail("--eval-only contradicts --sample-only: run them one after the other");
    const char* only = o.eval_only ? "--eval-only" : "--sample-only";
    if (o.profile && !o.trains()) fail("--profile contradicts %s: it profiles steps of training", only);
    bool resuming = given.count("--resume");
    if (o.profile && !o.out.empty() && !resuming) fail("--profile writes nothing: leave --out away");
    if (!o.trains() && !resuming && !is_directory(o.model))
        fail("%s needs trained weights: add --resume DIR, or --model with a folder that has model.safetensors", only);
    if (const Option* useless = find_useless(o, table, given)) fail("%s has no effect with %s: leave it away", useless->name, only);
    if (o.out.empty() && !resuming)
        for (const char* name : {"--save-every", "--keep"})
            if (given.count(name)) fail("%s has no effect without --out DIR", name);
}

// The machine: threads, or the GPU and its stream. More threads than a few times the cores are a mistake in a script; up to 64 are
// allowed on any machine, so that tests can show that they change no bit.
static void start_machine(Run& run) {
    const Options& o = run.o;
    Ctx& ctx = run.ctx;
    int cores = omp_get_num_procs();
    if (o.threads > std::max(64, 4 * cores)) fail("--threads %d: this machine has %d cores; leave it away", o.threads, cores);
    ctx.threads = o.threads ? o.threads : on_gpu ? 1 : cores;
    ctx.seed = (uint64_t)o.seed;
#ifdef __CUDACC__
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
        fail("this is the GPU build and no GPU answers: build for the CPU with `make GPU=0`");
    CUDA(cudaStreamCreate(&ctx.stream));
    if (o.graphs) ctx.graphs = std::make_shared<Graphs>();
#else
    if (o.graphs) fail("--graphs is for the GPU build: a CPU starts its loops itself");
#endif
    ctx.plans = std::make_shared<MatmulPlans>(ctx);
}

// A preset's shape, changed by single dimensions. data_vocab: of the data's kind. It is padded to a multiple of 128, which the head's
// GEMMs like: GPT-2's 50257 becomes 50304, LLaMA-3's 128256 is one already; 256 bytes stay 256. Ids of the padding are never targets:
// training only pushes their logits down.
static Config preset_config(Options& o, const Preset& p, int data_vocab) {
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

// The shape that a config.json says, or the one in a folder, whose weights training then starts from: `weights`, else left "".
static Config file_config(Options& o, const std::set<std::string>& given, std::string& weights) {
    bool folder = is_directory(o.model);
    std::string file = folder ? o.model + "/config.json" : o.model;
    struct stat st;
    if (stat(file.c_str(), &st) != 0) {
        std::string names;
        for (const Preset& p : presets) names += std::string(names.empty() ? "" : ", ") + p.name;
        fail("--model %s is neither a preset (%s) nor a file or folder with a config.json", o.model.c_str(), names.c_str());
    }
    for (const char* name : {"--layers", "--dim", "--heads", "--kv-heads", "--ffn", "--vocab"})
        if (given.count(name)) fail("%s contradicts --model %s, which fixes it: edit the config.json instead", name, o.model.c_str());
    if (folder) weights = o.model;
    Config c = read_config(file);
    // A file says nothing of training: modest values, which --dry-run helps to raise.
    if (!o.batch) o.batch = 8;
    if (!o.seq) o.seq = std::min(c.max_seq, 1024);
    if (!o.lr) o.lr = 3e-4;
    return c;
}

// --data and --val, mapped, and every id checked against the vocabulary once (Corpus::open). Both must hold tokens of one kind: a loss
// in nats per byte beside one per GPT-2 token would compare nothing.
static void open_data(Run& run, const std::set<std::string>& given) {
    const Options& o = run.o;
    struct stat st;
    if (!given.count("--data") && stat(o.data.c_str(), &st) != 0)
        fail("there is no %s yet: `make run` writes it, or name your own text with --data FILE", o.data.c_str());
    run.train_data = Corpus::open(o.data, o.vocab);
    if (o.val.empty()) return;
    run.val_data = Corpus::open(o.val, o.vocab);
    if (run.val_data.kind != run.train_data.kind)
        fail("--val holds %s, --data holds %s: give data of one kind", Corpus::format(run.val_data.kind).name,
             Corpus::format(run.train_data.kind).name);
}

// The data and the model's shape, and with them every option that was left at "the preset's" or "the data's":
//
//     --model        vocabulary             batch, seq, lr          weights
//     a preset       the data's, padded     the preset's            random
//     config.json    the file's             8, up to 1024, 3e-4     random
//     a folder       the file's             8, up to 1024, 3e-4     the folder's
//     (--resume)     the checkpoint's       the run's               the checkpoint's, with moments and bases
//
// Data and shape wait for each other: a preset's vocabulary comes from the data, a file's has to hold the data's. Windows come last, from
// --seq. --sample-only opens no data: a published model can be sampled on a machine that has none.
static Config resolve_data(Run& run, const std::set<std::string>& given, const std::string& checkpoint, std::string& weights) {
    Options& o = run.o;
    const Preset* preset = checkpoint.empty() ? find_preset(o.model) : nullptr;
    Config c;
    if (!checkpoint.empty()) c = read_config(checkpoint + "/config.json");
    else if (!preset) c = file_config(o, given, weights);
    if (!o.sample_only) open_data(run, given);
    if (preset) c = preset_config(o, *preset, run.train_data.vocab);
    check_config(c);
    if (!o.sample_only && run.train_data.vocab > c.vocab)
        fail("%s has a vocabulary of %d, the model one of %d: give data made with this model's tokenizer", o.data.c_str(), run.train_data.vocab, c.vocab);
    // From here on the options are what the model is, and are saved so: a resumed run needs neither the preset nor the config.json again.
    o.layers = c.layers, o.dim = c.dim, o.heads = c.heads, o.kv_heads = c.kv_heads, o.ffn = c.ffn, o.vocab = c.vocab;

    // Defaults that follow from others: a tenth of the peak at the end, 5% of the steps to warm up.
    if (o.min_lr < 0) o.min_lr = o.lr / 10;
    if (o.min_lr > o.lr) fail("--min-lr %g is above --lr %g", o.min_lr, o.lr);
    if (o.warmup < 0) o.warmup = o.steps / 20;
    if (o.warmup > o.steps) fail("--warmup %lld is longer than --steps %lld", (long long)o.warmup, (long long)o.steps);
    if (o.seq > c.max_seq) fail("--seq %d is over the model's %d positions", o.seq, c.max_seq);
    if (o.sample_only) {
        if (!given.count("--batch")) o.batch = 1;                                // a sample is one sequence
        return c;
    }
    run.train = o.val.empty() ? run.train_data.training(o.seq) : run.train_data.all(o.seq);
    run.val = o.val.empty() ? run.train_data.held_out(o.seq) : run.val_data.all(o.seq);
    return c;
}

// Whether the model's tokens are bytes. Where data are open they say so by their kind. --sample-only opens none: the data's name tells,
// if a resumed run has one or --data was given (text is any file that is not called .bin; a glob hides its files' names); else bytes are
// what a vocabulary of at most 256 holds, unless there is a tokenizer.
static bool tokens_are_bytes(const Run& run, int vocab, bool named) {
    const Options& o = run.o;
    if (!o.sample_only) return run.train_data.kind == Corpus::TEXT;
    bool text = named && o.data.find_first_of("*?[") == std::string::npos;
    for (size_t at = 0, comma; at < o.data.size(); at = comma + 1) {
        comma = std::min(o.data.find(',', at), o.data.size());
        text = text && !ends_with(o.data.substr(at, comma - at), ".bin");
    }
    return text || (o.tokenizer.empty() && vocab <= 256);
}

// How samples become text, and what they begin with. Without a tokenizer token data train, but nobody reads their ids: no samples.
// `named`: --data says something about this model (a resumed run's, or given).
static void resolve_text(Run& run, int vocab, bool named) {
    Options& o = run.o;
    run.bytes = tokens_are_bytes(run, vocab, named);
    if (run.bytes && !o.tokenizer.empty()) fail("--tokenizer contradicts --data %s: it is text, whose tokens are bytes", o.data.c_str());
    if (!run.bytes && o.tokenizer.empty()) {
        if (o.sample_only) fail("--sample-only needs --tokenizer FILE: the model's %d tokens are not bytes", vocab);
        if (!o.prompt.empty()) fail("--prompt needs --tokenizer FILE: the data are token ids");
        o.sample_tokens = 0;
    }
    if (!o.tokenizer.empty()) run.tokenizer = Tokenizer::open(o.tokenizer);
    run.prompt = o.prompt.empty() ? std::vector<int>{run.tokenizer.begin} : run.tokenizer.encode(o.prompt);
    // Refused now, not at the end of a day's training when the first sample is due.
    for (int id : run.prompt)
        if (o.sample_tokens && id >= vocab)
            fail("samples would begin with token %d, beyond the model's vocabulary of %d: give another --prompt", id, vocab);
}

// The rows that the run's linear layers use (llama.cuh, recipe_of(), chooses among them):
//
//     recipe    --recipe, changed by --set         all linear layers but those of the next lines
//     high      bf16                               --bf16-first, --bf16-last, --bf16-layers, and the head always
//     late      bf16 in fprop, or everywhere       the last --bf16-end of the steps, as --bf16-end-gemms says
//     eval      --eval-recipe                      evaluation and samples, if given
static Precision resolve_precision(Options& o) {
    Precision p(find_recipe(o.recipe));
    set_cells(p.recipe, o.set);                                                  // check_options() has judged them
    // A float-stored operand (f32, or e2m1 under float scales) is made of float activations; a GPU build keeps bf16 ones.
    for (const std::string& name : {o.recipe, o.eval_recipe})
        for (int i = 0; i < operand_count && !name.empty(); i++) {
            const Recipe& r = name == o.recipe ? p.recipe : *find_recipe(name);
            if (on_gpu && type_of<act_t>() == Type::bf16 && is_float_stored(r.cell[i].format))
                fail("recipe %s needs float activations, which this GPU build does not have: build with `make ACT=float`, or use --recipe bf16",
                     name.c_str());
        }
    // What leaves 4 bits goes to bf16; where nothing is quantised there is nothing to leave. Near the end only fprop does, unless "all":
    // then the loss is bf16's, and gradients still come from 4-bit GEMMs.
    p.high = is_quantised(p.recipe) ? *find_recipe("bf16") : p.recipe;
    p.late = o.bf16_end_gemms == "all" ? p.high : p.recipe;
    p.late.cell[fprop_x] = p.high.cell[fprop_x], p.late.cell[fprop_w] = p.high.cell[fprop_w];
    p.end = o.bf16_end;
    p.eval_own = !o.eval_recipe.empty();
    p.eval = p.eval_own ? *find_recipe(o.eval_recipe) : p.recipe;
    // Evaluation runs fprop only, and refreshes nothing: a row that splits X or W there needs the bases that training keeps for it.
    for (Matrix matrix : {matrix_x, matrix_w}) {
        bool wants = false, keeps = false;
        for (int i = 0; i < operand_count; i++) {
            if (matrix_of[i] != matrix) continue;
            wants = wants || (i <= fprop_w && p.eval.cell[i].split);
            keeps = keeps || p.recipe.cell[i].split;
        }
        if (wants && !keeps)
            fail("--eval-recipe %s needs bases of %s, which a run by --recipe %s does not keep", o.eval_recipe.c_str(),
                 matrix == matrix_x ? "X" : "W", (o.recipe + (o.set.empty() ? "" : " with --set " + o.set)).c_str());
    }
    // NVIDIA's row keeps the last 15% of the blocks in bf16: 1 of 7 blocks, 4 of 28.
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

// A Hadamard needs whole groups along the contracted axis: of every linear layer's in and out, and, for wgrad, of the tokens. A split
// needs matrices at least as wide as its rank.
static void check_shapes(const Options& o, const Precision& p, const Config& c) {
    typedef std::pair<const char*, int64_t> Named;
    const Named widths[] = {{"--dim", c.dim}, {"heads x head size", (int64_t)c.heads * c.head_dim}, {"--ffn", c.ffn},
                            {"the rows of qkv", ((int64_t)c.heads + 2 * c.kv_heads) * c.head_dim}};
    auto check = [&](int i, const char* name, int64_t size) {
        int h = p.recipe.cell[i].hadamard;
        if (h && size % h)
            fail("the hadamard of %d in %s of recipe %s needs a multiple of %d, and %s is %lld", h, operand_names[i], p.recipe.name.c_str(), h, name,
                 (long long)size);
    };
    for (auto [name, size] : widths)
        for (int i = 0; i < wgrad_d; i++) check(i, name, size);
    if (o.trains()) check(wgrad_d, "--batch x --seq", (int64_t)o.batch * o.seq);
    // A basis of k orthonormal rows needs k columns.
    int k = split_rank(p.recipe.split, c.dim);
    for (auto [name, size] : widths)
        if ((is_split(p.recipe) || is_split(p.eval)) && k > size)
            fail("a split of rank %d needs matrices at least as wide, and %s is %lld: lower %s, or widen the model", k, name, (long long)size,
                 p.recipe.split.k ? "split.k" : "split.rank");
}

// ---------------------------------------------------------------------------------------------------------------------------
// Training, from inside to outside: a micro-batch, a step; the loop, train(), is near the end of the file

// Peak to min_lr: linear warmup, then the schedule. The step counts from 1.
//
//     lr       ____                    ______________             cosine   min + (lr - min) (1 + cos(pi t)) / 2, t from 0 to 1
//             /    ''--.._            /              \            wsd      flat, then linear over the last 20%
//     min    /  cosine   ''--..      /      wsd       \           constant flat to the end
//            warmup        steps     warmup     80%  steps
//
// --steps 100 --warmup 10 --lr 1, cosine: step 1 0.1, step 10 1, step 55 0.55, step 100 0.1.
static double learning_rate(const Options& o, int64_t step) {
    if (step <= o.warmup) return o.lr * step / o.warmup;
    double end = o.steps, at = step;
    if (o.schedule == "constant") return o.lr;
    if (o.schedule == "wsd") {
        double start = std::max<double>(o.warmup, std::floor(0.8 * end));
        return at <= start ? o.lr : o.lr + (o.min_lr - o.lr) * (at - start) / (end - start);
    }
    float s, c;
    sincos_((float)(M_PI * (at - o.warmup) / std::max<double>(1, end - o.warmup)), &s, &c);      // ours: the same bits on every machine
    return o.min_lr + 0.5 * (o.lr - o.min_lr) * (1 + c);
}

// Micro-batch `micro`, counted from the start of the run: tokens and targets, (batch x seq) each. Sequence number `index` of the run is
// a window of the training split, every epoch in a new order, both computed from `index`: there is no position in the data to save, and
// batches of another size see the same sequences in the same order.
//
//     --batch 2 --accum 2, 5 windows      step       0          1          2
//                                         micro      0    1     2    3     4    5
//                                         index      0 1  2 3   4 5  6 7   8 9 10 11
//                                         epoch      0 0  0 0   0 1  1 1   1 1  2  2       an epoch ends anywhere, also within a batch
//
// The epoch's key is 64 bits of the stream (seed, data_order): permuted() makes it an order of the windows.
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

// The mean loss of this step's micro-batches; their gradients, added up, in m.grads.
//
// The step's loss is the mean over all batch x seq x accum tokens. So each token's gradient is scaled by 1 / (N accum) at the logits, where
// the gradient begins, and the micro-batches' gradients simply add up: the sum is the gradient of one large batch, up to the order of
// additions, and nothing has to be divided at the end. For --batch 2 --seq 4 --accum 3: N = 8, every token weighs 1/24.
//
// (A mean per micro-batch, then a mean of means, is the same here only because every sequence has seq targets; the sum says it without
// that assumption.)
static float accumulate(Run& run, Use use) {
    Ctx& ctx = run.ctx;
    Model& m = run.model;
    const Options& o = run.o;
    int64_t N = (int64_t)o.batch * o.seq;
    std::vector<int> tokens, targets;
    set_recipes(m, use, (double)run.step / o.steps);
    set_zero(ctx, m.grads, m.arena * sizeof(acc_t));
    set_zero(ctx, m.sums, 2 * sizeof(acc_t));
    // One micro-batch at a time lives in memory: N = batch x seq tokens of activations, whatever --accum.
    for (int i = 0; i < o.accum; i++) {
        ctx.step = (uint32_t)run.step, ctx.micro = (uint32_t)i;                  // part of the name of every random draw
        training_batch(run, run.step * o.accum + i, tokens, targets);
        forward(ctx, m, tokens.data(), o.batch, o.seq);                          // tokens (batch, seq) -> h_final (N, C)
        classify(ctx, m, targets.data(), N, acc_t(1) / (N * o.accum));           // sums[0] += loss of N tokens; dh (N, C)
        backward(ctx, m, tokens.data(), o.batch, o.seq);                         // grads += every parameter's
    }
    acc_t sum;                                                                   // the loss stays on the device until here
    to_host(ctx, &sum, m.sums, sizeof sum);
    return (float)(sum / (N * o.accum));
}

// What a shadow step found: the loss above bf16's on the same batch, the relative error and the cosine of the gradient, of all
// quantised weights together and of every tensor.
struct Shadow {
    double loss_gap = 0, error = 0, cosine = 0;
    std::vector<std::pair<double, double>> tensors;
};
struct StepResult {
    float loss, norm;                   // nats per token, before the update; of the gradient, before clipping
    bool skipped = false, shadowed = false;
    double shadow_seconds = 0;
    Shadow shadow;
    std::vector<Tally> tally;           // of every operand class; empty: not this step
};

// The same batch again in bf16, its gradient h against the quantised one q in m.grads, which is there again afterwards: so training goes
// on as if nothing had been. From three sums: error = |q - h| / |h|, cosine = q h / (|q| |h|).
static Shadow shadow_step(Run& run, float loss) {
    Ctx& ctx = run.ctx;
    Model& m = run.model;
    Shadow s;
    copy(ctx, m.shadow, m.grads, m.arena);                                       // q waits there; m.grads becomes h
    s.loss_gap = (double)loss - accumulate(run, Use::reference);
    // p: the sums of q q, h h and q h. |q - h|^2 = q q + h h - 2 q h, which rounding may leave just below zero.
    auto error = [](const double* p) { return std::sqrt(std::max(0., p[0] + p[1] - 2 * p[2]) / p[1]); };
    auto cosine = [](const double* p) { return p[2] / std::sqrt(p[0] * p[1]); };
    double all[3] = {};
    for (const Tensor& t : m.tensors) {
        int64_t n = (int64_t)t.size(), chunks = chunks_of(n);
        products(ctx, m.norm_partial, m.shadow + t.offset, m.grads + t.offset, n);
        std::vector<acc_t> parts(3 * chunks);
        to_host(ctx, parts.data(), m.norm_partial, parts.size() * sizeof(acc_t));
        double sums[3] = {};                                                    // q q, h h, q h
        for (int64_t i = 0; i < 3 * chunks; i++) sums[i / chunks] += parts[i];
        s.tensors.push_back({error(sums), cosine(sums)});
        for (int i = 0; i < 3 && t.quantised; i++) all[i] += sums[i];
    }
    s.error = error(all), s.cosine = cosine(all);
    copy(ctx, m.grads, m.shadow, m.arena);
    return s;
}

// One optimiser step over --accum micro-batches. A step whose loss or gradient is not finite changes nothing: neither weights nor
// moments; its number is used up all the same, so that the next step sees other data.
static StepResult train_step(Run& run, double lr) {
    Ctx& ctx = run.ctx;
    Model& m = run.model;
    const Options& o = run.o;
    StepResult r;
    // On steps that --stats-every names the quantisers count their errors as they go, for all micro-batches together.
    bool tally = o.stats_every && (run.step + 1) % o.stats_every == 0 && is_quantised(m.precision.recipe);
    if (tally) set_zero(ctx, m.tally, operand_count * sizeof(Tally));
    m.operands.tally = tally ? m.tally : nullptr;
    r.loss = accumulate(run, Use::train);
    for_trained(m, [&](const Linear& lin) { factor_gradients(ctx, lin); });      // from dW, once all micro-batches are in it
    m.operands.tally = nullptr;
    if (tally) {
        r.tally.resize(operand_count);
        to_host(ctx, r.tally.data(), m.tally, operand_count * sizeof(Tally));
    }

    // The norm over all parameters: squares of chunks, then the chunks in order. A NaN or an infinity anywhere makes it one, so this
    // one number guards every weight.
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

    // LLaMA's AdamW: beta 0.9 and 0.95, eps 1e-8; t counts steps from 1, in the corrections 1 - beta^t. Clipping is a factor that AdamW
    // applies as it reads a gradient, so the arena is not written for it (torch.nn.utils.clip_grad_norm_, its 1e-6 included).
    double t = (double)(run.step + 1);
    AdamW adam = {(acc_t)lr, acc_t(0.9), acc_t(0.95), acc_t(1e-8), 0, 1, (acc_t)(1 - std::pow(0.9, t)), (acc_t)(1 - std::pow(0.95, t))};
    if (o.clip > 0) adam.clip = std::min<acc_t>(1, (acc_t)(o.clip / (r.norm + 1e-6)));
    for (size_t i = 0; i < m.trained.size(); i++) adamw_step(ctx, m, i, adam, (acc_t)o.decay);
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Evaluation

// Mean loss in nats per token over the first --eval-batches of held-out windows, the same ones every time, spread over the split.
// By training's forward, but for rounding to nearest and frozen bases, so the number depends on the weights alone.
static double evaluate(Run& run) {
    Ctx& ctx = run.ctx;
    Model& m = run.model;
    const Options& o = run.o;
    // 8 batches of 8 windows out of 640: every tenth. A prefix of the split would be a few documents.
    int64_t windows = std::min<int64_t>((int64_t)o.eval_batches * o.batch, run.val.count);
    std::vector<int> tokens((size_t)o.batch * o.seq), targets((size_t)o.batch * o.seq);
    double total = 0;
    set_recipes(m, Use::evaluate, (double)run.step / o.steps);
    ctx.step = (uint32_t)run.step, ctx.micro = 0;        // random signs are those of this step, in the run and of its checkpoint
    for (int64_t i = 0; i < windows; i += o.batch) {
        int B = (int)std::min<int64_t>(o.batch, windows - i);                    // the last batch may be smaller
        for (int b = 0; b < B; b++) {
            int64_t window = run.val.first + (i + b) * run.val.count / windows;
            run.held_out().window(window, o.seq, &tokens[(size_t)b * o.seq], &targets[(size_t)b * o.seq]);
        }
        set_zero(ctx, m.sums, 2 * sizeof(acc_t));
        forward(ctx, m, tokens.data(), B, o.seq);
        classify(ctx, m, targets.data(), (int64_t)B * o.seq, 0);                 // 0: no gradient, logits stay logits
        acc_t sum;
        to_host(ctx, &sum, m.sums, sizeof sum);
        total += (double)sum;
    }
    return total / ((double)windows * o.seq);
}

// Of bytes also bits per byte, loss / ln 2: what a compressor with this model would need, whatever the text.

static double print_evaluation(Run& run) {
    double loss = evaluate(run);
    printf("eval %lld/%lld | val loss %.9g", (long long)run.step, (long long)run.o.steps, loss);
    if (run.bytes) printf(" | %.4f bits per byte", loss / M_LN2);
    printf("\n");
    fflush(stdout);
    return loss;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Sampling

// The next token after logits (V): temperature, then top-k, then top-p, then one uniform draw. On the host: V is small beside a step.
//
//     probabilities .5 .3 .15 .05, top-p 0.9      kept .5 .3 .15 (.8 is not enough), mass .95
//     a draw of 0.6                               u = .57: beyond .5, within .5 + .3: the second
//
// Draw i of a sample is word 0 of block i of the stream (seed, step, sampling): the same sample from the run and from its checkpoint.
static int draw(const Options& o, std::vector<acc_t>& logits, RandomKey key, uint64_t index) {
    std::vector<int> order(logits.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = (int)i;
    // Likeliest first, equals by their id: an order that no sort may choose otherwise.
    std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
    if (o.temperature == 0) return order[0];
    // Softmax of logits / temperature over the top-k, unnormalised: the largest is 1. Below 1 a temperature sharpens.
    size_t n = o.top_k > 0 ? std::min<size_t>(o.top_k, order.size()) : order.size();
    std::vector<double> p(n);
    double total = 0, mass = 0;
    for (size_t i = 0; i < n; i++) total += p[i] = exp_((float)((logits[order[i]] - logits[order[0]]) / o.temperature));
    size_t kept = 0;                                                             // the fewest likeliest whose probabilities reach top-p
    while (kept < n && (kept == 0 || mass < o.top_p * total)) mass += p[kept++];
    double u = uniform(philox(key, index).w[0]) * mass;
    for (size_t i = 0; i < kept; i++)
        if ((u -= p[i]) < 0) return order[i];
    return order[kept - 1];
}

// Prints a sample: the prompt and up to --sample-tokens more, fewer if the model ends the document. There is no key/value cache: every
// token runs the model over what precedes it, up to --seq tokens; then the window slides, and positions count from its first token.
// A prompt of the user's is printed, the token that stands for "a document's start" is not.
static void sample(Run& run) {
    const Options& o = run.o;
    Model& m = run.model;
    int V = m.config.vocab;
    std::vector<int> ids = run.prompt;                                           // grows by one token a turn
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
        // The head sees one row: the last token's.
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
    // Decoded together: a character may be spelled by two tokens.
    std::string text = run.tokenizer.decode(std::vector<int>(ids.begin() + (o.prompt.empty() ? 1 : 0), ids.end()));
    printf("--- sample after step %lld, %zu tokens\n%s\n---\n", (long long)run.step, ids.size() - prompt, printable(text).c_str());
    fflush(stdout);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Checkpoints and the log

// Floats travel between arenas and files in pieces of at most 16 MiB (checkpoint.h): a source gives those from an arena, a sink puts
// them there. On a CPU float arenas are read where they lie.

// A moment's type as safetensors calls it.
static const char* stored_type(Type moments) { return moments == Type::bf16 ? "BF16" : "F32"; }

// Room on the host for a piece of an arena on its way to a file; the sources of one checkpoint share it.
struct Staging {
    std::vector<float> floats;
    std::vector<bf16> halves;
};
static FloatSource source(Ctx& ctx, const acc_t* arena, Staging& s) {
    return [&ctx, arena, &s](size_t first, size_t count) {
        if (!on_gpu) return (const float*)(arena + first);
        s.floats.resize(count);
        to_host(ctx, s.floats.data(), arena + first, count * sizeof(float));
        return (const float*)s.floats.data();
    };
}
static FloatSource source(Ctx& ctx, const bf16* arena, Staging& s) {
    return [&ctx, arena, &s](size_t first, size_t count) {
        s.floats.resize(count), s.halves.resize(count);
        to_host(ctx, s.halves.data(), arena + first, count * sizeof(bf16));
        for (size_t i = 0; i < count; i++) s.floats[i] = load(&s.halves[i]);
        return (const float*)s.floats.data();
    };
}

// Writes a checkpoint. A resumed run must give the bits of an unbroken one, so it holds all that a later step reads:
//
//     model.safetensors       the weights, in float32: the masters that AdamW moves. W as everybody else knows it: where its factors
//                             are trained it is merged
//     optimizer.safetensors   m and v as they are kept; AdamW's t is the step in the folder's name
//     bases.safetensors       of split recipes: they are refreshed every few steps, and from the last ones
//     factors.safetensors     of trained factors: W_R, U, s and V, since the merged W does not tell them apart
//     state.json              the options (seed, schedule, recipe, data ...), steps skipped in a row, the data's fingerprint, the build
//
// Random numbers and the place in the data have no state: they are functions of the options and the step.
static void save(Run& run, FILE* log) {
    Model& m = run.model;
    Ctx& ctx = run.ctx;
    // A checkpoint never outlives the log of its steps: resuming cuts a log that is too long, and could not write one that is too short.
    fsync(fileno(log));
    Staging staging;
    auto moment = [&](const void* arena) {
        return m.moments == Type::bf16 ? source(ctx, (const bf16*)arena, staging) : source(ctx, (const acc_t*)arena, staging);
    };
    // The weights' source looks up which linear layer, if any, owns the piece. W_R + U diag(s) V is merged a whole tensor at a time, when
    // its first piece is asked for: pieces of one tensor follow one another.
    const Linear* merged = nullptr;
    auto weights = [&, plain = source(ctx, m.params, staging), whole = source(ctx, m.operands.merged, staging)](size_t first, size_t count) {
        const Linear* of = nullptr;
        for_trained(m, [&](const Linear& lin) {
            if (lin.w <= m.params + first && m.params + first < lin.w + lin.in * lin.out) of = &lin;
        });
        if (of && of != merged) merge_factors(ctx, m.operands.merged, *of, 1);
        merged = of;
        return of ? whole(m.params + first - of->w, count) : plain(first, count);
    };
    nlohmann::ordered_json state = {{"options", saved_options(run.o)}, {"bad_steps", run.bad_steps}, {"build", BUILD},
        {"data", std::to_string(run.train_data.fingerprint())}};
    std::vector<CheckpointFile> files = {
        {"model.safetensors", tensor_entries(m.tensors, {{"", weights}})},
        {"optimizer.safetensors", tensor_entries(m.trained, {{".exp_avg", moment(m.m)}, {".exp_avg_sq", moment(m.v)}}, stored_type(m.moments))}};
    if (m.k) files.push_back({"bases.safetensors", tensor_entries(m.bases, {{"", source(ctx, m.basis, staging)}})});
    if (!m.factors.empty()) files.push_back({"factors.safetensors", tensor_entries(m.factors, {{"", source(ctx, m.params, staging)}})});
    std::string dir = save_checkpoint(run.o.out, run.step, write_config(m.config), files, state);
    prune_checkpoints(run.o.out, run.o.keep);
    printf("saved %s\n", dir.c_str());
}

// Floats from a file into an arena of T. bf16 moments were written from bf16, so rounding them again changes nothing.
template <class T> FloatSink sink(Ctx& ctx, T* arena) {
    return [&ctx, arena](size_t first, const float* values, size_t count) {
        std::vector<T> converted(count);
        for (size_t i = 0; i < count; i++) store(&converted[i], values[i]);
        to_device(ctx, arena + first, converted.data(), count * sizeof(T));
    };
}

// Fills the model: from a checkpoint, from a folder's weights, or at random. Evaluation and sampling read no moments.
static void restore(Run& run, const std::string& checkpoint, const nlohmann::ordered_json& state, const std::string& weights) {
    Ctx& ctx = run.ctx;
    Model& m = run.model;
    if (checkpoint.empty()) {
        if (weights.empty()) initialise(ctx, m);
        else load_parameters(WeightFiles(weights), m.tensors, sink(ctx, m.params));
        for_trained(m, [&](const Linear& lin) { split_weight(ctx, lin, m.operands); });
        return;
    }
    auto file = [&](const char* name) { return WeightFiles(checkpoint + name); };
    auto moment = [&](void* arena) { return m.moments == Type::bf16 ? sink(ctx, (bf16*)arena) : sink(ctx, (acc_t*)arena); };
    run.bad_steps = state.value("bad_steps", 0);
    load_parameters(file(""), m.tensors, sink(ctx, m.params));
    if (run.o.trains())
        load_tensors(file("/optimizer.safetensors"), m.trained, {{".exp_avg", moment(m.m)}, {".exp_avg_sq", moment(m.v)}}, stored_type(m.moments));
    if (m.k) load_tensors(file("/bases.safetensors"), m.bases, {{"", sink(ctx, m.basis)}});
    if (!m.factors.empty()) load_tensors(file("/factors.safetensors"), m.factors, {{"", sink(ctx, m.params)}});      // W_R over the merged W
}

// log.jsonl for appending: a new one begins with the options, a resumed one is cut back to the checkpoint's step.
//
//     {"options":{"model":"tiny","steps":"1500",...},"build":"CPU native, ...","machine":"oneDNN ..."}
//     {"step":1,"loss":5.58,"lr":4e-05,"grad_norm":1.6,"ms":140.2,"tokens_per_s":14600.0}
//     {"step":250,"val_loss":1.82935977}
//
// A line is flushed when it is complete; a kill may tear the last one, which truncate_log() then drops.
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

// Nothing if there is no log. A full disk must end the run here, not leave a hole in the log.
__attribute__((format(printf, 2, 3))) static void log_line(FILE* log, const char* format, ...) {
    if (!log) return;
    va_list args;
    va_start(args, format);
    int n = vfprintf(log, format, args);
    va_end(args);
    if (n < 0 || fflush(log) != 0) fail("cannot write log.jsonl: %s; free space, then go on with --resume", strerror(errno));
}

// The lines of log.jsonl that not every step has:
//
//     {"step":10,"quant":{"fprop_x":{"error":0.0942,"zero":0.061,"saturated":0.012},"fprop_w":{...},...}}
//     {"step":20,"shadow_loss_gap":0.0115,"shadow_grad_rel_err":0.464,"shadow_grad_cos":0.903,"shadow_tensors":{"embed":[0.31,0.95],...}}
//
// shadow_tensors: relative error and cosine of each tensor's gradient; quant: per
// operand class, over sampled tiles, the relative error, and the shares of elements that became zero and that met the largest code.
static void log_details(const Run& run, FILE* log, const StepResult& r) {
    auto pair = [](double a, double b) { return "[" + json_number(a) + "," + json_number(b) + "]"; };
    if (r.shadowed) {
        std::string tensors;
        for (size_t i = 0; i < r.shadow.tensors.size(); i++)
            tensors += (i ? ",\"" : "\"") + run.model.tensors[i].name + "\":" + pair(r.shadow.tensors[i].first, r.shadow.tensors[i].second);
        log_line(log, "{\"step\":%lld,\"shadow_loss_gap\":%s,\"shadow_grad_rel_err\":%s,\"shadow_grad_cos\":%s,\"shadow_tensors\":{%s}}\n",
                 (long long)run.step, json_number(r.shadow.loss_gap).c_str(), json_number(r.shadow.error).c_str(),
                 json_number(r.shadow.cosine).c_str(), tensors.c_str());
    }
    std::string classes;
    for (size_t i = 0; i < r.tally.size(); i++) {
        const Tally& t = r.tally[i];
        if (t.count == 0) continue;                                              // not quantised
        classes += std::string(classes.empty() ? "\"" : ",\"") + operand_names[i] + "\":{";
        classes += "\"error\":" + json_number(t.energy > 0 ? std::sqrt(t.error / t.energy) : 0);
        classes += ",\"zero\":" + json_number(t.zero / t.count) + ",\"saturated\":" + json_number(t.saturated / t.count);
        if (is_carried(run.model.precision.recipe.cell[i])) classes += ",\"lost\":" + json_number(t.lost / t.count);
        classes += "}";
    }
    if (!classes.empty()) log_line(log, "{\"step\":%lld,\"quant\":{%s}}\n", (long long)run.step, classes.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------------
// The run's folder

// OUT/log.jsonl, OUT/step_00000250/ ...; checkpoint.h shows it whole.

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
// returns the checkpoint's folder ("" for a fresh start of the same run) and fills `state`. `writes`: locks the run before it looks,
// since another process that still trains there may be about to delete what it would find.
//
//     --out DIR --resume, or --resume DIR     the newest checkpoint in DIR
//     --resume DIR/step_00000250              that one; main() removes later ones, whose future is about to be written anew
static std::string find_run(Options& o, nlohmann::ordered_json& state, bool writes) {
    std::string dir = o.resume.empty() ? o.out : o.resume;
    if (dir.empty()) fail("--resume needs the run's folder: --resume DIR, or --out DIR --resume");
    while (dir.size() > 1 && dir.back() == '/') dir.pop_back();
    if (!is_directory(dir)) fail("nothing to resume: %s is not a folder", dir.c_str());
    // A folder called step_NNNNNNNN is a checkpoint, and its run is the folder around it.
    std::string checkpoint;
    if (checkpoint_step(dir) >= 0) checkpoint = dir, dir = folder_of(dir);
    if (!o.out.empty() && !o.resume.empty() && absolute(o.out) != absolute(dir))
        fail("--out %s contradicts --resume %s: leave --out away", o.out.c_str(), o.resume.c_str());
    o.out = dir;
    if (writes) lock_folder(dir);
    if (checkpoint.empty()) checkpoint = latest_checkpoint(dir);
    if (!checkpoint.empty()) {
        state = open_checkpoint(checkpoint);
        return checkpoint;
    }
    // Killed before its first checkpoint: the log's first line has the options, and the run starts again from step 0.
    std::string path = dir + "/log.jsonl";
    struct stat st;
    if (stat(path.c_str(), &st) != 0) fail("nothing to resume in %s: it has no checkpoint and no log.jsonl", dir.c_str());
    MappedFile log(path);
    const uint8_t* end = std::find(log.data, log.data + log.size, '\n');
    state = parse_json<nlohmann::ordered_json>(log.data, end - log.data, path + " (first line)");
    if (!state.is_object() || !state["options"].is_object()) fail("%s is damaged: its first line should be the options of the run", path.c_str());
    return "";
}

// An empty or new folder for a new run. Anything in it could be somebody's work, so it is refused, not overwritten.
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
// What is said before the first step

// The lines before the first step: all that decides the run's numbers and speed, so that a saved terminal explains itself.
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
    printf(", bf16 operands %s; matmul peak %.0f GFLOP/s (measured, %s)\n",
           MatmulPlans::bf16_units() ? "multiplied natively" : "held as float (faster here)", run.peak * 1e-9, o.recipe.c_str());
    printf("model    | %s: %d layers, dim %d, %d/%d heads of %d, ffn %d, vocab %d; %.2fM parameters, %.2fM without embedding and head\n",
           o.model.c_str(), c.layers, c.dim, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab, parameter_count(run.model.tensors) * 1e-6,
           parameter_count(run.model.tensors, true) * 1e-6);
    report_precision(run.ctx, run.model, o);
    double needed = run.model.plan.total() + overhead_bytes(run.ctx, o.seq);
    if (o.sample_only) {
        printf("memory   | %.2f GB of %.2f GB available\n", needed * 1e-9, available_memory() * 1e-9);
    } else {
        printf("data     | %s: %s, %.2fM tokens, %lld windows of %d to train on, %lld held out%s\n", o.data.c_str(),
               Corpus::format(run.train_data.kind).name, run.train_data.tokens * 1e-6, (long long)run.train.count, o.seq, (long long)run.val.count,
               o.val.empty() ? "" : " from --val");
        if (run.bytes && c.vocab == 256) printf("         | tokens are bytes: bits per byte = loss / ln 2\n");
        printf("schedule | %lld steps of %lld tokens (%.2f epochs), lr %g to %g, %s, %lld warmup steps%s\n", (long long)o.steps,
               (long long)run.tokens_per_step(), (double)o.steps * o.batch * o.accum / run.train.count, o.lr, o.min_lr, o.schedule.c_str(),
               (long long)o.warmup, run.model.moments == Type::bf16 ? "; m and v in bf16" : "");
        printf("memory   | %.2f GB of %.2f GB available; %.1f GFLOP a step\n", needed * 1e-9, available_memory() * 1e-9,
               flops_per_token(c, o.seq) * run.tokens_per_step() * 1e-9);
    }
    if (!o.out.empty()) printf("output   | %s%s%s\n", o.out.c_str(), checkpoint.empty() ? "" : ", resumed from ", checkpoint.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------------
// The training loop

// Ctrl-C and SIGTERM ask the loop to finish its step, save and exit. A second Ctrl-C kills. (A signal handler can reach nothing
// but static storage.)
static volatile sig_atomic_t stop_requested = 0;
static void request_stop(int) { stop_requested = 1; }

static void catch_signals() {
    struct sigaction action = {};
    action.sa_handler = request_stop;
    action.sa_flags = SA_RESETHAND | SA_RESTART;                                // or a write that waits would lose its line
    sigaction(SIGINT, &action, nullptr), sigaction(SIGTERM, &action, nullptr);
    signal(SIGXFSZ, SIG_IGN);                                                    // a file-size limit is an error from write(), with its line
}

// The step's line on stdout and its lines in the log. s: seconds the step took, left: seconds to the end.
//
//     step 7/1500 | loss 4.85 | norm 1.8 | lr 0.00028 | 140 ms | 14600 tok/s | 23% of peak | eta 3m29s
//
// "of peak": the model's FLOPs (flops_per_token, no recomputation, nothing that a recipe adds) a second, of the matmul ceiling measured on
// this machine at the start.
static void report_step(const Run& run, FILE* log, const StepResult& r, double lr, double s, double left) {
    const Options& o = run.o;
    double flops = flops_per_token(run.model.config, o.seq) * run.tokens_per_step(), tokens_per_s = run.tokens_per_step() / s;
    std::string peak = run.peak > 0 ? std::to_string((int)(100 * flops / s / run.peak + 0.5)) + "%" : "n/a";
    printf("step %lld/%lld | loss %.9g | norm %.4g | lr %.3g | %.0f ms | %.0f tok/s | %s of peak | eta %s", (long long)run.step, (long long)o.steps,
           r.loss, r.norm, lr, s * 1e3, tokens_per_s, peak.c_str(), duration(left).c_str());
    if (r.shadowed)
        printf(" | shadow: loss %+.4f, gradient error %.4f, cosine %.4f", r.shadow.loss_gap, r.shadow.error, r.shadow.cosine);
    printf("%s\n", r.skipped ? " | NOT FINITE, step skipped" : "");
    fflush(stdout);
    // %.9g gives back every float: losses can be compared bit for bit.
    log_line(log, "{\"step\":%lld,\"loss\":%s,\"lr\":%.9g,\"grad_norm\":%s,\"ms\":%.3f,\"tokens_per_s\":%.1f%s}\n", (long long)run.step,
             json_number(r.loss).c_str(), lr, json_number(r.norm).c_str(), s * 1e3, tokens_per_s, r.skipped ? ",\"skipped\":true" : "");
    if (log) log_details(run, log, r);
}

// Trains from run.step to --steps, or profiles: one step that warms caches and plans, then --profile steps, or what is left of them.
static void train(Run& run, FILE* log) {
    const Options& o = run.o;
    const int stop_after = 10;                                                   // non-finite steps in a row
    double average = 0;                                                          // seconds a step, lately
    int64_t last = o.profile ? std::min(o.steps, run.step + 1 + o.profile) : o.steps, first = run.step + 1;
    catch_signals();
    // run.step is the number of steps done; inside train_step() it is the index of the step being made, from 0, as random draws know it.
    while (run.step < last && !stop_requested) {
        run.ctx.profiler.on = o.profile && run.step >= first;
        double begin = seconds(), lr = learning_rate(o, run.step + 1);
        StepResult r = train_step(run, lr);
        run.ctx.synchronise();
        double s = seconds() - begin - r.shadow_seconds;                         // what training alone would have taken
        run.ctx.profiler.on = false;
        run.step++;
        run.bad_steps = r.skipped ? run.bad_steps + 1 : 0;
        average = average == 0 || run.step == first + 1 ? s : 0.9 * average + 0.1 * s;   // the first step also makes plans
        report_step(run, log, r, lr, s, average * (o.steps - run.step));
        // One bad step may be a batch; ten in a row are weights that will not recover. bad_steps is saved: a resumed run counts on.
        if (run.bad_steps >= stop_after)
            fail("loss or gradient was not finite %d steps in a row: start a new run with a lower --lr (%g) or a longer --warmup, and check the data",
                 stop_after, o.lr);
        if (o.profile) continue;

        // Evaluating and sampling come before saving: a run that is killed in between does them again, and its log is cut back. Neither
        // touches weights, moments, bases or the state of anything random, so how often they happen changes no training loss.
        bool end = run.step == o.steps;
        auto due = [&](int64_t every) { return end || (every && run.step % every == 0); };
        if (due(o.eval_every))
            log_line(log, "{\"step\":%lld,\"val_loss\":%s}\n", (long long)run.step, json_number(print_evaluation(run)).c_str());
        if (o.sample_tokens && due(o.sample_every)) sample(run);
        if (log && (stop_requested || due(o.save_every))) save(run, log);
    }
    if (stop_requested && run.step < last)
        printf("stopped after step %lld%s\n", (long long)run.step, log ? ": go on with --resume" : "; nothing was saved (no --out)");
    if (o.profile && run.step > first) print_profile(run.ctx, run.peak, run.step - first);
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

    // What is asked for. Paths become absolute at once, since the options are saved and resumed from anywhere.
    std::vector<Option> table = option_table(o);
    std::set<std::string> given = parse(argc, argv, table);
    if (o.help) return print_help(table), 0;
    if (o.list_recipes) return list_recipes(o.set), 0;
    o.data = absolute(o.data), o.val = absolute(o.val), o.tokenizer = absolute(o.tokenizer);
    if (!find_preset(o.model) && access(o.model.c_str(), F_OK) == 0) o.model = absolute(o.model);
    while (o.out.size() > 1 && o.out.back() == '/') o.out.pop_back();
    bool resuming = given.count("--resume"), training = o.trains();
    nlohmann::ordered_json state;                                                // the resumed run's
    std::string checkpoint, weights;                                             // what the model starts from; "", "": random numbers
    if (resuming) {
        checkpoint = find_run(o, state, training && !o.dry_run && !o.profile);
        adopt_options(table, given, state["options"]);
        if (!checkpoint.empty()) run.step = checkpoint_step(checkpoint);
        else if (!training) fail("%s has no checkpoint yet: there is nothing to %s", o.out.c_str(), o.eval_only ? "evaluate" : "sample");
    }
    if (!resuming && !training && !given.count("--recipe")) o.recipe = "bf16";   // weights alone have no bases
    check_options(o, table, given);
    if (o.profile && o.steps - run.step < 2)
        fail("nothing to profile: the first step only warms up, and --steps %lld leaves %lld; %s", (long long)o.steps,
             (long long)(o.steps - run.step), resuming ? "resume an older checkpoint, or profile a new run" : "raise --steps");

    // What that means here: machine, data, shape, precision. After this the options are complete: no zero stands for a default.
    start_machine(run);
    Config config = resolve_data(run, given, checkpoint, weights);
    resolve_text(run, config.vocab, resuming || given.count("--data"));
    Precision precision = resolve_precision(o);
    check_shapes(o, precision, config);
    if (!training && !resuming && is_split(precision.eval))
        fail("recipe %s needs bases, which only the checkpoint of a run by it has: give --resume DIR, or another --recipe", precision.eval.name.c_str());

    // Memory: planned, shown or refused, allocated. On a machine that overcommits, an allocation never fails: the process is killed hours
    // later. So the plan is compared with what is free.
    Recompute recompute = o.recompute == "block" ? Recompute::block : o.recompute == "norms" ? Recompute::norms : Recompute::none;
    Type moments = o.moments == "bf16" ? Type::bf16 : type_of<acc_t>();
    measure(run.model, config, o.batch, o.seq, recompute, precision, training, o.shadow_every > 0, moments);
    if (o.dry_run) return print_plan(run.ctx, run.model, o), 0;
    if (run.model.plan.total() + overhead_bytes(run.ctx, o.seq) > available_memory()) {
        print_memory(run.ctx, run.model, o, stderr);
        fail("this run does not fit: lower --batch (and raise --accum), shorten --seq, or use --recompute block%s",
             training && o.moments == "f32" ? " or --moments bf16" : "");
    }
    if (resuming && training && state.contains("data") && state["data"] != std::to_string(run.train_data.fingerprint()))
        fail("%s is not the data this run was trained on: put the original back, or start a new run", o.data.c_str());
    // The peak is measured before the arenas are there: on a GPU its operands need room that the run will take.
    run.peak = measure_matmul(run.ctx, precision.recipe.cell[fprop_x].format);
    allocate(run.ctx, run.model, training);
    restore(run, checkpoint, state, weights);

    // Only now is a folder made: whatever is refused has left nothing behind.
    if (!o.out.empty() && !resuming && training) claim_folder(o.out);
    report(run, checkpoint);
    if (o.sample_only) return sample(run), 0;
    if (o.eval_only) {
        if (!is_finite(print_evaluation(run))) fail("the loss is not finite: the weights are damaged, or the recipe does not carry them");
        return 0;
    }
    FILE* log = nullptr;
    if (!o.out.empty() && !o.profile) {
        if (resuming) {                                                          // the folder is ours alone since find_run()
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
