// AMX: many inputs at a time against decoded weights.
//
// A look-up serves one input. For many of them, codes are decoded once, to bytes that are -1, 0 or 1, and matrix units
// multiply 16 inputs with 16 rows, 64 columns at a time. A decoded weight is looked up as a product is: in the table that
// an input of one such column and zeros would have.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "matrix.hpp"
#include "vbmi.hpp"

namespace subbit {
namespace {

// ---- inputs ----------------------------------------------------------------------------------------------------------

float split(const float* inputs, int panels, int row, uint8_t* planes) {
    constexpr float limit = 32767;
    const float largest = largest_of(inputs, kPanelColumns * panels);
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? limit / largest : 0);
    uint8_t *high = planes + row * kPanelColumns, *low = high + static_cast<ptrdiff_t>(panels) * kPanelBytes;
    for (int panel = 0; panel < panels; panel++, high += kPanelBytes, low += kPanelBytes) {
        for (int j = 0; j < kPanelColumns; j += 16, inputs += 16) {
            const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(inverse, _mm512_loadu_ps(inputs)));
            const __m128i upper = _mm512_cvtepi32_epi8(_mm512_srai_epi32(value, 8)), lower = _mm512_cvtepi32_epi8(value);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(high + j), upper);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(low + j), lower);
        }
    }
    return largest / limit;
}

// ---- weights ---------------------------------------------------------------------------------------------------------

// The entries of the table of a group whose only input is a 1 in column j.
template <int columns>
struct Units {
    int8_t entries[columns][64];
};
constexpr Units<8> units_of(const Entries& entries) {
    Units<8> units{};
    for (int j = 0; j < 8; j++) {
        for (int e = 0; e < 64; e++) units.entries[j][e] = static_cast<int8_t>(entries.weights[j][e]);
    }
    return units;
}
// five: 16 columns, then their negatives.
constexpr Units<16> five_units() {
    Units<16> units{};
    for (int j = 0; j < 16; j++) {
        for (int e = 0; e < 64; e++) units.entries[j][e] = static_cast<int8_t>(e % 16 != j ? 0 : e / 16 % 2 ? -1 : 1);
    }
    return units;
}
// four: the negatives of 8 columns, then these; byte b of a row is looked up for column b of either half of a group.
constexpr Units<2> four_units() {
    Units<2> units{};
    for (int half = 0; half < 2; half++) {
        for (int e = 0; e < 64; e++) {
            const int column = 4 * half + e / 16;
            units.entries[half][e] = static_cast<int8_t>(e % 8 != column ? 0 : e / 8 % 2 ? 1 : -1);
        }
    }
    return units;
}
constexpr Units<8> kSixUnits = units_of(kSix), kSevenUnits = units_of(kSeven);
template <Layout layout>
constexpr Units<8> kTermUnits[3] = {units_of(kTermTables<layout>.of[0]), units_of(kTermTables<layout>.of[1]),
                                    units_of(kTermTables<layout>.of[2])};
constexpr Units<16> kFiveUnits = five_units();
constexpr Units<2> kFourUnits = four_units();

// Where the weights of four columns go: a row of each of the four panels for 64 rows.
inline int8_t* quad_at(int8_t* weights, int quad) { return weights + quad / 16 * 4 * kPanelBytes + quad % 16 * 64; }

// Four columns of 64 rows, interleaved; kPlaces says which row is where.
inline void put_quad(__m512i a, __m512i b, __m512i c, __m512i d, int8_t* quad) {
    const __m512i low[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d)};
    const __m512i high[2] = {_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d)};
    _mm512_storeu_si512(quad, _mm512_unpacklo_epi16(low[0], low[1]));
    _mm512_storeu_si512(quad + kPanelBytes, _mm512_unpackhi_epi16(low[0], low[1]));
    _mm512_storeu_si512(quad + 2 * kPanelBytes, _mm512_unpacklo_epi16(high[0], high[1]));
    _mm512_storeu_si512(quad + 3 * kPanelBytes, _mm512_unpackhi_epi16(high[0], high[1]));
}

// All columns of a group of 64 rows, from a quad on.
template <int columns, class Column>
inline void put_columns(const Column& column, int8_t* weights, int quad) {
    for (int i = 0; i < columns; i += 4) {
        put_quad(column(i), column(i + 1), column(i + 2), column(i + 3), quad_at(weights, quad + i / 4));
    }
}

// Where in the four panels a row is, 16 rows a panel: the inverse of what put_quad makes of byte_of.
struct Places {
    int of[kTileRows];
};
constexpr Places make_places() {
    Places places{};
    for (int row = 0; row < kTileRows; row++) {
        const int byte = byte_of(row);
        places.of[row] = byte % 16 / 4 * 16 + byte / 16 * 4 + byte % 4;
    }
    return places;
}
constexpr Places kPlaces = make_places();
// decode_four leaves them in their order.
constexpr Places in_order() {
    Places places{};
    for (int row = 0; row < kTileRows; row++) places.of[row] = row;
    return places;
}
constexpr Places kInOrder = in_order();

inline __m512i negated(__m512i x, __mmask64 where) {
    return _mm512_mask_sub_epi8(x, where, _mm512_setzero_si512(), x);
}

template <Layout layout>
void decode_folded(const uint8_t* codes, int groups, int8_t* weights) {
    constexpr bool seven = layout == Layout::seven;
    const auto& units = (seven ? kSevenUnits : kSixUnits).entries;
    for (int group = 0; group < groups; codes += of(layout).unit_bytes) {
        __m512i index[8];
        load_sixes(codes, index);
        for (int j = 0; j < 8; j++, group++) {
            const __mmask64 negative = seven ? load_mask(codes + 384 + 8 * j) : 0;
            const auto column = [&](int i) {
                return negated(_mm512_permutexvar_epi8(index[j], load(units[i])), negative);
            };
            put_columns<8>(column, weights, 2 * group);
        }
    }
}

template <Layout layout>
void decode_terms(const uint8_t* codes, int groups, int8_t* weights) {
    const auto& units = kTermUnits<layout>;
    for (int group = 0; group < groups; codes += of(layout).unit_bytes) {
        TermIndices<layout> indices(codes);
        for (int j = 0; j < 8; j++, group++) {
            const Indices index = indices.of_group(j);
            const auto column = [&](int i) {
                const __m512i left = _mm512_permutexvar_epi8(index.left, load(units[0].entries[i]));
                const __m512i right = _mm512_permutexvar_epi8(index.right, load(units[1 + j % 2].entries[i]));
                return negated(_mm512_add_epi8(left, right), index.negative);
            };
            put_columns<8>(column, weights, 2 * group);
        }
    }
}

// Four columns of 16 rows at a time: the byte of a row for a group, in four places.
void decode_four(const uint8_t* codes, int groups, int8_t* weights) {
    const __m512i rows = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
    for (int group = 0; group < groups; group++) {
        const uint8_t* unit = codes + group / 8 * of(Layout::four).unit_bytes;
        const __m512i bytes = _mm512_add_epi8(rows, _mm512_set1_epi8(static_cast<char>(group % 4)));
        for (int panel = 0; panel < 4; panel++) {
            const __m512i code = _mm512_shuffle_epi8(load(unit + 64 * panel), bytes);
            const __m512i index = place_four(group % 8 < 4 ? code : _mm512_srli_epi16(code, 4));
            for (int half = 0; half < 2; half++) {
                int8_t* at = quad_at(weights, 2 * group + half) + panel * kPanelBytes;
                _mm512_storeu_si512(at, _mm512_permutexvar_epi8(index, load(kFourUnits.entries[half])));
            }
        }
    }
}

template <Layout layout>
void decode_five(const uint8_t* codes, int groups, int8_t* weights) {
    constexpr int entries = of(layout).entries;
    for (int group = 0; group < groups; codes += of(layout).unit_bytes) {
        __m512i index[entries][8];
        for (int k = 0; k < entries; k++) load_fives(codes + k * kFiveBytes, index[k]);
        for (int j = 0; j < 8; j++, group++) {
            const auto column = [&](int i) {
                const __m512i unit = load(kFiveUnits.entries[i]);
                __m512i sum = _mm512_permutexvar_epi8(index[0][j], unit);
                for (int k = 1; k < entries; k++) sum = _mm512_add_epi8(sum, _mm512_permutexvar_epi8(index[k][j], unit));
                return sum;
            };
            put_columns<16>(column, weights, 4 * group);
        }
    }
}

void decode(Layout layout, const uint8_t* codes, int groups, int8_t* weights) {
    switch (layout) {
        case Layout::four: return decode_four(codes, groups, weights);
        case Layout::five1: return decode_five<Layout::five1>(codes, groups, weights);
        case Layout::five2: return decode_five<Layout::five2>(codes, groups, weights);
        case Layout::five3: return decode_five<Layout::five3>(codes, groups, weights);
        case Layout::six: return decode_folded<Layout::six>(codes, groups, weights);
        case Layout::seven: return decode_folded<Layout::seven>(codes, groups, weights);
        case Layout::terms3: return decode_terms<Layout::terms3>(codes, groups, weights);
        default: return decode_terms<Layout::terms4>(codes, groups, weights);
    }
}

// ---- products --------------------------------------------------------------------------------------------------------

// What the matrix registers are: all of 16 rows of 64 bytes.
struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr Configuration kConfiguration;

// 16 inputs and the rows of two panels, over all columns: sums of the upper bytes, then of the lower ones.
inline void sum_panels(const uint8_t* high, const int8_t* weights, int panels, int32_t (&sums)[4][256]) {
    const uint8_t* low = high + static_cast<ptrdiff_t>(panels) * kPanelBytes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int panel = 0; panel < panels; panel++) {
        _tile_loadd(6, weights, 64);
        _tile_loadd(4, high, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, weights + kPanelBytes, 64);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, low, 64);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
        high += kPanelBytes, low += kPanelBytes, weights += 4 * kPanelBytes;
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    asm volatile("" : : : "memory");  // the stores of some compilers do not say what they write
}

void multiply_panels(Layout layout, const uint8_t* planes, const float* steps, int tiles, const int8_t* weights,
                     const float* scales, int panels, float* sums) {
    const Places& places = layout == Layout::four ? kInOrder : kPlaces;
    alignas(64) uint8_t before[64];  // the registers may be somebody else's
    _tile_storeconfig(before);
    _tile_loadconfig(&kConfiguration);
    for (int tile = 0; tile < tiles; tile++, planes += 2 * static_cast<ptrdiff_t>(panels) * kPanelBytes) {
        alignas(64) float parts[kPanelVectors][kTileRows];
        for (int pair = 0; pair < 2; pair++) {
            alignas(64) int32_t whole[4][256];
            sum_panels(planes, weights + static_cast<ptrdiff_t>(2 * pair) * kPanelBytes, panels, whole);
            for (int i = 0; i < 2 * kPanelVectors; i++) {
                const int half = i % 2, vector = i / 2;
                const __m512 high = _mm512_cvtepi32_ps(load(whole[half] + 16 * vector));
                const __m512 low = _mm512_cvtepi32_ps(load(whole[2 + half] + 16 * vector));
                _mm512_storeu_ps(parts[vector] + 16 * (2 * pair + half), _mm512_fmadd_ps(high, _mm512_set1_ps(256), low));
            }
        }
        for (const auto& part : parts) {
            const __m512 step = _mm512_set1_ps(*steps++);
            for (int row = 0; row < kTileRows; row += 16, sums += 16) {
                const __m512 sum = _mm512_mul_ps(step, _mm512_i32gather_ps(load(places.of + row), part, 4));
                _mm512_storeu_ps(sums, _mm512_mul_ps(sum, _mm512_loadu_ps(scales + row)));
            }
        }
    }
    _tile_loadconfig(before);
}

}  // namespace

const MatrixKernel amx_matrix{split, decode, multiply_panels};

// The processor has to have the registers, and Linux lends them to a process that asks.
bool may_use_amx() {
    constexpr unsigned tile_and_int8 = 3U << 24;
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned a, b, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    return (d & tile_and_int8) == tile_and_int8 && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace subbit
