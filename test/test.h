// test.h: the few lines every C++ test shares. A test prints `ok NAME` or `FAIL NAME: why` a line; test/run counts the lines,
// so a program that dies half-way fails too (it never prints its `done` line).
#pragma once
#include <unistd.h>     // execv
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>      // getenv, setenv

inline int test_failures = 0;

// One named check. The format says what was seen; it is printed when the check fails.
__attribute__((format(printf, 3, 4))) inline bool check(bool ok, const char* name, const char* format, ...) {
    if (ok) { printf("ok %s\n", name); return true; }
    test_failures++;
    printf("FAIL %s: ", name);
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    return false;
}

// Written so that a NaN on either side fails: never `diff > tol`.
inline bool near(double a, double b, double tol) { return std::fabs(a - b) <= tol; }

// Idle threads must sleep, not spin: on shared cores, with more threads than cores, spinning costs ten to a hundred times the work.
// OpenMP reads its environment before main(), so start again.
inline void calm_openmp(char** argv) {
    if (!getenv("OMP_WAIT_POLICY") && setenv("OMP_WAIT_POLICY", "passive", 1) == 0) execv("/proc/self/exe", argv);
}

inline int done() {
    printf("done\n");
    fflush(stdout);
    return test_failures ? 1 : 0;
}
