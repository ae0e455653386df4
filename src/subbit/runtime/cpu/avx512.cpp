// AVX-512 with VBMI: one `vpermb` looks 64 rows up in a table of 64 bytes.
//
// An entry of such a table is a vector of weights up to its sign (folded.hpp). The sign is a bit of a mask register, and
// negates both bytes of the entry on their own.
#include "vbmi.hpp"

namespace subbit {
namespace {

inline __m512i load_half(const uint8_t* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// ---- tables ----------------------------------------------------------------------------------------------------------

// Of 32 entries in 32 bits each, both bytes.
struct Bytes {
    __m256i low, high;

    template <int radix>
    static Bytes of(__m512i first, __m512i second) {
        // value / radix, exact below 2^15 - 256: the multiplier is 2^22 / radix, rounded up.
        const auto multiplier = static_cast<short>(((1 << 22) + radix - 1) / radix);
        const __m512i values = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)),
                                                  _mm512_cvtepi32_epi16(second), 1);
        const __m512i high = _mm512_srli_epi16(_mm512_mulhi_epu16(values, _mm512_set1_epi16(multiplier)), 6);
        const __m512i low = _mm512_sub_epi16(values, _mm512_mullo_epi16(high, _mm512_set1_epi16(radix)));
        return {_mm512_cvtepi16_epi8(low), _mm512_cvtepi16_epi8(high)};
    }
};

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

constexpr Pairs kSixPairs = make_pairs(kSix, packed_at), kSevenPairs = make_pairs(kSeven, packed_at);

template <Layout layout>
inline void put_pairs(const float* x, __m512 inverse, uint8_t* table) {
    __m512 sums[4];
    add_pairs<layout>(layout == Layout::six ? kSixPairs : kSevenPairs, x, inverse, sums);
    put_table(sums, table);
}

constexpr Entries pack_order(const Entries& entries) {
    Entries packed{};
    for (int j = 0; j < 8; j++) {
        for (int e = 0; e < 64; e++) packed.weights[j][packed_at(e)] = entries.weights[j][e];
    }
    return packed;
}
template <Layout layout, int which>
constexpr Entries kPackedTerms = pack_order(kTermTables<layout>.of[which]);

// Whether any of 16 entries has a weight in column j.
constexpr bool has_column(const Entries& packed, int j, int i) {
    bool any = false;
    for (int e = 16 * i; e < 16 * (i + 1); e++) any |= packed.weights[j][e] != 0;
    return any;
}

// A table from the columns of a group in steps of the grid; most entries have those of one half.
template <Layout layout, int which>
inline void put_terms(const __m512 (&columns)[8], uint8_t* table) {
    constexpr const Entries& packed = kPackedTerms<layout, which>;
    __m512 sums[4] = {};
    SUBBIT_UNROLLED
    for (int j = 0; j < 8; j++) {
        SUBBIT_UNROLLED
        for (int i = 0; i < 4; i++) {
            if (!has_column(packed, j, i)) continue;
            sums[i] = _mm512_fmadd_ps(columns[j], _mm512_loadu_ps(packed.weights[j] + 16 * i), sums[i]);
        }
    }
    put_table(sums, table);
}

// The largest sum of the magnitudes of four columns.
inline float largest_half(const float* x, int count) {
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 16) {
        const __m512 a = _mm512_abs_ps(_mm512_loadu_ps(x + i));
        const __m512 pairs = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
        most = larger_of(most, _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4E)));
    }
    return largest_lane(most);
}

// No entry is larger than `largest`.
template <Layout layout>
float build_folded(const float* x, int groups, uint8_t* tables) {
    const float largest = is_terms(layout) ? largest_half(x, 8 * groups) : 2 * largest_of(x, 8 * groups);
    const float limit = kFoldedGrid.limit;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? limit / largest : 0);
    for (int g = 0; g < groups; g++, x += 8, tables += of(layout).table_bytes) {
        if constexpr (is_terms(layout)) {
            __m512 columns[8];
            for (int j = 0; j < 8; j++) columns[j] = _mm512_mul_ps(inverse, _mm512_set1_ps(x[j]));
            put_terms<layout, 0>(columns, tables);
            (g % 2 ? put_terms<layout, 2> : put_terms<layout, 1>)(columns, tables + 128);
        } else {
            put_pairs<layout>(x, inverse, tables);
        }
    }
    return largest / limit;
}

// -x and x of 8 columns, for four groups a table.
float build_four(const float* x, int groups, uint8_t* tables) {
    const float largest = largest_of(x, 8 * groups), limit = kFourGrid.limit;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? limit / largest : 0);
    const __m512i zero = _mm512_set1_epi32(kFourGrid.zero);
    for (int g = 0; g < groups; g += 4, tables += 128) {
        for (int half = 0; half < 2; half++, x += 16) {
            const __m512i plus = to_grid(_mm512_loadu_ps(x), inverse, kFourGrid.zero);
            const __m512i minus = _mm512_sub_epi32(_mm512_add_epi32(zero, zero), plus);
            const Bytes bytes = Bytes::of<kFourGrid.radix>(_mm512_shuffle_i64x2(minus, plus, 0x44),
                                                           _mm512_shuffle_i64x2(minus, plus, 0xEE));
            store_256(tables + 32 * half, bytes.low);
            store_256(tables + 64 + 32 * half, bytes.high);
        }
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
        case Layout::four: return build_four(inputs, groups, tables);
        case Layout::five1:
        case Layout::five2:
        case Layout::five3: return build_five(inputs, groups, tables);
        case Layout::six: return build_folded<Layout::six>(inputs, groups, tables);
        case Layout::seven: return build_folded<Layout::seven>(inputs, groups, tables);
        case Layout::terms3: return build_folded<Layout::terms3>(inputs, groups, tables);
        default: return build_folded<Layout::terms4>(inputs, groups, tables);
    }
}

// The bytes of a row for four groups are looked up together, and added to the sum of the row by one instruction, which
// multiplies those of the upper plane by the radix.
void add_four(const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums, int tiles) {
    const __m512i low = _mm512_set1_epi8(1), high = _mm512_set1_epi8(kFourGrid.radix);
    for (int tile = 0; tile < tiles; tile++, sums += kTileRows) {
        __m512i whole[4];
        for (__m512i& sum : whole) sum = _mm512_set1_epi32(-groups * kFourGrid.zero);
        const uint8_t* table = tables;
        for (int unit = 0; unit < groups; unit += 8, codes += of(Layout::four).unit_bytes, table += 256) {
            const __m512i planes[4] = {load(table), load(table + 64), load(table + 128), load(table + 192)};
            SUBBIT_UNROLLED
            for (int i = 0; i < 4; i++) {
                fetch(codes + 64 * i);
                const __m512i code = load(codes + 64 * i);
                const __m512i first = place_four(code), second = place_four(_mm512_srli_epi16(code, 4));
                whole[i] = _mm512_dpbusd_epi32(whole[i], _mm512_permutexvar_epi8(first, planes[0]), low);
                whole[i] = _mm512_dpbusd_epi32(whole[i], _mm512_permutexvar_epi8(first, planes[1]), high);
                whole[i] = _mm512_dpbusd_epi32(whole[i], _mm512_permutexvar_epi8(second, planes[2]), low);
                whole[i] = _mm512_dpbusd_epi32(whole[i], _mm512_permutexvar_epi8(second, planes[3]), high);
            }
        }
        for (int i = 0; i < 4; i++) {
            const __m512 sum = _mm512_loadu_ps(sums + 16 * i), more = _mm512_cvtepi32_ps(whole[i]);
            _mm512_storeu_ps(sums + 16 * i, _mm512_fmadd_ps(_mm512_set1_ps(step), more, sum));
        }
    }
}

// Bytes of a sum of some entries, or of its negative where the mask has a bit.
template <int entries>
inline __m512i negated(__m512i bytes, __mmask64 where) {
    return _mm512_mask_sub_epi8(bytes, where, _mm512_set1_epi8(static_cast<char>(entries * kFoldedGrid.radix)), bytes);
}

template <Layout layout>
inline void add_folded(const uint8_t* codes, const uint8_t* tables, int groups, Planes& sums) {
    for (int unit = 0; unit < groups; unit += 8, codes += of(layout).unit_bytes, tables += 8 * 128) {
        __m512i index[8];
        load_sixes(codes, index);
        SUBBIT_UNROLLED
        for (int j = 0; j < 8; j += 2) {
            fetch_part<kLines<layout>>(codes, j), fetch_part<kLines<layout>>(codes, j + 1);
            const auto sum = [&](int plane) {
                __m512i entries[2];
                for (int k = 0; k < 2; k++) {
                    const uint8_t* table = tables + 128 * (j + k) + plane;
                    entries[k] = _mm512_permutexvar_epi8(index[j + k], load(table));
                    if (layout == Layout::six) continue;
                    entries[k] = negated<1>(entries[k], load_mask(codes + 384 + 8 * (j + k)));
                }
                return _mm512_add_epi8(entries[0], entries[1]);
            };
            sums.low.add(sum(0));
            sums.high.add(sum(64));
        }
    }
}

template <Layout layout>
inline void add_terms(const uint8_t* codes, const uint8_t* tables, int groups, Planes& sums) {
    for (int unit = 0; unit < groups; unit += 8, codes += of(layout).unit_bytes) {
        TermIndices<layout> indices(codes);
        SUBBIT_UNROLLED
        for (int j = 0; j < 8; j++, tables += 256) {
            fetch_part<kLines<layout>>(codes, j);
            const Indices index = indices.of_group(j);
            const auto sum = [&](int plane) {
                const __m512i left = _mm512_permutexvar_epi8(index.left, load(tables + plane));
                const __m512i right = _mm512_permutexvar_epi8(index.right, load(tables + 128 + plane));
                return negated<2>(_mm512_add_epi8(left, right), index.negative);
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
            load_fives(codes, index);
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

void add_avx512(Layout layout, const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums,
                int tiles) {
    const auto run = [&](auto add) { add(codes, tables, groups, step, sums, tiles); };
    switch (layout) {
        case Layout::four: return run(add_four);
        case Layout::five1: return run(add_tiles<Layout::five1, Planes, add_five<Layout::five1>>);
        case Layout::five2: return run(add_tiles<Layout::five2, Planes, add_five<Layout::five2>>);
        case Layout::five3: return run(add_tiles<Layout::five3, Planes, add_five<Layout::five3>>);
        case Layout::six: return run(add_tiles<Layout::six, Planes, add_folded<Layout::six>>);
        case Layout::seven: return run(add_tiles<Layout::seven, Planes, add_folded<Layout::seven>>);
        case Layout::terms3: return run(add_tiles<Layout::terms3, Planes, add_terms<Layout::terms3>>);
        default: return run(add_tiles<Layout::terms4, Planes, add_terms<Layout::terms4>>);
    }
}

}  // namespace

const Kernels avx512_kernels{"AVX512VBMI", Order::large, build_avx512, add_avx512, read_avx512, rows_avx512,
                              levels_avx512};

}  // namespace subbit
