// rows_uniform (rows.hpp): the loop over the rows of a head, included by the translation unit of every x86 instruction set.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "fetch.hpp"
#include "rows.hpp"

namespace subbit {
namespace {

inline float sum_of_lanes(__m256 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Steps of groups of a row, and what their zeros take off: eight at a time.
struct RowGrids {
    float steps[8];
    __m256 zeros = _mm256_setzero_ps();

    void next(const RowMatrix& matrix, const RowInputs& inputs, ptrdiff_t at, int group, int count) {
        if (count < 8) {
            float products[8] = {};
            for (int i = 0; i < count; i++) {
                steps[i] = from_float16(matrix.scales[at + i]) * inputs.steps[group + i];
                products[i] = steps[i] * static_cast<float>(matrix.zeros[at + i]) * inputs.sums[group + i];
            }
            zeros = _mm256_add_ps(zeros, _mm256_loadu_ps(products));
            return;
        }
        const auto* halves = reinterpret_cast<const __m128i*>(matrix.scales + at);
        const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves));
        const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x8000)), 16);
        const __m256i size = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7FFF)), 13);
        const __m256 scales = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, size)), _mm256_set1_ps(0x1p112F));
        const __m256 step = _mm256_mul_ps(scales, _mm256_loadu_ps(inputs.steps + group));
        const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(matrix.zeros + at)));
        const __m256 sums = _mm256_mul_ps(_mm256_cvtepi32_ps(zero), _mm256_loadu_ps(inputs.sums + group));
        zeros = _mm256_fmadd_ps(step, sums, zeros);
        _mm256_storeu_ps(steps, step);
    }
};

// Every group has a multiple of Sum::kColumns columns; all have `size`, or are of any size if that is 0. `Sum` adds the
// products of kColumns codes in integers, then what a group has in float32.
template <class Sum, int bits, int size>
void add_grouped_rows(const RowMatrix& matrix, const RowInputs& inputs, int first, int count, float* sums) {
    const int groups = matrix.groups();
    for (int i = 0; i < count; i++) {
        const uint8_t* codes = matrix.codes + (first + i) * matrix.row_bytes();
        const int16_t* x = inputs.values;
        const ptrdiff_t grids = static_cast<ptrdiff_t>(first + i) * groups;
        Sum sum;
        RowGrids grid;
        for (int from = 0; from < groups; from += 8) {
            const int some = groups - from < 8 ? groups - from : 8;
            grid.next(matrix, inputs, grids + from, from, some);
            for (int group = from; group < from + some; group++) {
                const int left = matrix.columns - group * matrix.group_size;
                const int columns = size ? size : std::min(matrix.group_size, left);
                fetch(codes);
                SUBBIT_UNROLLED
                for (int j = 0; j < columns; j += Sum::kColumns, codes += Sum::kColumns * bits / 8, x += Sum::kColumns)
                    sum.template add<bits>(codes, x);
                sum.close_group(grid.steps[group - from]);
            }
        }
        sums[i] = sum.whole() - sum_of_lanes(grid.zeros);
    }
}

template <class Sum>
void add_whole_rows(const RowMatrix& matrix, const RowInputs& inputs, int first, int count, float* sums) {
    const bool usual = matrix.group_size == 64 && matrix.columns % 64 == 0;  // the default of the format
    const RowsKernel of_8_bits = usual ? add_grouped_rows<Sum, 8, 64> : add_grouped_rows<Sum, 8, 0>;
    const RowsKernel of_4_bits = usual ? add_grouped_rows<Sum, 4, 64> : add_grouped_rows<Sum, 4, 0>;
    (matrix.bits == 8 ? of_8_bits : of_4_bits)(matrix, inputs, first, count, sums);
}

// Whether add_whole_rows may be called.
template <class Sum>
bool is_whole(const RowMatrix& matrix) {
    return matrix.group_size % Sum::kColumns == 0 && matrix.columns % Sum::kColumns == 0;
}

}  // namespace
}  // namespace subbit
