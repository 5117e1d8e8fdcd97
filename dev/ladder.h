// ladder.h: what the ladders share: whether there is anything to time, and how.
#pragma once
#include "../device.cuh"        // Ctx, seconds
#include "../test/test.h"       // check, done

#ifndef __CUDACC__
#error "ladders are programs for GPUs: make GPU=1 build/gpu-.../ladder_NAME, or make build/emulated/ladder_NAME"
#endif
#ifdef METIS_EMULATED
constexpr bool timed = false;   // an emulated device knows nothing of speed
#else
constexpr bool timed = true;
#endif

// The median of 25 times, each of a few calls in a row, so that the wait at the end is small beside them.
template <class F> double median_seconds(Ctx& ctx, F call) {
    const int runs = 25, calls = 4;
    std::vector<double> t;
    call();
    for (int i = 0; i < runs; i++) {
        ctx.synchronise();
        double begin = seconds();
        for (int k = 0; k < calls; k++) call();
        ctx.synchronise();
        t.push_back((seconds() - begin) / calls);
    }
    std::sort(t.begin(), t.end());
    return t[runs / 2];
}
