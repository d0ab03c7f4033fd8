// k-means of feature pyramids on the CPU: what fgfast/pixels/native.py has computed of each level, and where results go.
#pragma once

#include <cstdint>
#include <vector>

namespace fgfast {

// Bilinear resizing along one axis: output i mixes the cells low[i] and low[i] + 1 (or only the last one).
struct Axis {
    int64_t cells = 0;
    const int64_t* low = nullptr;
    const float* fraction = nullptr;  // of the second cell
};

struct Level {
    const float* scores = nullptr;  // [B, rows.cells, columns.cells, lanes]
    const float* cells = nullptr;   // [B, cells and padding, channels]
    int64_t problem = 0;            // cells and padding of a problem
    int64_t channels = 0;
    Axis rows, columns;
};

struct Pyramid {
    std::vector<Level> levels;
    int64_t batch = 0, height = 0, width = 0;
    int64_t clusters = 0, lanes = 0;  // lanes: clusters rounded up
};

// Sums of scale_n y_n over the pixels of each label, [B, clusters, channels of all levels], brought up to date in place.
struct Update {
    const int64_t* labels = nullptr;  // [B, N]
    const int64_t* before = nullptr;  // the labels that the sums belong to, or null where there are none
    const float* scale = nullptr;     // [B, N]
    const float* norms = nullptr;     // |y_n| [B, N]
    int64_t most = 0;                 // changed pixels of a problem
    float* counts = nullptr;          // [B, clusters], sums of scale_n
    float* mass = nullptr;            // [B, clusters], sums of scale_n |y_n|
    float* carried = nullptr;         // [B, clusters], the same over what was ever added or taken away; see pixels/native.py
    float* sums = nullptr;
};

// Labels [B, N] of the least resized score + bias [B, clusters], lowest first, and that score.
void label_pyramid(const Pyramid& p, const float* bias, int64_t* labels, float* best, int threads);

// Counts and mass of new labels, and their sums if few pixels have changed; false where the sums are left as they are.
bool update_sums(const Pyramid& p, const Update& u);

}  // namespace fgfast
