// AVX-512 without VBMI: one `pshufb` looks 64 rows up in a table of 16 bytes, as in avx2.cpp, which fills these tables.
//
// For 1:4 and N:16, tables have 64 or 32 entries of 16 bits, and one `vpermi2w` or `vpermw` looks 32 rows up. It ignores all
// but the lowest bits of a 16-bit number, whose two bytes are the indices of two rows.
#include "avx512.hpp"

namespace subbit {
namespace {

// ---- tables ----------------------------------------------------------------------------------------------------------

// Where entry e of a table of 64 is in four vectors of floats, so that packing them leaves 16-bit numbers in order.
constexpr int packed_at(int e) { return e / 32 * 32 + e % 8 / 4 * 16 + e % 32 / 8 * 4 + e % 4; }
constexpr Pairs kSixPairs = make_pairs(kSix, packed_at);

// Four columns and their signs are 64 entries.
float build_six(const float* x, int groups, uint8_t* tables) {
    const float largest = 2 * largest_of(x, 8 * groups), limit = kFoldedGrid.limit;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? limit / largest : 0);
    for (int g = 0; g < groups; g++, x += 8, tables += 128) {
        __m512 sums[4];
        add_pairs<Layout::six>(kSixPairs, x, inverse, sums);
        for (int i = 0; i < 2; i++) {
            const __m512i first = _mm512_cvtps_epi32(sums[2 * i]), second = _mm512_cvtps_epi32(sums[2 * i + 1]);
            const __m512i zero = _mm512_set1_epi16(kFoldedGrid.zero);
            _mm512_storeu_si512(tables + 64 * i, _mm512_add_epi16(_mm512_packs_epi32(first, second), zero));
        }
    }
    return largest / limit;
}

// x of 16 columns and -x are 32 entries.
float build_five(const float* x, int groups, uint8_t* tables) {
    const float largest = largest_of(x, 16 * groups), limit = kTwoGrid.limit;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? limit / largest : 0);
    for (int g = 0; g < groups; g++, x += 16, tables += 64) {
        const __m512i plus = to_grid(_mm512_loadu_ps(x), inverse, kTwoGrid.zero);
        store_256(tables, _mm512_cvtepi32_epi16(plus));
        store_256(tables + 32, _mm512_cvtepi32_epi16(_mm512_sub_epi32(_mm512_set1_epi32(2 * kTwoGrid.zero), plus)));
    }
    return largest / limit;
}

float build_avx512bw(Layout layout, const float* inputs, int groups, uint8_t* tables) {
    if (layout == Layout::six) return build_six(inputs, groups, tables);
    return is_five(layout) ? build_five(inputs, groups, tables) : avx2_kernels.build(layout, inputs, groups, tables);
}

// ---- sums ------------------------------------------------------------------------------------------------------------

// The sums of four entries of 32 rows, in 16 bits without a sign, gathered in 32 bits in the same way as Wide does.
static_assert(4 * (kTwoGrid.zero + kTwoGrid.limit) < 1 << 16 && 4 * (kFoldedGrid.zero + kFoldedGrid.limit) < 1 << 16);
struct Words {
    __m512i both = _mm512_setzero_si512(), upper = _mm512_setzero_si512();

    void add(__m512i words) {
        both = _mm512_add_epi32(both, words);
        upper = _mm512_add_epi32(upper, _mm512_srli_epi32(words, 16));
    }
    void put(__m512i zero, __m512 step, float* sums) const {
        const __m512i lower = _mm512_sub_epi32(both, _mm512_slli_epi32(upper, 16));
        put_sums<32>({_mm512_unpacklo_epi32(lower, upper), _mm512_unpackhi_epi32(lower, upper)}, zero, step, sums);
    }
};
struct Halves {
    Words even, odd;  // of the bytes

    template <int>
    void put(__m512i zero, __m512 step, float* sums) const {
        even.put(zero, step, sums);
        odd.put(zero, step, sums + 16);
    }
};

template <Layout layout>
inline __m512i look_up(const uint8_t* table, __m512i index) {
    if (is_five(layout)) return _mm512_permutexvar_epi16(index, load(table));
    return _mm512_permutex2var_epi16(load(table), index, load(table + 64));
}

// six and five.
template <Layout layout>
inline void add_words(const uint8_t* codes, const uint8_t* tables, int groups, Halves& sums) {
    constexpr int bytes = of(layout).unit_bytes / of(layout).entries, size = of(layout).table_bytes;
    for (int unit = 0; unit < groups; unit += 8, tables += 8 * size) {
        for (int k = 0; k < of(layout).entries; k++, codes += bytes) {
            __m512i index[8];
            (is_five(layout) ? load_fives : load_sixes)(codes, index);
            SUBBIT_UNROLLED
            for (int j = 0; j < 8; j += 4) {
                __m512i even = _mm512_setzero_si512(), odd = even;
                for (int i = j; i < j + 4; i++) {
                    fetch_part<bytes / 64>(codes, i);
                    const uint8_t* table = tables + size * i;
                    even = _mm512_add_epi16(even, look_up<layout>(table, index[i]));
                    odd = _mm512_add_epi16(odd, look_up<layout>(table, _mm512_srli_epi16(index[i], 8)));
                }
                sums.even.add(even);
                sums.odd.add(odd);
            }
        }
    }
}

// The two symbols of a row are neighbours, which are added while they are widened.
struct Neighbours {
    __m512i low[2] = {}, high[2] = {};

    template <int radix>
    void put(__m512i zero, __m512 step, float* sums) const {
        for (int i = 0; i < 2; i++) put_planes<radix, 16>(low[i], high[i], zero, step, sums + 32 * i);
    }
};

inline void add_pair(const uint8_t* codes, const uint8_t* tables, int groups, Neighbours& sums) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int g = 0; g < groups; g += 2, tables += 64, codes += 128) {
        for (int i = 0; i < 2; i++) {
            fetch(codes + 64 * i);
            const __m512i code = load(codes + 64 * i), a = low_nibble(code), b = high_nibble(code);
            const auto add = [&](__m512i& sum, int plane) {
                const __m512i bytes = _mm512_add_epi8(_mm512_shuffle_epi8(load_table(tables + plane), a),
                                                      _mm512_shuffle_epi8(load_table(tables + 32 + plane), b));
                sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(bytes, ones));
            };
            add(sums.low[i], 0);
            add(sums.high[i], 16);
        }
    }
}

// The k-th half bytes of the j-th group of a unit, as indices.
template <Layout layout>
inline __m512i half_bytes(const uint8_t* unit, int k, int j) {
    const __m512i code = load(unit + half_byte_at(layout, k, j));
    return is_upper(layout, k, j) ? high_nibble(code) : low_nibble(code);
}

// 3:8 and 4:8.
template <Layout layout>
inline void add_signs(const uint8_t* codes, const uint8_t* tables, int groups, Planes& sums) {
    for (int unit = 0; unit < groups; unit += 8, codes += of(layout).unit_bytes) {
        __m512i bits = layout == Layout::quad ? load(codes + bit_at(layout, 2)) : _mm512_setzero_si512();
        SUBBIT_UNROLLED
        for (int j = 0; j < 8; j++, tables += of(layout).table_bytes) {
            fetch_part<kLines<layout>>(codes, j);
            const __m512i index[3] = {half_bytes<layout>(codes, 0, j), half_bytes<layout>(codes, 1, j),
                                      half_bytes<layout>(codes, 2, j)};
            const __mmask64 negative = _mm512_movepi8_mask(bits);
            const auto sum = [&](int plane) {
                const auto table = [&](int k) { return load_table(tables + 32 * k + plane); };
                __m512i s = _mm512_shuffle_epi8(table(2), index[2]);
                if (layout == Layout::quad) s = _mm512_mask_shuffle_epi8(s, negative, table(3), index[2]);
                const __m512i t = _mm512_add_epi8(_mm512_shuffle_epi8(table(0), index[0]),
                                                  _mm512_shuffle_epi8(table(1), index[1]));
                return _mm512_add_epi8(t, s);
            };
            sums.low.add(sum(0));
            sums.high.add(sum(16));
            bits = _mm512_add_epi8(bits, bits);
        }
    }
}

void add_avx512bw(Layout layout, const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums,
                  int tiles) {
    const auto run = [&](auto add) { add(codes, tables, groups, step, sums, tiles); };
    switch (layout) {
        case Layout::single: return run(add_tiles<Layout::single, Planes, add_single>);
        case Layout::pair: return run(add_tiles<Layout::pair, Neighbours, add_pair>);
        case Layout::triple: return run(add_tiles<Layout::triple, Planes, add_signs<Layout::triple>>);
        case Layout::quad: return run(add_tiles<Layout::quad, Planes, add_signs<Layout::quad>>);
        case Layout::six: return run(add_tiles<Layout::six, Halves, add_words<Layout::six>>);
        case Layout::five1: return run(add_tiles<Layout::five1, Halves, add_words<Layout::five1>>);
        case Layout::five2: return run(add_tiles<Layout::five2, Halves, add_words<Layout::five2>>);
        default: return run(add_tiles<Layout::five3, Halves, add_words<Layout::five3>>);
    }
}

}  // namespace

const Kernels avx512bw_kernels{"AVX512BW", Order::mixed, build_avx512bw, add_avx512bw, read_avx512, rows_avx512,
                                levels_avx512};

}  // namespace subbit
