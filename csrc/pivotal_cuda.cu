// The mask sampler and the masking of images on the GPU.
//
// One block per image (and slice of its pixels): scores into shared memory, a radix selection of the k-th largest key
// there, the mask and the ascending index by ballots, then the pixels, all in one launch. Attention is read once, by
// tasks of one layer and four neighbouring patches (one where they are not aligned), which have the heads in flight
// together. The terms of the layers meet in shared memory, where they are added in order.

#include <cuda_runtime.h>

#include <type_traits>

#include "pivotal.h"

namespace fgfast {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 8;  // resident on a processor: 1,056 images at once on 132 of them
constexpr int kTermBytes = 24 << 10;  // most shared memory for the terms of the layers of an image
constexpr int kRun = 4;  // patches of an access
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;

template <int dtype>
using Element = std::conditional_t<dtype == kFloat32, uint32_t, uint16_t>;

template <int dtype>
__device__ __forceinline__ float value_of(Element<dtype> bits) {
    return dtype == kFloat32 ? float_of(bits) : dtype == kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

// Adds the attention of N heads to the sums of V neighbouring patches; the N accesses are in flight together.
template <int dtype, int V, int N>
__device__ __forceinline__ void add_heads(const Element<dtype>*& at, int64_t stride, float* sum) {
    using Wide = std::conditional_t<dtype == kFloat32, uint4, uint64_t>;
    using Access = std::conditional_t<V == 1, Element<dtype>, Wide>;
    Access read[N];
#pragma unroll
    for (int h = 0; h < N; ++h, at += stride) read[h] = __ldg(reinterpret_cast<const Access*>(at));
#pragma unroll
    for (int h = 0; h < N; ++h) {
        Element<dtype> bits[V];
        memcpy(bits, &read[h], sizeof(Access));
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += value_of<dtype>(bits[v]);
    }
}

// Scores of V patches from layer ``first`` to ``last``: the sum over these of log2 of the mean over heads.
template <int dtype, int V>
__device__ __forceinline__ void add_layers(const Problem& p, int64_t image, int patch, int first, int last, float* out) {
    constexpr int kAhead = dtype == kFloat32 && V > 1 ? 6 : 12;
    const int heads = int(p.heads);
    const auto* base = static_cast<const Element<dtype>*>(p.attention) + image * p.stride_batch + patch * p.stride_patch;
    float score[V];
    for (int l = first; l < last; ++l) {
        const Element<dtype>* at = base + l * p.stride_layer;
        float sum[V] = {};  // 0 + a is a: the order is that of the CPU
        int left = heads;
#pragma unroll 1
        for (; left >= kAhead; left -= kAhead) add_heads<dtype, V, kAhead>(at, p.stride_head, sum);
#pragma unroll 1
        for (; left >= 4; left -= 4) add_heads<dtype, V, 4>(at, p.stride_head, sum);
#pragma unroll 1
        for (; left > 0; --left) add_heads<dtype, V, 1>(at, p.stride_head, sum);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const float term = log2_of(sum[v] / float(heads));
            score[v] = l == first ? term : score[v] + term;
        }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = score[v];
}

// Terms [rows, patches] in shared memory: each row the scores of as many layers.
template <int dtype, int V>
__device__ void fill_terms(const Problem& p, int64_t image, int rows, float* terms) {
    const int runs = int(p.patches) / V, layers = int(p.layers) / rows;
    for (int i = threadIdx.x; i < rows * runs; i += kThreads) {
        const int row = i / runs, patch = i % runs * V;
        add_layers<dtype, V>(p, image, patch, row * layers, (row + 1) * layers, terms + row * int(p.patches) + patch);
    }
}

// The kept-th largest key, and how many keys equal to it are kept: four passes over eight bits each.
__device__ void select(const uint32_t* key, int n, int kept, int* bins, uint32_t* threshold, int* ties) {
    __shared__ uint32_t prefix;
    __shared__ int need;
    if (threadIdx.x == 0) prefix = 0u, need = kept;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
        __syncthreads();
        const uint32_t fixed = shift == 24 ? 0u : ~0u << (shift + 8), wanted = prefix;
        for (int i = threadIdx.x; i < n; i += kThreads)
            if ((key[i] & fixed) == wanted) atomicAdd(&bins[key[i] >> shift & 255u], 1);
        __syncthreads();
        if (threadIdx.x < 32) {  // lane 0 has the eight largest bins
            const int lane = threadIdx.x;
            int own = 0;
            for (int j = 0; j < 8; ++j) own += bins[255 - (lane * 8 + j)];
            int before = own;
            for (int d = 1; d < 32; d *= 2) {
                const int other = __shfl_up_sync(~0u, before, d);
                if (lane >= d) before += other;
            }
            before -= own;
            const int left = need;
            __syncwarp();
            if (before < left && left <= before + own) {
                int seen = before;
                for (int j = 0; j < 8; ++j) {
                    const int bin = 255 - (lane * 8 + j);
                    if (left <= seen + bins[bin]) {
                        prefix = wanted | uint32_t(bin) << shift;
                        need = left - seen;
                        break;
                    }
                    seen += bins[bin];
                }
            }
        }
        __syncthreads();
    }
    *threshold = prefix;
    *ties = need;
}

// Rank of this thread among those whose flag is set, and their number; every thread must call this.
__device__ int rank_of(bool flag, int* counts, int* total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const unsigned votes = __ballot_sync(~0u, flag);
    __syncthreads();  // counts may still be read by a call before
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += counts[w];
        all += counts[w];
    }
    *total = all;
    return before + __popc(votes & ((1u << lane) - 1u));
}

// The first cell of the window with the largest sum, the first of equal ones, in *best.
__device__ void find_window(const Problem& p, const float* score, double* sums, int* places, int* best) {
    const int rows = int(p.side - p.window_rows + 1), columns = int(p.side - p.window_columns + 1);
    double most = 0.0;
    int place = -1;
    for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
        const double sum = window_sum(p, score, i / columns, i % columns);
        if (place < 0 || sum > most) most = sum, place = i;
    }
    sums[threadIdx.x] = most, places[threadIdx.x] = place;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int t = 1; t < kThreads; ++t) {
            const bool better = places[t] >= 0 && (sums[t] > most || (sums[t] == most && places[t] < place));
            if (better) most = sums[t], place = places[t];
        }
        *best = place;
    }
    __syncthreads();
}

template <typename V>
__device__ void mask_pixels(const Images& im, const bool* mask, int64_t image, int slice, int slices) {
    // V may be several elements wide: then every stride and run is a multiple of it.
    const int width = im.in_step == 1 && im.out_step == 1 ? int(sizeof(V)) / im.size : 1;
    const int64_t inner = im.inner / width, length = inner / im.grid_columns, height = im.rows / im.grid_rows;
    const V* in = reinterpret_cast<const V*>(im.in + image * im.in_batch * im.size);
    V* out = reinterpret_cast<V*>(im.out + image * im.out_batch * im.size);
    const int64_t total = im.outer * im.rows * inner;
    for (int64_t i = int64_t(slice) * kThreads + threadIdx.x; i < total; i += int64_t(slices) * kThreads) {
        const int64_t x = i % inner, y = i / inner % im.rows, o = i / inner / im.rows;
        const bool keep = mask[y / height * im.grid_columns + x / length];
        const int64_t from = (o * im.in_outer + y * im.in_row) / width + x * im.in_step;
        const int64_t to = (o * im.out_outer + y * im.out_row) / width + x * im.out_step;
        V zero;
        memset(&zero, 0, sizeof(V));
        out[to] = keep ? in[from] : zero;
    }
}

__device__ void mask_any(const Images& im, int vector, const bool* mask, int64_t image, int slice, int slices) {
    switch (vector) {
        case 16: return mask_pixels<uint4>(im, mask, image, slice, slices);
        case 8: return mask_pixels<uint64_t>(im, mask, image, slice, slices);
        case 4: return mask_pixels<uint32_t>(im, mask, image, slice, slices);
        default: return mask_pixels<uint16_t>(im, mask, image, slice, slices);
    }
}

// ``rows``: of terms in shared memory, one per layer, or a single one; ``aligned``: runs of patches may be loaded.
template <int dtype>
__global__ void __launch_bounds__(kThreads, kBlocks) pivotal_kernel(Problem p, int rows, bool aligned, int vector) {
    extern __shared__ unsigned char memory[];
    const int n = int(p.patches);
    float* score = reinterpret_cast<float*>(memory);                // [rows, n], the first row then scores or keys
    uint32_t* key = reinterpret_cast<uint32_t*>(memory);            // [n]
    bool* chosen = reinterpret_cast<bool*>(score + int64_t(rows) * n);  // [n]
    __shared__ int bins[kBins], counts[kWarps], best;
    __shared__ double sums[kThreads];
    const int64_t image = blockIdx.x;
    const bool writes = blockIdx.y == 0;  // the other slices make the mask again, from the cache, for their pixels
    if (p.strategy != kRandom && aligned) {
        fill_terms<dtype, kRun>(p, image, rows, score);
    } else if (p.strategy != kRandom) {
        fill_terms<dtype, 1>(p, image, rows, score);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
        float s = p.strategy == kRandom ? 0.0f : score[i];
        for (int row = 1; row < rows; ++row) s += score[row * n + i];
        if (p.strategy == kBlock) {
            score[i] = s;
        } else {
            key[i] = key_of(ranked(p, s, image, i));
        }
    }
    __syncthreads();
    uint32_t threshold = 0u;
    int ties = 0, row = 0, column = 0;
    if (p.strategy == kBlock) {
        find_window(p, score, sums, bins, &best);
        const int columns = int(p.side - p.window_columns + 1);
        row = best / columns, column = best % columns;
    } else {
        select(key, n, int(p.kept), bins, &threshold, &ties);
    }
    int equal_before = 0, kept_before = 0;
    for (int first = 0; first < n; first += kThreads) {
        const int i = first + int(threadIdx.x);
        bool keep = false;
        if (p.strategy == kBlock) {
            keep = i < n && in_window(p, row, column, i);
        } else {
            const bool equal = i < n && key[i] == threshold;
            int equals;
            const int rank = equal_before + rank_of(equal, counts, &equals);
            equal_before += equals;
            keep = i < n && (key[i] > threshold || (equal && rank < ties));
        }
        int kept;
        const int place = kept_before + rank_of(keep, counts, &kept);
        kept_before += kept;
        if (i < n) {
            chosen[i] = keep;
            if (writes) p.mask[image * n + i] = keep;
            if (writes && keep) p.index[image * p.kept + place] = i;
        }
    }
    if (p.images.in == nullptr) return;
    __syncthreads();
    mask_any(p.images, vector, chosen, image, int(blockIdx.y), int(gridDim.y));
}

__global__ void __launch_bounds__(kThreads) mask_kernel(Images im, const bool* mask, int vector) {
    const int64_t image = blockIdx.x;
    mask_any(im, vector, mask + image * im.grid_rows * im.grid_columns, image, int(blockIdx.y), int(gridDim.y));
}

// The widest access, in bytes, that divides every run, stride and address.
int widest(const Images& im) {
    if (im.in == nullptr || im.in_step != 1 || im.out_step != 1) return im.size;
    const int64_t length = im.inner / im.grid_columns;
    uint64_t all = uint64_t(length) | uint64_t(im.in_batch) | uint64_t(im.out_batch) | uint64_t(im.in_row) |
                   uint64_t(im.out_row);
    if (im.outer > 1) all |= uint64_t(im.in_outer) | uint64_t(im.out_outer);
    all = all * uint64_t(im.size) | reinterpret_cast<uintptr_t>(im.in) | reinterpret_cast<uintptr_t>(im.out);
    for (int bytes = 16; bytes > im.size; bytes /= 2)
        if (all % uint64_t(bytes) == 0) return bytes;
    return im.size;
}

// Whether runs of patches may be loaded at once: their stride is 1, and they start where an access may.
bool runs_of_patches(const Problem& p) {
    const int size = p.dtype == kFloat32 ? 4 : 2;
    const uint64_t all = uint64_t(p.patches) | uint64_t(p.stride_layer) | uint64_t(p.stride_batch) | uint64_t(p.stride_head);
    return p.stride_patch == 1 && all % kRun == 0 && reinterpret_cast<uintptr_t>(p.attention) % (kRun * size) == 0;
}

// Blocks that share the pixels of an image: enough to fill the device when there are few images.
unsigned slices_of(const Images& im, int64_t batch) {
    if (im.in == nullptr) return 1;
    const int64_t runs = (im.outer * im.rows * im.inner * im.size + 16 * kThreads * 16 - 1) / (16 * kThreads * 16);
    const int64_t wanted = batch > 0 ? (2048 + batch - 1) / batch : 1;
    const int64_t slices = wanted < runs ? wanted : runs;
    return unsigned(slices < 1 ? 1 : slices > 64 ? 64 : slices);
}

const char* outcome() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* pivotal_cuda(const Problem& p, void* stream) {
    if (p.batch == 0) return nullptr;
    cudaGetLastError();  // an error of someone else's call before is not ours to report
    const bool fits = p.strategy != kRandom && p.layers * p.patches * 4 <= kTermBytes;
    const int rows = fits ? int(p.layers) : 1;
    const size_t memory = size_t(p.patches) * size_t(4 * rows + 1);
    const dim3 grid(unsigned(p.batch), slices_of(p.images, p.batch));
    const auto s = static_cast<cudaStream_t>(stream);
    const int vector = widest(p.images);
    const bool aligned = runs_of_patches(p);
    if (p.dtype == kFloat32) {
        pivotal_kernel<kFloat32><<<grid, kThreads, memory, s>>>(p, rows, aligned, vector);
    } else if (p.dtype == kFloat16) {
        pivotal_kernel<kFloat16><<<grid, kThreads, memory, s>>>(p, rows, aligned, vector);
    } else {
        pivotal_kernel<kBFloat16><<<grid, kThreads, memory, s>>>(p, rows, aligned, vector);
    }
    return outcome();
}

const char* mask_images_cuda(const Images& im, const bool* mask, int64_t batch, void* stream) {
    if (batch == 0 || im.outer * im.rows * im.inner == 0) return nullptr;
    cudaGetLastError();  // as above
    const dim3 grid(unsigned(batch), slices_of(im, batch));
    mask_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(im, mask, widest(im));
    return outcome();
}

}  // namespace fgfast
