// test_model.cu: the model's gradients against finite differences, in double (built with -DMETIS_DOUBLE, plain loops).
//
// Central differences of the loss in double: truncation error O(h^2 f'''), rounding error O(eps L / h). With h = 1e-5 and a loss
// near 3.5 both are below 1e-9 here, and gradients are around 1e-3: a relative error of 1e-5 on the sampled directions is a
// thousand times what is seen and a thousandth of what any wrong term gives. rope, exp and the schedule are double too.
#include "../llama.cuh"
#include "test.h"

// A random direction in every tensor of its own: the directional derivative by finite differences must equal grad . direction.
static void check_gradients(const char* name, Config c, int B, int T, Recompute recompute) {
    Ctx ctx;
    ctx.threads = 2, ctx.seed = 7;
    ctx.plans = std::make_shared<MatmulPlans>(ctx);
    Model m;
    const Recipe* recipe = find_recipe("float");
    measure(m, c, B, T, recompute, recipe, true);
    allocate(ctx, m, true);
    int64_t N = (int64_t)B * T;
    RandomKey key = {11, 0, 0, 0, 0, Purpose::test};
    // Weights of order 0.3 and norm weights away from 1, so that no term of any gradient vanishes.
    for (const Tensor& t : m.tensors)
        for (size_t i = 0; i < t.size(); i++) m.params[t.offset + i] = (t.dims == 1 ? 1 : 0) + 0.3 * normal(key, t.offset + i);
    std::vector<int> tokens(N), targets(N);
    for (int64_t i = 0; i < N; i++) {
        Words w = philox({5, 0, 0, 0, 0, Purpose::test}, i);
        tokens[i] = w.w[0] % c.vocab, targets[i] = w.w[1] % c.vocab;
    }
    auto loss = [&](double dloss) {
        m.sums[0] = 0;
        forward(ctx, m, tokens.data(), B, T);
        classify(ctx, m, targets.data(), N, dloss);
        return (double)m.sums[0] / N;
    };
    // Backward must add: start from a gradient that is not zero.
    std::vector<double> start(m.arena);
    for (size_t i = 0; i < m.arena; i++) m.grads[i] = start[i] = 0.01 * normal({12, 0, 0, 0, 0, Purpose::test}, i);
    loss(1.0 / N);
    backward(ctx, m, tokens.data(), B, T);

    double worst = 0;
    std::string where;
    for (const Tensor& t : m.tensors) {
        std::vector<double> saved(m.params + t.offset, m.params + t.offset + t.size()), d(t.size());
        double analytic = 0, norm2 = 0, total = 0;
        for (size_t i = 0; i < t.size(); i++) {
            d[i] = normal({13, 0, 0, 0, 0, Purpose::test}, t.offset + i);
            double g = m.grads[t.offset + i] - start[t.offset + i];
            analytic += d[i] * g, norm2 += g * g;
        }
        const double h = 1e-5;
        for (int sign = -1; sign <= 1; sign += 2) {
            for (size_t i = 0; i < t.size(); i++) m.params[t.offset + i] = saved[i] + sign * h * d[i];
            total += sign * loss(0);
        }
        for (size_t i = 0; i < t.size(); i++) m.params[t.offset + i] = saved[i];
        double numeric = total / (2 * h), error = std::fabs(numeric - analytic) / (std::sqrt(norm2) + 1e-12);
        if (!(error <= worst)) worst = error, where = t.name;
    }
    check(worst <= 1e-5, name, "relative error %.3g at %s", worst, where.c_str());
}

int main(int, char** argv) {
    calm_openmp(argv);
    Config c{2, 24, 4, 2, 6, 40, 32, false, {}};
    check_gradients("gradients: untied, GQA", c, 2, 19, Recompute::none);
    c.tied = true;
    c.scaling = {8, 1, 4, 16};
    check_gradients("gradients: tied, rope scaling, head size not dim / heads", Config{2, 24, 3, 1, 10, 40, 32, true, c.scaling}, 2, 19, Recompute::none);
    check_gradients("gradients: recompute norms", c, 2, 19, Recompute::norms);
    check_gradients("gradients: recompute block", c, 2, 19, Recompute::block);
    check_gradients("gradients: several blocks of queries", c, 1, 150, Recompute::none);
    return done();
}
