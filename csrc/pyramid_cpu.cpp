// Labels of the pixels of a feature pyramid from scores of its cells, and sums of pixels whose label has changed.

#include "pyramid.h"

#include <cmath>

#include "threads.h"

namespace fgfast {
namespace {

constexpr int64_t kBlock = 16;         // lanes at a time; ``lanes`` is a multiple of it
constexpr int64_t kPixelsEach = 1024;  // of a thread
constexpr double kCarried = 4.0;       // times the pixels of a sum: those whose rounding errors it may hold

// out[i] = a x[i] + b y[i]
inline __attribute__((always_inline)) void mix(
    const float* __restrict x, const float* __restrict y, float a, float b, int64_t n, float* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = a * x[i] + b * y[i];
}

// The scores of a row of pixels of one level, added to ``sum`` [width, lanes]; ``row`` holds a row of cells.
inline __attribute__((always_inline)) void add_level(
    const Level& level, const float* scores, int64_t y, int64_t width, int64_t lanes, float* __restrict row,
    float* __restrict sum) {
    const int64_t w = level.columns.cells, low = level.rows.low[y], high = low + (low + 1 < level.rows.cells);
    const float f = level.rows.fraction[y];
    mix(scores + low * w * lanes, scores + high * w * lanes, 1.0f - f, f, w * lanes, row);
    for (int64_t x = 0; x < width; ++x) {
        const int64_t left = level.columns.low[x], right = left + (left + 1 < w);
        const float g = level.columns.fraction[x], rest = 1.0f - g;
        const float *a = row + left * lanes, *b = row + right * lanes;
        float* out = sum + x * lanes;
        for (int64_t k = 0; k < lanes; k += kBlock)
            for (int64_t i = k; i < k + kBlock; ++i) out[i] += rest * a[i] + g * b[i];
    }
}

// v[0] = the least of v[0], ..., v[2 half - 1]
template <int64_t half, typename T>
inline __attribute__((always_inline)) void reduce(T* v) {
    for (int64_t i = 0; i < half; ++i) v[i] = v[i + half] < v[i] ? v[i + half] : v[i];
    if constexpr (half > 1) reduce<half / 2>(v);
}

// The least of ``lanes`` scores, and the first place where it is; ``lanes`` if none is a number.
inline __attribute__((always_inline)) int64_t first_least(const float* score, int64_t lanes, float* least) {
    float low[kBlock];
    int32_t first[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) low[i] = score[i];
    for (int64_t k = kBlock; k < lanes; k += kBlock)
        for (int64_t i = 0; i < kBlock; ++i) low[i] = score[k + i] < low[i] ? score[k + i] : low[i];
    reduce<kBlock / 2>(low);
    *least = low[0];
    for (int64_t i = 0; i < kBlock; ++i) first[i] = int32_t(lanes);
    for (int64_t k = 0; k < lanes; k += kBlock)
        for (int64_t i = 0; i < kBlock; ++i) {
            const int32_t here = score[k + i] == low[0] ? int32_t(k + i) : int32_t(lanes);
            first[i] = here < first[i] ? here : first[i];
        }
    reduce<kBlock / 2>(first);
    return first[0];
}

FGFAST_CLONES void label_row(const Pyramid& p, const float* bias, int64_t b, int64_t y, float* row, float* sum,
                             int64_t* labels, float* best) {
    for (int64_t x = 0; x < p.width; ++x)
        for (int64_t k = 0; k < p.lanes; ++k) sum[x * p.lanes + k] = k < p.clusters ? bias[k] : INFINITY;
    for (const Level& level : p.levels) {
        const int64_t cells = level.rows.cells * level.columns.cells;
        add_level(level, level.scores + b * cells * p.lanes, y, p.width, p.lanes, row, sum);
    }
    for (int64_t x = 0; x < p.width; ++x)
        labels[x] = std::min(first_least(sum + x * p.lanes, p.lanes, best + x), p.clusters - 1);
}

// Pixel n of problem b, times ``weight``, added to the sum of one cluster and taken from that of another.
FGFAST_CLONES void move_pixel(const Pyramid& p, int64_t b, int64_t n, float weight, float* __restrict to,
                              float* __restrict from) {
    const int64_t y = n / p.width, x = n % p.width;
    for (const Level& level : p.levels) {
        const int64_t w = level.columns.cells, top = level.rows.low[y], left = level.columns.low[x];
        const int64_t below = top + (top + 1 < level.rows.cells), right = left + (left + 1 < w);
        const float f = level.rows.fraction[y], g = level.columns.fraction[x];
        const float aa = weight * (1 - f) * (1 - g), ab = weight * (1 - f) * g, ba = weight * f * (1 - g), bb = weight * f * g;
        const float* cells = level.cells + b * level.problem * level.channels;
        const float* __restrict c0 = cells + (top * w + left) * level.channels;
        const float* __restrict c1 = cells + (top * w + right) * level.channels;
        const float* __restrict c2 = cells + (below * w + left) * level.channels;
        const float* __restrict c3 = cells + (below * w + right) * level.channels;
        for (int64_t c = 0; c < level.channels; ++c) {
            const float v = aa * c0[c] + ab * c1[c] + (ba * c2[c] + bb * c3[c]);
            to[c] += v;
            from[c] -= v;
        }
        to += level.channels;
        from += level.channels;
    }
}

}  // namespace

void label_pyramid(const Pyramid& p, const float* bias, int64_t* labels, float* best, int threads) {
    int64_t widest = 0;
    for (const Level& level : p.levels) widest = std::max(widest, level.columns.cells);
    deal_out(p.batch * p.height, threads, 1 + kPixelsEach / p.width, [&](int64_t begin, int64_t end) {
        std::vector<float> row(widest * p.lanes), sum(p.width * p.lanes);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / p.height;
            label_row(p, bias + b * p.clusters, b, i % p.height, row.data(), sum.data(), labels + i * p.width,
                      best + i * p.width);
        }
    });
}

bool update_sums(const Pyramid& p, const Update& u) {
    const int64_t n = p.height * p.width, k = p.clusters;
    int64_t channels = 0;
    for (const Level& level : p.levels) channels += level.channels;
    std::vector<std::vector<int64_t>> changed(p.batch);
    std::vector<int64_t> pixels(p.batch * k), moves(p.batch * k);
    std::vector<double> counts(p.batch * k), mass(p.batch * k), moved(p.batch * k);
    bool few = u.before != nullptr;
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t i = b * n; i < (b + 1) * n; ++i) {
            const int64_t to = b * k + u.labels[i];
            const double size = double(u.scale[i]) * double(u.norms[i]);
            ++pixels[to];
            counts[to] += u.scale[i];
            mass[to] += size;
            if (u.before == nullptr || u.before[i] == u.labels[i]) continue;
            for (const int64_t j : {to, b * k + u.before[i]}) ++moves[j], moved[j] += size;
            changed[b].push_back(i);
        }
        few &= int64_t(changed[b].size()) <= u.most;
    }
    for (int64_t i = 0; i < p.batch * k; ++i) {
        u.counts[i] = float(counts[i]);
        u.mass[i] = float(mass[i]);
        moved[i] += mass[i] * double(moves[i]) / double(std::max<int64_t>(1, pixels[i]));
        moved[i] += few ? double(u.carried[i]) : 0.0;
        few &= moved[i] <= kCarried * mass[i];
    }
    if (!few) return false;
    for (int64_t i = 0; i < p.batch * k; ++i) u.carried[i] = float(moved[i]);
    for (int64_t b = 0; b < p.batch; ++b)
        for (const int64_t i : changed[b]) {
            float *to = u.sums + (b * k + u.labels[i]) * channels, *from = u.sums + (b * k + u.before[i]) * channels;
            move_pixel(p, b, i - b * n, u.scale[i], to, from);
        }
    return true;
}

}  // namespace fgfast
