// Work dealt out to PyTorch's own threads.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(FGFAST_SANITIZE)
#define FGFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FGFAST_CLONES
#endif

namespace fgfast {

constexpr int64_t kRanges = 4;  // for each thread

using Parallel = void(void (*)(void*), void*, unsigned, unsigned);

// Runs work in ``threads`` threads: PyTorch's own, through the OpenMP library that it has loaded. They exist already and
// may still be spinning after its last operation, so new ones would wait for a core. Without OpenMP one thread runs it all.
inline void in_threads(int threads, std::function<void()> work) {
    static Parallel* const openmp = reinterpret_cast<Parallel*>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (openmp == nullptr) return work();
    openmp([](void* f) { (*static_cast<std::function<void()>*>(f))(); }, &work, unsigned(threads), 0);
}

// Calls work(begin, end) on disjoint ranges that cover [0, n), in at most ``threads`` threads with at least ``least`` items each.
// A free thread takes the next range: one that starts late, on a busy machine, leaves more to the others.
inline void deal_out(int64_t n, int threads, int64_t least, const std::function<void(int64_t, int64_t)>& work) {
    const int64_t parts = std::min<int64_t>(threads, n / least);
    if (parts <= 1) return work(0, n);
    const int64_t range = std::max<int64_t>(1, n / (kRanges * parts));
    std::atomic<int64_t> next{0};
    in_threads(int(parts), [&] {
        for (int64_t i = next.fetch_add(range); i < n; i = next.fetch_add(range)) work(i, std::min(i + range, n));
    });
}

}  // namespace fgfast
