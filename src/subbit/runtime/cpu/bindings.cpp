// The Python module subbit.runtime._native; runtime/native.py is its only caller and checks shapes and dtypes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "codes.hpp"
#include "latents.hpp"
#include "team.hpp"

namespace nb = nanobind;

namespace subbit {
namespace {

#ifdef SUBBIT_AMX
Kernels with_amx() {
    Kernels kernels = avx512_kernels;
    kernels.name = "AMX";
    kernels.matrix = &amx_matrix;
    return kernels;
}
#endif

// Best first. A new instruction set is a translation unit with flags of its own in CMakeLists.txt and a line here.
std::vector<const Kernels*> available() {
    std::vector<const Kernels*> list;
#ifdef SUBBIT_AVX512
    // The compiler's runtime says so only where the system keeps these registers, too.
    bool all = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f");
    all = all && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    all = all && __builtin_cpu_supports("avx512bw");
    const bool vbmi = all && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
#ifdef SUBBIT_AMX
    static const Kernels amx_kernels = with_amx();
    if (vbmi && may_use_amx()) list.push_back(&amx_kernels);
#endif
    if (vbmi) list.push_back(&avx512_kernels);
    if (all) list.push_back(&avx512bw_kernels);
#endif
#ifdef SUBBIT_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(&avx2_kernels);
#endif
#ifdef SUBBIT_NEON
    list.push_back(&neon_kernels);
#endif
    list.push_back(&portable_kernels);
    return list;
}

const Kernels& find_kernels(const std::string& name) {
    for (const Kernels* kernels : available()) {
        if (name == kernels->name) return *kernels;
    }
    throw nb::value_error("this processor has no such kernels");
}

// What is the same in every call.
struct Linear {
    const Kernels& kernels;
    Shape shape;
    const uint8_t* buffer;
};

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace
}  // namespace subbit

NB_MODULE(_native, module) {
    using namespace subbit;
    nb::class_<Kernels>(module, "Kernels").def_ro("name", &Kernels::name);
    nb::class_<Shape>(module, "Shape")
        .def("__init__",
             [](Shape* shape, int rows, int columns, int n, int m, bool column_scales, const Kernels& kernels) {
                 new (shape) Shape{rows, columns, n, m, column_scales, kernels.order};
             })
        .def_prop_ro("bytes", &Shape::bytes);
    module.def("variants", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
        return names;
    });
    module.def("find", &find_kernels, nb::rv_policy::reference, nb::arg("name"));
    module.def("use_gomp_parallel", [](uintptr_t function) { use_gomp_parallel(pointer<void>(function)); });
    module.def("use_large_pages",
               [](uintptr_t bytes, size_t count) { use_large_pages(pointer<uint8_t>(bytes), count); });
    module.def(
        "repack",
        [](const Shape& shape, uintptr_t codes, uintptr_t row_scales, uintptr_t column_scales, uintptr_t buffer,
           int threads) {
            const nb::gil_scoped_release release;
            return repack(shape, pointer<uint8_t>(codes), pointer<float>(row_scales), pointer<float>(column_scales),
                          pointer<uint8_t>(buffer), threads);
        });
    module.def("unpack", [](const Shape& shape, uintptr_t buffer, uintptr_t codes) {
        const nb::gil_scoped_release release;
        unpack(shape, pointer<uint8_t>(buffer), pointer<uint8_t>(codes));
    });
    module.def("decode", [](const Shape& shape, uintptr_t buffer, int first_row, int rows, uintptr_t weights) {
        const nb::gil_scoped_release release;
        decode(shape, pointer<uint8_t>(buffer), first_row, rows, pointer<float>(weights));
    });
    nb::class_<Linear>(module, "Linear")
        .def("__init__",
             [](Linear* linear, const Kernels& kernels, const Shape& shape, uintptr_t buffer) {
                 new (linear) Linear{kernels, shape, pointer<uint8_t>(buffer)};
             })
        .def("multiply", [](const Linear& linear, uintptr_t inputs, bool bfloat16, int batch, uintptr_t bias,
                            bool bfloat16_bias, uintptr_t outputs, int threads) {
            const nb::gil_scoped_release release;
            multiply(linear.kernels, linear.shape, linear.buffer, {pointer<void>(inputs), bfloat16}, batch,
                     {pointer<void>(bias), bfloat16_bias}, pointer<void>(outputs), threads);
        });
    nb::class_<RowMatrix>(module, "RowMatrix")
        .def("__init__",
             [](RowMatrix* matrix, uintptr_t codes, uintptr_t zeros, uintptr_t scales, int rows, int columns, int bits,
                int group_size) {
                 new (matrix) RowMatrix{pointer<uint8_t>(codes), pointer<uint8_t>(zeros), pointer<uint16_t>(scales),
                                        rows, columns, bits, group_size};
             });
    module.def("multiply_rows", [](const Kernels& kernels, const RowMatrix& matrix, uintptr_t inputs, bool bfloat16,
                                   int batch, uintptr_t bias, bool bfloat16_bias, uintptr_t outputs, int threads) {
        const nb::gil_scoped_release release;
        multiply_rows(kernels, matrix, {pointer<void>(inputs), bfloat16}, batch, {pointer<void>(bias), bfloat16_bias},
                      pointer<void>(outputs), threads);
    });
    nb::class_<GroupedMatrix>(module, "GroupedMatrix")
        .def("__init__",
             [](GroupedMatrix* matrix, uintptr_t codes, uintptr_t symbols, uintptr_t scales, uintptr_t salient,
                uintptr_t residuals, uintptr_t column_scales, int rows, int columns, int n, int m, int block_size,
                int regions, int residual_bytes) {
                 new (matrix) GroupedMatrix{
                     pointer<uint8_t>(codes),      pointer<uint8_t>(symbols),   pointer<uint16_t>(scales),
                     pointer<uint8_t>(salient),    pointer<uint8_t>(residuals), pointer<uint16_t>(column_scales),
                     rows,                         columns,                     n,
                     m,                            block_size,                  regions,
                     residual_bytes};
             });
    module.def("multiply_grouped", [](const Kernels& kernels, const GroupedMatrix& matrix, uintptr_t inputs,
                                      bool bfloat16, int batch, uintptr_t bias, bool bfloat16_bias, uintptr_t outputs,
                                      int threads) {
        const nb::gil_scoped_release release;
        return multiply_grouped(kernels, matrix, {pointer<void>(inputs), bfloat16}, batch,
                                {pointer<void>(bias), bfloat16_bias}, pointer<void>(outputs), threads);
    });
    module.def("decode_grouped", [](const Kernels& kernels, const GroupedMatrix& matrix, int first_row, int rows,
                                    uintptr_t weights, int threads) {
        const nb::gil_scoped_release release;
        return decode_grouped(kernels, matrix, first_row, rows, pointer<float>(weights), threads);
    });
    module.def("round_latents", [](uintptr_t latents, size_t groups, int n, int m, uintptr_t signs, bool bfloat16,
                                   int threads) {
        const nb::gil_scoped_release release;
        round_latents(pointer<float>(latents), groups, n, m, pointer<void>(signs), bfloat16, threads);
    });
    module.def("read_memory", [](const Kernels& kernels, uintptr_t bytes, size_t count, int threads) {
        const nb::gil_scoped_release release;
        return read_memory(kernels, pointer<uint8_t>(bytes), count, threads);
    });
}
