// host.h: what every other file needs from the operating system: one way to fail, files mapped into memory, checksums,
// a clock. It knows nothing of models, tensors or CUDA.
#pragma once
#include <fcntl.h>      // open
#include <sys/mman.h>   // mmap, munmap
#include <sys/stat.h>   // fstat, S_ISDIR
#include <time.h>       // clock_gettime
#include <unistd.h>     // close
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

// The program's only way to refuse: one line that says what is wrong and what mends it, exit status 2.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    char line[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char* c = line; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f) *c = '?';      // names come from users and files: keep it one line, and harmless
    fflush(stdout);
    fprintf(stderr, "train_llama: %s\n", line);
    exit(2);
}

// Seconds since some moment in the past: for differences. Monotonic: setting the clock of the machine does not move it.
inline double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// A whole file, read-only, mapped: the kernel's page cache holds it, not this process's heap. Fails with a line that names the file.
// O_NONBLOCK: opening a pipe that nobody writes to would wait for ever; on a file it does nothing.
struct MappedFile {
    std::string path;
    const uint8_t* data = nullptr;
    size_t size = 0;

    explicit MappedFile(const std::string& file) : path(file) {
        int fd = open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd < 0) fail("cannot open %s: %s", file.c_str(), strerror(errno));
        struct stat st;
        if (fstat(fd, &st) != 0) fail("cannot read %s: %s", file.c_str(), strerror(errno));
        if (!S_ISREG(st.st_mode)) fail("%s is not a regular file: save what it gives to a file first", file.c_str());
        size = (size_t)st.st_size;
        if (size > 0) {
            void* p = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
            if (p == MAP_FAILED) fail("cannot map %s: %s", file.c_str(), strerror(errno));
            data = (const uint8_t*)p;
        }
        close(fd);                                                // the mapping stays
    }
    // Moves, so that files can be kept in vectors; a copy would unmap twice.
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    MappedFile(MappedFile&& o) noexcept : path(std::move(o.path)), data(o.data), size(o.size) { o.data = nullptr; o.size = 0; }
    ~MappedFile() { if (data) munmap((void*)data, size); }
};

// 64-bit checksum of a stream of bytes, for damage, not for malice: four interleaved multiply-rotate lanes over 8-byte words
// (several GB/s), folded with the length. Feed any pieces in order; the result does not depend on how they were cut.
//
//     bytes   0-7     8-15    16-23   24-31  |  32-39 ...
//     lane    0       1       2       3      |  0     ...      four chains, so that a multiplication need not wait for the one before it
struct Checksum {
    // Where lanes start: odd constants with no pattern, so that lanes exchanged are seen.
    uint64_t lane[4] = {0x9E3779B97F4A7C15u, 0xBF58476D1CE4E5B9u, 0x94D049BB133111EBu, 0xD6E8FEB86659FD93u};
    uint64_t length = 0;          // bytes so far
    uint8_t pending[32];          // the last length % 32 of them, no whole block yet

    // One to one in either argument: a changed word always changes its lane.
    static uint64_t mix(uint64_t h, uint64_t word) {
        h = (h ^ word) * 0x9FB21C651E98DF25u;
        return (h << 29) | (h >> 35);
    }
    void block(const uint8_t* p) {
        for (int i = 0; i < 4; i++) {
            uint64_t word;
            memcpy(&word, p + 8 * i, 8);
            lane[i] = mix(lane[i], word);
        }
    }
    void update(const void* bytes, size_t n) {
        const uint8_t* p = (const uint8_t*)bytes;
        size_t held = length % 32;
        length += n;
        if (held) {
            size_t take = 32 - held < n ? 32 - held : n;
            memcpy(pending + held, p, take);
            p += take, n -= take;
            if (held + take < 32) return;
            block(pending);
        }
        for (; n >= 32; p += 32, n -= 32) block(p);
        memcpy(pending, p, n);
    }
    // Of what came so far, its last block filled up with zeros (the length tells it from bytes that are zero); more may follow.
    uint64_t value() const {
        Checksum c = *this;
        memset(c.pending + length % 32, 0, 32 - length % 32);
        c.block(c.pending);
        uint64_t h = length;
        for (uint64_t l : c.lane) h = mix(h, l);
        return h ^ (h >> 31);
    }
};
