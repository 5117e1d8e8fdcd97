// test_checkpoint.cpp: what a user may lose when a disk fills up, a bit flips or a run is killed: nothing but the newest
// checkpoint, and never without one clear line. Everything happens in a fresh folder under $TMPDIR.
//     g++ -std=c++17 -O2 -Wall -Wextra -I. test/test_checkpoint.cpp -o test_checkpoint && ./test_checkpoint
#include "checkpoint.h"
#include "test/test.h"
#include <random>
#include <signal.h>
#include <sys/resource.h>   // RLIMIT_FSIZE
#include <sys/wait.h>

using json = nlohmann::ordered_json;
using Bytes = std::vector<uint8_t>;
namespace fs = std::filesystem;

static Bytes slurp(const std::string& path) {
    MappedFile f(path);
    return f.size ? Bytes(f.data, f.data + f.size) : Bytes();
}

static void spill(const std::string& path, const void* data, size_t n) {
    FileWriter f(path);
    f.write(data, n);
    if (f.fd < 0 || ::close(f.fd) != 0) fail("%s", f.error.c_str());   // no fsync: the test writes thousands of files
    f.fd = -1;
}

// A file with any header, valid or not. length < 0: the true one.
static void spill_safetensors(const std::string& path, const std::string& header, const Bytes& data, int64_t length = -1) {
    uint64_t n = length < 0 ? header.size() : (uint64_t)length;
    Bytes all((uint8_t*)&n, (uint8_t*)&n + 8);
    all.insert(all.end(), header.begin(), header.end());
    all.insert(all.end(), data.begin(), data.end());
    spill(path, all.data(), all.size());
}

// Runs f in a child and says how it ended: exit status (128 + n for signal n) and what it printed on stderr.
struct Outcome { int status; std::string text; };
static Outcome in_child(const std::function<void()>& f) {
    fflush(stdout);
    int ends[2];
    if (pipe(ends) != 0) fail("no pipe");
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]), close(ends[1]);
        f();
        _exit(0);
    }
    close(ends[1]);
    Outcome o;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) o.text.append(buffer, (size_t)n);
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    o.status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    return o;
}

// The contract: exit status 2 and one line. `word` must be in it.
static bool refused(const Outcome& o, const std::string& word = "") {
    return o.status == 2 && o.text.rfind("train_llama: ", 0) == 0 && o.text.find('\n') == o.text.size() - 1 &&
           o.text.find(word) != std::string::npos;
}
static void expect_refusal(const char* name, const std::string& word, const std::function<void()>& f) {
    Outcome o = in_child(f);
    check(refused(o, word), name, "status %d, wanted 2 and \"%s\", seen \"%s\"", o.status, word.c_str(), o.text.c_str());
}

// A model in miniature: fused q, k, v; a vector; offsets with padding between, as an arena may have.
static std::vector<Tensor> small_table() {
    return {{"embed", 6, 4, 2, false, false, 0.02f, 0, {{"model.embed_tokens.weight", 6}}},
            {"layers.0.qkv", 8, 4, 2, true, true, 0.02f, 32, {{"layers.0.q", 4}, {"layers.0.k", 2}, {"layers.0.v", 2}}},
            {"norm", 1, 4, 1, false, false, 0, 64, {{"model.norm.weight", 1}}}};
}
constexpr size_t arena_size = 68;
static std::vector<float> random_arena(uint32_t seed, size_t n = arena_size) {
    std::mt19937 random(seed);
    std::vector<float> a(n);
    for (float& f : a) f = (float)random() / 4e9f - 0.5f;
    return a;
}
static FloatSource source_of(const std::vector<float>& a) { return [&a](size_t first, size_t) { return a.data() + first; }; }
static FloatSink sink_into(std::vector<float>& a) {
    return [&a](size_t first, const float* p, size_t n) {
        if (first + n > a.size()) fail("a sink was called beyond its arena");
        std::copy(p, p + n, a.begin() + (ptrdiff_t)first);
    };
}
// Equal bit for bit where the table has tensors; the padding between them must still hold what it held.
static bool same_arena(const std::vector<float>& a, const std::vector<float>& b, float padding) {
    std::vector<float> want(a.size(), padding);
    for (const Tensor& t : small_table()) memcpy(&want[t.offset], &a[t.offset], 4 * t.size());
    return want.size() == b.size() && memcmp(want.data(), b.data(), 4 * b.size()) == 0;
}

static std::string save_small(const std::string& out, int64_t step, const std::vector<float>& p) {
    auto table = small_table();
    auto model = tensor_entries(table, {{"", source_of(p)}});
    auto optimizer = tensor_entries(table, {{".exp_avg", source_of(p)}, {".exp_avg_sq", source_of(p)}});
    return save_checkpoint(out, step, "{\"hidden_size\": 4}\n",
                           {{"model.safetensors", model}, {"optimizer.safetensors", optimizer}}, {{"seed", 42}, {"a", "\"\n"}});
}

static void test_round_trip(const std::string& dir) {
    auto table = small_table();
    std::vector<float> p = random_arena(1), m = random_arena(2), v = random_arena(3);
    p[32] = NAN, p[33] = -0.f, p[34] = INFINITY, p[35] = 1e-45f;
    std::string path = dir + "/a.safetensors";
    Written w = write_safetensors(path, tensor_entries(table, {{"", source_of(p)}}), {{"format", "pt"}});
    Bytes bytes = slurp(path);
    uint64_t length;
    memcpy(&length, bytes.data(), 8);
    check(w.bytes == bytes.size() && checksum_text(w.sum) == checksum_text(bytes.data(), bytes.size()),
          "written size and checksum", "%zu of %zu bytes", (size_t)w.bytes, bytes.size());
    check(length % 8 == 0 && bytes.size() == 8 + length + 4 * (24 + 32 + 4), "header padded to 8 bytes", "%zu", (size_t)length);

    SafeTensors file(path);
    const StoredTensor* k = file.find("layers.0.k");
    bool ok = k && k->shape == std::vector<int64_t>{2, 4} && k->read<float>()[0] == p[32 + 16];
    check(ok && !file.find("layers.0") && file.metadata["format"] == "pt", "find, shape and metadata", "k %p", (const void*)k);
    std::vector<double> doubles = file.find("model.norm.weight")->read<double>();
    check(doubles.size() == 4 && doubles[3] == (double)p[67], "float read as double", "%zu", doubles.size());

    std::vector<float> back(arena_size, -7.f);
    load_parameters(WeightFiles(path), table, sink_into(back));
    check(same_arena(p, back, -7.f), "fused parts round trip, bit for bit", "arenas differ");

    std::vector<float> m2(arena_size, 1.f), v2(arena_size, 2.f);
    std::mt19937 random_bits(6);
    write_safetensors(path, tensor_entries(table, {{".exp_avg", source_of(m)}, {".exp_avg_sq", source_of(v)}}));
    load_tensors(WeightFiles(path), table, {{".exp_avg", sink_into(m2)}, {".exp_avg_sq", sink_into(v2)}});
    check(same_arena(m, m2, 1.f) && same_arena(v, v2, 2.f), "optimiser round trip", "arenas differ");

    // bf16 values take two bytes each and come back as they were, NaN included; who wants the other type is told so.
    for (std::vector<float>* a : {&m, &v})
        for (float& x : *a) x = float_from_bf16((uint16_t)(random_bits() >> 16));
    m[32] = float_from_bits(0xffc00000), m[33] = -0.f, m[34] = -INFINITY, m[35] = float_from_bf16(1);
    w = write_safetensors(path, tensor_entries(table, {{".exp_avg", source_of(m)}, {".exp_avg_sq", source_of(v)}}, "BF16"));
    SafeTensors halves(path);
    uint64_t data = 0;
    for (const auto& [name, t] : halves.tensors) data += t.dtype == "BF16" ? 2 * t.count : 0;
    check(data == 2 * 2 * (24 + 32 + 4) && w.bytes % 8 == 0, "bf16 takes two bytes", "%zu bytes of data", (size_t)data);
    for (const char* dtype : {"BF16", ""}) {
        std::fill(m2.begin(), m2.end(), 1.f), std::fill(v2.begin(), v2.end(), 2.f);
        load_tensors(WeightFiles(path), table, {{".exp_avg", sink_into(m2)}, {".exp_avg_sq", sink_into(v2)}}, dtype);
        check(same_arena(m, m2, 1.f) && same_arena(v, v2, 2.f), "bf16 round trip", "arenas differ");
    }
    std::string other = dir + "/f.safetensors";
    write_safetensors(other, tensor_entries(table, {{".exp_avg", source_of(m)}, {".exp_avg_sq", source_of(v)}}));
    for (bool bf16 : {false, true})
        expect_refusal(bf16 ? "bf16 moments for a run of float ones" : "float moments for a run of bf16 ones", bf16 ? "is BF16, this run keeps it as F32" : "is F32, this run keeps it as BF16",
            [&] { load_tensors(WeightFiles(bf16 ? path : other), table, {{".exp_avg", sink_into(m2)}, {".exp_avg_sq", sink_into(v2)}}, bf16 ? "F32" : "BF16"); });

    // Bigger than a piece: asked for in order, in pieces of 16 MiB at most, and read back whole.
    size_t n = tensor_piece + 12345, next = 0, largest = 0;
    std::vector<float> big = random_arena(4, n), big2(n);
    FloatSource source = [&](size_t first, size_t count) {
        if (first == next) next += count;
        largest = std::max(largest, count);
        return big.data() + first;
    };
    std::vector<Tensor> one = {{"t", 1, (int64_t)n, 1, false, false, 0, 0, {{"t", 1}}}};
    w = write_safetensors(path, tensor_entries(one, {{"", source}}));
    check(next == n && largest == tensor_piece, "written in pieces", "%zu of %zu, largest %zu", next, n, largest);
    bytes = slurp(path);
    check(checksum_text(w.sum) == checksum_text(bytes.data(), bytes.size()), "checksum of a file in pieces", "differs");
    load_parameters(WeightFiles(path), one, sink_into(big2));
    check(big == big2, "read in pieces", "arenas differ");
    std::mt19937 random(5);
    Checksum cut;
    for (size_t at = 0; at < bytes.size();) {
        size_t take = std::min<size_t>(bytes.size() - at, random() % (random() % 8 ? 100 : 100000));
        if (take) cut.update(bytes.data() + at, take);
        at += take;
    }
    check(checksum_text(cut) == checksum_text(w.sum), "checksum does not depend on the cuts", "%s", checksum_text(cut).c_str());
}

// Independent of the reader's bit tricks: the value as the formats define it, in double. NaNs only need to be NaNs.
static double value_of(uint16_t bits, int exponent_bits, int mantissa_bits) {
    int top = (1 << exponent_bits) - 1, bias = top / 2, e = bits >> mantissa_bits & top, m = bits & ((1 << mantissa_bits) - 1);
    double sign = bits >> 15 ? -1 : 1;
    if (e == top) return m ? NAN : sign * INFINITY;
    return sign * (e ? std::ldexp(1 + std::ldexp(m, -mantissa_bits), e - bias) : std::ldexp(m, 1 - bias - mantissa_bits));
}

static void test_dtypes(const std::string& dir) {
    Bytes data(131072);
    for (int i = 0; i < 65536; i++) data[2 * i] = (uint8_t)i, data[2 * i + 1] = (uint8_t)(i >> 8);
    for (bool bf16 : {true, false}) {
        std::string path = dir + "/d.safetensors";
        for (const char* pad : {"", " ", "   "}) {   // the data may start at any byte
            spill_safetensors(path, std::string(pad) + "{\"x\":{\"dtype\":\"" + (bf16 ? "BF16" : "F16") +
                              "\",\"shape\":[65536],\"data_offsets\":[0,131072]}}", data);
            std::vector<float> x = SafeTensors(path).find("x")->read<float>();
            int wrong = 0;
            for (int i = 0; i < 65536; i++) {
                double want = bf16 ? value_of((uint16_t)i, 8, 7) : value_of((uint16_t)i, 5, 10);
                bool ok = std::isnan(want) ? std::isnan(x[i]) : want == x[i];
                wrong += !(ok && std::signbit(x[i]) == (i >= 32768));
            }
            check(wrong == 0, bf16 ? "all BF16 values exact" : "all F16 values exact", "%d wrong", wrong);
        }
    }
    int64_t i64[2] = {-5, 1LL << 40};
    int32_t i32[2] = {7, -2147483647};
    double f64[2] = {0.1, -1e300};
    Bytes mixed;
    for (auto [p, n] : {std::pair<const void*, size_t>{i64, 16}, {i32, 8}, {f64, 16}})
        mixed.insert(mixed.end(), (const uint8_t*)p, (const uint8_t*)p + n);
    mixed.push_back(200);
    std::string path = dir + "/i.safetensors";
    spill_safetensors(path, R"({"d":    {"dtype": "F64", "shape": [2, 1], "data_offsets": [24, 40]},
                                "a":    {"dtype": "I64", "shape": [2],    "data_offsets": [0, 16]},
                                "b":    {"dtype": "I32", "shape": [2],    "data_offsets": [16, 24]},
                                "none": {"dtype": "F32", "shape": [3, 0], "data_offsets": [24, 24]},
                                "u":    {"dtype": "U8",  "shape": [],     "data_offsets": [40, 41]}})", mixed);
    SafeTensors f(path);
    auto a = f.find("a")->read<int64_t>(), b = f.find("b")->read<int64_t>();
    auto c = f.find("b")->read<int32_t>();
    auto d = f.find("d")->read<double>();
    check(a[0] == -5 && a[1] == 1LL << 40 && b[1] == -2147483647 && c[0] == 7, "I64 and I32", "%lld", (long long)a[1]);
    check(d[0] == 0.1 && d[1] == -1e300 && f.find("d")->read<float>()[0] == 0.1f, "F64", "%g", d[0]);
    check(f.find("u")->read<int32_t>() == std::vector<int32_t>{200}, "U8, and a scalar", "wrong");
    check(f.find("none")->read<float>().empty(), "no elements", "some");
    expect_refusal("I64 that does not fit", "1099511627776", [&] { f.find("a")->read<int32_t>(); });
    expect_refusal("integers are no weights", "a is I64", [&] { f.find("a")->read<float>(); });
    expect_refusal("weights are no integers", "d is F64", [&] { f.find("d")->read<int64_t>(); });
    float two[3];
    expect_refusal("beyond the tensor", "2 elements", [&] { f.find("d")->read(1, 2, two); });
}

static void test_damaged_header(const std::string& dir) {
    std::string path = dir + "/h.safetensors";
    auto header = [&](const char* name, const char* word, const std::string& text, size_t data = 16, int64_t length = -1) {
        spill_safetensors(path, text, Bytes(data, 1), length);
        expect_refusal(name, word, [&] { SafeTensors f(path); });
    };
    auto x = [](const std::string& fields) { return "{\"x\":{" + fields + "}}"; };
    std::string f32 = "\"dtype\":\"F32\",", shape = "\"shape\":[2,2],", span = "\"data_offsets\":[0,16]";
    spill_safetensors(path, x(f32 + shape + span), Bytes(16, 1));
    check(SafeTensors(path).find("x") != nullptr, "the undamaged header", "refused");

    header("header length huge", "beyond", x(f32 + shape + span), 16, INT64_MAX);
    header("header length over the limit", "beyond", x(f32 + shape + span), 16, 100000001);
    header("header length past the end", "truncated", x(f32 + shape + span), 16, 99999999);
    header("header length a little off", "damaged", x(f32 + shape + span), 16, 40);
    header("header length zero", "not JSON", x(f32 + shape + span), 16, 0);
    header("header no object", "no JSON object", "[1, 2]");
    header("header nested deep", "not JSON", std::string(1000000, '['));
    header("number out of range", "damaged", x(f32 + "\"shape\":[1e999]," + span));
    header("entry no object", "no JSON object", "{\"x\":3}");
    header("metadata no object", "no JSON object", "{\"__metadata__\":3}", 0);
    header("no dtype", "lacks", x(shape + span));
    header("no shape", "lacks", x(f32 + span));
    header("no offsets", "lacks", x(f32 + "\"shape\":[2,2]"));
    header("three offsets", "lacks", x(f32 + shape + "\"data_offsets\":[0,16,16]"));
    header("negative size", "lacks", x(f32 + "\"shape\":[-2,-2]," + span));
    header("fractional size", "lacks", x(f32 + "\"shape\":[2.0,2]," + span));
    header("unknown dtype", "unknown dtype F31", x("\"dtype\":\"F31\"," + shape + span));
    header("control characters stay out of the message", "unknown dtype F?2", x("\"dtype\":\"F\\n2\"," + shape + span));
    header("shape and span differ", "cannot be", x(f32 + "\"shape\":[2,3]," + span));
    header("size overflows", "cannot be", x(f32 + "\"shape\":[4611686018427387904,4]," + span));
    header("size overflows to the right one", "cannot be", x(f32 + "\"shape\":[4611686018427387905],\"data_offsets\":[0,4]"), 4);
    header("begin after end", "cannot be", x(f32 + shape + "\"data_offsets\":[16,0]"));
    header("offset past the end", "truncated: 89 bytes expected, 73 seen", x(f32 + "\"shape\":[3,2],\"data_offsets\":[0,24]"), 8);
    header("offset far past the end", "truncated", x(f32 + "\"shape\":[1000000000000],\"data_offsets\":[0,4000000000000]"));
    header("bytes after the last tensor", "16 bytes after", x(f32 + shape + span), 32);
    std::string y = "\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":";
    header("overlap", "starts at byte 4, not at 8", "{\"x\":{" + y + "[0,8]},\"y\":{" + y + "[4,12]}}", 12);
    header("hole", "starts at byte 12, not at 8", "{\"x\":{" + y + "[0,8]},\"y\":{" + y + "[12,20]}}", 20);
    header("hole at the start", "starts at byte 8, not at 0", "{\"x\":{" + y + "[8,16]}}");
    header("the same name twice", "starts at byte 8, not at 0", "{\"x\":{" + y + "[0,8]},\"x\":{" + y + "[8,16]}}");
    expect_refusal("no such file", "cannot open", [&] { SafeTensors f(dir + "/none"); });
    expect_refusal("a folder without weights", "neither", [&] { WeightFiles f("/proc/self"); });
}

static void test_random_damage(const std::string& dir) {
    auto table = small_table();
    std::vector<float> p = random_arena(6);
    std::string path = dir + "/r.safetensors";
    write_safetensors(path, tensor_entries(table, {{"", source_of(p)}}), {{"format", "pt"}});
    Bytes good = slurp(path);
    uint64_t length;
    memcpy(&length, good.data(), 8);
    std::mt19937 random(7);
    auto load = [&] {
        std::vector<float> back(arena_size, 0.f);
        load_parameters(WeightFiles(path), table, sink_into(back));
        _exit(same_arena(p, back, 0.f) ? 0 : 3);
    };
    int wrong = 0;
    for (int i = 0; i < 100; i++) {
        spill(path, good.data(), i < 12 ? (size_t)i : random() % good.size());
        wrong += !refused(in_child(load));
    }
    check(wrong == 0, "every truncation refused", "%d of 100 not", wrong);
    // A flipped bit in the header is refused, or harmless (in blanks or metadata); never is anything else loaded.
    int refusals = 0;
    for (int i = 0; i < 300; i++) {
        Bytes bad = good;
        bad[i < 64 ? (size_t)i / 8 : random() % (8 + length)] ^= (uint8_t)(1 << (i < 64 ? i % 8 : (int)(random() % 8)));
        spill(path, bad.data(), bad.size());
        Outcome o = in_child(load);
        refusals += refused(o);
        if (!refused(o) && o.status != 0) { wrong++; printf("status %d: %s\n", o.status, o.text.c_str()); }
    }
    check(wrong == 0 && refusals > 250, "every flip in the header refused or harmless", "%d wrong, %d refused", wrong, refusals);
}

static void test_wrong_model(const std::string& dir) {
    auto table = small_table();
    std::vector<float> p = random_arena(8), back(arena_size);
    std::string path = dir + "/w.safetensors";
    auto entries = tensor_entries(table, {{"", source_of(p)}});
    auto load = [&] { load_parameters(WeightFiles(path), table, sink_into(back)); };
    auto with = [&](const char* name, std::vector<int64_t> shape, size_t first = 0) {
        auto more = entries;
        more.push_back({name, shape, [&p, first](size_t at, size_t) { return p.data() + first + at; }});
        write_safetensors(path, more);
    };
    write_safetensors(path, {entries.begin(), entries.end() - 1});
    expect_refusal("missing tensor", "lacks the tensor model.norm.weight", load);
    with("model.layers.1.q", {2, 2});
    expect_refusal("extra tensor", "model.layers.1.q has no place", load);
    with("model\nx", {2, 2});
    expect_refusal("extra tensor with a line feed", "model?x has no place", load);
    with("model.layers.0.self_attn.rotary_emb.inv_freq", {2});
    check(in_child(load).status == 0, "inv_freq is harmless", "refused");
    with("lm_head.weight", {6, 4});
    check(in_child(load).status == 0, "a copy of the tied embedding is harmless", "refused");
    with("lm_head.weight", {6, 4}, 1);
    expect_refusal("another head than the embedding", "ties", load);
    write_safetensors(path, entries);
    table[1].parts[1].rows = 3, table[1].parts[2].rows = 1;
    expect_refusal("wrong rows", "layers.0.k is [2, 4], the model wants [3, 4]", load);
    table = small_table();
    table[2].dims = 2;
    expect_refusal("vector or matrix", "model.norm.weight is [4], the model wants [1, 4]", load);
    table = small_table();
    table[1].parts.pop_back();
    expect_refusal("parts that do not add up", "add up", load);
}

static void test_shards(const std::string& dir) {
    auto table = small_table();
    std::vector<float> p = random_arena(9), back(arena_size, 0.f);
    auto entries = tensor_entries(table, {{"", source_of(p)}});
    std::string folder = dir + "/sharded", index = folder + "/model.safetensors.index.json";
    mkdir(folder.c_str(), 0777);
    write_safetensors(folder + "/model-00001-of-00002.safetensors", {entries.begin(), entries.begin() + 2});
    write_safetensors(folder + "/model-00002-of-00002.safetensors", {entries.begin() + 2, entries.end()});
    json map;
    for (size_t i = 0; i < entries.size(); i++)
        map[entries[i].name] = i < 2 ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors";
    auto write_index = [&](const json& root) { write_file_atomically(index, root.dump()); };
    auto load = [&] { load_parameters(WeightFiles(folder), table, sink_into(back)); };
    write_index({{"metadata", {{"total_size", 240}}}, {"weight_map", map}});
    load();
    check(same_arena(p, back, 0.f), "sharded folder", "arenas differ");
    json other = map;
    other["layers.0.v"] = "model-00001-of-00002.safetensors";
    write_index({{"weight_map", other}});
    expect_refusal("tensor in another shard than the index says", "layers.0.v, which its index lists", load);
    other["layers.0.v"] = "../x";
    write_index({{"weight_map", other}});
    expect_refusal("shard in another folder", "in no file of this folder", load);
    other["layers.0.v"] = "model-00003-of-00002.safetensors";
    write_index({{"weight_map", other}});
    expect_refusal("shard missing", "cannot open", load);
    write_index({{"weights", map}});
    expect_refusal("no weight_map", "no weight_map", load);
    write_file_atomically(index, "{\"weight_map\": ");
    expect_refusal("torn index", "not JSON", load);
}

static void test_checkpoints(const std::string& dir) {
    std::string out = dir + "/run";
    mkdir(out.c_str(), 0777);
    check(latest_checkpoint(out).empty() && latest_checkpoint(dir + "/none").empty(), "no checkpoint yet", "found one");
    std::vector<float> p = random_arena(10), back(arena_size, 0.f);
    std::string at = save_small(out, 100, p);
    json state = open_checkpoint(at + "/");
    check(at == out + "/step_00000100", "name of a checkpoint", "%s", at.c_str());
    check(state["step"] == 100 && state["files"].size() == 3, "step and files", "%s", state.dump().c_str());
    check(state["seed"] == 42 && state["a"] == "\"\n", "state round trip", "%s", state.dump().c_str());
    load_parameters(WeightFiles(at), small_table(), sink_into(back));
    check(same_arena(p, back, 0.f), "checkpoint round trip", "arenas differ");
    check(read_json(at + "/config.json")["hidden_size"] == 4, "config.json", "differs");

    save_small(out, 100, p = random_arena(11));
    load_parameters(WeightFiles(at), small_table(), sink_into(back));
    check(same_arena(p, back, 0.f) && list_checkpoints(out).size() == 1, "the same step saved again", "the old one stayed");

    save_small(out, 50, p);
    save_small(out, 123456789, p);
    fs::copy(at, out + "/step_00000200.tmp", fs::copy_options::recursive);   // none of these is a checkpoint
    fs::copy(at, out + "/step_300", fs::copy_options::recursive);
    mkdir((out + "/step_00000400").c_str(), 0777);
    std::vector<std::string> want = {out + "/step_00000050", at, out + "/step_123456789"};
    check(list_checkpoints(out) == want, "list", "%zu listed", list_checkpoints(out).size());
    check(latest_checkpoint(out) == want[2], "latest", "%s", latest_checkpoint(out).c_str());
    write_file_atomically(out + "/log.jsonl", "{}\n");
    remove_leftovers(out);
    check(!fs::exists(out + "/step_00000200.tmp") && list_checkpoints(out) == want && is_file(out + "/log.jsonl"),
          "remove_leftovers", "removed too much or too little");

    // Any damage to any file of a checkpoint is found, and the line names an older checkpoint.
    std::mt19937 random(12);
    int wrong = 0;
    for (int i = 0; i < 200; i++) {
        const char* names[] = {"config.json", "model.safetensors", "optimizer.safetensors", "state.json"};
        std::string file = at + "/" + names[i % 4], word;
        Bytes good = slurp(file), bad = good;
        if (i % 8 < 4) bad[random() % bad.size()] ^= (uint8_t)(1 << random() % 8);
        else if (i % 16 < 8) bad.resize(random() % bad.size()), word = i % 4 < 3 ? " is truncated" : " is damaged";
        else bad.insert(bad.begin() + (ptrdiff_t)(random() % (bad.size() + 1)), (uint8_t)random());
        spill(file, bad.data(), bad.size());
        Outcome o = in_child([&] { open_checkpoint(at); });
        if (!refused(o, "/" + (names[i % 4] + word)) || !refused(o, "--resume " + want[0])) {
            wrong++;
            printf("%s\n", o.text.c_str());
        }
        spill(file, good.data(), good.size());
    }
    check(wrong == 0, "any damage to a checkpoint is found", "%d of 200 not", wrong);
    for (const char* name : {"config.json", "optimizer.safetensors", "state.json"}) {
        rename((at + "/" + name).c_str(), (at + "/away").c_str());
        expect_refusal("missing file", name, [&] { open_checkpoint(at); });
        rename((at + "/away").c_str(), (at + "/" + name).c_str());
    }
    open_checkpoint(at);
    expect_refusal("no such checkpoint", "no state.json", [&] { open_checkpoint(out + "/step_00000007"); });

    prune_checkpoints(out, 0);
    check(list_checkpoints(out) == want, "keep 0 keeps all", "%zu left", list_checkpoints(out).size());
    prune_checkpoints(out, 2);
    check(list_checkpoints(out) == std::vector<std::string>{at, want[2]} && !fs::exists(want[0]), "prune", "wrong ones");
    remove_checkpoints_after(out, 100);
    check(list_checkpoints(out) == std::vector<std::string>{at}, "remove later ones", "wrong ones");
    for (const auto& e : fs::directory_iterator(out))
        check(e.path().extension() != ".tmp", "nothing left over", "%s", e.path().c_str());
}

// kill -9 at any moment: whatever is listed afterwards is whole, and the checkpoint before the killed one is among it.
static void test_kill(const std::string& dir) {
    std::string out = dir + "/killed";
    mkdir(out.c_str(), 0777);
    const size_t n = 300000;
    std::vector<float> p = random_arena(13, n);
    std::vector<Tensor> table;
    for (int i = 0; i < 8; i++)
        table.push_back({"t", 1, 30000, 1, false, false, 0, 30000 * (size_t)i, {{"t" + std::to_string(i), 1}}});
    auto save = [&](int64_t step, const FloatSource& source) {
        save_checkpoint(out, step, "{}", {{"model.safetensors", tensor_entries(table, {{"", source}})}}, json::object());
    };
    save(1, source_of(p));
    double begin = seconds();
    save(2, source_of(p));
    double whole = seconds() - begin;
    fs::remove_all(out + "/step_00000002");

    int wrong = 0, torn = 0, saved = 0;
    std::mt19937 random(14);
    for (int i = 0; i < 60; i++) {
        int calls = 0;
        FloatSource source = [&](size_t first, size_t) {
            if (i < 8 && calls++ == i) raise(SIGKILL);   // these die in the middle for certain, the others somewhere
            return p.data() + first;
        };
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) { save(2, source); _exit(0); }
        if (i >= 8) {
            usleep((useconds_t)(1e6 * 1.3 * whole * (random() % 1000) / 1000));
            kill(child, SIGKILL);
        }
        waitpid(child, nullptr, 0);
        std::string latest = latest_checkpoint(out);
        bool second = latest == out + "/step_00000002";
        if (!second && latest != out + "/step_00000001") wrong++;
        for (const std::string& c : list_checkpoints(out)) wrong += in_child([&] { open_checkpoint(c); }).status != 0;
        torn += fs::exists(out + "/step_00000002.tmp"), saved += second;
        remove_leftovers(out);
        fs::remove_all(out + "/step_00000002");
    }
    check(wrong == 0 && torn >= 8, "kill while saving", "%d wrong, %d torn, %d saved", wrong, torn, saved);

    wrong = torn = 0;
    for (int i = 0; i < 20; i++) {
        for (int64_t step = 2; step <= 5; step++)
            fs::copy(out + "/step_00000001", checkpoint_path(out, step), fs::copy_options::recursive);
        pid_t child = fork();
        if (child == 0) { prune_checkpoints(out, 1); _exit(0); }
        usleep(random() % 3000);
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
        auto all = list_checkpoints(out);
        wrong += all.empty() || all.back() != out + "/step_00000005";
        torn += all.size() > 1;
        for (const std::string& c : all) wrong += in_child([&] { open_checkpoint(c); }).status != 0;
        remove_leftovers(out);
        prune_checkpoints(out, 1);
        rename((out + "/step_00000005").c_str(), (out + "/step_00000001").c_str());
    }
    check(wrong == 0, "kill while pruning", "%d wrong, %d torn", wrong, torn);
}

static void test_disk_full(const std::string& dir) {
    std::string out = dir + "/full";
    mkdir(out.c_str(), 0777);
    std::vector<float> p = random_arena(15);
    auto limited = [&](rlim_t bytes, int64_t step) {
        return in_child([&] {
            signal(SIGXFSZ, SIG_IGN);
            rlimit limit = {bytes, bytes};
            setrlimit(RLIMIT_FSIZE, &limit);
            save_small(out, step, p);
        });
    };
    Outcome o = limited(100, 3);
    check(refused(o, "no earlier one") && refused(o, "model.safetensors: File too large"), "disk full at the first checkpoint",
          "status %d: %s", o.status, o.text.c_str());
    std::string first = save_small(out, 1, p);
    int wrong = 0;
    for (rlim_t bytes : {0, 10, 100, 400, 600, 700}) {
        o = limited(bytes, 2);
        std::string second = checkpoint_path(out, 2);
        wrong += !refused(o, first + " is intact") || fs::exists(second) || fs::exists(second + ".tmp");
    }
    check(wrong == 0 && latest_checkpoint(out) == first, "disk full keeps the older one", "%d wrong: %s", wrong, o.text.c_str());
    open_checkpoint(first);
    auto entries = tensor_entries(small_table(), {{"", source_of(p)}});
    expect_refusal("no space left", "No space left", [&] { write_safetensors("/dev/full", entries); });
    expect_refusal("no such folder", "cannot create", [&] { save_small(out + "/none", 1, p); });
}

static void test_log(const std::string& dir) {
    std::string path = dir + "/log.jsonl";
    auto cut = [&](const std::string& before, int64_t step, const std::string& want, const char* name) {
        spill(path, before.data(), before.size());
        Outcome o = in_child([&] { truncate_log(path, step); });
        Bytes b = slurp(path);
        std::string after(b.begin(), b.end());
        bool tidy = !fs::exists(path + ".tmp");
        check(o.status == 0 && after == want && tidy, name, "status %d, left\n%s", o.status, after.c_str());
    };
    std::string head = "{\"a\": {\"step\": 9}}\n", s1 = "{\"step\": 1, \"loss\": 2.5}\n", s2 = "{\"step\": 2, \"loss\": N}\n",
                s3 = "{\"step\": 3}\n", e1 = "{\"step\": 1, \"val_loss\": 2}\n";
    cut(head + s1 + e1 + s3, 3, head + s1 + e1 + s3, "log: nothing to cut");
    cut(head + s1 + e1 + s3, 2, head + s1 + e1, "log: later steps");
    cut(head + s1 + e1 + s3, 0, head, "log: all steps");
    cut(head + s1 + s3 + s1, 1, head + s1, "log: everything after a later step");
    cut(head + s1 + "{\"step\": 2, \"lo", 9, head + s1, "log: torn last line");
    cut(head + s1 + "{\"step\": 2}", 9, head + s1, "log: last line without its end");
    cut(head + s1 + "{\"step\": 2, \"lo\n" + s3, 9, head + s1, "log: torn line inside");
    cut(head + s1 + s2 + s3, 9, head + s1, "log: no JSON");
    cut(head + s1 + "\n" + s3, 9, head + s1, "log: empty line");
    cut(head + s1 + "[1]\n" + s3, 9, head + s1, "log: no object");
    cut(head + s1 + "{\"loss\": 1}\n" + s3, 9, head + s1, "log: no step");
    cut(head + s1 + std::string("\0\0\0", 3), 9, head + s1, "log: zeros after a power cut");
    cut(head, 5, head, "log: options only");
    for (const char* bad : {"", "{\"options\": 1"}) {
        spill(path, bad, strlen(bad));
        expect_refusal("log: no first line", "first line", [&] { truncate_log(path, 1); });
    }
    write_file_atomically(path, "new");
    check(slurp(path) == Bytes({'n', 'e', 'w'}), "write_file_atomically", "wrong text");
    expect_refusal("write into no folder", "cannot write", [&] { write_file_atomically(dir + "/none/x", "x"); });
}

int main() {
    const char* base = getenv("TMPDIR");
    std::string dir = std::string(base ? base : "/tmp") + "/test_checkpoint.XXXXXX";
    if (!mkdtemp(dir.data())) fail("cannot create %s", dir.c_str());
    test_round_trip(dir);
    test_dtypes(dir);
    test_damaged_header(dir);
    test_random_damage(dir);
    test_wrong_model(dir);
    test_shards(dir);
    test_checkpoints(dir);
    test_kill(dir);
    test_disk_full(dir);
    test_log(dir);
    std::error_code ec;
    fs::remove_all(dir, ec);
    return done();
}
