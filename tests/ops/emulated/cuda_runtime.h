// As much of CUDA as csrc/pivotal_cuda.cu uses, on the CPU, for its tests: blocks run one after the other, the threads
// of a block as coroutines, each warp as far as it can run before the next, which exposes a missing barrier. A barrier that
// not every thread reaches is an error. The test replaces <<< >>> and the dynamic shared memory by the functions here.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx emulated::thread
#define blockIdx emulated::block
#define gridDim emulated::grid

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
extern "C" {
inline cudaError_t emulated_error = cudaSuccess;  // the last error; a test may set it
}

namespace emulated {

inline dim3 thread, block, grid;
inline unsigned char* memory = nullptr;

struct Barrier {
    unsigned members = 0, arrived = 0, generation = 0;
};

struct Coroutine {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Coroutine> threads;
inline std::vector<Barrier> warps;
inline std::vector<unsigned> exchanged;
inline Barrier whole;
inline const std::function<void()>* body = nullptr;
inline unsigned running = 0;

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (generation == barrier.generation) swapcontext(&threads[running].context, &scheduler);
}

inline unsigned lane() { return thread.x % 32; }

// The values that the 32 threads of this warp brought, read by ``read`` before any of them goes on.
template <typename R>
auto exchange(unsigned value, R read) {
    Barrier& warp = warps[thread.x / 32];
    exchanged[thread.x] = value;
    wait(warp);
    const auto result = read(&exchanged[thread.x / 32 * 32]);
    wait(warp);
    return result;
}

inline void enter() {
    (*body)();
    threads[running].done = true;
    --whole.members;
    swapcontext(&threads[running].context, &scheduler);
}

// Lets every thread of a warp go on to its next barrier; whether anything happened.
inline bool run_warp(unsigned warp, bool backwards, unsigned& left) {
    const auto state = [&] { return (whole.generation + warps[warp].generation) * 1024 + whole.arrived + warps[warp].arrived; };
    bool moved = false;
    for (unsigned i = 0; i < 32; ++i) {
        running = warp * 32 + (backwards ? 31 - i : i);
        if (threads[running].done) continue;
        const auto before = state();
        thread = dim3(running);
        swapcontext(&scheduler, &threads[running].context);
        left -= threads[running].done;
        moved |= threads[running].done || before != state();
    }
    return moved;
}

// Runs one block of whole warps, each warp as far as it can run before the next; false on a deadlock.
inline bool run_block(unsigned n, uint32_t& random) {
    constexpr size_t kStack = 64 << 10;
    threads = std::vector<Coroutine>(n);
    warps.assign((n + 31) / 32, Barrier{32, 0, 0});
    exchanged.assign(n, 0u);
    whole = Barrier{n, 0, 0};
    for (auto& t : threads) {
        t.stack = std::make_unique<char[]>(kStack);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.get();
        t.context.uc_stack.ss_size = kStack;
        t.context.uc_link = &scheduler;
        makecontext(&t.context, enter, 0);
    }
    const unsigned count = warps.size();
    for (unsigned left = n; left > 0;) {
        bool moved = false;
        random = random * 1664525u + 1013904223u;
        for (unsigned i = 0; i < count; ++i) {
            const unsigned warp = (i + (random >> 8)) % count;
            while (run_warp(warp, random >> 31 != 0, left)) moved = true;
        }
        if (!moved) return false;
    }
    return true;
}

inline void launch(const std::function<void()>& kernel, dim3 blocks, unsigned n, size_t bytes, cudaStream_t) {
    std::vector<uint64_t> shared(bytes / 8 + 1);
    uint32_t random = 12345u;
    body = &kernel;
    grid = blocks;
    memory = reinterpret_cast<unsigned char*>(shared.data());
    for (unsigned y = 0; y < blocks.y; ++y) {
        for (unsigned x = 0; x < blocks.x; ++x) {
            block = dim3(x, y);
            shared.assign(shared.size(), 0xABABABABABABABABu);
            if (!run_block(n, random)) {
                emulated_error = 1;
                return;
            }
        }
    }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::whole); }
inline void __syncwarp() { emulated::wait(emulated::warps[threadIdx.x / 32]); }
inline unsigned __ballot_sync(unsigned, bool flag) {
    return emulated::exchange(flag, [](const unsigned* its) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) votes |= its[i] << i;
        return votes;
    });
}
inline int __shfl_up_sync(unsigned, int value, unsigned by) {
    const unsigned lane = emulated::lane();
    return emulated::exchange(unsigned(value), [=](const unsigned* its) { return int(its[lane < by ? lane : lane - by]); });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int atomicAdd(int* at, int value) { return (*at += value) - value; }
template <typename T>
T __ldg(const T* at) {
    return *at;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulated_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == 1 ? "threads of a block wait for each other" : "an error before the launch";
}
