// AVX2: one `pshufb` looks 32 rows (or 16 rows, twice) up in a table of 16 bytes.
//
// Bytes of two or three look-ups are added as bytes, then widened. Neighbouring bytes of `pair` are the two symbols of
// one row, and `pmaddubsw` adds them while it widens. In the other layouts they are different rows: an accumulator takes
// both as one 16-bit number, another the upper one alone, and the lower one is their difference.
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "fetch.hpp"
#include "rows_x86.hpp"
#include "tables.hpp"

namespace subbit {
namespace {

inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i load_table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i low_nibble(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline __m256i high_nibble(__m256i x) { return low_nibble(_mm256_srli_epi16(x, 4)); }

inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), x); }
// The largest magnitude, or NaN if there is one: as integers, magnitudes have the same order, and NaN is the largest.
inline float largest_of(const float* x, int count) {
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < count; i += 8) {
        most = _mm256_max_epi32(most, _mm256_castps_si256(magnitude(_mm256_loadu_ps(x + i))));
    }
    __m128i lanes = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    lanes = _mm_max_epi32(lanes, _mm_shuffle_epi32(lanes, 0x4E));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(lanes, _mm_shuffle_epi32(lanes, 0xB1))));
}

// The 16 entries of a table, in 32 bits, as bytes of its two planes.
template <int radix>
inline void put(uint8_t* table, __m256i first, __m256i second) {
    // Packing works within halves of a vector; the permutation puts the quarters in order again.
    const __m256i values = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xD8);
    // value / radix, exact below 2^14: the multiplier is 2^22 / radix, rounded up.
    const auto multiplier = static_cast<short>(((1 << 22) + radix - 1) / radix);
    const __m256i high = _mm256_srli_epi16(_mm256_mulhi_epu16(values, _mm256_set1_epi16(multiplier)), 6);
    const __m256i low = _mm256_sub_epi16(values, _mm256_mullo_epi16(high, _mm256_set1_epi16(radix)));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(table), bytes);
}

float build_symbols(const float* x, int groups, uint8_t* tables) {
    const float largest = largest_of(x, 8 * groups), limit = kTwoGrid.limit;
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? limit / largest : 0);
    const __m256i zero = _mm256_set1_epi32(kTwoGrid.zero);
    for (int g = 0; g < groups; g++, x += 8, tables += 32) {
        const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse));
        put<kTwoGrid.radix>(tables, _mm256_sub_epi32(zero, q), _mm256_add_epi32(zero, q));
    }
    return largest / limit;
}

// The 16 sums of `columns` inputs with the signs that the factors say, as integers.
struct Sums {
    __m256i first, second;

    template <int columns>
    static Sums of(const float* x, __m256 inverse, const float (*factors)[16]) {
        __m256 first = _mm256_setzero_ps(), second = _mm256_setzero_ps();
        for (int j = 0; j < columns; j++) {
            const __m256 a = _mm256_broadcast_ss(x + j);
            first = _mm256_fmadd_ps(a, _mm256_loadu_ps(factors[j]), first);
            second = _mm256_fmadd_ps(a, _mm256_loadu_ps(factors[j] + 8), second);
        }
        return {_mm256_cvtps_epi32(_mm256_mul_ps(first, inverse)), _mm256_cvtps_epi32(_mm256_mul_ps(second, inverse))};
    }
    void put_plus(uint8_t* table) const {
        const __m256i zero = _mm256_set1_epi32(kThreeGrid.zero);
        put<kThreeGrid.radix>(table, _mm256_add_epi32(zero, first), _mm256_add_epi32(zero, second));
    }
    void put_minus(uint8_t* table) const {
        const __m256i zero = _mm256_set1_epi32(kThreeGrid.zero);
        put<kThreeGrid.radix>(table, _mm256_sub_epi32(zero, first), _mm256_sub_epi32(zero, second));
    }
};

// Four tables a group: t in columns 0-3, t in columns 4-7, s, and s negated.
float build_signs(const float* x, int groups, uint8_t* tables) {
    float most = 0;
    for (int g = 0; g < groups; g++) {
        const float whole = sum_of_lanes(magnitude(_mm256_loadu_ps(x + 8 * g)));
        most = whole <= most || most != most ? most : whole;  // NaN stays
    }
    const float largest = 0.5F * most, limit = kThreeGrid.limit;  // no sum of a table is larger
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? limit / largest : 0);
    for (int g = 0; g < groups; g++, x += 8, tables += 128) {
        Sums::of<4>(x, inverse, kFactors.half).put_plus(tables);
        Sums::of<4>(x + 4, inverse, kFactors.half).put_plus(tables + 32);
        const Sums s = Sums::of<8>(x, inverse, kFactors.hadamard);
        s.put_plus(tables + 64);
        s.put_minus(tables + 96);
    }
    return largest / limit;
}

// x of 16 columns. Bytes of even groups have 128 more: the sum of an even and an odd one is not negative, and still is
// not after each of them was negated.
float build_wide(const float* x, int groups, uint8_t* tables) {
    constexpr int radix = kSignedGrid.radix, limit = kSignedGrid.limit;
    const float largest = largest_of(x, 16 * groups);
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? limit / largest : 0);
    const __m256i zero = _mm256_set1_epi32(limit);
    for (int g = 0; g < groups; g++, x += 16, tables += 32) {
        const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse));
        const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), inverse));
        put<radix>(tables, _mm256_add_epi32(zero, first), _mm256_add_epi32(zero, second));
        const auto shift = static_cast<char>((g % 2 ? 0 : 128) - radix / 2);
        auto* bytes = reinterpret_cast<__m256i*>(tables);
        _mm256_storeu_si256(bytes, _mm256_add_epi8(_mm256_loadu_si256(bytes), _mm256_set1_epi8(shift)));
    }
    return largest / limit;
}

float build_avx2(Layout layout, const float* inputs, int groups, uint8_t* tables) {
    return (has_symbols(layout) ? build_symbols : is_wide(layout) ? build_wide : build_signs)(inputs, groups, tables);
}

// sums[0..15] += step * (low + radix * high - zero), of 16 rows in 16 bits.
template <int radix>
inline void flush(__m256i low, __m256i high, __m256i zero, __m256 step, float* sums) {
    const __m256i factor = _mm256_set1_epi32(radix << 16 | 1);
    const __m256i halves[2] = {_mm256_unpacklo_epi16(low, high), _mm256_unpackhi_epi16(low, high)};
    for (int i = 0; i < 2; i++) {
        const __m256i whole = _mm256_sub_epi32(_mm256_madd_epi16(halves[i], factor), zero);
        float* out = sums + 8 * i;
        _mm256_storeu_ps(out, _mm256_fmadd_ps(step, _mm256_cvtepi32_ps(whole), _mm256_loadu_ps(out)));
    }
}

// The sums of 32 rows in bytes, gathered in 16 bits.
struct Wide {
    __m256i both = _mm256_setzero_si256(), upper = _mm256_setzero_si256();

    void add(__m256i bytes) {
        both = _mm256_add_epi16(both, bytes);
        upper = _mm256_add_epi16(upper, _mm256_srli_epi16(bytes, 8));
    }
    __m256i lower() const { return _mm256_sub_epi16(both, _mm256_slli_epi16(upper, 8)); }
};

template <int radix>
inline void flush(const Wide& low, const Wide& high, __m256i zero, __m256 step, float* sums) {
    flush<radix>(low.lower(), high.lower(), zero, step, sums);
    flush<radix>(low.upper, high.upper, zero, step, sums + 16);
}

// Each of these takes half of a tile's rows: more sums at a time do not fit the registers, nor do they when a compiler
// merges two of them.
template <int half>
[[gnu::noinline]] void add_single(const uint8_t* codes, const uint8_t* tables, int groups, __m256i zero, __m256 step,
                                  float* sums) {
    Wide low, high;
    codes += 32 * half;
    for (int g = 0; g < groups; g += 2, tables += 64, codes += 64) {
        if (g / 2 % 2 == half) fetch(codes);
        const __m256i code = load(codes), a = low_nibble(code), b = high_nibble(code);
        low.add(_mm256_add_epi8(_mm256_shuffle_epi8(load_table(tables), a),
                                _mm256_shuffle_epi8(load_table(tables + 32), b)));
        high.add(_mm256_add_epi8(_mm256_shuffle_epi8(load_table(tables + 16), a),
                                 _mm256_shuffle_epi8(load_table(tables + 48), b)));
    }
    flush<kTwoGrid.radix>(low, high, zero, step, sums + 32 * half);
}

template <int half>
[[gnu::noinline]] void add_pair(const uint8_t* codes, const uint8_t* tables, int groups, __m256i zero, __m256 step,
                                  float* sums) {
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i low[2] = {}, high[2] = {};
    codes += 64 * half;
    for (int g = 0; g < groups; g += 2, tables += 64, codes += 128) {
        const __m256i low0 = load_table(tables), high0 = load_table(tables + 16);
        const __m256i low1 = load_table(tables + 32), high1 = load_table(tables + 48);
        fetch(codes);
        for (int v = 0; v < 2; v++) {
            const __m256i code = load(codes + 32 * v), a = low_nibble(code), b = high_nibble(code);
            const __m256i l = _mm256_add_epi8(_mm256_shuffle_epi8(low0, a), _mm256_shuffle_epi8(low1, b));
            const __m256i h = _mm256_add_epi8(_mm256_shuffle_epi8(high0, a), _mm256_shuffle_epi8(high1, b));
            low[v] = _mm256_add_epi16(low[v], _mm256_maddubs_epi16(l, ones));
            high[v] = _mm256_add_epi16(high[v], _mm256_maddubs_epi16(h, ones));
        }
    }
    for (int v = 0; v < 2; v++) flush<kTwoGrid.radix>(low[v], high[v], zero, step, sums + 32 * half + 16 * v);
}

// The k-th half bytes of the j-th group of a unit, as indices.
template <Layout layout>
inline __m256i half_bytes(const uint8_t* unit, int k, int j) {
    const __m256i code = load(unit + half_byte_at(layout, k, j));
    return is_upper(layout, k, j) ? high_nibble(code) : low_nibble(code);
}

// 3:8 and 4:8.
template <Layout layout, int half>
[[gnu::noinline]] void add_signs(const uint8_t* codes, const uint8_t* tables, int groups, __m256i zero, __m256 step,
                                 float* sums) {
    constexpr Properties properties = of(layout);
    Wide low, high;
    for (int unit = 0; unit < groups; unit += 8, codes += properties.unit_bytes) {
        const uint8_t* mine = codes + 32 * half;
        // The uppermost bit of a byte decides.
        __m256i bits = layout == Layout::quad ? load(mine + bit_at(layout, 2)) : _mm256_setzero_si256();
        SUBBIT_UNROLLED
        for (int j = 0; j < 8; j++, tables += properties.table_bytes) {
            if (j % 2 == half) fetch_part<kLines<layout>>(codes, j);
            const __m256i index[3] = {half_bytes<layout>(mine, 0, j), half_bytes<layout>(mine, 1, j),
                                      half_bytes<layout>(mine, 2, j)};
            const auto sum = [&](int plane) {
                const auto entry = [&](int k, int table) {
                    return _mm256_shuffle_epi8(load_table(tables + table + plane), index[k]);
                };
                __m256i s = entry(2, 64);
                if (layout == Layout::quad) s = _mm256_blendv_epi8(s, entry(2, 96), bits);
                return _mm256_add_epi8(_mm256_add_epi8(entry(0, 0), entry(1, 32)), s);
            };
            low.add(sum(0));
            high.add(sum(16));
            bits = _mm256_add_epi8(bits, bits);
        }
    }
    flush<properties.grid.radix>(low, high, zero, step, sums + 32 * half);
}

// 1:16 to 3:16: look-ups of two groups are negated where their bits say so, and added.
template <Layout layout, int half>
[[gnu::noinline]] void add_wide(const uint8_t* codes, const uint8_t* tables, int groups, __m256i zero, __m256 step,
                                float* sums) {
    constexpr Properties properties = of(layout);
    const __m256i one = _mm256_set1_epi8(1);
    Wide low, high;
    for (int unit = 0; unit < groups; unit += 8, codes += properties.unit_bytes) {
        const uint8_t* mine = codes + 32 * half;
        __m256i bits[3] = {};  // the uppermost bit of a byte decides
        for (int k = 0; k < properties.entries; k++) bits[k] = load(mine + bit_at(layout, k));
        SUBBIT_UNROLLED
        for (int j = 0; j < 8; j += 2, tables += 2 * properties.table_bytes) {
            if (j / 2 % 2 == half) fetch_part<kLines<layout>>(codes, j), fetch_part<kLines<layout>>(codes, j + 1);
            for (int k = 0; k < properties.entries; k++) {
                const __m256i left = half_bytes<layout>(mine, k, j), right = half_bytes<layout>(mine, k, j + 1);
                const __m256i twice = _mm256_add_epi8(bits[k], bits[k]);
                // A sign must not be zero, which would make the entry zero.
                const __m256i first = _mm256_or_si256(bits[k], one), second = _mm256_or_si256(twice, one);
                const auto sum = [&](int plane) {
                    const __m256i a = _mm256_shuffle_epi8(load_table(tables + plane), left);
                    const __m256i b = _mm256_shuffle_epi8(load_table(tables + 32 + plane), right);
                    return _mm256_add_epi8(_mm256_sign_epi8(a, first), _mm256_sign_epi8(b, second));
                };
                low.add(sum(0));
                high.add(sum(16));
                bits[k] = _mm256_add_epi8(twice, twice);
            }
        }
    }
    flush<properties.grid.radix>(low, high, zero, step, sums + 32 * half);
}

template <Layout layout>
using Constant = std::integral_constant<Layout, layout>;

template <Layout layout, class Add>
void add_tiles(const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums, int tiles, Add add) {
    const __m256i zero = _mm256_set1_epi32(groups * of(layout).entries * of(layout).grid.zero);
    for (int tile = 0; tile < tiles; tile++, codes += bytes_of(layout, groups), sums += kTileRows) {
        add(codes, tables, groups, zero, _mm256_set1_ps(step), sums);
    }
}

void add_avx2(Layout layout, const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums,
              int tiles) {
    const auto add_all = [&](auto constant, auto add) {
        add_tiles<decltype(constant)::value>(codes, tables, groups, step, sums, tiles, add);
    };
    const auto add_all_signs = [&](auto constant) {
        using Which = decltype(constant);
        add_all(constant, [](auto... a) { add_signs<Which::value, 0>(a...), add_signs<Which::value, 1>(a...); });
    };
    const auto add_all_wide = [&](auto constant) {
        using Which = decltype(constant);
        add_all(constant, [](auto... a) { add_wide<Which::value, 0>(a...), add_wide<Which::value, 1>(a...); });
    };
    switch (layout) {
        case Layout::single:
            return add_all(Constant<Layout::single>(), [](auto... a) { add_single<0>(a...), add_single<1>(a...); });
        case Layout::pair:
            return add_all(Constant<Layout::pair>(), [](auto... a) { add_pair<0>(a...), add_pair<1>(a...); });
        case Layout::triple: return add_all_signs(Constant<Layout::triple>());
        case Layout::quad: return add_all_signs(Constant<Layout::quad>());
        case Layout::wide1: return add_all_wide(Constant<Layout::wide1>());
        case Layout::wide2: return add_all_wide(Constant<Layout::wide2>());
        default: return add_all_wide(Constant<Layout::wide3>());
    }
}

uint64_t read_avx2(const uint8_t* bytes, size_t count) {
    __m256i a = _mm256_setzero_si256(), b = a;
    for (size_t at = 0; at + 64 <= count; at += 64) {
        fetch(bytes + at);
        a = _mm256_xor_si256(a, load(bytes + at));
        b = _mm256_xor_si256(b, load(bytes + at + 32));
    }
    uint64_t words[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_xor_si256(a, b));
    return words[0] ^ words[1] ^ words[2] ^ words[3];
}

// ---- rows_uniform ----------------------------------------------------------------------------------------------------

// 16 codes as 16-bit numbers, in the order of their columns.
inline __m256i codes_of_8_bits(const uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i codes_of_4_bits(const uint8_t* p) {
    const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi32(15));
    return _mm256_or_si256(low, _mm256_slli_epi32(_mm256_andnot_si256(_mm256_set1_epi32(15), pairs), 12));
}

// For add_grouped_rows.
class RowSum {
   public:
    static constexpr int kColumns = 16;

    template <int bits>
    void add(const uint8_t* codes, const int16_t* x) {
        const __m256i code = bits == 8 ? codes_of_8_bits(codes) : codes_of_4_bits(codes);
        group_ = _mm256_add_epi32(group_, _mm256_madd_epi16(code, load(reinterpret_cast<const uint8_t*>(x))));
    }
    void close_group(float step) {
        whole_ = _mm256_fmadd_ps(_mm256_set1_ps(step), _mm256_cvtepi32_ps(group_), whole_);
        group_ = _mm256_setzero_si256();
    }
    float whole() const { return sum_of_lanes(whole_); }

   private:
    __m256i group_ = _mm256_setzero_si256();
    __m256 whole_ = _mm256_setzero_ps();
};

}  // namespace

void rows_avx2(const RowMatrix& matrix, const RowInputs& inputs, int first, int count, float* sums) {
    (is_whole<RowSum>(matrix) ? add_whole_rows<RowSum> : add_rows)(matrix, inputs, first, count, sums);
}

// ---- grouped_binary --------------------------------------------------------------------------------------------------

namespace {

// All ones in the lanes whose bit is set, of eight.
__m256i lanes_of(uint8_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane);
}

void levels_avx2(const LevelBits& bits, int columns, const float* levels, float* weights) {
    const __m256 ordinary = _mm256_loadu_ps(levels), salient = _mm256_loadu_ps(levels + 8);
    for (int i = 0; i < columns / 8; i++) {
        __m256i level = _mm256_and_si256(lanes_of(bits.positive[i]), _mm256_set1_epi32(1));
        level = _mm256_or_si256(level, _mm256_and_si256(lanes_of(bits.first[i]), _mm256_set1_epi32(2)));
        level = _mm256_or_si256(level, _mm256_and_si256(lanes_of(bits.second[i]), _mm256_set1_epi32(4)));
        const __m256 usual = _mm256_permutevar8x32_ps(ordinary, level), other = _mm256_permutevar8x32_ps(salient, level);
        const __m256 value = _mm256_blendv_ps(usual, other, _mm256_castsi256_ps(lanes_of(bits.salient[i])));
        _mm256_storeu_ps(weights + 8 * i, _mm256_and_ps(value, _mm256_castsi256_ps(lanes_of(bits.kept[i]))));
    }
}

}  // namespace

const Kernels avx2_kernels{"AVX2", Order::small, build_avx2, add_avx2, read_avx2, rows_avx2, levels_avx2};

}  // namespace subbit
