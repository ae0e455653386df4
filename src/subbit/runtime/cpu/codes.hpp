// Packed `codes` linears in the order in which the kernels read them, and what a kernel is.
//
// A look-up kernel computes, for one input vector, a small table for every group of 8 or 16 columns, and then reads a
// row's product with a group from the table: no weight is ever multiplied. Tables have the size that one byte-shuffle
// instruction looks many rows up in at once: 16 entries, or 64 where AVX-512 is. Entries have two bytes, which are kept
// apart in a low and a high plane.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "grouped.hpp"
#include "matrix.hpp"
#include "numbers.hpp"
#include "rows.hpp"

// Before a loop of a few constant iterations.
#ifdef __clang__
#define SUBBIT_UNROLLED _Pragma("clang loop unroll(full)")
#else
#define SUBBIT_UNROLLED _Pragma("GCC unroll 8")
#endif

namespace subbit {

// A symbol is one kept weight of a group: its column, and whether it is positive.
//
// In tables of 16 entries, 3:8 and 4:8 are sums of two vectors of signs: a kept weight is (s + t) / 2 with s, t in
// {-1, +1}^8, a pruned one has s = -t. t is 8 signs, two half bytes. s is a row of a Hadamard matrix of order 12 (half a
// byte), for 4:8 or its negative (a bit more): in any three columns the 12 rows, in any four the 24, have every choice of
// signs.
//
// In tables of 64 entries (folded.hpp) an entry is a vector of weights, or its negative: a bit more.
//
// Order says who uses which of them.
enum class Layout {
    single,   // 1:8, a symbol a group: half a byte
    pair,     // 2:8 and 1:4, two symbols a group: a byte
    triple,   // 3:8: 12 bits
    quad,     // 4:8: 13 bits
    wide1,    // 1:16, a column of 16 and a sign: 5 bits
    wide2,    // 2:16, two of them: 10 bits
    wide3,    // 3:16: 15 bits
    four,     // 1:8 in tables of 64, one for four groups: half a byte
    six,      // 1:4 in tables of 64, 6 bits for two codewords
    seven,    // 2:8 in tables of 64: 7 bits
    terms3,   // 3:8, the sum of an entry of a table of 32 and one of a table of 64: 9 bits
    terms4,   // 4:8, of two tables of 64: 11 bits
    five1,    // 1:16 to 3:16 in tables of 64, of which 32 are used, both signs: 5 bits a symbol
    five2,
    five3,
    generic,  // any other N:M: the codewords of the file
};

// What the entries of the tables are: an integer below 2^14, low + radix * high, of which `zero` stands for 0; none is
// further from it than `limit`. The largest sum of bytes before they are widened (2 or 3 entries) is below 256.
struct Grid {
    int radix, zero, limit;
};
constexpr Grid kTwoGrid{128, 8192, 8191}, kThreeGrid{86, 3697, 3697};
// Negating is radix - low and radix - high: 2 * zero = radix + radix * radix.
constexpr Grid kFoldedGrid{127, 8128, 8127};
// Bytes are from -63 to 63, and a sum of two has 128 added.
constexpr Grid kSignedGrid{127, 8192, 8064};
// Sums of 32 bits, so that the upper byte takes all of its values.
constexpr Grid kFourGrid{127, 16256, 16255};

// The layouts that kernels read, by what they look up fastest.
enum class Order {
    small,  // tables of 16 entries
    mixed,  // of 16 for N:8, of 32 for N:16, of 64 for 1:4
    large,  // of 32 for N:16, of 64 otherwise
};

struct Properties {
    int columns;      // of a group
    int groups;       // of a unit, in which the rows of a tile lie one after the other
    int unit_bytes;   // of a tile's rows in one unit
    int table_bytes;  // of a group
    int entries;      // looked up for a row and group
    Grid grid;
    int matrix_from = 0;  // vectors: fewer are faster one by one than with decoded weights, where there is a matrix kernel
};
constexpr Properties kProperties[] = {
    {8, 2, 64, 32, 1, kTwoGrid},       // single
    {8, 2, 128, 32, 2, kTwoGrid},      // pair
    {8, 8, 768, 128, 3, kThreeGrid},   // triple
    {8, 8, 832, 128, 3, kThreeGrid},   // quad
    {16, 8, 320, 32, 1, kSignedGrid},  // wide1
    {16, 8, 640, 32, 2, kSignedGrid},  // wide2
    {16, 8, 960, 32, 3, kSignedGrid},  // wide3
    {8, 8, 256, 32, 1, kFourGrid, 40},     // four
    {8, 8, 384, 128, 1, kFoldedGrid, 13},  // six
    {8, 8, 448, 128, 1, kFoldedGrid, 11},  // seven
    {8, 8, 576, 256, 2, kFoldedGrid, 9},   // terms3
    {8, 8, 704, 256, 2, kFoldedGrid, 9},   // terms4
    {16, 8, 320, 64, 1, kTwoGrid, 48},     // five1
    {16, 8, 640, 64, 2, kTwoGrid, 20},     // five2
    {16, 8, 960, 64, 3, kTwoGrid, 11},     // five3
    {8, 1, 0, 0, 0, kTwoGrid},         // generic, which has no units
};
constexpr const Properties& of(Layout layout) { return kProperties[static_cast<int>(layout)]; }

constexpr int kTileRows = 64;     // rows that lie interleaved
constexpr int kChunkGroups = 32;  // groups that share a scale of their tables; their sums fit 16 bits
// Tiles whose codes of the first chunk lie one after the other, then those of the second one: so the tables of a chunk
// are read from the first-level cache, which does not hold all tables.
constexpr int kBlockTiles = 8;
constexpr int kMaxKept = 4;

constexpr int chunks_of(int groups) { return (groups + kChunkGroups - 1) / kChunkGroups; }
constexpr int in_chunk(int groups, int chunk) {  // groups of it: the last one may have fewer
    return chunk < groups / kChunkGroups ? kChunkGroups : groups % kChunkGroups;
}
constexpr int bytes_of(Layout layout, int groups) { return groups / of(layout).groups * of(layout).unit_bytes; }
constexpr int chunk_tables(Layout layout) { return kChunkGroups * of(layout).table_bytes; }

constexpr bool is_wide(Layout layout) { return layout >= Layout::wide1 && layout <= Layout::wide3; }
constexpr bool is_five(Layout layout) { return layout >= Layout::five1 && layout <= Layout::five3; }
constexpr bool is_terms(Layout layout) { return layout == Layout::terms3 || layout == Layout::terms4; }
constexpr bool has_symbols(Layout layout) { return layout == Layout::single || layout == Layout::pair; }

// Where a row of a tile lies within 64 bytes (32 for 16 rows of `pair`). The order is the one in which widening 8 to 16
// to 32 bits leaves the lanes of a vector, so that sums come out in the order of the rows.
constexpr int word_of(int row) {
    const int lane = row % 16;
    return lane < 4 || lane >= 12 ? lane : lane < 8 ? lane + 4 : lane - 4;
}
constexpr int byte_of(int row) { return row / 32 * 32 + 2 * word_of(row) + row / 16 % 2; }
constexpr int pair_of(int row) { return row / 16 * 32 + 2 * word_of(row); }

// triple, quad and wide: a byte for two half bytes of a group, then bytes for the third one (of wide1, the only one) of
// two groups, then bytes with a bit for each of eight groups, the first one uppermost. If the bit of half byte k is set,
// it stands for the negative of its entry.
constexpr bool shared_byte(Layout layout, int k) { return k == 2 || of(layout).entries == 1; }
constexpr int half_byte_at(Layout layout, int k, int group) {
    return !shared_byte(layout, k) ? 64 * group : (k == 2 ? 512 : 0) + group / 2 * 64;
}
constexpr bool is_upper(Layout layout, int k, int group) { return (shared_byte(layout, k) ? group : k) % 2; }
constexpr int bits_of(Layout layout) { return layout == Layout::quad ? 1 : is_wide(layout) ? of(layout).entries : 0; }
constexpr int bit_at(Layout layout, int k) { return 256 * of(layout).entries + (is_wide(layout) ? 64 * k : 0); }
constexpr bool has_bit(Layout layout, int k) { return is_wide(layout) || (layout == Layout::quad && k == 2); }
constexpr int table_at(Layout layout, int k) { return is_wide(layout) ? 0 : 32 * k; }

// five: five vectors of bytes for the k-th symbols of eight groups. The symbols of the last three are in the three
// uppermost bits of these bytes.
constexpr int kFiveBytes = 320;

// Eight columns of the Hadamard matrix; bit j is 1 for +1.
constexpr uint8_t kHadamard[12] = {255, 71, 142, 29, 58, 116, 233, 210, 164, 72, 145, 35};

// terms4: in a byte for four groups, the lower one of the two bits of each that the byte of the group has no room for.
constexpr int kRestAt[4] = {4, 0, 6, 2};

// four: four bytes of a row, one after the other, for eight groups: the first four in their lower halves.
constexpr int quad_of(int row) { return 4 * row; }

// Some bits of the code of a group, and where they lie in a unit.
struct Field {
    enum Rows { bytes, pairs, bits, quads };

    int shift, width;  // of the code
    int at, bit;       // first byte of all rows, and the lowest bit there
    Rows rows;         // a byte of each row at byte_of, at pair_of, at quad_of, or a bit
};
std::vector<Field> fields_of(Layout layout, int group);

// What differs between instruction sets.
struct Kernels {
    const char* name;
    Order order;
    // Fill the tables of a chunk of `groups` groups from their inputs; returns the value of one step of the grid.
    float (*build)(Layout, const float* inputs, int groups, uint8_t* tables);
    // sums[r] += step * (sum over the groups of a chunk of row r), for the rows of `tiles` tiles.
    void (*add)(Layout, const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums, int tiles);
    // Read memory and do nothing with it, 64 bytes at a time: the bound of any kernel, for benchmarks.
    uint64_t (*read)(const uint8_t* bytes, size_t count);
    RowsKernel rows;
    LevelsKernel levels;
    const MatrixKernel* matrix = nullptr;  // for many vectors at a time
};

extern const Kernels portable_kernels;
#ifdef SUBBIT_AVX2
extern const Kernels avx2_kernels;
#endif
#ifdef SUBBIT_AVX512
extern const Kernels avx512_kernels, avx512bw_kernels;
#endif
#ifdef SUBBIT_AMX
extern const MatrixKernel amx_matrix;
bool may_use_amx();
#endif
#ifdef SUBBIT_NEON
extern const Kernels neon_kernels;
#endif

int codeword_bits(int n, int m);  // of N:M in the file

// A linear in kernel order. The buffer holds the codes of a block of tiles and the float32 row scales of its rows, block
// after block, then float32 column scales if any: all is read from end to end. Of a generic layout it holds all codes,
// then all row scales.
struct Shape {
    int rows, columns, n, m;
    bool column_scales;
    Order order;  // of the kernels that will read it

    Layout layout() const;
    int width() const;                             // bits of a codeword in the file
    int codewords() const { return columns / m; }  // of a row
    int groups() const;                            // rounded up to whole units
    int tiles() const { return (rows + kTileRows - 1) / kTileRows; }
    int blocks() const { return (tiles() + kBlockTiles - 1) / kBlockTiles; }
    size_t file_row_bytes() const;
    size_t tile_bytes() const;
    size_t chunk_at(int tile, int chunk) const;  // where the codes of a tile for a chunk are
    size_t row_scale_at(int row) const;          // the rows of a tile lie one after the other
    size_t column_scales_at() const;
    size_t bytes() const;
};

void use_large_pages(uint8_t* bytes, size_t count);

// Fill `buffer` (shape.bytes(), zeroed) from the codes of the file. Returns -1, or the first codeword that no encoder
// writes; then the buffer is of no use.
int64_t repack(const Shape& shape, const uint8_t* codes, const float* row_scales, const float* column_scales,
               uint8_t* buffer, int threads);

// The inverse: the codes of the file into `codes` (zeroed).
void unpack(const Shape& shape, const uint8_t* buffer, uint8_t* codes);

// Some rows as dense float32 weights, row scales and column scales included.
void decode(const Shape& shape, const uint8_t* buffer, int first_row, int rows, float* weights);

// outputs (batch x rows) = inputs (batch x columns) times the weights, plus bias unless it is null; outputs have the
// dtype of the inputs.
void multiply(const Kernels& kernels, const Shape& shape, const uint8_t* buffer, Numbers inputs, int batch,
              Numbers bias, void* outputs, int threads);

// Read `count` bytes on all threads, for benchmarks; returns their exclusive or.
uint64_t read_memory(const Kernels& kernels, const uint8_t* bytes, size_t count, int threads);

}  // namespace subbit
