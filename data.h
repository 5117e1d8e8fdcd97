// data.h: what the model reads and what it says: token files on one side, text on the other. Knows nothing of CUDA or models.
//
//   Corpus      a list of files, mapped into memory, all of one kind:
//                 plain text       any name but *.bin       a token is a byte            vocabulary    256
//                 GPT-2 shard      magic 20240520, v. 1     1 KiB header, uint16 ids     vocabulary  50257
//                 LLaMA-3 shard    magic 20240801, v. 7     1 KiB header, uint32 ids     vocabulary 128256
//               The two shard kinds are llm.c's: its dev/data scripts, and the FineWeb shards on Hugging Face, write them.
//   permuted()  the order in which an epoch visits the windows: a bijection that is computed, never stored
//   Tokenizer   ids <-> bytes: the bytes themselves, a tiktoken ranks file (LLaMA-3, GPT-2), or llm.c's gpt2_tokenizer.bin
//   printable() bytes -> text that cannot harm a terminal
//
// Windows. Predicting token t+1 from the tokens up to t takes seq + 1 tokens for seq predictions, so windows overlap by one:
//
//     shard     t0 t1 t2 t3 t4 t5 t6 t7 t8 t9        n = 10 tokens, seq = 4
//     window 0  t0 t1 t2 t3|t4                       inputs t0..t3, targets t1..t4
//     window 1              t4 t5 t6 t7|t8           (n - 1) / seq = 2 windows; t9 is never predicted
//
// Every other token is predicted exactly once an epoch. No window crosses a shard: the end of one file says nothing of the next.
//
// Errors end the program with one line and status 2 (fail() in host.h). Integers in files are little-endian, as are the machines.
// Test: g++ -std=c++17 -O2 -Wall -Wextra -I. test/test_data.cpp -o test_data && ./test_data
#pragma once
#include <glob.h>           // glob, globfree
#include <strings.h>        // strncasecmp
#include <algorithm>        // min, max, sort, min_element
#include <climits>          // INT_MAX
#include <string>
#include <unordered_map>
#include <vector>
#include "host.h"           // fail, MappedFile, Checksum

// ---------------------------------------------------------------------------------------------------------------------------
// Token files

inline bool ends_with(const std::string& s, const char* tail) {
    size_t n = strlen(tail);
    return s.size() >= n && s.compare(s.size() - n, n, tail) == 0;
}

// A file that must hold something, with lines that say more than MappedFile's.
inline MappedFile map_file(const std::string& path) {
    const char* name = path.c_str();
    struct stat st;
    if (stat(name, &st) != 0) fail("cannot open %s: %s; check the path", name, strerror(errno));
    if (S_ISDIR(st.st_mode)) fail("%s is a directory: name what is in it (for data a quoted glob will do, '%s/*.bin')", name, name);
    if (!S_ISREG(st.st_mode)) fail("%s is not a regular file: save what it gives to a file first", name);
    if (st.st_size == 0) fail("%s is empty: leave it out, or make it again", name);
    return MappedFile(path);
}

// "a.txt,shards/*.bin" -> the files, in the order given; what one glob finds is sorted by bytes, not by the locale, since the
// order of the shards decides which token a window holds and must be the same wherever a run is resumed.
inline std::vector<std::string> expand_paths(const std::string& spec) {
    std::vector<std::string> paths;
    for (size_t at = 0, comma; at <= spec.size(); at = comma + 1) {
        comma = std::min(spec.find(',', at), spec.size());
        std::string item = spec.substr(at, comma - at);
        if (item.empty()) fail("empty name in \"%s\": give files or quoted globs with single commas between them", spec.c_str());
        struct stat st;
        bool is_glob = item.find_first_of("*?[") != std::string::npos && stat(item.c_str(), &st) != 0;  // "a[1].txt" may be a name
        if (!is_glob) { paths.push_back(item); continue; }
        glob_t found = {};
        if (glob(item.c_str(), GLOB_NOSORT, nullptr, &found) != 0)
            fail("no file matches %s: check the folder and the pattern", item.c_str());
        std::sort(found.gl_pathv, found.gl_pathv + found.gl_pathc, [](char* a, char* b) { return strcmp(a, b) < 0; });
        paths.insert(paths.end(), found.gl_pathv, found.gl_pathv + found.gl_pathc);
        globfree(&found);
    }
    return paths;
}

struct Split { int64_t first = 0, count = 0; };     // windows [first, first + count)

struct Corpus {
    enum Kind { TEXT, GPT2, LLAMA3 };
    struct Format { const char* name; int magic, version, width, vocab; };      // width: bytes a token
    static const Format& format(Kind kind) {
        static const Format table[] = {{"plain text", 0, 0, 1, 256},
                                       {"GPT-2 tokens", 20240520, 1, 2, 50257},
                                       {"LLaMA-3 tokens", 20240801, 7, 4, 128256}};
        return table[kind];
    }
    static constexpr int header_bytes = 1024;       // of a shard: 256 int32, of which {magic, version, token count} are used
    struct Shard { MappedFile file; const uint8_t* ids; int64_t tokens; };

    Kind kind = TEXT;
    int vocab = 256;            // every id is below it: checked once, in open()
    int64_t tokens = 0;         // of all shards together
    std::string spec;           // as given: error lines repeat it
    std::vector<Shard> shards;  // empty only in a Corpus that was never opened

    // Opens every file of the list. vocab_limit, if not 0, replaces the kind's own vocabulary (--vocab): larger where the
    // model's tables are padded, smaller where the data are known to use few ids.
    static Corpus open(const std::string& spec, int vocab_limit = 0) {
        Corpus c;
        c.spec = spec;
        std::vector<struct stat> seen;
        for (const std::string& path : expand_paths(spec)) {
            Kind kind;
            Shard shard = map_shard(path, &kind);
            // A file that came twice would be trained on after its end was held out: a validation loss that flatters.
            struct stat st = {};
            stat(path.c_str(), &st);
            for (const struct stat& s : seen)
                if (s.st_ino == st.st_ino && s.st_dev == st.st_dev)
                    fail("%s comes twice in \"%s\": name each file once", path.c_str(), spec.c_str());
            seen.push_back(st);
            if (c.shards.empty()) c.kind = kind;
            if (kind != c.kind)
                fail("%s holds %s, %s holds %s: give files of one kind", c.shards[0].file.path.c_str(), format(c.kind).name,
                     path.c_str(), format(kind).name);
            c.shards.push_back(std::move(shard));
            c.tokens += c.shards.back().tokens;
        }
        c.vocab = vocab_limit > 0 ? vocab_limit : format(c.kind).vocab;
        // One pass over all ids, at memory or disk speed, buys a training loop and an embedding kernel that need no check.
        for (const Shard& s : c.shards) c.typed(s, [&](auto* ids) { scan(s, ids, c.vocab); });
        return c;
    }

    // Windows of seq + 1 tokens (seq >= 1), numbered through all shards.
    int64_t windows(int seq) const {
        int64_t n = 0;
        for (const Shard& s : shards) n += (s.tokens - 1) / seq;
        return n;
    }

    // inputs[t] and targets[t], t < seq, of window `index` < windows(seq): targets are inputs one token later. Walks the list of
    // shards: a thousand of them cost microseconds, and no table has to be kept for each seq.
    void window(int64_t index, int seq, int32_t* inputs, int32_t* targets) const {
        int64_t left = index;
        for (const Shard& s : shards) {
            int64_t here = (s.tokens - 1) / seq;
            if (left >= here || left < 0) { left -= here; continue; }
            typed(s, [&](auto* ids) {
                ids += left * seq;
                for (int t = 0; t < seq; t++) inputs[t] = (int32_t)ids[t], targets[t] = (int32_t)ids[t + 1];
            });
            return;
        }
        fail("there is no window %lld in \"%s\": please report this bug", (long long)index, spec.c_str());
    }

    // Without --val the last 1% of the windows, and no fewer than 16, are held out: the end of the files, not a random choice,
    // so that the held-out text is not cut from the middle of what was trained on. With --val, all() serves both corpora.
    Split held_out(int seq) const {
        need_windows(seq, 16 + 1, "16 to validate on and one to train on");
        int64_t n = windows(seq), held = std::max<int64_t>(16, n / 100);
        return {n - held, held};
    }
    Split training(int seq) const { return {0, held_out(seq).first}; }
    Split all(int seq) const { need_windows(seq, 1, "one at least"); return {0, windows(seq)}; }

    // Tells one data set from another at --resume: kind, sizes, order, and 64 KiB at either end of each shard, but not the paths,
    // so that data may move. A change in the middle of a large shard goes unseen; reading it all would take minutes.
    uint64_t fingerprint() const {
        Checksum sum;
        for (const Shard& s : shards) {
            uint64_t facts[2] = {(uint64_t)kind, s.file.size};
            size_t part = std::min<size_t>(s.file.size, 64 << 10);
            sum.update(facts, sizeof facts);
            sum.update(s.file.data, part);
            sum.update(s.file.data + s.file.size - part, part);
        }
        return sum.value();
    }

private:
    // Calls f with the shard's ids as a pointer to their own type. The map starts on a page and the header is 1 KiB: aligned.
    template <class F> void typed(const Shard& s, F f) const {
        if (kind == TEXT) f(s.ids);
        else if (kind == GPT2) f((const uint16_t*)s.ids);
        else f((const uint32_t*)s.ids);
    }

    // Maps one file, tells its kind, and checks that header and size agree.
    static Shard map_shard(const std::string& path, Kind* kind) {
        MappedFile file = map_file(path);
        const char* name = path.c_str();
        const uint8_t* data = file.data;
        const int64_t size = (int64_t)file.size;
        *kind = TEXT;
        if (!ends_with(path, ".bin")) return {std::move(file), data, size};

        if (size < header_bytes)
            fail("%s is truncated: a token shard begins with %d bytes of header, the file has %lld; fetch or make it again, or "
                 "rename it if it is text", name, header_bytes, (long long)size);
        int32_t header[3];
        memcpy(header, data, sizeof header);
        if (header[0] == 20240328) fail("%s is a tokenizer, not a token shard: give it as --tokenizer", name);
        for (Kind k : {GPT2, LLAMA3})
            if (header[0] == format(k).magic) *kind = k;
        if (*kind == TEXT)
            fail("%s has magic number %d, not a token shard's (GPT-2: %d, LLaMA-3: %d): make it with llm.c's dev/data scripts, or "
                 "rename it if it is text", name, header[0], format(GPT2).magic, format(LLAMA3).magic);
        const Format& f = format(*kind);
        if (header[1] != f.version)
            fail("%s is version %d of a shard of %s; only version %d is known: make it again", name, header[1], f.name, f.version);
        const int64_t n = (uint32_t)header[2], expected = header_bytes + n * f.width;
        if (size != expected)
            fail("%s is %s: %lld tokens take %lld bytes, the file has %lld; fetch or make it again", name,
                 size < expected ? "truncated" : "too long", (long long)n, (long long)expected, (long long)size);
        if (n == 0) fail("%s holds no tokens: leave it out, or make it again", name);
        return {std::move(file), data + header_bytes, n};
    }

    // Fails on the first id that is not below vocab. The maximum of a piece is a loop that the compiler vectorises, as a search
    // for the first bad id is not; the search runs only in the piece that holds one.
    template <class T> static void scan(const Shard& s, const T* ids, int vocab) {
        if ((int64_t)vocab > (int64_t)(T)~(T)0) return;         // no id of this width could be too large
        const int64_t piece = 1 << 16;
        for (int64_t at = 0; at < s.tokens; at += piece) {
            int64_t end = std::min(at + piece, s.tokens);
            T top = 0;
            for (int64_t i = at; i < end; i++) top = std::max(top, ids[i]);
            if (top < (uint32_t)vocab) continue;
            while (ids[at] < (uint32_t)vocab) at++;
            fail("%s: token %lld is %u, the vocabulary ends at %d: raise --vocab, or use data made with the right tokenizer",
                 s.file.path.c_str(), (long long)at, (unsigned)ids[at], vocab - 1);
        }
    }

    void need_windows(int seq, int64_t needed, const char* why) const {
        if (windows(seq) >= needed) return;
        int fits = seq;
        while (fits > 0 && windows(fits) < needed) fits /= 2;
        char mend[64];
        snprintf(mend, sizeof mend, fits > 0 ? "give more data, or --seq %d" : "give more data", fits);
        fail("%s has %lld tokens, %lld windows of --seq %d; %lld are needed (%s), %lld tokens in one file: %s", spec.c_str(),
             (long long)tokens, (long long)windows(seq), seq, (long long)needed, why, (long long)(needed * seq + 1), mend);
    }
};

// ---------------------------------------------------------------------------------------------------------------------------
// Order

// Finaliser of SplitMix64 (Steele, Lea and Flood 2014; constants: Stafford's variant 13): a bijection in which each bit of the
// input flips each bit of the output with a probability close to one half.
inline uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Where position i (0 <= i < n) of an epoch's order points: a bijection on [0, n) for every key, in O(1) memory, so that any step
// of any epoch can be resumed at without replaying what came before. The caller derives the key from (seed, epoch).
//
// A Feistel network is a bijection whatever its round function: each round xors one half with a hash of the other, and is undone
// by the same xor. It permutes 2^(2h) values, the least such power >= n; a value beyond n is sent through again until it falls
// below ("cycle walking": i's own cycle leads back into [0, n), and 2^(2h) < 4n, so that fewer than 4 passes are expected).
// Luby and Rackoff: 4 rounds suffice for large halves; halves of a few bits take more. Measured at n = 16: where 0 and 1 go, over
// 96000 keys, is off the uniform law by 159, 10 and -1 standard deviations of chi^2 after 4, 6 and 8 rounds.
inline int64_t permuted(int64_t i, int64_t n, uint64_t key) {
    if (n <= 1) return 0;
    const int rounds = 8;
    int half = 1;
    while (half < 31 && (int64_t)1 << (2 * half) < n) half++;
    const uint64_t mask = ((uint64_t)1 << half) - 1;
    uint64_t round_key[rounds];         // hashed in a chain, so that neighbouring keys share nothing
    for (int r = 0; r < rounds; r++) round_key[r] = key = mix64(key + 0x9E3779B97F4A7C15u);
    uint64_t left = (uint64_t)i >> half, right = (uint64_t)i & mask;
    do {
        for (int r = 0; r < rounds; r++) {
            uint64_t next = left ^ (mix64(right ^ round_key[r]) & mask);
            left = right, right = next;
        }
    } while ((int64_t)(left << half | right) >= n);
    return (int64_t)(left << half | right);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Text

// Standard base64 with padding. False if anything about it is wrong.
inline bool base64_decode(const char* s, size_t n, std::string* out) {
    out->clear();
    if (n == 0 || n % 4 != 0) return false;
    size_t pad = s[n - 1] != '=' ? 0 : s[n - 2] != '=' ? 1 : 2;
    uint32_t bits = 0;
    for (size_t i = 0; i < n; i++) {
        char c = s[i];
        int v = c >= 'A' && c <= 'Z' ? c - 'A' : c >= 'a' && c <= 'z' ? c - 'a' + 26 : c >= '0' && c <= '9' ? c - '0' + 52
              : c == '+' ? 62 : c == '/' ? 63 : i >= n - pad ? 0 : -1;
        if (v < 0) return false;
        bits = bits << 6 | (uint32_t)v;
        if (i % 4 != 3) continue;
        for (int shift = 16; shift >= 0; shift -= 8) out->push_back((char)(bits >> shift & 0xFF));
    }
    out->resize(out->size() - pad);
    return true;
}

// Byte-pair encoding works within chunks, so that no token joins the end of one word to the next. Returns where the chunk that
// starts at i ends, by the published patterns
//     GPT-2     '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//     LLaMA-3   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
// " Hello, it's 2024  now" -> " Hello" "," " it" "'s" " 2024" " " " now" by GPT-2's; by LLaMA-3's " 2024" is " " "202" "4".
// Written out for ASCII, where it agrees with them. Bytes from 0x80 count as letters: text with other digits, punctuation, spaces
// or emoji may be cut elsewhere than the original cuts it. The ids then differ, the text that they spell does not.
inline size_t chunk_end(const std::string& s, size_t i, bool llama3) {
    enum { END, LETTER, DIGIT, SPACE, MARK };
    auto kind = [&](size_t j) {
        if (j >= s.size()) return END;
        uint8_t c = (uint8_t)s[j], lower = c | 0x20;
        return c >= 0x80 || (lower >= 'a' && lower <= 'z') ? LETTER : c >= '0' && c <= '9' ? DIGIT
             : c == ' ' || (c >= '\t' && c <= '\r') ? SPACE : MARK;
    };
    auto run = [&](size_t j, int k) { while (kind(j) == k) j++; return j; };
    auto newline = [&](size_t j) { return j < s.size() && (s[j] == '\n' || s[j] == '\r'); };
    if (s[i] == '\'')
        for (const char* tail : {"s", "t", "re", "ve", "m", "ll", "d"}) {
            size_t n = strlen(tail);
            if ((llama3 ? strncasecmp(s.c_str() + i + 1, tail, n) : strncmp(s.c_str() + i + 1, tail, n)) == 0) return i + 1 + n;
        }
    size_t spaced = i + (s[i] == ' ');          // an optional space in front
    size_t word = !llama3 ? spaced : i + ((kind(i) == SPACE || kind(i) == MARK) && !newline(i));
    if (kind(word) == LETTER) return run(word, LETTER);
    if (llama3 && kind(i) == DIGIT) return std::min(run(i, DIGIT), i + 3);
    if (!llama3 && kind(spaced) == DIGIT) return run(spaced, DIGIT);
    if (kind(spaced) == MARK) {
        size_t end = run(spaced, MARK);
        while (llama3 && newline(end)) end++;
        return end;
    }
    size_t end = run(i, SPACE);                 // only white space is left: all of it, but ...
    for (size_t j = end; llama3 && j > i; j--)
        if (newline(j - 1)) return j;           // ... LLaMA-3 stops after the last newline,
    return end == s.size() || end - i == 1 ? end : end - 1;     // ... and the last blank goes with the word that follows
}

struct Tokenizer {
    std::vector<std::string> text;              // id -> bytes
    std::unordered_map<std::string, int> rank;  // bytes -> id, for what merging may produce: all but special tokens
    int begin = '\n';                           // what to put before an empty prompt: the token that opens a document, or a newline
    int end = -1;                               // the token that ends a document; -1: there is none
    bool llama3 = false;                        // which pattern cuts the chunks

    // Bytes: token b is byte b.
    Tokenizer() { for (int b = 0; b < 256; b++) add(std::string(1, (char)b), ""); }

    // A vocabulary file; which of the two kinds, its first bytes say.
    static Tokenizer open(const std::string& path) {
        Tokenizer t;
        t.text.clear(), t.rank.clear();
        MappedFile file = map_file(path);
        uint32_t magic = 0;
        memcpy(&magic, file.data, std::min<size_t>(file.size, 4));
        if (magic == 20240328) t.read_llmc(file);
        else if (!ends_with(path, ".bin")) t.read_ranks(file);
        else fail("%s has magic number %u, not a tokenizer's (20240328); write it with llm.c's train_gpt2.py", path.c_str(), magic);
        // Byte-pair encoding starts from single bytes: with all of them present, encode() cannot fail.
        for (int b = 0; b < 256; b++)
            if (!t.rank.count(std::string(1, (char)b)))
                fail("%s has no token for byte %d, so could not spell all text: use LLaMA-3's or GPT-2's", path.c_str(), b);
        if (t.end < 0) t.begin = t.rank["\n"];
        return t;
    }

    int vocab() const { return (int)text.size(); }

    // The bytes of a token; half a character is common, so join them before printable(). A model with a padded vocabulary can
    // sample an id beyond ours: that reads as U+FFFD.
    std::string decode(int id) const { return id >= 0 && id < vocab() ? text[id] : "\xEF\xBF\xBD"; }
    std::string decode(const std::vector<int>& ids) const {
        std::string s;
        for (int id : ids) s += decode(id);
        return s;
    }

    // Text -> ids. decode(encode(s)) == s for any bytes. "<|endoftext|>" and its like are spelled out as text, not made special.
    std::vector<int> encode(const std::string& s) const {
        std::vector<int> ids;
        for (size_t at = 0, stop; at < s.size(); at = stop) {
            stop = chunk_end(s, at, llama3);
            merge(s.substr(at, stop - at), &ids);
        }
        return ids;
    }

private:
    // Next id. `file` is empty for the built-in table, which cannot go wrong.
    void add(std::string bytes, const std::string& file) {
        if (!rank.emplace(bytes, vocab()).second)
            fail("%s: token %d repeats token %d; fetch the tokenizer again", file.c_str(), vocab(), rank[bytes]);
        text.push_back(std::move(bytes));
    }

    // Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) as tiktoken does it: a chunk that is a token stays whole; else,
    // from single bytes, the two neighbours whose joined bytes have the lowest rank become one, until no neighbours are a token.
    //
    //     "lower", where lo has rank 5, we 7, low 9, er 3 and lower none:   l o w e r -> l o w er -> lo w er -> low er: 2 ids
    //
    // Quadratic in the chunk, so meant for prompts: data come tokenised.
    void merge(const std::string& chunk, std::vector<int>* ids) const {
        auto find = [&](size_t from, size_t to) {
            auto it = rank.find(chunk.substr(from, to - from));
            return it == rank.end() ? INT_MAX : it->second;
        };
        if (find(0, chunk.size()) != INT_MAX) { ids->push_back(find(0, chunk.size())); return; }
        std::vector<size_t> cut;        // part p is bytes [cut[p], cut[p + 1])
        std::vector<int> joined;        // rank of parts p and p + 1 as one token
        for (size_t p = 0; p <= chunk.size(); p++) cut.push_back(p);
        for (size_t p = 0; p + 2 < cut.size(); p++) joined.push_back(find(p, p + 2));
        while (!joined.empty()) {
            size_t p = std::min_element(joined.begin(), joined.end()) - joined.begin();
            if (joined[p] == INT_MAX) break;
            cut.erase(cut.begin() + p + 1);
            joined.erase(joined.begin() + p);
            if (p < joined.size()) joined[p] = find(cut[p], cut[p + 2]);
            if (p > 0) joined[p - 1] = find(cut[p - 1], cut[p + 1]);
        }
        for (size_t p = 0; p + 1 < cut.size(); p++) ids->push_back(find(cut[p], cut[p + 1]));
    }

    // Lines of "base64 rank" ("IQ== 0" is "!", token 0), in any order; ranks 0, 1, 2, ... each once. Special tokens are not in the
    // file: 256 follow LLaMA-3's 128000, one follows GPT-2's 50256, and the two vocabularies are known by that count.
    void read_ranks(const MappedFile& file) {
        const char *name = file.path.c_str(), *p = (const char*)file.data, *stop = p + file.size;
        std::unordered_map<long, std::string> by_rank;
        for (int line = 1; p < stop; line++) {
            const char* newline = (const char*)memchr(p, '\n', stop - p);
            std::string row(p, newline ? newline : stop), bytes;
            p = newline ? newline + 1 : stop;
            if (row.empty()) continue;
            size_t space = std::min(row.find(' '), row.size());
            std::string digits = row.substr(std::min(space + 1, row.size()));
            bool number = !digits.empty() && digits.size() <= 8 && digits.find_first_not_of("0123456789") == std::string::npos;
            if (!number || !base64_decode(row.c_str(), space, &bytes))
                fail("%s, line %d, is not \"base64 rank\": --tokenizer takes a tiktoken file (LLaMA-3's original/tokenizer.model) "
                     "or llm.c's gpt2_tokenizer.bin", name, line);
            if (!by_rank.emplace(std::stol(digits), bytes).second)
                fail("%s, line %d, repeats rank %s; fetch the tokenizer again", name, line, digits.c_str());
        }
        for (long id = 0; id < (long)by_rank.size(); id++) {
            if (!by_rank.count(id)) fail("%s has %zu tokens but none of rank %ld; fetch it again", name, by_rank.size(), id);
            add(by_rank[id], file.path);
        }
        if (vocab() == 50256) {
            begin = end = 50256;
            text.push_back("<|endoftext|>");
        } else if (vocab() == 128000) {
            llama3 = true, begin = 128000, end = 128001;
            text.insert(text.end(), {"<|begin_of_text|>", "<|end_of_text|>"});
            for (int i = 0; i < 254; i++) text.push_back("<|reserved_special_token_" + std::to_string(i) + "|>");
        }
    }

    // llm.c's file: 256 uint32 {magic, version, tokens, end-of-text id}, then for each token a length byte and its bytes.
    // Version 1 left the end-of-text id out; it was written for GPT-2 only.
    void read_llmc(const MappedFile& file) {
        const char* name = file.path.c_str();
        uint32_t header[4];
        if (file.size < 1024) fail("%s is truncated: its header has 1024 bytes, the file has %zu; fetch it again", name, file.size);
        memcpy(header, file.data, sizeof header);
        uint32_t version = header[1], count = header[2], eot = version == 1 ? 50256 : header[3];
        if (version != 1 && version != 2)
            fail("%s is version %u of a tokenizer file, this program reads 1 and 2; write it again", name, version);
        if (eot >= count) fail("%s names token %u as the end of text, but counts %u tokens; write it again", name, eot, count);
        size_t at = 1024;
        for (uint32_t id = 0; id < count; id++) {
            size_t length = at < file.size ? file.data[at] : 0;
            if (at + 1 + length > file.size) fail("%s is truncated: it ends at token %u of %u; fetch it again", name, id, count);
            if (length == 0) fail("%s: token %u is empty; write it again", name, id);
            std::string bytes((const char*)file.data + at + 1, length);
            if (id == eot) text.push_back(bytes);           // special: no merge makes it
            else add(bytes, file.path);
            at += 1 + length;
        }
        if (at != file.size) fail("%s has %zu bytes after its %u tokens; fetch it again", name, file.size - at, count);
        begin = end = (int)eot;
    }
};

// What a model says may be any bytes, and a terminal obeys some of them: "\x1b[2J" clears it. Keeps valid UTF-8, newline and tab; each invalid byte and
// each control character (C0, DEL, C1, and those that turn the direction of writing) becomes U+FFFD.
inline std::string printable(const std::string& bytes) {
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};      // that n bytes may spell: a longer form is invalid
    std::string out;
    for (size_t i = 0; i < bytes.size();) {
        uint8_t c = (uint8_t)bytes[i];
        size_t n = c < 0x80 ? 1 : c < 0xC0 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF8 ? 4 : 0;
        uint32_t point = n < 2 ? c : c & (0x7Fu >> n);
        bool valid = n > 0 && i + n <= bytes.size();
        for (size_t k = 1; valid && k < n; k++) {
            uint8_t d = (uint8_t)bytes[i + k];
            valid = (d & 0xC0) == 0x80;
            point = point << 6 | (d & 0x3Fu);
        }
        valid = valid && point >= least[n] && point <= 0x10FFFF && (point < 0xD800 || point > 0xDFFF);
        bool control = (point < 0x20 && point != '\n' && point != '\t') || (point >= 0x7F && point < 0xA0) ||
                       (point >= 0x202A && point <= 0x202E) || (point >= 0x2066 && point <= 0x2069);
        if (valid && !control) out.append(bytes, i, n);
        else out += "\xEF\xBF\xBD";
        i += valid ? n : 1;
    }
    return out;
}
