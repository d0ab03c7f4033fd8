// Python bindings. They take only numbers and addresses, nothing of PyTorch: one build serves every version of it.

#include <pybind11/pybind11.h>

#include "pivotal.h"
#include "pyramid.h"

namespace py = pybind11;
using fgfast::Images;
using fgfast::Problem;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (in, out, size, shape (outer, rows, inner), grid (rows, columns), in strides (4), out strides (4))
Images images_of(const py::tuple& t) {
    Images im;
    const auto shape = t[3].cast<py::tuple>(), grid = t[4].cast<py::tuple>();
    const auto in = t[5].cast<py::tuple>(), out = t[6].cast<py::tuple>();
    im.in = pointer<const char>(t[0].cast<uintptr_t>());
    im.out = pointer<char>(t[1].cast<uintptr_t>());
    im.size = t[2].cast<int>();
    im.outer = shape[0].cast<int64_t>(), im.rows = shape[1].cast<int64_t>(), im.inner = shape[2].cast<int64_t>();
    im.grid_rows = grid[0].cast<int64_t>(), im.grid_columns = grid[1].cast<int64_t>();
    im.in_batch = in[0].cast<int64_t>(), im.in_outer = in[1].cast<int64_t>();
    im.in_row = in[2].cast<int64_t>(), im.in_step = in[3].cast<int64_t>();
    im.out_batch = out[0].cast<int64_t>(), im.out_outer = out[1].cast<int64_t>();
    im.out_row = out[2].cast<int64_t>(), im.out_step = out[3].cast<int64_t>();
    return im;
}

void raise(const char* error) {
    if (error != nullptr) throw py::value_error(error);
}

void pivotal_mask(uintptr_t attention, int dtype, const py::tuple& shape, const py::tuple& strides, int64_t kept,
                  int strategy, const py::tuple& window, uint64_t seed, uintptr_t mask, uintptr_t index,
                  const py::object& images, bool cuda, uintptr_t stream, int threads) {
    Problem p;
    p.attention = pointer<const void>(attention);
    p.dtype = dtype;
    p.layers = shape[0].cast<int64_t>(), p.batch = shape[1].cast<int64_t>();
    p.heads = shape[2].cast<int64_t>(), p.patches = shape[3].cast<int64_t>();
    p.stride_layer = strides[0].cast<int64_t>(), p.stride_batch = strides[1].cast<int64_t>();
    p.stride_head = strides[2].cast<int64_t>(), p.stride_patch = strides[3].cast<int64_t>();
    p.kept = kept;
    p.strategy = strategy;
    p.side = window[0].cast<int64_t>();
    p.window_rows = window[1].cast<int64_t>(), p.window_columns = window[2].cast<int64_t>();
    p.seed = seed;
    p.mask = pointer<bool>(mask);
    p.index = pointer<int64_t>(index);
    if (!images.is_none()) p.images = images_of(images.cast<py::tuple>());
    const char* error = nullptr;
    {
        py::gil_scoped_release free;
#ifdef FGFAST_CUDA
        error = cuda ? fgfast::pivotal_cuda(p, pointer<void>(stream)) : fgfast::pivotal_cpu(p, threads);
#else
        (void)cuda, (void)stream;
        error = fgfast::pivotal_cpu(p, threads);
#endif
    }
    raise(error);
}

void mask_images(const py::tuple& images, uintptr_t mask, int64_t batch, bool cuda, uintptr_t stream, int threads) {
    const Images im = images_of(images);
    const char* error = nullptr;
    {
        py::gil_scoped_release free;
#ifdef FGFAST_CUDA
        error = cuda ? fgfast::mask_images_cuda(im, pointer<const bool>(mask), batch, pointer<void>(stream))
                     : fgfast::mask_images_cpu(im, pointer<const bool>(mask), batch, threads);
#else
        (void)cuda, (void)stream;
        error = fgfast::mask_images_cpu(im, pointer<const bool>(mask), batch, threads);
#endif
    }
    raise(error);
}

// (cells of the level, low, fraction)
fgfast::Axis axis_of(const py::handle& h) {
    const auto t = h.cast<py::tuple>();
    return {t[0].cast<int64_t>(), pointer<const int64_t>(t[1].cast<uintptr_t>()),
            pointer<const float>(t[2].cast<uintptr_t>())};
}

// Levels: (cells, cells of a problem with padding, channels, rows, columns); shape: (batch, height, width, clusters, lanes)
fgfast::Pyramid pyramid_of(const py::tuple& levels, const py::tuple& shape) {
    fgfast::Pyramid p;
    p.batch = shape[0].cast<int64_t>(), p.height = shape[1].cast<int64_t>(), p.width = shape[2].cast<int64_t>();
    p.clusters = shape[3].cast<int64_t>(), p.lanes = shape[4].cast<int64_t>();
    for (const py::handle& h : levels) {
        const auto t = h.cast<py::tuple>();
        fgfast::Level level;
        level.cells = pointer<const float>(t[0].cast<uintptr_t>());
        level.problem = t[1].cast<int64_t>(), level.channels = t[2].cast<int64_t>();
        level.rows = axis_of(t[3]), level.columns = axis_of(t[4]);
        p.levels.push_back(level);
    }
    return p;
}

void label_pyramid(const py::tuple& levels, const py::tuple& shape, const py::tuple& scores, uintptr_t bias,
                   uintptr_t labels, uintptr_t best, int threads) {
    fgfast::Pyramid p = pyramid_of(levels, shape);
    for (size_t i = 0; i < p.levels.size(); ++i) p.levels[i].scores = pointer<const float>(scores[i].cast<uintptr_t>());
    const py::gil_scoped_release free;
    fgfast::label_pyramid(p, pointer<const float>(bias), pointer<int64_t>(labels), pointer<float>(best), threads);
}

bool update_sums(const py::tuple& levels, const py::tuple& shape, uintptr_t labels, uintptr_t before, uintptr_t scale,
                 uintptr_t norms, int64_t most, uintptr_t counts, uintptr_t mass, uintptr_t carried, uintptr_t sums) {
    const fgfast::Pyramid p = pyramid_of(levels, shape);
    const fgfast::Update u{
        pointer<const int64_t>(labels), pointer<const int64_t>(before), pointer<const float>(scale),
        pointer<const float>(norms), most, pointer<float>(counts), pointer<float>(mass), pointer<float>(carried),
        pointer<float>(sums)};
    const py::gil_scoped_release free;
    return fgfast::update_sums(p, u);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The compiled mask sampler and k-means of pyramids; nothing here checks what it is given.";
#ifdef FGFAST_CUDA
    m.attr("CUDA") = true;
#else
    m.attr("CUDA") = false;
#endif
    m.def("pivotal_mask", &pivotal_mask);
    m.def("mask_images", &mask_images);
    m.def("label_pyramid", &label_pyramid);
    m.def("update_sums", &update_sums);
}
