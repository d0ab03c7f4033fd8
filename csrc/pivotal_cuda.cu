// The mask sampler and the masking of images on the GPU.
//
// One block per image (and slice of its pixels): scores into shared memory, a radix selection of the k-th largest key
// there, the mask and the ascending index by ballots, then the pixels, all in one launch. Attention is read once:
// neighbouring threads take neighbouring patches, and each has the heads of a layer in flight together.

#include <cuda_runtime.h>

#include "pivotal.h"

namespace fgfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;

template <int dtype>
__device__ __forceinline__ float load(const void* base, int64_t i) {
    if (dtype == kFloat32) return __ldg(static_cast<const float*>(base) + i);
    const uint16_t h = __ldg(static_cast<const uint16_t*>(base) + i);
    return dtype == kFloat16 ? from_float16(h) : from_bfloat16(h);
}

template <int dtype>
__device__ float score_of(const Problem& p, int64_t image, int64_t patch) {
    const int64_t first = image * p.stride_batch + patch * p.stride_patch;
    float score = 0.0f;
    for (int64_t l = 0; l < p.layers; ++l) {
        float sum = 0.0f;  // 0 + a is a: the order is that of the CPU
#pragma unroll 4
        for (int64_t h = 0; h < p.heads; ++h) sum += load<dtype>(p.attention, first + l * p.stride_layer + h * p.stride_head);
        const float term = log2_of(sum / float(p.heads));
        score = l == 0 ? term : score + term;
    }
    return score;
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

template <int dtype>
__global__ void __launch_bounds__(kThreads) pivotal_kernel(Problem p, int vector) {
    extern __shared__ unsigned char memory[];
    const int n = int(p.patches);
    uint32_t* key = reinterpret_cast<uint32_t*>(memory);  // [n], scores for "block"
    bool* chosen = reinterpret_cast<bool*>(key + n);      // [n]
    __shared__ int bins[kBins], counts[kWarps], best;
    __shared__ double sums[kThreads];
    const int64_t image = blockIdx.x;
    const bool writes = blockIdx.y == 0;  // the other slices make the mask again, from the cache, for their pixels
    float* score = reinterpret_cast<float*>(key);
    for (int i = threadIdx.x; i < n; i += kThreads) {
        const float s = p.strategy == kRandom ? 0.0f : score_of<dtype>(p, image, i);
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
    const size_t memory = size_t(p.patches) * 5;
    const dim3 grid(unsigned(p.batch), slices_of(p.images, p.batch));
    const auto s = static_cast<cudaStream_t>(stream);
    const int vector = widest(p.images);
    if (p.dtype == kFloat32) {
        pivotal_kernel<kFloat32><<<grid, kThreads, memory, s>>>(p, vector);
    } else if (p.dtype == kFloat16) {
        pivotal_kernel<kFloat16><<<grid, kThreads, memory, s>>>(p, vector);
    } else {
        pivotal_kernel<kBFloat16><<<grid, kThreads, memory, s>>>(p, vector);
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
