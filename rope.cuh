// rope.cuh: a token's row of queries, keys and values, and the rotary position embedding (RoPE, arXiv 2104.09864) that turns the first two.
//
// A row of qkv has (H + 2 KV) D elements; with H = 4 query heads on KV = 2 key/value heads it is
//
//     | q0 | q1 | q2 | q3 | k0 | k1 | v0 | v1 |        D each; q0 and q1 attend to k0 and v0, q2 and q3 to k1 and v1
//
// Elements i and i + D/2 of a head are a point in a plane, turned by the angle (position x frequency i). A turn keeps lengths, and
// the product of a query at position s with a key at position t sees their distance alone: (R(s) q) . (R(t) k) = q . R(t - s) k.
#pragma once
#include "config.h"     // Config
#include "device.cuh"   // for_rows, sincos_

struct Heads {
    int B, T, H, KV, D;                                     // sequences, tokens each, query heads, key/value heads, head size
    HD int64_t row() const { return (int64_t)(H + 2 * KV) * D; }   // elements in a row of qkv
};

// cos and sin of position times frequency, (T x D/2) each, on the device: what rotate() turns by. Null: nothing was turned.
struct Angles { const acc_t *cosine = nullptr, *sine = nullptr; };

// The table for positions 0 ... T - 1 as Hugging Face computes it: frequencies theta^(-2 i / D), i < D/2, in float32. With theta = 500000 and
// D = 64 the first pair turns by 1 radian a token, once around in 6.3 tokens, the last once around in 2.1 million.
// c's scaling, if there is a factor, is Llama-3.1's, which makes a model trained on `original` tokens read longer texts: pairs
// that go around within original / high tokens, and so tell neighbours apart, are kept; those that need more than original / low, whose
// angles beyond `original` were never seen, are slowed down by the factor; a linear blend lies between.
inline void rope_table(std::vector<acc_t>& cosine, std::vector<acc_t>& sine, const Config& c, int T) {
    int half_d = c.head_dim / 2;
    cosine.resize((size_t)T * half_d), sine.resize((size_t)T * half_d);
    for (int i = 0; i < half_d; i++) {
        double f = 1 / std::pow(c.rope_theta, 2.0 * i / c.head_dim);
        if (c.scaling.factor > 0) {
            const RopeScaling& s = c.scaling;
            double wavelength = 2 * M_PI / f;                                       // tokens to go around once
            double blend = (s.original / wavelength - s.low) / (s.high - s.low);    // 0 at original / low, 1 at original / high
            if (wavelength > s.original / s.low) f /= s.factor;
            else if (wavelength >= s.original / s.high) f = (1 - blend) * f / s.factor + blend * f;
        }
        for (int t = 0; t < T; t++) {
            float angle = (float)t * (float)f, sn, cs;
            sincos_(angle, &sn, &cs);
            cosine[(size_t)t * half_d + i] = cs, sine[(size_t)t * half_d + i] = sn;
        }
    }
}

// Rotates query and key heads of qkv (B T x row) in place: (a, b) -> (a cos - b sin, b cos + a sin) with b half a head after a.
// direction -1 rotates back: a turn's inverse is its transpose, so that is the gradient. Torch: q * cos + rotate_half(q) * sin.
struct rope;
inline void rotate(Ctx& ctx, act_t* qkv, Angles table, Heads s, acc_t direction) {
    const acc_t *cosine = table.cosine, *sine = table.sine;
    int turned = s.H + s.KV, D = s.D, T = s.T;              // query and key heads lie side by side
    int64_t row = s.row();
    Cost cost = {(double)s.B * T * turned * D * 2 * sizeof(act_t), 0};
    for_rows<rope, 8>(ctx, cost, (int64_t)s.B * T * turned, KERNEL(Group<8> g, int64_t r) {          // a head a group
        int64_t n = r / turned, t = n % T * (D / 2);        // token; where the table has its position
        act_t* a = qkv + n * row + r % turned * D;
        g.map(D / 2, [=](acc_t& u, acc_t& v, acc_t cs, acc_t sn) {
            acc_t w = direction * sn, first = u * cs - v * w;
            v = v * cs + u * w;
            u = first;
        }, a, a + D / 2, cosine + t, sine + t);
    });
}
