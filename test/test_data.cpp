// test_data.cpp: data.h alone. It makes its own small files in a folder of its own, and removes them.
// Everything here is exact but two statistics of the order, whose limits are derived where they are used.
// Run: g++ -std=c++17 -O2 -Wall -Wextra -I. test/test_data.cpp -o test_data && ./test_data
#include <ftw.h>        // nftw
#include <sys/wait.h>   // waitpid
#include <functional>
#include <set>
#include "data.h"
#include "test.h"

static std::string folder;

static std::string put(const std::string& name, const std::string& bytes) {
    std::string path = folder + "/" + name;
    FILE* f = fopen(path.c_str(), "wb");
    if (!f || fwrite(bytes.data(), 1, bytes.size(), f) != bytes.size() || fclose(f) != 0) { perror(path.c_str()); exit(1); }
    return path;
}

// A shard as llm.c writes it: 256 int32, then ids of `width` bytes.
static std::string shard(int magic, int version, int count, int width, const std::vector<uint32_t>& ids) {
    int32_t header[256] = {magic, version, count};
    std::string s((const char*)header, sizeof header);
    for (uint32_t id : ids) s.append((const char*)&id, width);
    return s;
}
static std::string gpt2(const std::vector<uint32_t>& ids) { return shard(20240520, 1, (int)ids.size(), 2, ids); }
static std::string llama3(const std::vector<uint32_t>& ids) { return shard(20240801, 7, (int)ids.size(), 4, ids); }

// Bytes in which neighbours and far parts differ, so that an off-by-one cannot go unseen.
static std::string noise(size_t n, uint64_t seed) {
    std::string s;
    for (size_t i = 0; i < n; i++) s.push_back((char)mix64(seed * 1000003 + i));
    return s;
}

// f must end its process with status 2 after one line on stderr that holds every one of `words`, and print nothing else.
static void refuses(const char* name, const std::vector<std::string>& words, const std::function<void()>& f) {
    std::string out = folder + "/captured";
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        int fd = open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
        dup2(fd, 1), dup2(fd, 2);
        f();
        _exit(0);       // it was not refused
    }
    int status = 0;
    waitpid(pid, &status, 0);
    std::string seen;
    if (FILE* file = fopen(out.c_str(), "rb")) {
        for (int c; (c = fgetc(file)) != EOF;) seen.push_back((char)c);
        fclose(file);
    }
    bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 2 && seen.size() < 500;
    ok = ok && std::count(seen.begin(), seen.end(), '\n') == 1 && seen.back() == '\n';
    for (const std::string& w : words) ok = ok && seen.find(w) != std::string::npos;
    check(ok, name, "status %d, said: %s", WIFEXITED(status) ? WEXITSTATUS(status) : -1, seen.c_str());
}

// Every window of c against the ids that went into its shards: inputs, targets, order, and nothing written past seq.
static bool windows_right(const Corpus& c, const std::vector<std::vector<uint32_t>>& ids, int seq) {
    const int32_t poison = -77;
    int64_t index = 0;
    for (const auto& s : ids)
        for (size_t at = 0; at + seq + 1 <= s.size(); at += seq, index++) {     // from `at` on, seq + 1 tokens are left
            std::vector<int32_t> in(seq + 1, poison), out(seq + 1, poison);
            if (index >= c.windows(seq)) return false;
            c.window(index, seq, in.data(), out.data());
            for (int t = 0; t < seq; t++)
                if (in[t] != (int32_t)s[at + t] || out[t] != (int32_t)s[at + t + 1]) return false;
            if (in[seq] != poison || out[seq] != poison) return false;
        }
    return index == c.windows(seq);
}

static void test_text_windows() {
    std::vector<std::string> texts = {noise(10, 1), noise(1, 2), noise(5, 3), noise(4, 4), noise(301, 5)};
    std::vector<std::vector<uint32_t>> ids;
    std::string spec;
    for (size_t i = 0; i < texts.size(); i++) {
        spec += (i ? "," : "") + put("w" + std::to_string(i) + ".txt", texts[i]);
        ids.emplace_back();
        for (char ch : texts[i]) ids.back().push_back((uint8_t)ch);
    }
    Corpus c = Corpus::open(spec);
    check(c.kind == Corpus::TEXT && c.vocab == 256 && c.tokens == 321 && c.shards.size() == 5, "text_opens",
          "kind %d, vocab %d, %lld tokens, %zu shards", c.kind, c.vocab, (long long)c.tokens, c.shards.size());
    check(c.windows(4) == 2 + 0 + 1 + 0 + 75, "windows_count", "%lld", (long long)c.windows(4));
    for (int seq : {1, 2, 3, 4, 5, 9, 10, 300, 301, 1000})
        check(windows_right(c, ids, seq), ("windows_seq_" + std::to_string(seq)).c_str(), "a window differs from its shard");
    Corpus moved;
    moved = std::move(c);
    check(windows_right(moved, ids, 4), "corpus_moves", "a window differs after a move");
    refuses("window_out_of_range", {"window 78"}, [&] { int32_t a[4], b[4]; moved.window(78, 4, a, b); });
    refuses("window_negative", {"window -1"}, [&] { int32_t a[4], b[4]; moved.window(-1, 4, a, b); });
}

static void test_shards() {
    std::vector<std::vector<uint32_t>> ids(2), big(2);
    for (int s = 0; s < 2; s++)
        for (int i = 0; i < 1000 + 70 * s; i++) {
            ids[s].push_back(mix64(i + 5000 * s) % 50257);
            big[s].push_back(mix64(i + 9000 * s) % 128256);
        }
    ids[0][3] = 50256, big[1][1069] = 128255;          // the last id of each vocabulary is allowed
    std::string g = put("g_0.bin", gpt2(ids[0])) + "," + put("g_1.bin", gpt2(ids[1]));
    std::string l = put("l_0.bin", llama3(big[0])) + "," + put("l_1.bin", llama3(big[1]));
    Corpus a = Corpus::open(g), b = Corpus::open(l);
    check(a.kind == Corpus::GPT2 && a.vocab == 50257 && windows_right(a, ids, 64), "gpt2_shards", "vocab %d", a.vocab);
    check(b.kind == Corpus::LLAMA3 && b.vocab == 128256 && windows_right(b, big, 64), "llama3_shards", "vocab %d", b.vocab);
    check(Corpus::open(folder + "/g_?.bin").tokens == 2070, "glob", "wrong number of tokens");
    check(Corpus::open(g, 60000).vocab == 60000 && Corpus::open(g, 70000).vocab == 70000, "vocab_raised", "not taken");
    refuses("vocab_lowered", {"g_0.bin", "token 3", "50256", "--vocab"}, [&] { Corpus::open(g, 50256); });
    check(Corpus::open(put("ascii.txt", "abc"), 100).vocab == 100, "vocab_lowered_fits", "refused");
    refuses("vocab_text", {"ascii.txt", "token 2", "99", "--vocab"}, [&] { Corpus::open(folder + "/ascii.txt", 99); });
    refuses("vocab_255", {"high.txt", "token 1", "is 255"}, [&] { Corpus::open(put("high.txt", "a\xFF"), 255); });

    std::vector<uint32_t> far(200000, 7);               // a bad id past the first piece of the scan, and one after it
    far[150001] = 50257, far[150002] = 65535;
    refuses("bad_id_gpt2", {"far.bin", "token 150001", "50257"}, [&] { Corpus::open(put("far.bin", gpt2(far))); });
    far[150001] = 0xFFFFFFFF;                           // would be -1 as an int32
    refuses("bad_id_llama3", {"far.bin", "token 150001", "4294967295"}, [&] { Corpus::open(put("far.bin", llama3(far))); });

    // Byte order, not the locale's and not the folder's.
    for (const char* n : {"o_b.x", "o_B.x", "o_a.x", "o_10.x"}) put(n, n);
    Corpus o = Corpus::open(put("o_first.y", "z") + "," + folder + "/o_*.x");
    std::string order;
    for (const auto& s : o.shards) order += s.file.path.substr(folder.size() + 1) + " ";
    check(order == "o_first.y o_10.x o_B.x o_a.x o_b.x ", "glob_order", "%s", order.c_str());
    put("odd[1].txt", "abc");
    check(Corpus::open(folder + "/odd[1].txt").tokens == 3, "brackets_in_a_name", "not opened");
}

static void test_bad_data() {
    auto opens = [](const std::string& spec) { return [=] { Corpus::open(spec); }; };
    std::string good = put("good.txt", "good"), bin = put("good.bin", gpt2({1, 2, 3}));
    refuses("missing", {"nothere.txt", "No such file"}, opens(folder + "/nothere.txt"));
    refuses("no_match", {"nothere*.bin", "no file matches"}, opens(folder + "/nothere*.bin"));
    refuses("empty_spec", {"empty name"}, opens(""));
    refuses("empty_item", {"empty name"}, opens(good + ",," + bin));
    refuses("trailing_comma", {"empty name"}, opens(good + ","));
    refuses("directory", {"is a directory", "*.bin"}, opens(folder));
    refuses("empty_file", {"empty.txt", "is empty"}, opens(put("empty.txt", "")));
    refuses("empty_bin", {"empty.bin", "is empty"}, opens(put("empty.bin", "")));
    refuses("mixed_kinds", {"good.txt", "good.bin", "plain text", "GPT-2"}, opens(good + "," + bin));
    refuses("mixed_bins", {"GPT-2", "LLaMA-3", "l.bin"}, opens(bin + "," + put("l.bin", llama3({1, 2}))));
    refuses("same_file_twice", {"good.txt", "twice"}, opens(good + "," + folder + "/./good.txt"));
    refuses("short_header", {"h.bin", "truncated", "1023"}, opens(put("h.bin", gpt2({1}).substr(0, 1023))));
    refuses("wrong_magic", {"m.bin", "magic number 4711", "20240520", "20240801"}, opens(put("m.bin", shard(4711, 1, 1, 2, {1}))));
    refuses("tokenizer_as_data", {"t.bin", "--tokenizer"}, opens(put("t.bin", shard(20240328, 1, 1, 2, {1}))));
    refuses("gpt2_version", {"v.bin", "version 7", "version 1"}, opens(put("v.bin", shard(20240520, 7, 1, 2, {1}))));
    refuses("llama3_version", {"v.bin", "version 1", "version 7"}, opens(put("v.bin", shard(20240801, 1, 1, 4, {1}))));
    refuses("truncated", {"s.bin", "truncated", "1030", "1029"}, opens(put("s.bin", gpt2({1, 2, 3}).substr(0, 1029))));
    refuses("too_long", {"s.bin", "too long", "1036", "1037"}, opens(put("s.bin", llama3({1, 2, 3}) + "x")));
    refuses("count_negative", {"s.bin", "truncated"}, opens(put("s.bin", shard(20240520, 1, -1, 2, {1}))));
    refuses("count_zero", {"s.bin", "no tokens"}, opens(put("s.bin", gpt2({}))));
    std::string pipe_path = folder + "/pipe";
    if (mkfifo(pipe_path.c_str(), 0600) == 0) refuses("pipe", {"pipe", "not a regular file"}, opens(pipe_path));
    std::string link = folder + "/dangling.txt";
    if (symlink("gone", link.c_str()) == 0) refuses("dangling_link", {"dangling.txt"}, opens(link));
    if (geteuid() != 0 && chmod(good.c_str(), 0) == 0)          // root may read anything
        refuses("unreadable", {"good.txt", "ermission denied"}, opens(good));
}

static void test_split() {
    // {windows, held out}: 16 until 1% is more, then 1% rounded down.
    const int cases[][2] = {{17, 16}, {100, 16}, {1699, 16}, {1700, 17}, {10000, 100}, {10099, 100}};
    for (auto& k : cases) {
        Corpus c = Corpus::open(put("split.txt", noise(k[0] * 8 + 1, 9)));
        Split t = c.training(8), v = c.held_out(8);
        check(c.windows(8) == k[0] && v.count == k[1] && t.first == 0 && t.count == v.first && v.first + v.count == k[0],
              ("split_" + std::to_string(k[0])).c_str(), "training %lld + %lld, held out %lld + %lld", (long long)t.first,
              (long long)t.count, (long long)v.first, (long long)v.count);
    }
    Corpus c = Corpus::open(put("split.txt", noise(17 * 8, 9)));        // one token too few for 17 windows
    refuses("split_too_few", {"split.txt", "136 tokens", "16 windows of --seq 8", "137 tokens", "--seq 4"}, [&] { c.held_out(8); });
    refuses("split_training_too_few", {"split.txt", "more data"}, [&] { c.training(8); });
    check(c.all(8).count == 16 && c.all(8).first == 0 && c.all(135).count == 1, "split_all", "%lld", (long long)c.all(8).count);
    refuses("all_too_few", {"split.txt", "1000 tokens in one file", "--seq 124"}, [&] { c.all(999); });
    Corpus one = Corpus::open(put("one.txt", "x"));
    refuses("one_token", {"one.txt", "1 tokens", "give more data"}, [&] { one.all(1); });
}

static void test_order() {
    for (int64_t n : {1, 2, 3, 4, 5, 16, 17, 64, 65, 1000, 4096, 65537})
        for (uint64_t key : {0ull, 1ull, 0xDEADBEEFull}) {
            std::vector<char> hit(n, 0);
            int64_t bad = 0;
            for (int64_t i = 0; i < n; i++) {
                int64_t p = permuted(i, n, key);
                if (p < 0 || p >= n || hit[p]++) bad++;
            }
            check(bad == 0, ("bijection_" + std::to_string(n) + "_" + std::to_string(key)).c_str(), "%lld clashes", (long long)bad);
        }
    const int64_t huge = (int64_t)3 << 45;
    std::set<int64_t> seen;
    for (int64_t i = 0; i < 1000; i++) seen.insert(permuted(huge - 1 - i, huge, 5));
    int64_t least = *seen.begin(), most = *seen.rbegin();
    check(seen.size() == 1000 && least >= 0 && most < huge && most - least > huge / 2, "order_huge",
          "%zu different, from %lld to %lld", seen.size(), (long long)least, (long long)most);

    // For independent random orders of n, the number of positions where two agree is Poisson(1): more than 12 has p < 1e-10.
    // The correlation of i with p(i), and of p(i) with p(i+1), is 0 +- 1/sqrt(n): 6 standard deviations have p < 2e-9.
    const int64_t n = 65537;
    for (uint64_t key = 0; key < 4; key++) {
        int64_t same = 0, fixed = 0;
        double with_i = 0, with_next = 0, mean = (n - 1) / 2., var = ((double)n * n - 1) / 12;
        for (int64_t i = 0; i < n; i++) {
            int64_t p = permuted(i, n, key), q = permuted((i + 1) % n, n, key);
            same += p == permuted(i, n, key + 1), fixed += p == i;
            with_i += (i - mean) * (p - mean) / var / n;
            with_next += (q - mean) * (p - mean) / var / n;
        }
        const double tol = 6 / std::sqrt((double)n);
        check(same <= 12 && fixed <= 12, ("order_keys_differ_" + std::to_string(key)).c_str(), "%lld agree, %lld fixed",
              (long long)same, (long long)fixed);
        check(near(with_i, 0, tol) && near(with_next, 0, tol), ("order_shuffled_" + std::to_string(key)).c_str(),
              "correlations %g and %g, limit %g", with_i, with_next, tol);
    }

    // Where 0 and 1 go together, over neighbouring keys, is uniform over the 240 ordered pairs of 16: chi^2 with 239 degrees of
    // freedom has mean 239 and standard deviation sqrt(478); 6 of them above the mean is the limit. Six rounds of Feistel miss it,
    // eight do not.
    const int pairs = 16 * 15, each = 400;
    std::vector<int> count(256, 0);
    for (int key = 0; key < pairs * each; key++) count[permuted(0, 16, key) * 16 + permuted(1, 16, key)]++;
    double chi2 = 0;
    for (int k = 0; k < 256; k++)
        if (k / 16 != k % 16) chi2 += (count[k] - each) * (double)(count[k] - each) / each;
    check(chi2 < pairs - 1 + 6 * std::sqrt(2. * (pairs - 1)), "order_pairs_uniform", "chi^2 %g for 239 degrees of freedom", chi2);
}

static void test_fingerprint() {
    std::string a = noise(200000, 1), b = noise(50, 2);
    auto print = [&](const std::string& x, const std::string& y) {
        return Corpus::open(put("f1.txt", x) + "," + put("f2.txt", y)).fingerprint();
    };
    const uint64_t base = print(a, b);
    check(print(a, b) == base, "fingerprint_repeats", "it differs");
    for (size_t at : {(size_t)0, (size_t)65535, a.size() - 65536, a.size() - 1}) {
        std::string changed = a;
        changed[at] ^= 1;
        check(print(changed, b) != base, ("fingerprint_byte_" + std::to_string(at)).c_str(), "it stays the same");
    }
    std::string small = b;
    small[25] ^= 1;
    check(print(a, small) != base, "fingerprint_second_shard", "it stays the same");
    check(print(b, a) != base, "fingerprint_order", "it stays the same");
    check(print(a + b.substr(0, 1), b.substr(1)) != base && print(a + "x", b) != base, "fingerprint_sizes", "it stays the same");
    std::string middle = a;
    middle[100000] ^= 1;            // the documented limit: 64 KiB at either end are read
    check(print(middle, b) == base, "fingerprint_middle_unread", "it differs");
    Corpus elsewhere = Corpus::open(put("elsewhere.txt", a) + "," + put("f2.txt", b));
    check(elsewhere.fingerprint() == base, "fingerprint_without_paths", "it differs");
    Corpus as_ids = Corpus::open(put("k.bin", gpt2({1, 2}))), as_bytes = Corpus::open(put("k.txt", gpt2({1, 2})));
    check(as_ids.fingerprint() != as_bytes.fingerprint(), "fingerprint_kind", "it stays the same");
}

static std::string base64(const std::string& s) {
    const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string out;
    for (size_t i = 0; i < s.size(); i += 3) {
        uint32_t v = 0;
        for (size_t k = 0; k < 3; k++) v = v << 8 | (i + k < s.size() ? (uint8_t)s[i + k] : 0);
        for (size_t k = 0; k < 4; k++) out.push_back(i + k <= s.size() ? digits[v >> (18 - 6 * k) & 63] : '=');
    }
    return out;
}

// A ranks file of the 256 bytes in an order of their own (GPT-2's ids are not byte values either), then `more`.
static std::vector<std::string> bytes_and(const std::vector<std::string>& more) {
    std::vector<std::string> tokens;
    for (int b = 0; b < 256; b++) tokens.push_back(std::string(1, (char)(b ^ 0x41)));
    tokens.insert(tokens.end(), more.begin(), more.end());
    return tokens;
}
static std::string ranks(const std::vector<std::string>& tokens) {
    std::string file;
    for (size_t i = 0; i < tokens.size(); i++) file += base64(tokens[i]) + " " + std::to_string(i) + "\n";
    return file;
}
static std::string llmc_tokenizer(int version, int count, int eot, const std::vector<std::string>& tokens) {
    std::string s = shard(20240328, version, count, 1, {});
    memcpy(&s[12], &eot, 4);
    for (const std::string& t : tokens) s += std::string(1, (char)t.size()) + t;
    return s;
}

static std::string joined(const std::vector<int>& ids) {
    std::string s;
    for (int id : ids) s += std::to_string(id) + " ";
    return s;
}

// The chunks of s, with | between them.
static std::string chunks(const std::string& s, bool llama) {
    std::string out;
    for (size_t at = 0; at < s.size();) {
        size_t stop = chunk_end(s, at, llama);
        out += (at ? "|" : "") + s.substr(at, stop - at);
        at = stop;
    }
    return out;
}

static void test_tokenizer() {
    std::string all;
    for (int b = 0; b < 256; b++) all.push_back((char)b);
    Tokenizer bytes;
    check(bytes.vocab() == 256 && joined(bytes.encode("Az\n")) == "65 122 10 ", "bytes", "%s",
          joined(bytes.encode("Az\n")).c_str());
    check(bytes.decode(bytes.encode(all + all)) == all + all, "bytes_round_trip", "all bytes differ");
    check(bytes.begin == '\n' && bytes.end == -1 && bytes.encode("").empty(), "bytes_begin_end", "%d %d", bytes.begin, bytes.end);
    check(bytes.decode(256) == "\xEF\xBF\xBD" && bytes.decode(-1) == "\xEF\xBF\xBD", "decode_beyond", "not U+FFFD");

    // 256 "lo", 257 "low", 258 " l", 259 "er", 260 " low", 261 "ow", 262 "lowly", 263 "fl". No merge can reach "lowly", but as a
    // whole chunk it is a token. "flow": l+o comes before o+w and f+l. "lower": lo, low, er. " low": " l" would win had "lo" not.
    Tokenizer t = Tokenizer::open(put("ranks", ranks(bytes_and({"lo", "low", " l", "er", " low", "ow", "lowly", "fl"}))));
    auto byte = [](char c) { return std::to_string((uint8_t)c ^ 0x41) + " "; };
    check(t.vocab() == 264 && t.end == -1 && t.begin == ('\n' ^ 0x41) && !t.llama3, "ranks_open", "vocab %d", t.vocab());
    check(joined(t.encode("flow")) == byte('f') + "257 ", "bpe_flow", "%s", joined(t.encode("flow")).c_str());
    check(joined(t.encode("lower low")) == "257 259 260 ", "bpe_lower_low", "%s", joined(t.encode("lower low")).c_str());
    std::string twice = joined(t.encode("lowly lowly"));
    check(twice == "262 260 " + byte('l') + byte('y'), "bpe_whole", "%s", twice.c_str());
    check(joined(t.encode("lolo")) == "256 256 ", "bpe_ties", "%s", joined(t.encode("lolo")).c_str());
    for (uint64_t seed = 0; seed < 20; seed++) {
        std::string s = noise(seed * 7, seed), letters;
        for (char c : s) letters.push_back("lower .\n'1"[(uint8_t)c % 10]);
        if (t.decode(t.encode(s)) != s || t.decode(t.encode(letters)) != letters || t.decode(t.encode(all)) != all)
            check(false, "ranks_round_trip", "seed %d", (int)seed);
    }
    check(t.decode(t.encode(noise(3000, 3))) == noise(3000, 3), "ranks_round_trip", "3000 bytes differ");

    // What the published patterns give. (When this was written, 222000 ASCII texts, random and real, were also cut and encoded by
    // tiktoken 0.14 with each pattern and a vocabulary trained for the purpose: no difference.)
    struct { const char *text, *gpt2, *llama3; } cut[] = {
        {"Hello, world", "Hello|,| world", "Hello|,| world"},
        {"it's we'LL", "it|'s| we|'|LL", "it|'s| we|'LL"},
        {"a  b   ", "a| | b|   ", "a| | b|   "},
        {"a\n\n b\nc", "a|\n\n| b|\n|c", "a|\n\n| b|\n|c"},
        {"x \n y", "x| \n| y", "x| \n| y"},
        {"in 12345", "in| 12345", "in| |123|45"},
        {"f(x);\n\ny", "f|(|x|);|\n|\n|y", "f|(x|);\n\n|y"},
        {"\tif", "\t|if", "\tif"},
        {"'Summer 'summer", "'|Summer| '|summer", "'S|ummer| '|summer"},
    };
    for (auto& k : cut) {
        std::string g = chunks(k.text, false), l = chunks(k.text, true), name = "chunks_" + std::to_string(&k - cut);
        check(g == k.gpt2 && l == k.llama3, name.c_str(), "\"%s\": %s and %s", k.text, g.c_str(), l.c_str());
    }

    // The two known sizes bring their special tokens. Tokens of three bytes are made up to fill the table.
    auto filled = [&](size_t n) {
        std::vector<std::string> v = bytes_and({});
        for (uint32_t i = 0; v.size() < n; i++) v.push_back(std::string((const char*)&i, 3));
        return v;
    };
    Tokenizer l3 = Tokenizer::open(put("tokenizer.model", ranks(filled(128000))));
    check(l3.vocab() == 128256 && l3.begin == 128000 && l3.end == 128001 && l3.llama3, "llama3_special", "vocab %d", l3.vocab());
    std::string names = l3.decode({128000, 128001, 128255});
    check(names == "<|begin_of_text|><|end_of_text|><|reserved_special_token_253|>", "llama3_special_names", "%s", names.c_str());
    std::vector<int> spelt = l3.encode("<|end_of_text|>");
    check(spelt[0] < 128000 && l3.decode(spelt) == "<|end_of_text|>", "special_as_text", "%s", joined(spelt).c_str());
    Tokenizer g2 = Tokenizer::open(put("gpt2.tiktoken", ranks(filled(50256))));
    check(g2.vocab() == 50257 && g2.begin == 50256 && g2.end == 50256 && !g2.llama3 && g2.decode(50256) == "<|endoftext|>",
          "gpt2_special", "vocab %d", g2.vocab());

    std::vector<std::string> v2 = bytes_and({"ab", "eot", "abc"});        // the special token need not come last
    Tokenizer b2 = Tokenizer::open(put("tok.bin", llmc_tokenizer(2, 259, 257, v2)));
    check(b2.vocab() == 259 && b2.end == 257 && b2.begin == 257 && b2.decode(257) == "eot", "llmc_version2", "vocab %d, end %d",
          b2.vocab(), b2.end);
    check(joined(b2.encode("abcab")) == "258 256 ", "llmc_encode", "%s", joined(b2.encode("abcab")).c_str());
    check(joined(b2.encode("zabc")) == byte('z') + "258 ", "llmc_encode_tail", "%s", joined(b2.encode("zabc")).c_str());
    check(joined(b2.encode("eot")) == byte('e') + byte('o') + byte('t'), "llmc_special_as_text", "%s", joined(b2.encode("eot")).c_str());
    std::vector<std::string> v1 = filled(50256);
    v1.push_back("<|endoftext|>");
    Tokenizer b1 = Tokenizer::open(put("tok1.bin", llmc_tokenizer(1, 50257, 0, v1)));
    check(b1.vocab() == 50257 && b1.end == 50256 && b1.decode(b1.encode(all)) == all, "llmc_version1", "vocab %d, end %d",
          b1.vocab(), b1.end);
}

static void test_bad_tokenizers() {
    auto opens = [](const std::string& path) { return [=] { Tokenizer::open(path); }; };
    std::vector<std::string> good = bytes_and({});
    std::string r = ranks(good);
    refuses("tok_missing", {"nothere", "No such file"}, opens(folder + "/nothere"));
    refuses("tok_directory", {"is a directory"}, opens(folder));
    refuses("tok_empty", {"is empty"}, opens(put("r", "")));
    refuses("tok_json", {"r, line 1", "base64 rank"}, opens(put("r", "{\"model\": 1}")));
    refuses("tok_binary", {"line 1"}, opens(put("r", noise(500, 1))));
    refuses("tok_no_rank", {"line 257"}, opens(put("r", r + "QUJD\n")));
    refuses("tok_rank_word", {"line 257"}, opens(put("r", r + "QUJD x\n")));
    refuses("tok_rank_negative", {"line 257"}, opens(put("r", r + "QUJD -1\n")));
    refuses("tok_rank_huge", {"line 257"}, opens(put("r", r + "QUJD 99999999999999999999\n")));
    refuses("tok_rank_twice", {"line 257", "rank 5"}, opens(put("r", r + "QUJD 5\n")));
    refuses("tok_rank_gap", {"none of rank 256"}, opens(put("r", r + "QUJD 257\n")));
    refuses("tok_token_twice", {"token 256 repeats token 0"}, opens(put("r", r + "QQ== 256\n")));
    for (const char* bad : {"QUJ", "Q===", "====", "QU=D", "QU!D", ""})
        refuses((std::string("tok_base64_") + bad).c_str(), {"line 257"}, opens(put("r", r + bad + " 256\n")));
    std::vector<std::string> lacking(good.begin(), good.end() - 1);
    refuses("tok_byte_lacking", {"no token for byte 190"}, opens(put("r", ranks(lacking))));
    check(Tokenizer::open(put("r", r.substr(0, r.size() - 1))).vocab() == 256, "tok_no_last_newline", "refused");

    good.push_back("<e>");
    std::string b = llmc_tokenizer(2, 257, 256, good);
    refuses("bin_magic", {"r.bin", "magic number"}, opens(put("r.bin", shard(4711, 2, 257, 1, {}))));
    refuses("bin_header", {"r.bin", "truncated"}, opens(put("r.bin", b.substr(0, 1000))));
    refuses("bin_version", {"r.bin", "version 3"}, opens(put("r.bin", llmc_tokenizer(3, 257, 256, good))));
    refuses("bin_eot", {"r.bin", "token 257"}, opens(put("r.bin", llmc_tokenizer(2, 257, 257, good))));
    refuses("bin_version1_size", {"r.bin", "50256"}, opens(put("r.bin", llmc_tokenizer(1, 257, 256, good))));
    refuses("bin_count_zero", {"r.bin", "0 tokens"}, opens(put("r.bin", llmc_tokenizer(2, 0, 0, {}))));
    refuses("bin_count_huge", {"r.bin", "truncated"}, opens(put("r.bin", llmc_tokenizer(2, -1, 256, good))));
    refuses("bin_truncated", {"r.bin", "token 256 of 257"}, opens(put("r.bin", b.substr(0, b.size() - 1))));
    refuses("bin_trailing", {"r.bin", "1 bytes after"}, opens(put("r.bin", b + "x")));
    good[7] = "";
    refuses("bin_empty_token", {"r.bin", "token 7 is empty"}, opens(put("r.bin", llmc_tokenizer(2, 257, 256, good))));
    good[7] = good[3];
    refuses("bin_token_twice", {"r.bin", "token 7 repeats token 3"}, opens(put("r.bin", llmc_tokenizer(2, 257, 256, good))));
}

static void test_printable() {
    const std::string q = "\xEF\xBF\xBD", utf8 = "\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x99\x82 \xF4\x8F\xBF\xBF";
    struct { const char* name; std::string in, out; } cases[] = {
        {"ascii", "Hi ~!\n\t", "Hi ~!\n\t"},
        {"utf8", utf8, utf8},
        {"controls", std::string("\0\x1B[2J\r\b\x7F", 8), q + q + "[2J" + q + q + q},
        {"c1", "\xC2\x9B" "31m\xC2\xA0", q + "31m\xC2\xA0"},
        {"direction", "\xE2\x80\xAE\xE2\x81\xA6", q + q},
        {"cut_off", "\xE2\x82", q + q},
        {"cut_off_then_text", "\xF0\x9F\x99" "a", q + q + q + "a"},
        {"lone_continuation", "\x80\xBF", q + q},
        {"overlong", "\xC0\x80\xC1\xBF\xE0\x80\x80\xF0\x80\x80\x80", q + q + q + q + q + q + q + q + q + q + q},
        {"surrogate", "\xED\xA0\x80\xED\x9F\xBF", q + q + q + "\xED\x9F\xBF"},
        {"beyond", "\xF4\x90\x80\x80\xF8\xFF", q + q + q + q + q + q},
        {"empty", "", ""},
    };
    for (auto& k : cases)
        check(printable(k.in) == k.out, (std::string("printable_") + k.name).c_str(), "%zu bytes", printable(k.in).size());
    // Whatever comes in, what comes out is left as it is by a second pass, and holds no control character.
    bool stable = true;
    for (uint64_t seed = 0; seed < 50; seed++) {
        std::string once = printable(noise(400, seed));
        stable = stable && printable(once) == once;
        for (uint8_t c : once) stable = stable && (c >= 32 || c == '\n' || c == '\t') && c != 127;
    }
    check(stable, "printable_stable", "noise came through");
}

int main() {
    const char* tmp = getenv("TMPDIR");
    folder = std::string(tmp && *tmp ? tmp : "/tmp") + "/test_data_XXXXXX";
    if (!mkdtemp(&folder[0])) { perror(folder.c_str()); return 1; }
    test_text_windows();
    test_shards();
    test_bad_data();
    test_split();
    test_order();
    test_fingerprint();
    test_tokenizer();
    test_bad_tokenizers();
    test_printable();
    nftw(folder.c_str(), [](const char* p, const struct stat*, int, FTW*) { return remove(p); }, 8, FTW_DEPTH | FTW_PHYS);
    return done();
}
