// NEON, which every 64-bit ARM processor has: one `tbl` looks 16 rows up in a table of 16, 32 or 64 bytes.
//
// As in avx2.cpp, bytes are added, then gathered in 16 bits: an accumulator takes the bytes of two rows as one number,
// another the upper one alone, and the lower one is their difference. Of a tile, 32 bytes are taken at a time: sums of more
// and the tables of a group do not fit the registers.
#include <arm_neon.h>

#include <algorithm>

#include "tables.hpp"

namespace subbit {
namespace {

// ---- tables ----------------------------------------------------------------------------------------------------------

inline float largest_of(const float* x, int count) {
    float32x4_t most = vdupq_n_f32(0);
    for (int i = 0; i < count; i += 4) most = vmaxq_f32(most, vabsq_f32(vld1q_f32(x + i)));
    return vmaxvq_f32(most);
}

// 16 entries, as bytes of two planes that are `apart`.
template <int radix, int apart>
inline void put(uint8_t* table, const int32x4_t (&entries)[4]) {
    const auto multiplier = static_cast<int16_t>(((1 << 21) + radix - 1) / radix);
    uint8x8_t low[2], high[2];
    for (int i = 0; i < 2; i++) {
        const int16x8_t values = vcombine_s16(vmovn_s32(entries[2 * i]), vmovn_s32(entries[2 * i + 1]));
        // value / radix, exact below 2^14: the multiplier is 2^21 / radix, rounded up; multiplying doubles.
        const int16x8_t upper = vshrq_n_s16(vqdmulhq_n_s16(values, multiplier), 6);
        low[i] = vqmovun_s16(vmlsq_n_s16(values, upper, radix));
        high[i] = vqmovun_s16(upper);
    }
    vst1q_u8(table, vcombine_u8(low[0], low[1]));
    vst1q_u8(table + apart, vcombine_u8(high[0], high[1]));
}

inline int32x4_t to_grid(float32x4_t x, int zero) { return vaddq_s32(vdupq_n_s32(zero), vcvtnq_s32_f32(x)); }

// -x and x of eight columns; for five, x and -x of sixteen.
template <bool five>
float build_symbols(const float* x, int groups, uint8_t* tables) {
    constexpr int columns = five ? 16 : 8, radix = kTwoGrid.radix;
    const float largest = largest_of(x, columns * groups), limit = kTwoGrid.limit;
    const float inverse = largest > 0 ? limit / largest : 0;
    for (int g = 0; g < groups; g++, x += columns, tables += 4 * columns) {
        int32x4_t plus[4], minus[4];
        for (int i = 0; i < columns / 4; i++) {
            plus[i] = to_grid(vmulq_n_f32(vld1q_f32(x + 4 * i), inverse), kTwoGrid.zero);
            minus[i] = vsubq_s32(vdupq_n_s32(2 * kTwoGrid.zero), plus[i]);
        }
        if (five) {
            put<radix, 32>(tables, plus);
            put<radix, 32>(tables + 16, minus);
        } else {
            put<radix, 16>(tables, {minus[0], minus[1], plus[0], plus[1]});
        }
    }
    return largest / limit;
}

// One of -x and x of four columns, and of the next four: 64 entries.
float build_six(const float* x, int groups, uint8_t* tables) {
    const float largest = 2 * largest_of(x, 8 * groups), limit = kFoldedGrid.limit;
    const float inverse = largest > 0 ? limit / largest : 0;
    for (int g = 0; g < groups; g++, x += 8, tables += 128) {
        const float32x4_t left = vmulq_n_f32(vld1q_f32(x), inverse), right = vmulq_n_f32(vld1q_f32(x + 4), inverse);
        float rights[8];
        vst1q_f32(rights, vnegq_f32(right));
        vst1q_f32(rights + 4, right);
        for (int i = 0; i < 8; i += 2) {
            const float32x4_t first = vdupq_n_f32(rights[i]), second = vdupq_n_f32(rights[i + 1]);
            put<kFoldedGrid.radix, 64>(tables + 8 * i, {to_grid(vsubq_f32(first, left), kFoldedGrid.zero),
                                                        to_grid(vaddq_f32(first, left), kFoldedGrid.zero),
                                                        to_grid(vsubq_f32(second, left), kFoldedGrid.zero),
                                                        to_grid(vaddq_f32(second, left), kFoldedGrid.zero)});
        }
    }
    return largest / limit;
}

// The 16 sums of `columns` inputs with the signs that the factors say, as entries.
template <int columns>
inline void put_signs(const float* x, float inverse, const float (*factors)[16], uint8_t* table) {
    int32x4_t entries[4];
    for (int i = 0; i < 4; i++) {
        float32x4_t sum = vdupq_n_f32(0);
        for (int j = 0; j < columns; j++) sum = vfmaq_n_f32(sum, vld1q_f32(factors[j] + 4 * i), x[j]);
        entries[i] = to_grid(vmulq_n_f32(sum, inverse), kThreeGrid.zero);
    }
    put<kThreeGrid.radix, 16>(table, entries);
}

// Four tables a group: t in columns 0-3, t in columns 4-7, s, and s negated.
float build_signs(const float* x, int groups, uint8_t* tables) {
    float most = 0;
    for (int g = 0; g < groups; g++) {
        const float32x4_t first = vabsq_f32(vld1q_f32(x + 8 * g)), second = vabsq_f32(vld1q_f32(x + 8 * g + 4));
        const float whole = vaddvq_f32(vaddq_f32(first, second));
        most = whole > most ? whole : most;
    }
    const float largest = 0.5F * most, limit = kThreeGrid.limit;  // no sum of a table is larger
    const float inverse = largest > 0 ? limit / largest : 0;
    for (int g = 0; g < groups; g++, x += 8, tables += 128) {
        put_signs<4>(x, inverse, kFactors.half, tables);
        put_signs<4>(x + 4, inverse, kFactors.half, tables + 32);
        put_signs<8>(x, inverse, kFactors.hadamard, tables + 64);
        put_signs<8>(x, -inverse, kFactors.hadamard, tables + 96);
    }
    return largest / limit;
}

float build_neon(Layout layout, const float* inputs, int groups, uint8_t* tables) {
    if (layout == Layout::six) return build_six(inputs, groups, tables);
    if (is_five(layout)) return build_symbols<true>(inputs, groups, tables);
    return (has_symbols(layout) ? build_symbols<false> : build_signs)(inputs, groups, tables);
}

// ---- sums ------------------------------------------------------------------------------------------------------------

// sums[0..3] and sums[8..11] += step * (low + radix * high - zero)
template <int radix>
inline void put_planes(uint16x8_t low, uint16x8_t high, int zero, float step, float* sums) {
    const uint32x4_t wholes[2] = {vmlal_n_u16(vmovl_u16(vget_low_u16(low)), vget_low_u16(high), radix),
                                  vmlal_n_u16(vmovl_high_u16(low), vget_high_u16(high), radix)};
    for (int i = 0; i < 2; i++) {
        const int32x4_t whole = vsubq_s32(vreinterpretq_s32_u32(wholes[i]), vdupq_n_s32(zero));
        float* out = sums + 8 * i;
        vst1q_f32(out, vfmaq_n_f32(vld1q_f32(out), vcvtq_f32_s32(whole), step));
    }
}

// The sums of 16 rows in bytes, gathered in 16 bits.
struct Wide {
    uint16x8_t both = vdupq_n_u16(0), upper = vdupq_n_u16(0);

    void add(uint8x16_t bytes) {
        both = vaddq_u16(both, vreinterpretq_u16_u8(bytes));
        upper = vsraq_n_u16(upper, vreinterpretq_u16_u8(bytes), 8);
    }
    uint16x8_t lower() const { return vsubq_u16(both, vshlq_n_u16(upper, 8)); }
};
struct Planes {
    static constexpr int rows = 32;  // of 32 bytes
    Wide low, high;

    template <int radix>
    void put(int zero, float step, float* sums) const {
        put_planes<radix>(low.lower(), high.lower(), zero, step, sums);
        put_planes<radix>(low.upper, high.upper, zero, step, sums + 16);
    }
};

// The two symbols of a row are neighbours, which are added while they are widened.
struct Neighbours {
    static constexpr int rows = 16;
    uint16x8_t low = vdupq_n_u16(0), high = vdupq_n_u16(0);

    template <int radix>
    void put(int zero, float step, float* sums) const {
        put_planes<radix>(low, high, zero, step, sums);
    }
};

inline uint8x16_t low_nibble(uint8x16_t x) { return vandq_u8(x, vdupq_n_u8(15)); }

// single and pair: half a byte of two groups each.
template <class Sums, class Add>
inline void add_symbols(const uint8_t* codes, const uint8_t* tables, int groups, int stride, Sums (&sums)[2], Add add) {
    for (int g = 0; g < groups; g += 2, tables += 64, codes += stride) {
        const uint8x16x4_t table = vld1q_u8_x4(tables);
        for (int v = 0; v < 2; v++) {
            const uint8x16_t code = vld1q_u8(codes + 16 * v), a = low_nibble(code), b = vshrq_n_u8(code, 4);
            add(sums[v], vaddq_u8(vqtbl1q_u8(table.val[0], a), vqtbl1q_u8(table.val[2], b)),
                vaddq_u8(vqtbl1q_u8(table.val[1], a), vqtbl1q_u8(table.val[3], b)));
        }
    }
}
inline void add_single(const uint8_t* codes, const uint8_t* tables, int groups, Planes (&sums)[2]) {
    add_symbols(codes, tables, groups, 64, sums, [](Planes& sum, uint8x16_t low, uint8x16_t high) {
        sum.low.add(low);
        sum.high.add(high);
    });
}
inline void add_pair(const uint8_t* codes, const uint8_t* tables, int groups, Neighbours (&sums)[2]) {
    add_symbols(codes, tables, groups, 128, sums, [](Neighbours& sum, uint8x16_t low, uint8x16_t high) {
        sum.low = vpadalq_u8(sum.low, low);
        sum.high = vpadalq_u8(sum.high, high);
    });
}

// The k-th half bytes of the j-th group of a unit, as indices.
template <Layout layout>
inline uint8x16_t half_bytes(const uint8_t* unit, int k, int j) {
    const uint8x16_t code = vld1q_u8(unit + half_byte_at(layout, k, j));
    return is_upper(layout, k, j) ? vshrq_n_u8(code, 4) : low_nibble(code);
}

// 3:8 and 4:8. s and its negative are one table of 32 entries.
template <Layout layout>
inline void add_signs(const uint8_t* codes, const uint8_t* tables, int groups, Planes (&sums)[2]) {
    constexpr bool quad = layout == Layout::quad;
    constexpr int size = of(layout).table_bytes;
    for (int unit = 0; unit < groups; unit += 8, codes += of(layout).unit_bytes, tables += 8 * size) {
        for (int v = 0; v < 2; v++) {
            const uint8_t* mine = codes + 16 * v;
            SUBBIT_UNROLLED
            for (int j = 0; j < 8; j++) {
                const uint8x16_t left = half_bytes<layout>(mine, 0, j), right = half_bytes<layout>(mine, 1, j);
                uint8x16_t whole = half_bytes<layout>(mine, 2, j);
                if (quad) {
                    const uint8x16_t bits = vld1q_u8(mine + bit_at(layout, 2));
                    whole = vbslq_u8(vdupq_n_u8(16), vshlq_u8(bits, vdupq_n_s8(static_cast<int8_t>(j - 3))), whole);
                }
                const auto sum = [&](int plane) {
                    const auto table = [&](int k) { return vld1q_u8(tables + size * j + 32 * k + plane); };
                    const uint8x16_t s = quad ? vqtbl2q_u8({{table(2), table(3)}}, whole) : vqtbl1q_u8(table(2), whole);
                    return vaddq_u8(vaddq_u8(vqtbl1q_u8(table(0), left), vqtbl1q_u8(table(1), right)), s);
                };
                sums[v].low.add(sum(0));
                sums[v].high.add(sum(16));
            }
        }
    }
}

// The upper bits of `x`, and those of `y` shifted into the lower three.
inline uint8x16_t join(uint8x16_t x, uint8x16_t y) { return vsriq_n_u8(x, y, 5); }

// five: of eight groups. An index that is not in the table gives zero, so other bits are taken off.
inline void load_fives(const uint8_t* codes, uint8x16_t (&index)[8]) {
    for (int j = 0; j < 5; j++) index[j] = vld1q_u8(codes + 64 * j);
    const uint8x16_t one = index[1], three = index[3];
    index[5] = join(vshrq_n_u8(one, 2), index[0]);
    index[6] = join(vshrq_n_u8(three, 2), index[2]);
    index[7] = join(vsriq_n_u8(vshrq_n_u8(three, 3), one, 4), index[4]);
    for (uint8x16_t& i : index) i = vandq_u8(i, vdupq_n_u8(31));
}

// six: the two upper bits of three vectors are a vector more.
inline void load_sixes(const uint8_t* codes, uint8x16_t (&index)[8]) {
    for (int j = 0; j < 6; j++) index[j] = vld1q_u8(codes + 64 * j);
    for (int j = 0; j < 2; j++) {
        const uint8x16_t* from = index + 3 * j;
        index[6 + j] = vsriq_n_u8(vsriq_n_u8(vshrq_n_u8(from[2], 2), from[1], 4), from[0], 6);
    }
    for (uint8x16_t& i : index) i = vandq_u8(i, vdupq_n_u8(63));
}

template <Layout layout>
inline uint8x16_t look_up(const uint8_t* table, uint8x16_t index) {
    return is_five(layout) ? vqtbl2q_u8(vld1q_u8_x2(table), index) : vqtbl4q_u8(vld1q_u8_x4(table), index);
}

// six and five.
template <Layout layout>
inline void add_large(const uint8_t* codes, const uint8_t* tables, int groups, Planes (&sums)[2]) {
    constexpr int bytes = of(layout).unit_bytes / of(layout).entries, size = of(layout).table_bytes;
    for (int unit = 0; unit < groups; unit += 8, tables += 8 * size) {
        for (int k = 0; k < of(layout).entries; k++, codes += bytes) {
            for (int v = 0; v < 2; v++) {
                uint8x16_t index[8];
                (is_five(layout) ? load_fives : load_sixes)(codes + 16 * v, index);
                SUBBIT_UNROLLED
                for (int j = 0; j < 8; j += 2) {
                    const auto sum = [&](int plane) {
                        const uint8_t* table = tables + size * j + plane;
                        return vaddq_u8(look_up<layout>(table, index[j]), look_up<layout>(table + size, index[j + 1]));
                    };
                    sums[v].low.add(sum(0));
                    sums[v].high.add(sum(size / 2));
                }
            }
        }
    }
}

// 32 bytes of a tile's rows after the other. How rows lie in them is in codes.hpp (word_of).
template <Layout layout, class Sums, void (*add)(const uint8_t* codes, const uint8_t* tables, int groups, Sums (&)[2])>
void add_tiles(const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums, int tiles) {
    constexpr Properties properties = of(layout);
    const int zero = groups * properties.entries * properties.grid.zero;
    for (int tile = 0; tile < tiles; tile++, codes += bytes_of(layout, groups), sums += kTileRows) {
        for (int part = 0; part < kTileRows / Sums::rows; part++) {
            Sums total[2];
            add(codes + 32 * part, tables, groups, total);
            for (int v = 0; v < 2; v++)
                total[v].template put<properties.grid.radix>(zero, step, sums + Sums::rows * part + 4 * v);
        }
    }
}

void add_neon(Layout layout, const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums,
              int tiles) {
    const auto run = [&](auto add) { add(codes, tables, groups, step, sums, tiles); };
    switch (layout) {
        case Layout::single: return run(add_tiles<Layout::single, Planes, add_single>);
        case Layout::pair: return run(add_tiles<Layout::pair, Neighbours, add_pair>);
        case Layout::triple: return run(add_tiles<Layout::triple, Planes, add_signs<Layout::triple>>);
        case Layout::quad: return run(add_tiles<Layout::quad, Planes, add_signs<Layout::quad>>);
        case Layout::six: return run(add_tiles<Layout::six, Planes, add_large<Layout::six>>);
        case Layout::five1: return run(add_tiles<Layout::five1, Planes, add_large<Layout::five1>>);
        case Layout::five2: return run(add_tiles<Layout::five2, Planes, add_large<Layout::five2>>);
        default: return run(add_tiles<Layout::five3, Planes, add_large<Layout::five3>>);
    }
}

uint64_t read_neon(const uint8_t* bytes, size_t count) {
    uint8x16_t all = vdupq_n_u8(0);
    for (size_t at = 0; at + 64 <= count; at += 64) {
        const uint8x16x4_t four = vld1q_u8_x4(bytes + at);
        all = veorq_u8(all, veorq_u8(veorq_u8(four.val[0], four.val[1]), veorq_u8(four.val[2], four.val[3])));
    }
    const uint64x2_t words = vreinterpretq_u64_u8(all);
    return vgetq_lane_u64(words, 0) ^ vgetq_lane_u64(words, 1);
}

// ---- rows_uniform ----------------------------------------------------------------------------------------------------

// 16 codes, in the order of their columns.
template <int bits>
inline uint8x16_t load_codes(const uint8_t* p) {
    if (bits == 8) return vld1q_u8(p);
    const uint8x8_t pairs = vld1_u8(p), low = vand_u8(pairs, vdup_n_u8(15)), high = vshr_n_u8(pairs, 4);
    return vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
}

// Every group has a multiple of 16 columns.
template <int bits>
void add_rows_neon(const RowMatrix& matrix, const RowInputs& inputs, int first, int count, float* sums) {
    for (int i = 0; i < count; i++) {
        const uint8_t* codes = matrix.codes + (first + i) * matrix.row_bytes();
        const int16_t* x = inputs.values;
        ptrdiff_t at = static_cast<ptrdiff_t>(first + i) * matrix.groups();
        float32x4_t total = vdupq_n_f32(0);
        float zeros = 0;
        for (int group = 0; group < matrix.groups(); group++, at++) {
            const int columns = std::min(matrix.group_size, matrix.columns - group * matrix.group_size);
            int32x4_t sum[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
            for (int j = 0; j < columns; j += 16, codes += 2 * bits, x += 16) {
                const uint8x16_t code = load_codes<bits>(codes);
                const int16x8_t wide[2] = {vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(code))),
                                           vreinterpretq_s16_u16(vmovl_high_u8(code))};
                for (int h = 0; h < 2; h++) {
                    const int16x8_t values = vld1q_s16(x + 8 * h);
                    sum[0] = vmlal_s16(sum[0], vget_low_s16(wide[h]), vget_low_s16(values));
                    sum[1] = vmlal_high_s16(sum[1], wide[h], values);
                }
            }
            const float step = from_float16(matrix.scales[at]) * inputs.steps[group];
            total = vfmaq_n_f32(total, vcvtq_f32_s32(vaddq_s32(sum[0], sum[1])), step);
            zeros += step * static_cast<float>(matrix.zeros[at]) * inputs.sums[group];
        }
        sums[i] = vaddvq_f32(total) - zeros;
    }
}

void rows_neon(const RowMatrix& matrix, const RowInputs& inputs, int first, int count, float* sums) {
    const bool whole = matrix.group_size % 16 == 0 && matrix.columns % 16 == 0;
    (!whole ? add_rows : matrix.bits == 8 ? add_rows_neon<8> : add_rows_neon<4>)(matrix, inputs, first, count, sums);
}

}  // namespace

const Kernels neon_kernels{"NEON", Order::mixed, build_neon, add_neon, read_neon, rows_neon, look_levels_up};

}  // namespace subbit
