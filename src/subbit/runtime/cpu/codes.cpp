#include "codes.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "folded.hpp"
#include "team.hpp"

namespace subbit {
namespace {

constexpr size_t kTableBudget = 256 * 1024;  // of one thread: about half of a second-level cache
constexpr size_t kPlaneBudget = 1 << 20;     // of all threads, together with the weights of a tile in each one's cache
constexpr size_t kWorkOfThread = 48 * 1024;  // bytes of codes, times inputs, that are worth waking another thread for
constexpr size_t kFetchedByChunk = 4096;     // bytes of codes, while tables of a chunk are filled
constexpr size_t kScalesOfTile = sizeof(float) * kTileRows;
constexpr size_t kPadding = 8;               // bytes after generic codewords, which are read four at a time

size_t align(size_t bytes) { return (bytes + 63) / 64 * 64; }

int bits_for(int64_t count) {
    int bits = 0;
    while (int64_t{1} << bits < count) bits++;
    return bits;
}

int64_t binomial(int m, int n) {
    int64_t result = 1;
    for (int i = 0; i < n; i++) result = result * (m - i) / (i + 1);
    return result;
}

// The kept weights of a codeword: a column each, plus `m` if it is positive; columns ascending.
using Symbols = std::array<uint8_t, kMaxKept>;

// All codewords of N:M: `rank << n | signs`, ranks in ascending order of the masks' bit patterns.
std::vector<Symbols> list_codewords(int n, int m) {
    std::vector<Symbols> words;
    for (unsigned mask = 0; mask < 1U << m; mask++) {
        Symbols kept{};
        int count = 0;
        for (int j = 0; j < m; j++) {
            if (mask >> j & 1 && count++ < n) kept[static_cast<size_t>(count - 1)] = static_cast<uint8_t>(j);
        }
        if (count != n) continue;
        for (int signs = 0; signs < 1 << n; signs++) {
            Symbols word = kept;
            for (int i = 0; i < n; i++) word[static_cast<size_t>(i)] += static_cast<uint8_t>(signs >> i & 1 ? m : 0);
            words.push_back(word);
        }
    }
    return words;
}

// Half a byte, or three bits, for each symbol: its column, and the uppermost bit if it is positive.
uint16_t code_of_symbols(const Symbols& word, int n, int m, int width) {
    unsigned code = 0;
    for (int i = 0; i < n; i++) {
        const unsigned symbol = word[static_cast<size_t>(i)], size = static_cast<unsigned>(m);
        code |= (symbol % size | symbol / size << (width - 1)) << width * i;
    }
    return static_cast<uint16_t>(code);
}

// Half a byte for each column, then a bit for each weight that is negative.
uint16_t code_of_wide(const Symbols& word, int n) {
    unsigned code = 0;
    for (int i = 0; i < n; i++) {
        const unsigned symbol = word[static_cast<size_t>(i)];
        code |= symbol % 16 << 4 * i | (1 - symbol / 16) << (4 * n + i);
    }
    return static_cast<uint16_t>(code);
}

// Five bits for each symbol: its column, and the uppermost one if it is negative.
uint16_t code_of_five(const Symbols& word, int n) {
    unsigned code = 0;
    for (int i = 0; i < n; i++) code |= (word[static_cast<size_t>(i)] ^ 16U) << 5 * i;
    return static_cast<uint16_t>(code);
}

// t in bits 0-7, the Hadamard row in bits 8-11, bit 12 for its negative.
uint16_t code_of_signs(const Symbols& word, int n) {
    int kept = 0, positive = 0;
    for (int i = 0; i < n; i++) {
        const int symbol = word[static_cast<size_t>(i)];
        kept |= 1 << symbol % 8;
        positive |= symbol / 8 << symbol % 8;
    }
    for (int code = 0; code < 24; code++) {
        const int s = code < 12 ? kHadamard[code] : ~kHadamard[code - 12] & 255;
        if ((s & kept) != positive) continue;
        const int t = positive | (~s & ~kept & 255);
        return static_cast<uint16_t>(t | code % 12 << 8 | code / 12 << 12);
    }
    return 0;  // never: see Layout
}

// The code below `positive` whose weights these are, `weight(code, column)`, or that and `positive` for their negatives.
template <class Weight>
uint16_t find_code(const Symbols& word, int n, int positive, Weight weight) {
    float weights[8] = {};
    for (int i = 0; i < n; i++) {
        const int symbol = word[static_cast<size_t>(i)];
        weights[symbol % 8] = symbol / 8 ? 1 : -1;
    }
    for (int code = 0; code < 2 * positive; code++) {
        const float sign = code < positive ? 1 : -1;
        bool same = true;
        for (int j = 0; j < 8 && same; j++) same = sign * weight(code % positive, j) == weights[j];
        if (same) return static_cast<uint16_t>(code);
    }
    return 0;  // never: the tables have all of them
}

// The entry.
uint16_t code_of_seven(const Symbols& word, int n) {
    return find_code(word, n, 64, [](int code, int j) { return kSeven.weights[j][code]; });
}

// The left entry, then the place of the right one in its block.
template <Layout layout>
uint16_t code_of_terms(const Symbols& word, int n) {
    using Own = Terms<layout>;
    constexpr int lefts = Own::kBlocks * Own::kLeft;
    return find_code(word, n, lefts * Own::kRight, [](int code, int j) {
        const int left = code % lefts, right = left / Own::kLeft * Own::kRight + code / lefts;
        return kTerms<layout>.left.weights[j][left] + kTerms<layout>.right.weights[j][right];
    });
}

uint16_t code_of(const Shape& shape, unsigned index, const Symbols& word) {
    const Layout layout = shape.layout();
    switch (layout) {
        case Layout::single:
        case Layout::four:
        case Layout::pair: return code_of_symbols(word, shape.n, shape.m, 4);
        case Layout::six: return code_of_symbols(word, shape.n, shape.m, 3);
        case Layout::triple:
        case Layout::quad: return code_of_signs(word, shape.n);
        case Layout::wide1:
        case Layout::wide2:
        case Layout::wide3: return code_of_wide(word, shape.n);
        case Layout::five1:
        case Layout::five2:
        case Layout::five3: return code_of_five(word, shape.n);
        case Layout::generic: return static_cast<uint16_t>(index);
        case Layout::seven: return code_of_seven(word, shape.n);
        case Layout::terms3: return code_of_terms<Layout::terms3>(word, shape.n);
        default: return code_of_terms<Layout::terms4>(word, shape.n);
    }
}

// Per N:M and layout: the symbols and the kernel's code of every codeword, and codewords by code.
struct Book {
    unsigned count;  // codewords there are; `symbols` and `code` have an entry for every number of their width
    std::vector<Symbols> symbols;
    std::vector<uint16_t> code, word;
    std::vector<std::vector<Field>> fields;  // of the groups of a unit

    explicit Book(const Shape& shape) : symbols(list_codewords(shape.n, shape.m)) {
        count = static_cast<unsigned>(symbols.size());
        word.resize(1U << 16);
        for (unsigned i = 0; i < count; i++) {
            code.push_back(code_of(shape, i, symbols[i]));
            word[code[i]] = static_cast<uint16_t>(i);
        }
        symbols.resize(size_t{1} << shape.width());
        code.resize(symbols.size());
        for (int group = 0; group < of(shape.layout()).groups; group++) fields.push_back(fields_of(shape.layout(), group));
    }
};

const Book& book_of(const Shape& shape) {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, Order>, std::unique_ptr<Book>> books;
    const std::lock_guard<std::mutex> guard(mutex);
    std::unique_ptr<Book>& book = books[{shape.n, shape.m, shape.order}];
    if (!book) book = std::make_unique<Book>(shape);
    return *book;
}

// ---- a row of the file and of a tile ---------------------------------------------------------------------------------

// The codewords of a row of the file; reads no byte beyond `bytes`.
void read_row(const uint8_t* row, size_t bytes, int count, int width, uint16_t* words) {
    const unsigned mask = (1U << width) - 1;
    size_t bit = 0;
    int index = 0;
    for (; index < count && bit / 8 + 4 <= bytes; index++, bit += static_cast<size_t>(width)) {
        uint32_t four;
        std::memcpy(&four, row + bit / 8, 4);
        words[index] = static_cast<uint16_t>(four >> bit % 8 & mask);
    }
    for (; index < count; index++, bit += static_cast<size_t>(width)) {
        unsigned rest = 0;
        for (size_t i = 0; bit / 8 + i < bytes; i++) rest |= static_cast<unsigned>(row[bit / 8 + i]) << 8 * i;
        words[index] = static_cast<uint16_t>(rest >> bit % 8 & mask);
    }
}

// The inverse; the bytes of the row are zero.
void write_row(uint8_t* row, int count, int width, const uint16_t* words) {
    size_t bit = 0;
    for (int index = 0; index < count; index++, bit += static_cast<size_t>(width)) {
        unsigned shifted = static_cast<unsigned>(words[index]) << bit % 8;
        for (uint8_t* byte = row + bit / 8; shifted; byte++, shifted >>= 8) {
            *byte = static_cast<uint8_t>(*byte | (shifted & 255));
        }
    }
}

// Codes of codewords, one for every group: for 1:4 that is two codewords, the second one 4 columns to the right.
struct Second {
    int shift, plus;

    explicit Second(Layout layout) : shift(layout == Layout::six ? 3 : 4), plus(layout == Layout::six ? 0 : 4) {}
};

// `codes` is zeroed and holds shape.groups().
void codes_of(const Shape& shape, const Book& book, const uint16_t* words, uint16_t* codes) {
    const int count = shape.codewords();
    if (shape.m != 4) {
        for (int i = 0; i < count; i++) codes[i] = book.code[words[i]];
        return;
    }
    const Second place(shape.layout());
    for (int i = 0; i < count; i += 2) {
        // Half of a last group: its second symbol is a column that is not there, and zero.
        const int second = i + 1 < count ? book.code[words[i + 1]] : 0;
        codes[i / 2] = static_cast<uint16_t>(book.code[words[i]] | (second + place.plus) << place.shift);
    }
}

// The inverse.
void words_of(const Shape& shape, const Book& book, const uint16_t* codes, uint16_t* words) {
    const Second place(shape.layout());
    for (int i = 0; i < shape.codewords(); i++) {
        words[i] = shape.m != 4 ? book.word[codes[i]]
                   : i % 2      ? book.word[static_cast<uint16_t>((codes[i / 2] >> place.shift) - place.plus)]
                                : book.word[codes[i / 2] & ((1 << place.shift) - 1)];
    }
}

// Where a field of a row is.
struct Place {
    int offsets[4], bit;  // of the four Field::Rows

    explicit Place(int row)
        : offsets{byte_of(row), pair_of(row), byte_of(row) / 8, quad_of(row)}, bit(byte_of(row) % 8) {}
    int byte(const Field& field) const { return field.at + offsets[field.rows]; }
    int shift(const Field& field) const { return field.rows == Field::bits ? bit : field.bit; }
};

// Call `visit(bytes of a unit, index of its first group)` for the units of a tile.
template <class Byte, class Visit>
void visit_units(const Shape& shape, Byte* buffer, int tile, Visit visit) {
    const Properties& properties = of(shape.layout());
    const int groups = shape.groups();
    for (int chunk = 0; chunk < chunks_of(groups); chunk++) {
        Byte* unit = buffer + shape.chunk_at(tile, chunk);
        for (int i = 0; i < in_chunk(groups, chunk); i += properties.groups, unit += properties.unit_bytes) {
            visit(unit, chunk * kChunkGroups + i);
        }
    }
}

// The codes of a row, one for every group, into a buffer that is zero there.
void put_row(const Shape& shape, const Book& book, uint8_t* buffer, int row, const uint16_t* codes) {
    const Place place(row % kTileRows);
    visit_units(shape, buffer, row / kTileRows, [&](uint8_t* unit, int group) {
        for (const auto& fields : book.fields) {
            const int code = codes[group++];
            for (const Field& field : fields) {
                const int value = code >> field.shift & ((1 << field.width) - 1);
                uint8_t& byte = unit[place.byte(field)];
                byte = static_cast<uint8_t>(byte | value << place.shift(field));
            }
        }
    });
}

// The inverse.
void get_row(const Shape& shape, const Book& book, const uint8_t* buffer, int row, uint16_t* codes) {
    const Place place(row % kTileRows);
    visit_units(shape, buffer, row / kTileRows, [&](const uint8_t* unit, int group) {
        for (const auto& fields : book.fields) {
            int code = 0;
            for (const Field& field : fields) {
                const int value = unit[place.byte(field)] >> place.shift(field) & ((1 << field.width) - 1);
                code |= value << field.shift;
            }
            codes[group++] = static_cast<uint16_t>(code);
        }
    });
}

const float* row_scales_of(const Shape& shape, const uint8_t* buffer, int row) {
    return reinterpret_cast<const float*>(buffer + shape.row_scale_at(row));
}
const float* column_scales_of(const Shape& shape, const uint8_t* buffer) {
    return shape.column_scales ? reinterpret_cast<const float*>(buffer + shape.column_scales_at()) : nullptr;
}

// At an address that is a multiple of 64; what is there stays, and is not given back to the system.
template <class T>
T* aligned(std::vector<T>& memory, size_t count) {
    memory.resize(std::max(memory.size(), count + 64));
    return memory.data() + 63 - (reinterpret_cast<uintptr_t>(memory.data()) + 63) % 64;
}

// Into the second-level cache.
void fetch_ahead(const uint8_t* bytes, size_t count) {
    for (size_t at = 0; at < count; at += 64) __builtin_prefetch(bytes + at, 0, 2);
}

// One product: what all threads share.
struct Product {
    const Kernels& kernels;
    const Shape& shape;
    const uint8_t* buffer;
    Numbers inputs;
    int batch;
    Numbers bias;
    void* outputs;
    int together;  // inputs whose tables a thread holds at a time
    Shares shares;  // of blocks, for every `together` inputs after the other; of a generic layout, of tiles

    void run();
    void build_tables(int block, int first, int count, uint8_t* tables, float* steps, float* values) const;
    void run_block(int block, int first, int count, const uint8_t* tables, const float* steps, float* sums);
    void run_generic();
    void fetch_outputs(int first, int rows, int input) const;
    void finish(int tile, int input, float* sums);
    void put(int first_row, int input, const float* sums);
};

// Row scales, bias, and only rows that exist.
void Product::finish(int tile, int input, float* sums) {
    const int first = tile * kTileRows, rows = std::min(kTileRows, shape.rows - first);
    const float* scales = row_scales_of(shape, buffer, first);
    for (int i = 0; i < rows; i++) sums[i] *= scales[i];
    put(first, input, sums);
}

// Into the outputs, with the bias.
void Product::put(int first_row, int input, const float* sums) {
    const int rows = std::min(kTileRows, shape.rows - first_row);
    const ptrdiff_t at = static_cast<ptrdiff_t>(input) * shape.rows + first_row;
    store(outputs, inputs.bfloat16, at, rows, sums, bias, first_row);
}

// Writing to memory waits for what is there: it is fetched while the sums are made.
void Product::fetch_outputs(int first, int rows, int input) const {
    const size_t size = inputs.bfloat16 ? 2 : 4;
    const auto at = static_cast<size_t>(input) * static_cast<size_t>(shape.rows) + static_cast<size_t>(first);
    const auto* bytes = static_cast<const uint8_t*>(outputs) + size * at;
    fetch_ahead(bytes, size * static_cast<size_t>(rows));
}

// The inputs of one vector, times the column scales, padded with zeros to `count`.
void scaled_inputs(const Product& p, int input, int count, float* values) {
    const float* c = column_scales_of(p.shape, p.buffer);
    p.inputs.copy(static_cast<ptrdiff_t>(input) * p.shape.columns, p.shape.columns, values);
    for (int j = 0; c && j < p.shape.columns; j++) values[j] *= c[j];
    std::fill(values + p.shape.columns, values + count, 0.0F);
}

void Product::run() {
    const Layout layout = shape.layout();
    const int groups = shape.groups(), chunks = chunks_of(groups), columns = of(layout).columns;
    // Every thread has tables of its own: they would otherwise travel between caches. They stay for the next call, because
    // giving a page back to the system and getting it again takes as long as filling it.
    thread_local std::vector<uint8_t> memory;
    thread_local std::vector<float> steps, values, sums;
    uint8_t* tables = aligned(memory, static_cast<size_t>(chunk_tables(layout) * chunks * together));
    steps.resize(static_cast<size_t>(chunks * together));
    values.resize(static_cast<size_t>(groups * columns));
    sums.resize(static_cast<size_t>(together * kBlockTiles * kTileRows));

    const int thread = shares.join();
    int first = -1, count = 0;  // whose tables there are
    for (int number; (number = shares.take(thread)) >= 0;) {
        const int block = number % shape.blocks(), wanted = number / shape.blocks() * together;
        if (wanted != first) {
            first = wanted, count = std::min(together, batch - first);
            build_tables(block, first, count, tables, steps.data(), values.data());
        }
        run_block(block, first, count, tables, steps.data(), sums.data());
    }
}

// Of `count` inputs from `first` on, while the first codes of a block are fetched; `values` is for the inputs of one.
void Product::build_tables(int block, int first, int count, uint8_t* tables, float* steps, float* values) const {
    const Layout layout = shape.layout();
    const int groups = shape.groups(), chunks = chunks_of(groups), columns = of(layout).columns;
    const uint8_t* codes = buffer + shape.chunk_at(block * kBlockTiles, 0);
    for (int i = 0; i < count; i++) {
        scaled_inputs(*this, first + i, groups * columns, values);
        for (int chunk = 0; chunk < chunks; chunk++) {
            if (i == 0) fetch_ahead(codes + chunk * kFetchedByChunk, kFetchedByChunk);
            const int at = chunk * together + i;
            const float* x = values + static_cast<ptrdiff_t>(chunk) * kChunkGroups * columns;
            steps[at] = kernels.build(layout, x, in_chunk(groups, chunk), tables + at * chunk_tables(layout));
        }
    }
}

// A chunk after the other, for all of `count` inputs from `first` on while it is in the cache.
void Product::run_block(int block, int first, int count, const uint8_t* tables, const float* steps, float* sums) {
    const Layout layout = shape.layout();
    const int groups = shape.groups(), tile = block * kBlockTiles, tiles = std::min(kBlockTiles, shape.tiles() - tile);
    constexpr ptrdiff_t rows = kBlockTiles * kTileRows;
    std::fill_n(sums, count * rows, 0.0F);
    const int first_row = tile * kTileRows, some = std::min(tiles * kTileRows, shape.rows - first_row);
    for (int i = 0; i < count; i++) fetch_outputs(first_row, some, first + i);
    for (int chunk = 0; chunk < chunks_of(groups); chunk++) {
        const uint8_t* codes = buffer + shape.chunk_at(tile, chunk);
        for (int i = 0; i < count; i++) {
            const ptrdiff_t at = chunk * together + i;
            const uint8_t* table = tables + at * chunk_tables(layout);
            kernels.add(layout, codes, table, in_chunk(groups, chunk), steps[at], sums + i * rows, tiles);
        }
    }
    for (int i = 0; i < count; i++) {
        for (int t = 0; t < tiles; t++) finish(tile + t, first + i, sums + i * rows + t * kTileRows);
    }
}

constexpr int vector_tiles_of(int vectors) { return (vectors + kPanelVectors - 1) / kPanelVectors; }

// Some vectors of a product on matrix units: first their planes, which all threads read, then tile by tile.
struct MatrixProduct {
    Product& product;
    const MatrixKernel& kernel;
    int first, count, panels;
    size_t tile_bytes;  // of the planes of 16 vectors
    uint8_t* planes;
    float* steps;
    Shares vectors, tiles;

    int vector_tiles() const { return vector_tiles_of(count); }
    const uint8_t* codes(int tile, int chunk) const { return product.buffer + product.shape.chunk_at(tile, chunk); }

    void split();
    void multiply();
};

void MatrixProduct::split() {
    const int columns = panels * kPanelColumns;
    std::vector<float> values(static_cast<size_t>(columns));
    const int thread = vectors.join();
    for (int i; (i = vectors.take(thread)) >= 0;) {
        if (i < count) {
            scaled_inputs(product, first + i, columns, values.data());
        } else {
            std::fill(values.begin(), values.end(), 0.0F);
        }
        uint8_t* own = planes + static_cast<size_t>(i / kPanelVectors) * tile_bytes;
        steps[i] = kernel.split(values.data(), panels, i % kPanelVectors, own);
    }
}

void MatrixProduct::multiply() {
    const Shape& shape = product.shape;
    const Layout layout = shape.layout();
    const int chunks = chunks_of(shape.groups()), chunk_panels = kChunkGroups * of(layout).columns / kPanelColumns;
    thread_local std::vector<int8_t> memory;
    thread_local std::vector<float> sums;
    constexpr size_t tile_panels = kTileRows / kPanelVectors;  // for every 64 columns
    int8_t* weights = aligned(memory, static_cast<size_t>(panels) * tile_panels * kPanelBytes);
    sums.resize(std::max(sums.size(), static_cast<size_t>(vector_tiles() * kPanelVectors * kTileRows)));

    const int thread = tiles.join();
    int tile = tiles.take(thread);
    while (tile >= 0) {
        for (int chunk = 0; chunk < chunks; chunk++) {
            int8_t* own = weights + static_cast<size_t>(chunk * chunk_panels) * tile_panels * kPanelBytes;
            kernel.decode(layout, codes(tile, chunk), in_chunk(shape.groups(), chunk), own);
        }
        const int following = tiles.take(thread);
        for (int chunk = 0; following >= 0 && chunk < chunks; chunk++) {
            const int bytes = bytes_of(layout, in_chunk(shape.groups(), chunk));
            fetch_ahead(codes(following, chunk), static_cast<size_t>(bytes));
        }
        const int row = tile * kTileRows;
        const float* scales = row_scales_of(shape, product.buffer, row);
        kernel.multiply(layout, planes, steps, vector_tiles(), weights, scales, panels, sums.data());
        for (int i = 0; i < count; i++) product.put(row, first + i, sums.data() + static_cast<ptrdiff_t>(i) * kTileRows);
        tile = following;
    }
}

// The whole product.
void multiply_many(Product& product, const MatrixKernel& kernel, int threads) {
    const Shape& shape = product.shape;
    const int panels = (shape.groups() * of(shape.layout()).columns + kPanelColumns - 1) / kPanelColumns;
    const size_t tile_bytes = 2 * static_cast<size_t>(panels) * kPanelBytes;
    const int together = kPanelVectors * static_cast<int>(std::clamp<size_t>(kPlaneBudget / tile_bytes, 2, 16));
    thread_local std::vector<uint8_t> memory;
    thread_local std::vector<float> steps;
    const int most = vector_tiles_of(std::min(product.batch, together));
    uint8_t* planes = aligned(memory, static_cast<size_t>(most) * tile_bytes);
    steps.resize(std::max(steps.size(), static_cast<size_t>(most * kPanelVectors)));
    for (int first = 0; first < product.batch; first += together) {
        const int count = std::min(together, product.batch - first), vectors = vector_tiles_of(count) * kPanelVectors;
        MatrixProduct some{product, kernel, first,        count,           panels, tile_bytes,
                           planes,  steps.data(), {vectors, threads}, {shape.tiles(), threads}};
        on_team(threads, [](void* data) { static_cast<MatrixProduct*>(data)->split(); }, &some);
        on_team(threads, [](void* data) { static_cast<MatrixProduct*>(data)->multiply(); }, &some);
    }
}

// Codewords of the file, read one by one; inputs with both signs are the table.
void Product::run_generic() {
    const Book& book = book_of(shape);
    const int groups = shape.codewords(), width = shape.width(), n = shape.n, m = shape.m;
    const auto row_bytes = shape.file_row_bytes();
    std::vector<float> values(static_cast<size_t>(shape.columns)), table(2 * values.size());
    const unsigned mask = (1U << width) - 1;
    const int thread = shares.join();
    int filled = -1;  // the input in the table
    for (int number; (number = shares.take(thread)) >= 0;) {
        const int tile = number % shape.tiles(), input = number / shape.tiles();
        if (input != filled) scaled_inputs(*this, input, shape.columns, values.data());
        for (int j = 0; input != filled && j < shape.columns; j++) {
            const auto at = static_cast<size_t>(j / m * 2 * m + j % m);
            table[at] = -values[static_cast<size_t>(j)];
            table[at + static_cast<size_t>(m)] = values[static_cast<size_t>(j)];
        }
        filled = input;
        float sums[kTileRows] = {};
        for (int i = 0; i < std::min(kTileRows, shape.rows - tile * kTileRows); i++) {
            const uint8_t* row = buffer + static_cast<size_t>(tile * kTileRows + i) * row_bytes;
            float parts[kMaxKept] = {};
            for (int g = 0; g < groups; g++) {
                const auto bit = static_cast<size_t>(g) * static_cast<size_t>(width);
                uint32_t word;
                std::memcpy(&word, row + bit / 8, 4);
                const Symbols& symbols = book.symbols[word >> bit % 8 & mask];
                const float* x = table.data() + static_cast<ptrdiff_t>(g) * 2 * m;
                for (int k = 0; k < n; k++) parts[k] += x[symbols[static_cast<size_t>(k)]];
            }
            for (int k = 0; k < n; k++) sums[i] += parts[k];
        }
        finish(tile, input, sums);
    }
}

}  // namespace

std::vector<Field> fields_of(Layout layout, int group) {
    constexpr Field::Rows bytes = Field::bytes, bits = Field::bits;
    const int entries = of(layout).entries, quarter = group / 4, nibble = group % 2 * 4;
    switch (layout) {
        case Layout::generic: return {};
        case Layout::single: return {{0, 4, 0, nibble, bytes}};
        case Layout::four: return {{0, 4, group % 4, group / 4 * 4, Field::quads}};
        case Layout::pair: return {{0, 4, 0, nibble, Field::pairs}, {4, 4, 1, nibble, Field::pairs}};
        case Layout::terms3: return {{0, 8, 64 * group, 0, bytes}, {8, 1, 512 + 8 * group, 0, bits}};
        case Layout::terms4:
            return {{0, 8, 64 * group, 0, bytes},
                    {8, 2, 512 + 64 * quarter, kRestAt[group % 4], bytes},
                    {10, 1, 640 + 8 * group, 0, bits}};
        default: break;
    }
    std::vector<Field> fields;
    if (layout == Layout::six || layout == Layout::seven) {
        // The codes of two groups are in what six bits of the others leave.
        if (group < 6) fields.push_back({0, 6, 64 * group, 0, bytes});
        for (int i = 0; group >= 6 && i < 3; i++) fields.push_back({2 * i, 2, 64 * (3 * (group - 6) + i), 6, bytes});
        if (layout == Layout::seven) fields.push_back({6, 1, 384 + 8 * group, 0, bits});
        return fields;
    }
    for (int k = 0; is_five(layout) && k < entries; k++) {
        const int at = kFiveBytes * k, shift = 5 * k, pair = at + 128 * (group - 5);
        if (group < 5) fields.push_back({shift, 5, at + 64 * group, 0, bytes});
        if (group >= 5) fields.push_back({shift, 3, pair, 5, bytes});
        if (group == 5 || group == 6) fields.push_back({shift + 3, 2, pair + 64, 5, bytes});
        for (int i = 0; group == 7 && i < 2; i++) fields.push_back({shift + 3 + i, 1, at + 64 + 128 * i, 7, bytes});
    }
    if (is_five(layout)) return fields;
    for (int k = 0; k < entries; k++)
        fields.push_back({4 * k, 4, half_byte_at(layout, k, group), is_upper(layout, k, group) ? 4 : 0, bytes});
    for (int i = 0; i < bits_of(layout); i++) fields.push_back({4 * entries + i, 1, bit_at(layout, i), 7 - group, bytes});
    return fields;
}

Layout Shape::layout() const {
    if (m == 4 && n == 1) return order == Order::small ? Layout::pair : Layout::six;
    if (m == 16 && n <= 3) {
        constexpr Layout wide[] = {Layout::wide1, Layout::wide2, Layout::wide3};
        constexpr Layout five[] = {Layout::five1, Layout::five2, Layout::five3};
        return (order == Order::small ? wide : five)[n - 1];
    }
    if (m != 8) return Layout::generic;
    constexpr Layout whole[] = {Layout::single, Layout::pair, Layout::triple, Layout::quad};
    constexpr Layout halved[] = {Layout::four, Layout::seven, Layout::terms3, Layout::terms4};
    return (order == Order::large ? halved : whole)[n - 1];
}

int codeword_bits(int n, int m) { return bits_for(binomial(m, n)) + n; }

int Shape::width() const { return codeword_bits(n, m); }

int Shape::groups() const {
    const Properties& properties = of(layout());
    const int groups = (columns + properties.columns - 1) / properties.columns;
    return (groups + properties.groups - 1) / properties.groups * properties.groups;
}

size_t Shape::file_row_bytes() const {
    return (static_cast<size_t>(codewords()) * static_cast<size_t>(width()) + 7) / 8;
}

size_t Shape::tile_bytes() const {
    const Properties& properties = of(layout());
    return static_cast<size_t>(groups() / properties.groups) * static_cast<size_t>(properties.unit_bytes);
}

size_t Shape::chunk_at(int tile, int chunk) const {
    const int first = tile / kBlockTiles * kBlockTiles, of_block = std::min(kBlockTiles, tiles() - first);
    const size_t before = static_cast<size_t>(of_block * chunk) * static_cast<size_t>(bytes_of(layout(), kChunkGroups));
    const int mine = (tile - first) * bytes_of(layout(), in_chunk(groups(), chunk));
    return static_cast<size_t>(first) * (tile_bytes() + kScalesOfTile) + before + static_cast<size_t>(mine);
}

size_t Shape::row_scale_at(int row) const {
    if (layout() == Layout::generic)
        return align(static_cast<size_t>(rows) * file_row_bytes() + kPadding) + sizeof(float) * static_cast<size_t>(row);
    const int codes = std::min(tiles(), (row / kTileRows / kBlockTiles + 1) * kBlockTiles);  // tiles before the scale
    return static_cast<size_t>(codes) * tile_bytes() + sizeof(float) * static_cast<size_t>(row);
}

size_t Shape::column_scales_at() const {
    if (layout() == Layout::generic) return row_scale_at(rows);
    return static_cast<size_t>(tiles()) * (tile_bytes() + kScalesOfTile);
}

size_t Shape::bytes() const {
    return column_scales_at() + (column_scales ? sizeof(float) * static_cast<size_t>(columns) : 0);
}

namespace {

struct Repacking {
    const Shape& shape;
    const Book& book;
    const uint8_t* codes;
    uint8_t* buffer;
    std::atomic<int> next{0};
    std::atomic<int64_t> wrong{-1};

    void run();
};

void Repacking::run() {
    const size_t row_bytes = shape.file_row_bytes();
    const int count = shape.codewords();
    std::vector<uint16_t> words(static_cast<size_t>(count)), of_groups(static_cast<size_t>(shape.groups()));
    for (int tile; (tile = next.fetch_add(1)) < shape.tiles();) {
        const int first = tile * kTileRows, rows = std::min(kTileRows, shape.rows - first);
        for (int row = 0; row < rows; row++) {
            read_row(codes + static_cast<size_t>(first + row) * row_bytes, row_bytes, count, shape.width(), words.data());
            const unsigned largest = *std::max_element(words.begin(), words.end());
            if (largest >= book.count) return wrong.store(largest);
            if (shape.layout() == Layout::generic) continue;
            codes_of(shape, book, words.data(), of_groups.data());
            put_row(shape, book, buffer, first + row, of_groups.data());
        }
    }
}

}  // namespace

// Memory that is read from end to end is read a quarter faster in pages of 2 MiB. It must not have been written yet.
void use_large_pages([[maybe_unused]] uint8_t* bytes, [[maybe_unused]] size_t count) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = 2 << 20;
    const auto first = reinterpret_cast<uintptr_t>(bytes), from = (first + page - 1) / page * page;
    const uintptr_t to = (first + count) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // may fail: pages are then small
#endif
}

int64_t repack(const Shape& shape, const uint8_t* codes, const float* row_scales, const float* column_scales,
               uint8_t* buffer, int threads) {
    Repacking repacking{shape, book_of(shape), codes, buffer};
    on_team(threads, [](void* data) { static_cast<Repacking*>(data)->run(); }, &repacking);
    if (shape.layout() == Layout::generic)
        std::memcpy(buffer, codes, static_cast<size_t>(shape.rows) * shape.file_row_bytes());
    constexpr size_t size = sizeof(float);
    for (int row = 0; row < shape.rows; row++) std::memcpy(buffer + shape.row_scale_at(row), row_scales + row, size);
    if (shape.column_scales)
        std::memcpy(buffer + shape.column_scales_at(), column_scales, size * static_cast<size_t>(shape.columns));
    return repacking.wrong;
}

namespace {

// Reads the codewords of a linear in kernel order, a row at a time.
struct Reader {
    const Shape& shape;
    const Book& book;
    const uint8_t* buffer;
    std::vector<uint16_t> words, codes;

    Reader(const Shape& s, const uint8_t* b)
        : shape(s),
          book(book_of(s)),
          buffer(b),
          words(static_cast<size_t>(s.codewords())),
          codes(static_cast<size_t>(s.groups())) {}

    void read(int row) {
        if (shape.layout() == Layout::generic) {
            const size_t bytes = shape.file_row_bytes();
            const uint8_t* source = buffer + static_cast<size_t>(row) * bytes;
            return read_row(source, bytes, shape.codewords(), shape.width(), words.data());
        }
        get_row(shape, book, buffer, row, codes.data());
        words_of(shape, book, codes.data(), words.data());
    }
};

}  // namespace

void unpack(const Shape& shape, const uint8_t* buffer, uint8_t* codes) {
    Reader reader(shape, buffer);
    for (int row = 0; row < shape.rows; row++, codes += shape.file_row_bytes()) {
        reader.read(row);
        write_row(codes, shape.codewords(), shape.width(), reader.words.data());
    }
}

void decode(const Shape& shape, const uint8_t* buffer, int first_row, int rows, float* weights) {
    Reader reader(shape, buffer);
    const float* c = column_scales_of(shape, buffer);
    std::fill_n(weights, static_cast<ptrdiff_t>(rows) * shape.columns, 0.0F);
    for (int row = first_row; row < first_row + rows; row++, weights += shape.columns) {
        reader.read(row);
        const float r = *row_scales_of(shape, buffer, row);
        for (int group = 0; group < shape.codewords(); group++) {
            const Symbols& symbols = reader.book.symbols[reader.words[static_cast<size_t>(group)]];
            for (int k = 0; k < shape.n; k++) {
                const int symbol = symbols[static_cast<size_t>(k)], column = group * shape.m + symbol % shape.m;
                const float scale = c ? r * c[column] : r;
                weights[column] = symbol / shape.m ? scale : -scale;
            }
        }
    }
}

void multiply(const Kernels& kernels, const Shape& shape, const uint8_t* buffer, Numbers inputs, int batch,
              Numbers bias, void* outputs, int threads) {
    if (batch == 0) return;
    const bool generic = shape.layout() == Layout::generic;
    const bool many = kernels.matrix && !generic && batch >= of(shape.layout()).matrix_from;
    const size_t tables = static_cast<size_t>(shape.groups()) * static_cast<size_t>(of(shape.layout()).table_bytes);
    const int together = generic ? 1 : std::min(batch, static_cast<int>(std::clamp<size_t>(kTableBudget / tables, 1, 32)));
    const auto work = shape.column_scales_at() * static_cast<size_t>(batch) / kWorkOfThread;
    const int parts = (batch + together - 1) / together * (generic ? shape.tiles() : shape.blocks());
    threads = worth_waking(threads, many ? shape.tiles() : parts, work);
    Product product{kernels, shape, buffer, inputs, batch, bias, outputs, together, {parts, threads}};
    if (many) return multiply_many(product, *kernels.matrix, threads);
    on_team(threads,
            [](void* data) {
                auto& shared = *static_cast<Product*>(data);
                shared.shape.layout() == Layout::generic ? shared.run_generic() : shared.run();
            },
            &product);
}

uint64_t read_memory(const Kernels& kernels, const uint8_t* bytes, size_t count, int threads) {
    static constexpr size_t part = 512 * 1024;
    struct Reading {
        const Kernels& kernels;
        const uint8_t* bytes;
        size_t count;
        Shares shares;
        std::atomic<uint64_t> result{0};
    } reading{kernels, bytes, count, {static_cast<int>((count + part - 1) / part), threads}};
    on_team(threads,
            [](void* data) {
                auto& shared = *static_cast<Reading*>(data);
                const int thread = shared.shares.join();
                for (int i; (i = shared.shares.take(thread)) >= 0;) {
                    const size_t at = static_cast<size_t>(i) * part;
                    shared.result ^= shared.kernels.read(shared.bytes + at, std::min(part, shared.count - at));
                }
            },
            &reading);
    return reading.result;
}

}  // namespace subbit
