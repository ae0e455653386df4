// AVX-512 with VBMI: one `vpermb` looks 64 rows up in a table of 64 bytes.
//
// An entry of such a table is a vector of weights up to its sign (folded.hpp). The sign is a bit of a mask register, and
// negates both bytes of the entry on their own. As in avx2.cpp, bytes are added, then gathered in 16 bits: an accumulator
// takes the bytes of two rows as one number, another the upper one alone, and the lower one is their difference.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "fetch.hpp"
#include "folded.hpp"

namespace subbit {
namespace {

#ifdef __clang__
#define SUBBIT_UNROLLED _Pragma("clang loop unroll(full)")
#else
#define SUBBIT_UNROLLED _Pragma("GCC unroll 8")
#endif

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i load_table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m512i load_half(const uint8_t* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __mmask64 load_mask(const uint8_t* p) {
    uint64_t bits;
    std::memcpy(&bits, p, 8);
    return _cvtu64_mask64(bits);
}
inline __m512i low_nibble(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline __m512i high_nibble(__m512i x) { return low_nibble(_mm512_srli_epi16(x, 4)); }
// Bits of `x` where the mask has them, of `y` elsewhere.
inline __m512i select(int mask, __m512i x, __m512i y) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(mask)), x, y, 0xCA);
}

// ---- tables ----------------------------------------------------------------------------------------------------------

// Of 32 entries in 32 bits each, both bytes.
struct Bytes {
    __m256i low, high;

    template <int radix>
    static Bytes of(__m512i first, __m512i second) {
        // value / radix, exact below 2^14: the multiplier is 2^22 / radix, rounded up.
        const auto multiplier = static_cast<short>(((1 << 22) + radix - 1) / radix);
        const __m512i values = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)),
                                                  _mm512_cvtepi32_epi16(second), 1);
        const __m512i high = _mm512_srli_epi16(_mm512_mulhi_epu16(values, _mm512_set1_epi16(multiplier)), 6);
        const __m512i low = _mm512_sub_epi16(values, _mm512_mullo_epi16(high, _mm512_set1_epi16(radix)));
        return {_mm512_cvtepi16_epi8(low), _mm512_cvtepi16_epi8(high)};
    }
};

inline __m512i to_grid(__m512 x, __m512 inverse, int zero) {
    return _mm512_add_epi32(_mm512_set1_epi32(zero), _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
}
inline void store_256(uint8_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

// Where entry e of a table of 64 is in four vectors of floats, so that packing them leaves the bytes in order.
constexpr int packed_at(int e) { return e % 16 / 4 * 16 + e / 16 * 4 + e % 4; }

// Both planes of a table of 64 from its entries in this order, already in steps of the grid.
inline void put_table(const __m512 (&entries)[4], uint8_t* table) {
    constexpr auto radix = static_cast<short>(kFoldedGrid.radix), multiplier = static_cast<short>((1 << 22) / radix + 1);
    __m512i low[2], high[2];
    for (int i = 0; i < 2; i++) {
        const __m512i first = _mm512_cvtps_epi32(entries[2 * i]), second = _mm512_cvtps_epi32(entries[2 * i + 1]);
        const __m512i values = _mm512_add_epi16(_mm512_packs_epi32(first, second), _mm512_set1_epi16(kFoldedGrid.zero));
        high[i] = _mm512_srli_epi16(_mm512_mulhi_epu16(values, _mm512_set1_epi16(multiplier)), 6);
        low[i] = _mm512_sub_epi16(values, _mm512_mullo_epi16(high[i], _mm512_set1_epi16(radix)));
    }
    _mm512_storeu_si512(table, _mm512_packus_epi16(low[0], low[1]));
    _mm512_storeu_si512(table + 64, _mm512_packus_epi16(high[0], high[1]));
}

// Two columns and their signs, for every entry of six and seven.
struct Pairs {
    int columns[2][64];
    float signs[2][64];
};
constexpr Pairs make_pairs(const Entries<8>& entries) {
    Pairs pairs{};
    for (int e = 0; e < 64; e++) {
        int count = 0;
        for (int j = 0; j < 8; j++) {
            if (entries.weights[j][e] == 0) continue;
            pairs.columns[count][packed_at(e)] = j;
            pairs.signs[count++][packed_at(e)] = entries.weights[j][e];
        }
    }
    return pairs;
}
constexpr Pairs kSixPairs = make_pairs(kSix), kSevenPairs = make_pairs(kSeven);

constexpr Entries<4> pack_order(const Entries<4>& entries) {
    Entries<4> packed{};
    for (int j = 0; j < 4; j++) {
        for (int e = 0; e < 64; e++) packed.weights[j][packed_at(e)] = entries.weights[j][e];
    }
    return packed;
}
constexpr Entries<4> kPackedHalf = pack_order(kHalf);

template <Layout layout>
inline void put_pairs(const float* x, __m512 inverse, uint8_t* table) {
    constexpr const Pairs& pairs = layout == Layout::six ? kSixPairs : kSevenPairs;
    const __m512 scaled = _mm512_mul_ps(inverse, _mm512_broadcast_f32x8(_mm256_loadu_ps(x)));
    __m512 sums[4];
    for (int i = 0; i < 4; i++) {
        const __m512 left = _mm512_permutexvar_ps(load(pairs.columns[0] + 16 * i), scaled);
        const __m512 right = _mm512_permutexvar_ps(load(pairs.columns[1] + 16 * i), scaled);
        // Of seven, the left one is positive.
        sums[i] = layout == Layout::six ? _mm512_mul_ps(left, _mm512_loadu_ps(pairs.signs[0] + 16 * i)) : left;
        sums[i] = _mm512_fmadd_ps(right, _mm512_loadu_ps(pairs.signs[1] + 16 * i), sums[i]);
    }
    put_table(sums, table);
}

inline void put_half(const float* x, __m512 inverse, uint8_t* table) {
    __m512 sums[4] = {};
    for (int j = 0; j < 4; j++) {
        const __m512 a = _mm512_mul_ps(inverse, _mm512_set1_ps(x[j]));
        for (int i = 0; i < 4; i++) {
            sums[i] = _mm512_fmadd_ps(a, _mm512_loadu_ps(kPackedHalf.weights[j] + 16 * i), sums[i]);
        }
    }
    put_table(sums, table);
}

inline float largest_of(const float* x, int count) {
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    return _mm512_reduce_max_ps(most);
}

// The largest sum of the magnitudes of four columns.
inline float largest_half(const float* x, int count) {
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) {
        const __m512 a = _mm512_abs_ps(_mm512_loadu_ps(x + i));
        const __m512 pairs = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
        most = _mm512_max_ps(most, _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4E)));
    }
    return _mm512_reduce_max_ps(most);
}

// No entry is larger than `largest`.
template <Layout layout>
float build_folded(const float* x, int groups, uint8_t* tables) {
    constexpr bool halves = layout == Layout::halves3;
    const float largest = halves ? largest_half(x, 8 * groups) : 2 * largest_of(x, 8 * groups);
    const float limit = kFoldedGrid.limit;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? limit / largest : 0);
    for (int g = 0; g < groups; g++, x += 8, tables += of(layout).table_bytes) {
        if (halves) {
            put_half(x, inverse, tables);
            put_half(x + 4, inverse, tables + 128);
        } else {
            put_pairs<layout>(x, inverse, tables);
        }
    }
    return largest / limit;
}

// -x and x of two groups of 8 columns, a table each.
float build_single(const float* x, int groups, uint8_t* tables) {
    const float largest = largest_of(x, 8 * groups), limit = kTwoGrid.limit;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? limit / largest : 0);
    const __m512i zero = _mm512_set1_epi32(kTwoGrid.zero);
    for (int g = 0; g < groups; g += 2, x += 16, tables += 64) {
        const __m512i plus = to_grid(_mm512_loadu_ps(x), inverse, kTwoGrid.zero);
        const __m512i minus = _mm512_sub_epi32(_mm512_add_epi32(zero, zero), plus);
        const Bytes bytes = Bytes::of<kTwoGrid.radix>(_mm512_shuffle_i64x2(minus, plus, 0x44),
                                                      _mm512_shuffle_i64x2(minus, plus, 0xEE));
        store_256(tables, _mm256_permute2x128_si256(bytes.low, bytes.high, 0x20));
        store_256(tables + 32, _mm256_permute2x128_si256(bytes.low, bytes.high, 0x31));
    }
    return largest / limit;
}

// x of 16 columns and -x are a table.
float build_five(const float* x, int groups, uint8_t* tables) {
    const float largest = largest_of(x, 16 * groups), limit = kTwoGrid.limit;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? limit / largest : 0);
    const __m512i zero = _mm512_set1_epi32(kTwoGrid.zero);
    for (int g = 0; g < groups; g++, x += 16, tables += 64) {
        const __m512i plus = to_grid(_mm512_loadu_ps(x), inverse, kTwoGrid.zero);
        const Bytes bytes = Bytes::of<kTwoGrid.radix>(plus, _mm512_sub_epi32(_mm512_add_epi32(zero, zero), plus));
        store_256(tables, bytes.low);
        store_256(tables + 32, bytes.high);
    }
    return largest / limit;
}

float build_avx512(Layout layout, const float* inputs, int groups, uint8_t* tables) {
    switch (layout) {
        case Layout::single: return build_single(inputs, groups, tables);
        case Layout::five1:
        case Layout::five2:
        case Layout::five3: return build_five(inputs, groups, tables);
        case Layout::six: return build_folded<Layout::six>(inputs, groups, tables);
        case Layout::seven: return build_folded<Layout::seven>(inputs, groups, tables);
        default: return build_folded<Layout::halves3>(inputs, groups, tables);
    }
}

template <Layout layout>
constexpr int kLines = of(layout).unit_bytes / 64;

// ---- sums ------------------------------------------------------------------------------------------------------------

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
};

// sums of rows 0 to 15 and 32 to 47 += step * (low + radix * high - zero)
template <int radix>
inline void flush(__m512i low, __m512i high, __m512i zero, __m512 step, float* sums) {
    const __m512i factor = _mm512_set1_epi32(radix << 16 | 1);
    const __m512i halves[2] = {_mm512_unpacklo_epi16(low, high), _mm512_unpackhi_epi16(low, high)};
    for (int i = 0; i < 2; i++) {
        const __m512i whole = _mm512_sub_epi32(_mm512_madd_epi16(halves[i], factor), zero);
        const __m512 product = _mm512_mul_ps(step, _mm512_cvtepi32_ps(whole));
        float *first = sums + 8 * i, *second = first + 32;
        _mm256_storeu_ps(first, _mm256_add_ps(_mm256_loadu_ps(first), _mm512_castps512_ps256(product)));
        _mm256_storeu_ps(second, _mm256_add_ps(_mm256_loadu_ps(second), _mm512_extractf32x8_ps(product, 1)));
    }
}

// An entry, or its negative where the mask has a bit.
inline __m512i look_up(__m512i index, const uint8_t* table, __mmask64 negative) {
    const __m512i entry = _mm512_permutexvar_epi8(index, load(table));
    return _mm512_mask_sub_epi8(entry, negative, _mm512_set1_epi8(kFoldedGrid.radix), entry);
}

template <Layout layout>
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

// six and seven: a vector of codes a group, whose two upper bits together are those of two more groups.
template <Layout layout>
inline void add_folded(const uint8_t* codes, const uint8_t* tables, int groups, Planes& sums) {
    for (int unit = 0; unit < groups; unit += 8, codes += of(layout).unit_bytes, tables += 8 * 128) {
        __m512i index[8];
        for (int j = 0; j < 6; j++) index[j] = load(codes + 64 * j);
        for (int j = 0; j < 2; j++) {
            const __m512i* from = index + 3 * j;
            const __m512i two = _mm512_srli_epi16(from[0], 6), four = _mm512_srli_epi16(from[1], 4);
            index[6 + j] = select(15, select(3, two, four), _mm512_srli_epi16(from[2], 2));
        }
        SUBBIT_UNROLLED
        for (int j = 0; j < 8; j += 2) {
            fetch_part<kLines<layout>>(codes, j), fetch_part<kLines<layout>>(codes, j + 1);
            const auto sum = [&](int plane) {
                __m512i entries[2];
                for (int k = 0; k < 2; k++) {
                    const uint8_t* table = tables + 128 * (j + k) + plane;
                    entries[k] = layout == Layout::six
                                     ? _mm512_permutexvar_epi8(index[j + k], load(table))
                                     : look_up(index[j + k], table, load_mask(codes + 384 + 8 * (j + k)));
                }
                return _mm512_add_epi8(entries[0], entries[1]);
            };
            sums.low.add(sum(0));
            sums.high.add(sum(64));
        }
    }
}

template <Layout layout>
inline void add_halves(const uint8_t* codes, const uint8_t* tables, int groups, Planes& sums) {
    constexpr const Classes& classes = kClasses<layout == Layout::halves3 ? 3 : 4>;
    const __m512i left_blocks = load(classes.left), right_blocks = load(classes.right);
    for (int unit = 0; unit < groups; unit += 8, codes += of(layout).unit_bytes) {
        __m512i rest[2] = {load(codes + 512), load(codes + 576)};
        SUBBIT_UNROLLED
        for (int j = 0; j < 8; j++, tables += 256) {
            fetch_part<kLines<layout>>(codes, j);
            const __m512i code = load(codes + 64 * j);
            const __m512i left = select(3, _mm512_srli_epi16(code, 5), _mm512_permutexvar_epi8(code, left_blocks));
            const __m512i right = select(3, rest[j / 4], _mm512_permutexvar_epi8(code, right_blocks));
            rest[j / 4] = _mm512_srli_epi16(rest[j / 4], 2);
            const __mmask64 minus_left = _mm512_movepi8_mask(code), minus_right = load_mask(codes + 640 + 8 * j);
            const auto sum = [&](int plane) {
                return _mm512_add_epi8(look_up(left, tables + plane, minus_left),
                                       look_up(right, tables + 128 + plane, minus_right));
            };
            sums.low.add(sum(0));
            sums.high.add(sum(64));
        }
    }
}

// A look-up ignores all but six bits of an index, and a table of 32 entries lies in both halves of a vector.
template <Layout layout>
inline void add_five(const uint8_t* codes, const uint8_t* tables, int groups, Planes& sums) {
    for (int unit = 0; unit < groups; unit += 8, tables += 8 * of(layout).table_bytes) {
        for (int k = 0; k < of(layout).entries; k++, codes += kFiveBytes) {
            __m512i index[8];
            for (int j = 0; j < 5; j++) index[j] = load(codes + 64 * j);
            const __m512i one = index[1], three = index[3];
            index[5] = select(7, _mm512_srli_epi16(index[0], 5), _mm512_srli_epi16(one, 2));
            index[6] = select(7, _mm512_srli_epi16(index[2], 5), _mm512_srli_epi16(three, 2));
            index[7] = select(8, _mm512_srli_epi16(one, 4), _mm512_srli_epi16(three, 3));
            index[7] = select(7, _mm512_srli_epi16(index[4], 5), index[7]);
            SUBBIT_UNROLLED
            for (int j = 0; j < 8; j += 2) {
                fetch_part<kFiveBytes / 64>(codes, j), fetch_part<kFiveBytes / 64>(codes, j + 1);
                const auto sum = [&](int plane) {
                    const uint8_t* table = tables + 64 * j + plane;
                    return _mm512_add_epi8(_mm512_permutexvar_epi8(index[j], load_half(table)),
                                           _mm512_permutexvar_epi8(index[j + 1], load_half(table + 64)));
                };
                sums.low.add(sum(0));
                sums.high.add(sum(32));
            }
        }
    }
}

template <Layout layout, class Add>
void add_tiles(const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums, int tiles, Add add) {
    constexpr Properties properties = of(layout);
    const __m512i zero = _mm512_set1_epi32(groups * properties.entries * properties.grid.zero);
    const __m512 steps = _mm512_set1_ps(step);
    for (int tile = 0; tile < tiles; tile++, codes += bytes_of(layout, groups), sums += kTileRows) {
        Planes planes;
        add(codes, tables, groups, planes);
        flush<properties.grid.radix>(planes.low.lower(), planes.high.lower(), zero, steps, sums);
        flush<properties.grid.radix>(planes.low.upper, planes.high.upper, zero, steps, sums + 16);
    }
}

template <Layout layout>
using Constant = std::integral_constant<Layout, layout>;

void add_avx512(Layout layout, const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums,
                int tiles) {
    const auto add_all = [&](auto constant, auto add) {
        add_tiles<decltype(constant)::value>(codes, tables, groups, step, sums, tiles, add);
    };
    switch (layout) {
        case Layout::single: return add_all(Constant<Layout::single>(), add_single<Layout::single>);
        case Layout::five1: return add_all(Constant<Layout::five1>(), add_five<Layout::five1>);
        case Layout::five2: return add_all(Constant<Layout::five2>(), add_five<Layout::five2>);
        case Layout::five3: return add_all(Constant<Layout::five3>(), add_five<Layout::five3>);
        case Layout::six: return add_all(Constant<Layout::six>(), add_folded<Layout::six>);
        case Layout::seven: return add_all(Constant<Layout::seven>(), add_folded<Layout::seven>);
        case Layout::halves3: return add_all(Constant<Layout::halves3>(), add_halves<Layout::halves3>);
        default: return add_all(Constant<Layout::halves4>(), add_halves<Layout::halves4>);
    }
}

uint64_t read_avx512(const uint8_t* bytes, size_t count) {
    __m512i all = _mm512_setzero_si512();
    for (size_t at = 0; at + 64 <= count; at += 64) {
        fetch(bytes + at);
        all = _mm512_xor_si512(all, load(bytes + at));
    }
    return static_cast<uint64_t>(_mm512_reduce_or_epi64(all));
}

}  // namespace

const Kernels avx512_kernels{"AVX512VBMI", true, build_avx512, add_avx512, read_avx512, rows_avx2};

}  // namespace subbit
