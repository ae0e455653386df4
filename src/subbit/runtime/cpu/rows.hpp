// `rows_uniform` matrices (docs/format.md): the head, in 8 or 4 bits, multiplied as it is stored.
//
// A weight is scale * (code - zero) with a scale and a zero of its (row, group). Inputs are put on a grid of 16 bits, one
// step a group, so that a group is a sum of integers: sum(code * x) - zero * sum(x), then once a group in float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.hpp"

namespace subbit {

struct Kernels;

struct RowMatrix {
    const uint8_t* codes;
    const uint8_t* zeros;
    const uint16_t* scales;  // float16
    int rows, columns, bits, group_size;

    int groups() const { return (columns + group_size - 1) / group_size; }
    ptrdiff_t row_bytes() const { return (static_cast<ptrdiff_t>(columns) * bits + 7) / 8; }
};

constexpr int kLargestInput = 32767;
constexpr int kLargestGroup = 256;  // columns; their sum fits 32 bits

// One input vector on its grid.
struct RowInputs {
    const int16_t* values;  // columns
    const float* steps;     // of a group
    const float* sums;      // of a group, integers
};

// sums[0 .. count - 1] of the rows from `first` on.
using RowsKernel = void (*)(const RowMatrix&, const RowInputs&, int first, int count, float* sums);
void add_rows(const RowMatrix&, const RowInputs&, int first, int count, float* sums);  // in portable C++
void rows_avx2(const RowMatrix&, const RowInputs&, int first, int count, float* sums);

// outputs (batch x rows) = inputs (batch x columns) times the matrix, plus bias unless it is null; outputs have the dtype
// of the inputs. `group_size` is at most kLargestGroup.
void multiply_rows(const Kernels& kernels, const RowMatrix& matrix, Numbers inputs, int batch, Numbers bias,
                   void* outputs, int threads);

}  // namespace subbit
