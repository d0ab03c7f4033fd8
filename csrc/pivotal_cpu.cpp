// The mask sampler and the masking of images on the CPU: images are distributed over threads, rows of patches vectorise.

#include <vector>

#include "pivotal.h"
#include "threads.h"

namespace fgfast {
namespace {

constexpr int64_t kAhead = 8192;         // bytes
constexpr int64_t kScoresAtOnce = 8192;  // of a thread: 32 KiB, which stay in its caches

template <int dtype>
inline float load(const void* base, int64_t i) {
    if (dtype == kFloat32) return static_cast<const float*>(base)[i];
    const uint16_t h = static_cast<const uint16_t*>(base)[i];
    return dtype == kFloat16 ? from_float16(h) : from_bfloat16(h);
}

constexpr int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Asks for ``bytes`` that lie kAhead past ``at``, which is where the next rows are in a contiguous tensor; the rows are too
// short for the hardware to see a run in them. Prefetching an address that is never read is harmless.
inline void fetch(const char* at, int64_t bytes) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(at) + kAhead;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(first + i));
}

// sum[p] = sum over heads of a, one head after the other, four of them per pass; false if an entry is negative or NaN.
template <int dtype>
inline __attribute__((always_inline)) bool add_heads(
    const void* base, int64_t offset, int64_t by_head, int64_t stride, int64_t heads, int64_t n, float* sum) {
    int bad = 0;
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4) {
        const int64_t first = offset + h * by_head;
        if (stride == 1) fetch(static_cast<const char*>(base) + size_of(dtype) * first, 4 * size_of(dtype) * n);
        for (int64_t p = 0; p < n; ++p) {
            const int64_t at = first + p * stride;
            const float a = load<dtype>(base, at), b = load<dtype>(base, at + by_head);
            const float c = load<dtype>(base, at + 2 * by_head), d = load<dtype>(base, at + 3 * by_head);
            bad |= !(a >= 0.0f) | !(b >= 0.0f) | !(c >= 0.0f) | !(d >= 0.0f);
            sum[p] = (h == 0 ? a : sum[p] + a) + b + c + d;
        }
    }
    for (; h < heads; ++h) {
        for (int64_t p = 0; p < n; ++p) {
            const float a = load<dtype>(base, offset + h * by_head + p * stride);
            bad |= !(a >= 0.0f);
            sum[p] = h == 0 ? a : sum[p] + a;
        }
    }
    return !bad;
}

using AddHeads = bool(const void*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);

#define FGFAST_ADD_HEADS(name, dtype)                                                                               \
    FGFAST_CLONES bool name(const void* x, int64_t at, int64_t by, int64_t stride, int64_t heads, int64_t n, float* s) { \
        return stride == 1 ? add_heads<dtype>(x, at, by, 1, heads, n, s) : add_heads<dtype>(x, at, by, stride, heads, n, s); \
    }
FGFAST_ADD_HEADS(add_float32, kFloat32)
FGFAST_ADD_HEADS(add_float16, kFloat16)
FGFAST_ADD_HEADS(add_bfloat16, kBFloat16)
#undef FGFAST_ADD_HEADS

FGFAST_CLONES void add_log2_of_means(const float* sum, float heads, int64_t n, bool first, float* score) {
    for (int64_t p = 0; p < n; ++p) {
        const float term = log2_of(sum[p] / heads);
        score[p] = first ? term : score[p] + term;
    }
}

// Scores of the images [begin, end), a row of patches each. Layer by layer, in the memory order of attention: a thread
// reads one long run per layer, which the hardware prefetches.
bool scores_of(const Problem& p, int64_t begin, int64_t end, float* sum, float* scores) {
    AddHeads* const add = p.dtype == kFloat32 ? add_float32 : p.dtype == kFloat16 ? add_float16 : add_bfloat16;
    bool good = true;
    for (int64_t l = 0; l < p.layers; ++l) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t offset = l * p.stride_layer + b * p.stride_batch;
            good &= add(p.attention, offset, p.stride_head, p.stride_patch, p.heads, p.patches, sum);
            add_log2_of_means(sum, float(p.heads), p.patches, l == 0, scores + (b - begin) * p.patches);
        }
    }
    return good;
}

void choose_window(const Problem& p, const float* score, bool* mask) {
    double most = 0.0;
    int64_t best_row = -1, best_column = 0;
    for (int64_t y = 0; y + p.window_rows <= p.side; ++y) {
        for (int64_t x = 0; x + p.window_columns <= p.side; ++x) {
            const double sum = window_sum(p, score, y, x);
            if (best_row < 0 || sum > most) most = sum, best_row = y, best_column = x;
        }
    }
    for (int64_t i = 0; i < p.patches; ++i) mask[i] = in_window(p, best_row, best_column, i);
}

FGFAST_CLONES int64_t count_from(const uint32_t* key, int64_t n, uint32_t threshold) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += key[i] >= threshold;
    return count;
}

// The kept-th largest key is found bit by bit: 32 counts that vectorise, whatever the keys are. No branch
// depends on a key here or in write_index: it would be mispredicted as often as not.
void choose_top(const Problem& p, const float* score, int64_t image, std::vector<uint32_t>& key, bool* mask) {
    for (int64_t i = 0; i < p.patches; ++i) key[i] = key_of(ranked(p, score[i], image, i));
    uint32_t threshold = 0;
    int64_t above = 0;  // keys over the threshold
    for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
        const int64_t count = count_from(key.data(), p.patches, threshold | bit);
        const bool enough = count >= p.kept;
        threshold |= enough ? bit : 0;
        above = enough ? above : count;
    }
    int64_t ties = p.kept - above;
    for (int64_t i = 0; i < p.patches; ++i) {
        const bool equal = key[i] == threshold;
        mask[i] = (key[i] > threshold) | (equal & (ties > 0));
        ties -= equal;
    }
}

// The positions of the kept patches, ascending; ``all`` has room for one more than there are patches.
void write_index(const Problem& p, const bool* mask, int64_t* all, int64_t* index) {
    int64_t n = 0;
    for (int64_t i = 0; i < p.patches; ++i) {
        all[n] = i;
        n += mask[i];
    }
    memcpy(index, all, p.kept * sizeof(int64_t));
}

// One run of elements of one size, copied or zeroed.
template <typename T>
inline void run(const Images& im, const T* in, T* out, int64_t n, bool keep) {
    if (im.in_step == 1 && im.out_step == 1) {
        if (keep) {
            memcpy(out, in, n * sizeof(T));
        } else {
            memset(out, 0, n * sizeof(T));
        }
        return;
    }
    for (int64_t i = 0; i < n; ++i) out[i * im.out_step] = keep ? in[i * im.in_step] : T(0);
}

template <typename T>
void mask_image(const Images& im, const bool* mask, int64_t image) {
    const T* in = reinterpret_cast<const T*>(im.in) + image * im.in_batch;
    T* out = reinterpret_cast<T*>(im.out) + image * im.out_batch;
    const int64_t length = im.inner / im.grid_columns, height = im.rows / im.grid_rows;
    for (int64_t o = 0; o < im.outer; ++o) {
        for (int64_t y = 0; y < im.rows; ++y) {
            const bool* row = mask + (y / height) * im.grid_columns;
            const T* from = in + o * im.in_outer + y * im.in_row;
            T* to = out + o * im.out_outer + y * im.out_row;
            for (int64_t g = 0; g < im.grid_columns; ++g)
                run(im, from + g * length * im.in_step, to + g * length * im.out_step, length, row[g]);
        }
    }
}

void mask_any(const Images& im, const bool* mask, int64_t image) {
    if (im.size == 2) return mask_image<uint16_t>(im, mask, image);
    if (im.size == 4) return mask_image<uint32_t>(im, mask, image);
    return mask_image<uint64_t>(im, mask, image);
}

}  // namespace

const char* pivotal_cpu(const Problem& p, int threads) {
    std::atomic<bool> good{true};
    const int64_t group = std::max<int64_t>(1, kScoresAtOnce / std::max<int64_t>(1, p.patches));
    const auto work = [&](int64_t begin, int64_t end) {
        std::vector<float> sum(p.patches), scores(std::min(group, end - begin) * p.patches);
        std::vector<uint32_t> key(p.patches);
        std::vector<int64_t> all(p.patches + 1);
        for (int64_t first = begin; first < end; first += group) {
            const int64_t last = std::min(first + group, end);
            if (!scores_of(p, first, last, sum.data(), scores.data())) {
                good = false;
                return;
            }
            for (int64_t b = first; b < last; ++b) {
                const float* score = scores.data() + (b - first) * p.patches;
                bool* mask = p.mask + b * p.patches;
                if (p.strategy == kBlock) {
                    choose_window(p, score, mask);
                } else {
                    choose_top(p, score, b, key, mask);
                }
                write_index(p, mask, all.data(), p.index + b * p.kept);
                if (p.images.in != nullptr) mask_any(p.images, mask, b);
            }
        }
    };
    const int64_t elements = p.layers * p.heads * p.patches;
    deal_out(p.batch, threads, 1 + (int64_t(1) << 17) / std::max<int64_t>(1, elements), work);
    return good ? nullptr : "attention holds a negative number or NaN: give probabilities.";
}

const char* mask_images_cpu(const Images& im, const bool* mask, int64_t batch, int threads) {
    const int64_t patches = im.grid_rows * im.grid_columns, elements = im.outer * im.rows * im.inner;
    deal_out(batch, threads, 1 + (int64_t(1) << 18) / std::max<int64_t>(1, elements), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) mask_any(im, mask + b * patches, b);
    });
    return nullptr;
}

}  // namespace fgfast
