// What the kernels for AVX-512 share, with VBMI (avx512.cpp) and without (avx512bw.cpp): the unnamed namespace keeps the
// copies of the two translation units, which have flags of their own, apart.
//
// As in avx2.cpp, bytes are added, then gathered in 16 bits: an accumulator takes the bytes of two rows as one number,
// another the upper one alone, and the lower one is their difference.
#pragma once

#include <immintrin.h>

#include "fetch.hpp"
#include "folded.hpp"
#include "rows_x86.hpp"

namespace subbit {
namespace {

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i load_table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m512i low_nibble(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline __m512i high_nibble(__m512i x) { return low_nibble(_mm512_srli_epi16(x, 4)); }
// Bits of `x` where the mask has them, of `y` elsewhere.
inline __m512i select(int mask, __m512i x, __m512i y) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(mask)), x, y, 0xCA);
}

// ---- tables ----------------------------------------------------------------------------------------------------------

inline __m512i to_grid(__m512 x, __m512 inverse, int zero) {
    return _mm512_add_epi32(_mm512_set1_epi32(zero), _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
}
inline void store_256(uint8_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

// Two columns and their signs, for every entry of six and seven, entry e at place at(e).
struct Pairs {
    int columns[2][64];
    float signs[2][64];
};
constexpr Pairs make_pairs(const Entries& entries, int (*at)(int)) {
    Pairs pairs{};
    for (int e = 0; e < 64; e++) {
        int count = 0;
        for (int j = 0; j < 8; j++) {
            if (entries.weights[j][e] == 0) continue;
            pairs.columns[count][at(e)] = j;
            pairs.signs[count++][at(e)] = entries.weights[j][e];
        }
    }
    return pairs;
}

// The entries of six or seven in steps of the grid, in the order of `pairs`.
template <Layout layout>
inline void add_pairs(const Pairs& pairs, const float* x, __m512 inverse, __m512 (&sums)[4]) {
    const __m512 scaled = _mm512_mul_ps(inverse, _mm512_broadcast_f32x8(_mm256_loadu_ps(x)));
    for (int i = 0; i < 4; i++) {
        const __m512 left = _mm512_permutexvar_ps(load(pairs.columns[0] + 16 * i), scaled);
        const __m512 right = _mm512_permutexvar_ps(load(pairs.columns[1] + 16 * i), scaled);
        // Of seven, the left one is positive.
        sums[i] = layout == Layout::six ? _mm512_mul_ps(left, _mm512_loadu_ps(pairs.signs[0] + 16 * i)) : left;
        sums[i] = _mm512_fmadd_ps(right, _mm512_loadu_ps(pairs.signs[1] + 16 * i), sums[i]);
    }
}

// The largest of magnitudes, or NaN if there is one: as integers, magnitudes have the same order, and NaN is the largest.
inline __m512i larger_of(__m512i most, __m512 magnitudes) {
    return _mm512_max_epi32(most, _mm512_castps_si512(magnitudes));
}
inline float largest_lane(__m512i most) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(most))));
}
inline float largest_of(const float* x, int count) {
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 16) most = larger_of(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    return largest_lane(most);
}

// ---- sums ------------------------------------------------------------------------------------------------------------

// Sums of 16 rows, and of 16 rows `apart` of their first eight, += step * (whole - zero). Both have eight in each half.
template <int apart>
inline void put_sums(const __m512i (&wholes)[2], __m512i zero, __m512 step, float* sums) {
    for (int i = 0; i < 2; i++) {
        const __m512 product = _mm512_mul_ps(step, _mm512_cvtepi32_ps(_mm512_sub_epi32(wholes[i], zero)));
        float *first = sums + 8 * i, *second = first + apart;
        _mm256_storeu_ps(first, _mm256_add_ps(_mm256_loadu_ps(first), _mm512_castps512_ps256(product)));
        _mm256_storeu_ps(second, _mm256_add_ps(_mm256_loadu_ps(second), _mm512_extractf32x8_ps(product, 1)));
    }
}

// The same of low + radix * high, in 16 bits.
template <int radix, int apart>
inline void put_planes(__m512i low, __m512i high, __m512i zero, __m512 step, float* sums) {
    const __m512i factor = _mm512_set1_epi32(radix << 16 | 1);
    const __m512i wholes[2] = {_mm512_madd_epi16(_mm512_unpacklo_epi16(low, high), factor),
                               _mm512_madd_epi16(_mm512_unpackhi_epi16(low, high), factor)};
    put_sums<apart>(wholes, zero, step, sums);
}

// The sums of 64 rows in bytes, gathered in 16 bits.
struct Wide {
    __m512i both = _mm512_setzero_si512(), upper = _mm512_setzero_si512();

    void add(__m512i bytes) {
        both = _mm512_add_epi16(both, bytes);
        upper = _mm512_add_epi16(upper, _mm512_srli_epi16(bytes, 8));
    }
    __m512i lower() const { return _mm512_sub_epi16(both, _mm512_slli_epi16(upper, 8)); }
};
struct Planes {
    Wide low, high;

    template <int radix>
    void put(__m512i zero, __m512 step, float* sums) const {
        put_planes<radix, 32>(low.lower(), high.lower(), zero, step, sums);
        put_planes<radix, 32>(low.upper, high.upper, zero, step, sums + 16);
    }
};

// six and seven: a vector of codes a group, whose two upper bits together are those of two more groups.
inline void load_sixes(const uint8_t* codes, __m512i (&index)[8]) {
    for (int j = 0; j < 6; j++) index[j] = load(codes + 64 * j);
    for (int j = 0; j < 2; j++) {
        const __m512i* from = index + 3 * j;
        const __m512i two = _mm512_srli_epi16(from[0], 6), four = _mm512_srli_epi16(from[1], 4);
        index[6 + j] = select(15, select(3, two, four), _mm512_srli_epi16(from[2], 2));
    }
}

// five: of eight groups, with other bits above the five.
inline void load_fives(const uint8_t* codes, __m512i (&index)[8]) {
    for (int j = 0; j < 5; j++) index[j] = load(codes + 64 * j);
    const __m512i one = index[1], three = index[3];
    index[5] = select(7, _mm512_srli_epi16(index[0], 5), _mm512_srli_epi16(one, 2));
    index[6] = select(7, _mm512_srli_epi16(index[2], 5), _mm512_srli_epi16(three, 2));
    index[7] = select(8, _mm512_srli_epi16(one, 4), _mm512_srli_epi16(three, 3));
    index[7] = select(7, _mm512_srli_epi16(index[4], 5), index[7]);
}

inline void add_single(const uint8_t* codes, const uint8_t* tables, int groups, Planes& sums) {
    for (int g = 0; g < groups; g += 2, tables += 64, codes += 64) {
        fetch(codes);
        const __m512i code = load(codes), a = low_nibble(code), b = high_nibble(code);
        const auto sum = [&](int plane) {
            return _mm512_add_epi8(_mm512_shuffle_epi8(load_table(tables + plane), a),
                                   _mm512_shuffle_epi8(load_table(tables + 32 + plane), b));
        };
        sums.low.add(sum(0));
        sums.high.add(sum(16));
    }
}

template <Layout layout, class Sums, void (*add)(const uint8_t* codes, const uint8_t* tables, int groups, Sums&)>
void add_tiles(const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums, int tiles) {
    constexpr Properties properties = of(layout);
    const __m512i zero = _mm512_set1_epi32(groups * properties.entries * properties.grid.zero);
    for (int tile = 0; tile < tiles; tile++, codes += bytes_of(layout, groups), sums += kTileRows) {
        Sums total;
        add(codes, tables, groups, total);
        total.template put<properties.grid.radix>(zero, _mm512_set1_ps(step), sums);
    }
}

// For add_grouped_rows.
class RowSum {
   public:
    static constexpr int kColumns = 32;

    template <int bits>
    void add(const uint8_t* codes, const int16_t* x) {
        group_ = _mm512_add_epi32(group_, _mm512_madd_epi16(bits == 8 ? of_8_bits(codes) : of_4_bits(codes), load(x)));
    }
    void close_group(float step) {
        whole_ = _mm512_fmadd_ps(_mm512_set1_ps(step), _mm512_cvtepi32_ps(group_), whole_);
        group_ = _mm512_setzero_si512();
    }
    float whole() const { return _mm512_reduce_add_ps(whole_); }

   private:
    // 32 codes as 16-bit numbers, in the order of their columns.
    static __m512i of_8_bits(const uint8_t* p) {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static __m512i of_4_bits(const uint8_t* p) {
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12)), _mm512_set1_epi16(15));
    }

    __m512i group_ = _mm512_setzero_si512();
    __m512 whole_ = _mm512_setzero_ps();
};

inline void rows_avx512(const RowMatrix& matrix, const RowInputs& inputs, int first, int count, float* sums) {
    (is_whole<RowSum>(matrix) ? add_whole_rows<RowSum> : rows_avx2)(matrix, inputs, first, count, sums);
}

// grouped_binary (grouped.hpp): 16 columns at a time.
inline void levels_avx512(const LevelBits& bits, int columns, const float* levels, float* weights) {
    const __m512 table = _mm512_loadu_ps(levels);
    const auto lanes = [](const uint8_t* plane, int i) {
        uint16_t bits_of_16;
        std::memcpy(&bits_of_16, plane + 2 * i, 2);
        return static_cast<__mmask16>(bits_of_16);
    };
    for (int i = 0; i < columns / 16; i++) {
        __m512i level = _mm512_maskz_set1_epi32(lanes(bits.positive, i), 1);
        level = _mm512_mask_or_epi32(level, lanes(bits.first, i), level, _mm512_set1_epi32(2));
        level = _mm512_mask_or_epi32(level, lanes(bits.second, i), level, _mm512_set1_epi32(4));
        level = _mm512_mask_or_epi32(level, lanes(bits.salient, i), level, _mm512_set1_epi32(8));
        _mm512_storeu_ps(weights + 16 * i, _mm512_maskz_permutexvar_ps(lanes(bits.kept, i), level, table));
    }
}

inline uint64_t read_avx512(const uint8_t* bytes, size_t count) {
    __m512i all = _mm512_setzero_si512();
    for (size_t at = 0; at + 64 <= count; at += 64) {
        fetch(bytes + at);
        all = _mm512_xor_si512(all, load(bytes + at));
    }
    return static_cast<uint64_t>(_mm512_reduce_or_epi64(all));
}

}  // namespace
}  // namespace subbit
