// Common to the CPU and the CUDA code: arguments, and the score arithmetic, which gives the same bits on both.
//
// The score of a patch is sum over layers of log2(mean over heads of attention). Every operation is a single IEEE
// rounding (no fused multiply-add: both compilers are told so), and log2 is spelled out here instead of taken from a
// library, so that a mask is the same on every device. fgfast/ops/mask.py has the same arithmetic in PyTorch.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FGFAST_HD __host__ __device__ __forceinline__
#else
#define FGFAST_HD inline
#endif

namespace fgfast {

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Strategy : int { kTopK = 0, kSample = 1, kBlock = 2, kRandom = 3 };

// Images seen as [batch, outer, rows, inner]: inner is a run of W elements (outer = C) or, where channels lie next to
// each other, of W * C (outer = 1). Strides count elements.
struct Images {
    const char* in = nullptr;
    char* out = nullptr;
    int64_t outer = 0, rows = 0, inner = 0;
    int64_t in_batch = 0, in_outer = 0, in_row = 0, in_step = 0;
    int64_t out_batch = 0, out_outer = 0, out_row = 0, out_step = 0;
    int64_t grid_rows = 0, grid_columns = 0;  // patches
    int size = 0;                             // bytes of an element
};

struct Problem {
    const void* attention = nullptr;
    int dtype = kFloat32;
    int64_t layers = 0, batch = 0, heads = 0, patches = 0;
    int64_t stride_layer = 0, stride_batch = 0, stride_head = 0, stride_patch = 0;  // elements
    int64_t kept = 0;
    int strategy = kTopK;
    int64_t side = 0, window_rows = 0, window_columns = 0;  // block: cells beyond ``kept`` are left out from the end
    uint64_t seed = 0;
    bool* mask = nullptr;      // [batch, patches], contiguous
    int64_t* index = nullptr;  // [batch, kept], contiguous
    Images images;             // images.in is null where none are given
};

FGFAST_HD uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

FGFAST_HD float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// The float32 value of bfloat16 and of IEEE half-precision bits.
FGFAST_HD float from_bfloat16(uint16_t h) { return float_of(uint32_t(h) << 16); }

FGFAST_HD float from_float16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = h & 0x7fffu;
    // Shifted into place the exponent is 112 too small; the product puts it right and normalises what is denormal.
    const float scaled = float_of(rest << 13) * float_of(0x77800000u);  // 2^112
    return float_of((rest >= 0x7c00u ? (0x7f800000u | (rest << 13)) : bits_of(scaled)) | sign);
}

// log2 of x >= 0 within 3 units in the last place; -inf for 0.
//   x = 2^e m, m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1), log2 m = 2 / ln 2 (s + s^3 / 3 + ... + s^9 / 9)
FGFAST_HD float log2_of(float x) {
    const bool small = x < 1.17549435e-38f;  // denormal
    const uint32_t u = bits_of(small ? x * 16777216.0f : x);
    const uint32_t shifted = u - 0x3f3504f3u;  // sqrt(1/2)
    const int32_t e = int32_t(shifted) >> 23;
    const float m = float_of((shifted & 0x007fffffu) + 0x3f3504f3u);
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    float p = z * 0.32059890f;   // 2 / (9 ln 2)
    p = (p + 0.41219857f) * z;   // 2 / (7 ln 2)
    p = (p + 0.57707804f) * z;   // 2 / (5 ln 2)
    p = (p + 0.96179670f) * z;   // 2 / (3 ln 2)
    p = (p + 2.88539008f) * s;   // 2 / ln 2
    const float result = float(e - (small ? 24 : 0)) + p;
    return x > 0.0f ? (u < 0x7f800000u ? result : x) : -float_of(0x7f800000u);
}

// Larger floats have larger keys; NaN ranks with -inf.
FGFAST_HD uint32_t key_of(float x) {
    const uint32_t u = bits_of(x == x ? x : -float_of(0x7f800000u));
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): word ``which`` of a counter.
FGFAST_HD uint32_t philox(uint64_t seed, uint64_t image, uint32_t patch) {
    uint32_t c[4] = {patch >> 2, 0u, uint32_t(image), uint32_t(image >> 32)};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        const uint32_t n0 = uint32_t(b >> 32) ^ c[1] ^ k0, n2 = uint32_t(a >> 32) ^ c[3] ^ k1;
        c[1] = uint32_t(b), c[3] = uint32_t(a), c[0] = n0, c[2] = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const uint32_t word = patch & 3u;
    return word == 0 ? c[0] : word == 1 ? c[1] : word == 2 ? c[2] : c[3];
}

// A number in (0, 1) with 23 random bits, exact in float32.
FGFAST_HD float uniform_of(uint32_t random) { return (float(random >> 9) + 0.5f) * 1.1920928955078125e-07f; }

// The value by which patches are ranked, from their score.
FGFAST_HD float ranked(const Problem& p, float score, int64_t image, int64_t patch) {
    if (p.strategy == kTopK || p.strategy == kBlock) return score;
    const float u = uniform_of(philox(p.seed, uint64_t(image), uint32_t(patch)));
    if (p.strategy == kRandom) return u;
    return score - log2_of(-log2_of(u));  // Gumbel noise in base 2, up to a constant
}

// A score as a term of a window's sum: fewest zeros first, then the largest product.
FGFAST_HD double window_term(float score) { return score > -3.0e38f ? double(score) : -1.0e9; }

// Sum of the scores of the window whose first cell is (row, column), in a fixed order.
FGFAST_HD double window_sum(const Problem& p, const float* score, int64_t row, int64_t column) {
    double sum = 0.0;
    int64_t left = p.kept;
    for (int64_t y = row; y < row + p.window_rows && left > 0; ++y)
        for (int64_t x = column; x < column + p.window_columns && left > 0; ++x, --left)
            sum += window_term(score[y * p.side + x]);
    return sum;
}

FGFAST_HD bool in_window(const Problem& p, int64_t row, int64_t column, int64_t patch) {
    const int64_t y = patch / p.side - row, x = patch % p.side - column;
    return y >= 0 && y < p.window_rows && x >= 0 && x < p.window_columns && y * p.window_columns + x < p.kept;
}

// Both return an error message, or null. pivotal_cpu fails on negative or NaN attention.
const char* pivotal_cpu(const Problem& problem, int threads);
const char* mask_images_cpu(const Images& images, const bool* mask, int64_t batch, int threads);
#ifdef FGFAST_CUDA
const char* pivotal_cuda(const Problem& problem, void* stream);
const char* mask_images_cuda(const Images& images, const bool* mask, int64_t batch, void* stream);
#endif

}  // namespace fgfast
