#include "grouped.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "codes.hpp"
#include "team.hpp"

namespace subbit {
namespace {

constexpr int kShareRows = 16;             // that a thread takes at a time
constexpr size_t kWorkOfThread = 1 << 15;  // weights, that are worth waking another thread for

// Bits of the kept columns of a group, moved to their columns: entry `rank << n | bits`, as codewords are.
struct Spread {
    std::vector<uint16_t> columns;  // zeros where no mask has the rank

    Spread(int n, int m) : columns(size_t{1} << codeword_bits(n, m)) {
        size_t at = 0;
        for (unsigned mask = 0; mask < 1U << m; mask++) {
            if (__builtin_popcount(mask) != n) continue;
            for (unsigned bits = 0; bits < 1U << n; bits++) {
                unsigned rest = bits, moved = 0;
                for (int column = 0; column < m; column++) {
                    if (!(mask >> column & 1)) continue;
                    moved |= (rest & 1) << column;
                    rest >>= 1;
                }
                columns[at++] = static_cast<uint16_t>(moved);
            }
        }
    }
};

const Spread& spread_of(const GroupedMatrix& matrix) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, std::unique_ptr<Spread>> spreads;
    const std::lock_guard<std::mutex> guard(mutex);
    std::unique_ptr<Spread>& spread = spreads[{matrix.n, matrix.m}];
    if (!spread) spread = std::make_unique<Spread>(matrix.n, matrix.m);
    return *spread;
}

// Bits in order, lowest first, in memory that may be read a few bytes over their end.
unsigned read_bits(const uint8_t* bytes, size_t at, int width) {
    uint32_t four;
    std::memcpy(&four, bytes + at / 8, 4);
    return four >> at % 8 & ((1U << width) - 1);
}

// Five symbols of radix 3 of a byte: their lower bits, and their upper bits from bit 8 on.
std::array<uint16_t, 256> make_digits() {
    std::array<uint16_t, 256> digits{};
    for (unsigned byte = 0; byte < 256; byte++) {
        unsigned rest = byte;
        for (int i = 0; i < 5; i++, rest /= 3) {
            const unsigned digit = rest % 3;
            digits[byte] = static_cast<uint16_t>(digits[byte] | (digit & 1) << i | digit >> 1 << (8 + i));
        }
    }
    return digits;
}

// The lower and upper bits of symbols, some at a time.
struct TwoBits {
    unsigned lower, upper;
};

struct NoSymbols {
    static constexpr bool any = false, upper = false;
    explicit NoSymbols(const uint8_t*) {}
    TwoBits next(int) { return {0, 0}; }
};

struct Binary {
    static constexpr bool any = true, upper = false;
    const uint8_t* bytes;
    size_t at = 0;

    explicit Binary(const uint8_t* source) : bytes(source) {}
    TwoBits next(int count) {
        at += static_cast<size_t>(count);
        return {read_bits(bytes, at - static_cast<size_t>(count), count), 0};
    }
};

struct Ternary {
    static constexpr bool any = true, upper = true;
    const uint8_t* bytes;
    const std::array<uint16_t, 256>& digits;
    unsigned lower_bits = 0, upper_bits = 0;
    int there = 0;

    explicit Ternary(const uint8_t* source) : bytes(source), digits(table()) {}
    static const std::array<uint16_t, 256>& table() {
        static const std::array<uint16_t, 256> digits = make_digits();
        return digits;
    }
    TwoBits next(int count) {
        for (; there < count; there += 5) {
            const unsigned five = digits[*bytes++];
            lower_bits |= (five & 31) << there;
            upper_bits |= five >> 8 << there;
        }
        const unsigned all = (1U << count) - 1;
        const TwoBits result{lower_bits & all, upper_bits & all};
        lower_bits >>= count, upper_bits >>= count, there -= count;
        return result;
    }
};

// Where a block of every row is.
struct Place {
    int columns, byte;  // byte: of the bits of its columns
    size_t codes, symbols, residuals;
};

// Reads rows, block by block.
class Reader {
   public:
    Reader(const Kernels& kernels, const GroupedMatrix& matrix);
    void begin(int row);
    // weights[0 ..] of a block of the row, column scales not included, padded with zeros to kLevelColumns.
    void read(int block, float* weights);
    bool met_wrong() const { return wrong_ != 0; }  // a symbol that its column cannot have

   private:
    template <class Symbols>
    void read_masks(const Place& place);
    template <class Symbols, int m>
    void read_columns(const Place& place);
    void read_residuals(const Place& place);
    void read_levels(int block);

    const Kernels& kernels_;
    const GroupedMatrix& matrix_;
    const Spread* spread_;  // null: every column is kept, and codewords are signs
    std::vector<Place> places_;
    int width_, radix_, salient_regions_, scale_count_, row_ = 0;
    std::vector<uint8_t> codes_, symbols_, salient_;  // of the row; bits of all columns; all with a few bytes more
    LevelBits bits_{};
    uint64_t wrong_ = 0;
    float levels_[kLevels];
};

constexpr size_t kOver = 8;  // bytes, that are read over the end

int popcount(const uint8_t* bytes, int count) {
    int sum = 0;
    for (int i = 0; i < count; i++) sum += __builtin_popcount(bytes[i]);
    return sum;
}

Reader::Reader(const Kernels& kernels, const GroupedMatrix& matrix)
    : kernels_(kernels),
      matrix_(matrix),
      spread_(matrix.n < matrix.m ? &spread_of(matrix) : nullptr),
      width_(codeword_bits(matrix.n, matrix.m)),
      radix_(!matrix.symbols ? 1 : std::max(matrix.regions, 2)),
      salient_regions_(!matrix.salient ? 0 : matrix.residuals ? 2 : 1),
      salient_(static_cast<size_t>(matrix.columns) / 8 + kOver) {
    if (matrix.salient) std::memcpy(salient_.data(), matrix.salient, static_cast<size_t>(matrix.columns + 7) / 8);
    size_t codes = 0, symbols = 0, residuals = 0;
    for (int block = 0; block < matrix.blocks(); block++) {
        const int first = block * matrix.block_size, columns = matrix.columns_of(block), groups = columns / matrix.m;
        places_.push_back({columns, first / 8, codes, symbols, residuals});
        const auto kept = static_cast<size_t>(groups * matrix.n);
        codes += static_cast<size_t>(groups * width_ + 7) / 8;
        symbols += radix_ == 1 ? 0 : radix_ == 2 ? (kept + 7) / 8 : (kept + 4) / 5;
        if (!matrix.residuals) continue;
        residuals += static_cast<size_t>(popcount(salient_.data() + first / 8, (columns + 7) / 8) + 7) / 8;
    }
    codes_.resize(codes + kOver);
    symbols_.resize(symbols + kOver);
    const int shifts = matrix.column_scales ? 0 : 1;
    scale_count_ = (1 + shifts) * matrix.regions + (2 + shifts) * salient_regions_;
}

void Reader::begin(int row) {
    row_ = row;
    const size_t codes = codes_.size() - kOver, symbols = symbols_.size() - kOver;
    std::memcpy(codes_.data(), matrix_.codes + static_cast<size_t>(row) * codes, codes);
    if (symbols) std::memcpy(symbols_.data(), matrix_.symbols + static_cast<size_t>(row) * symbols, symbols);
}

void Reader::read(int block, float* weights) {
    const Place& place = places_[static_cast<size_t>(block)];
    bits_.salient = salient_.data() + place.byte;
    if (radix_ == 1) {
        read_masks<NoSymbols>(place);
    } else {
        radix_ == 2 ? read_masks<Binary>(place) : read_masks<Ternary>(place);
    }
    if (matrix_.residuals) read_residuals(place);
    read_levels(block);
    kernels_.levels(bits_, padded(place.columns), levels_, weights);
}

template <class Symbols>
void Reader::read_masks(const Place& place) {
    switch (spread_ ? matrix_.m : 0) {
        case 0: return read_columns<Symbols, 0>(place);
        case 4: return read_columns<Symbols, 4>(place);
        case 8: return read_columns<Symbols, 8>(place);
        default: return read_columns<Symbols, 16>(place);
    }
}

// Groups of m columns, or where every column is kept, which is m = 0, eight at a time.
template <class Symbols, int m>
void Reader::read_columns(const Place& place) {
    constexpr int step = m ? m : 8;
    const uint16_t* spread = m ? spread_->columns.data() : nullptr;
    const uint8_t* codes = codes_.data() + place.codes;
    const int n = matrix_.n, width = width_;
    const unsigned ones = m ? (1U << n) - 1 : 0;
    Symbols symbols(symbols_.data() + place.symbols);
    size_t at = 0;
    for (int first = 0; first < place.columns; first += 64) {
        const int end = std::min(64, place.columns - first);
        uint64_t kept = 0, positive = 0, lower = 0, upper = 0;
        for (int column = 0; column < end; column += step) {
            const auto put = [column](uint64_t& plane, unsigned bits) { plane |= uint64_t{bits} << column; };
            if (m) {
                const unsigned word = read_bits(codes, at, width), mask = word & ~ones;
                const TwoBits two = symbols.next(n);
                put(kept, spread[mask | ones]);
                put(positive, spread[word]);
                if (Symbols::any) put(lower, spread[mask | two.lower]);
                if (Symbols::upper) put(upper, spread[mask | two.upper]);
                at += static_cast<size_t>(width);
            } else {
                const int count = std::min(8, end - column);
                const unsigned all = (1U << count) - 1;
                const TwoBits two = symbols.next(count);
                put(kept, all);
                put(positive, *codes++ & all);
                put(lower, two.lower);
                put(upper, two.upper);
            }
        }
        uint64_t salient;
        std::memcpy(&salient, bits_.salient + first / 8, 8);
        if (Symbols::upper) wrong_ |= upper & salient;
        if (Symbols::any && matrix_.regions == 1) wrong_ |= lower & ~salient;
        std::memcpy(bits_.kept + first / 8, &kept, 8);
        std::memcpy(bits_.positive + first / 8, &positive, 8);
        std::memcpy(bits_.first + first / 8, &lower, 8);
        std::memcpy(bits_.second + first / 8, &upper, 8);
    }
}

// The residual signs of the salient columns, which have two regions of their own.
void Reader::read_residuals(const Place& place) {
    const uint8_t* source = matrix_.residuals + static_cast<ptrdiff_t>(row_) * matrix_.residual_bytes + place.residuals;
    int at = 0;
    for (int byte = 0; byte < (place.columns + 7) / 8; byte++) {
        unsigned signs = 0;
        for (unsigned rest = bits_.salient[byte]; rest; rest &= rest - 1, at++) {
            if (source[at / 8] >> at % 8 & 1) signs |= rest & ~(rest - 1);
        }
        bits_.second[byte] = static_cast<uint8_t>(bits_.second[byte] | signs);
    }
}

// In the order of operations of docs/format.md.
void Reader::read_levels(int block) {
    const int regions = matrix_.regions;
    const uint16_t* numbers = matrix_.scales + (static_cast<ptrdiff_t>(row_) * matrix_.blocks() + block) * scale_count_;
    const bool shifts = !matrix_.column_scales;
    std::fill_n(levels_, kLevels, 0.0F);
    for (int r = 0; r < regions; r++) {
        const float shift = shifts ? from_float16(numbers[r]) : 0.0F;
        const float scale = from_float16(numbers[shifts ? regions + r : r]);
        levels_[2 * r] = shift - scale;
        levels_[2 * r + 1] = shift + scale;
    }
    numbers += shifts ? 2 * regions : regions;
    for (int r = 0; r < salient_regions_; r++) {
        const float shift = shifts ? from_float16(*numbers++) : 0.0F;
        const float scale = from_float16(*numbers++), residual = from_float16(*numbers++);
        // the symbol is the region where there are two, else the residual sign
        float* own = levels_ + 8 + (salient_regions_ == 2 ? 2 * r : 0);
        const int plus = salient_regions_ == 2 ? 4 : 2;
        for (int sign = 0; sign < 2; sign++) {
            const float once = sign ? shift + scale : shift - scale;
            own[sign] = once - residual;
            own[sign + plus] = once + residual;
        }
    }
}

// Sixteen sums at a time, which compilers make vectors of.
void add_products(const float* weights, const float* inputs, int count, float* sums) {
    float own[kLevelColumns];
    std::copy_n(sums, kLevelColumns, own);
    for (int j = 0; j < count; j += kLevelColumns) {
        for (int i = 0; i < kLevelColumns; i++) own[i] += weights[j + i] * inputs[j + i];
    }
    std::copy_n(own, kLevelColumns, sums);
}

// What the threads of a call share: numbers of kShareRows rows each.
struct Rows {
    const Kernels& kernels;
    const GroupedMatrix& matrix;
    int first_row, rows;
    Shares shares;
    std::atomic<bool> wrong{false};

    // Calls `work` with the rows that this thread takes, and their reader.
    template <class Work>
    void run(const Work& work) {
        Reader reader(kernels, matrix);
        const int thread = shares.join();
        for (int number; (number = shares.take(thread)) >= 0;) {
            const int first = number * kShareRows, count = std::min(kShareRows, rows - first);
            work(reader, first_row + first, count);
        }
        if (reader.met_wrong()) wrong = true;
    }
};

int shares_of(int rows) { return (rows + kShareRows - 1) / kShareRows; }

int threads_for(const GroupedMatrix& matrix, int rows, int threads) {
    const auto work = static_cast<size_t>(rows) * static_cast<size_t>(matrix.columns) / kWorkOfThread;
    return worth_waking(threads, shares_of(rows), work);
}

struct Decoding {
    Rows rows;
    float* weights;

    void run();
};

void Decoding::run() {
    const GroupedMatrix& matrix = rows.matrix;
    float block[kLargestBlock];
    rows.run([&](Reader& reader, int first, int count) {
        for (int row = first; row < first + count; row++) {
            float* own = weights + static_cast<ptrdiff_t>(row - rows.first_row) * matrix.columns;
            reader.begin(row);
            for (int b = 0; b < matrix.blocks(); b++) {
                reader.read(b, block);
                const int from = b * matrix.block_size, columns = matrix.columns_of(b);
                for (int j = 0; j < columns; j++) {
                    const float scale = matrix.column_scales ? from_float16(matrix.column_scales[from + j]) : 1.0F;
                    own[from + j] = block[j] * scale;
                }
            }
        }
    });
}

struct Multiplication {
    Rows rows;
    const std::vector<float>& inputs;  // (batch x padded columns), times the column scales
    int batch;
    Numbers bias;
    void* outputs;
    bool bfloat16;

    void run();
};

void Multiplication::run() {
    const GroupedMatrix& matrix = rows.matrix;
    const auto stride = static_cast<ptrdiff_t>(inputs.size()) / batch;
    float block[kLargestBlock];
    std::vector<float> sums(static_cast<size_t>(batch * kLevelColumns)), results(static_cast<size_t>(batch * kShareRows));
    rows.run([&](Reader& reader, int first, int count) {
        for (int row = 0; row < count; row++) {
            std::fill(sums.begin(), sums.end(), 0.0F);
            reader.begin(first + row);
            for (int b = 0; b < matrix.blocks(); b++) {
                reader.read(b, block);
                const int columns = padded(matrix.columns_of(b));
                const float* x = inputs.data() + static_cast<ptrdiff_t>(b) * matrix.block_size;
                for (int i = 0; i < batch; i++) {
                    add_products(block, x + i * stride, columns, sums.data() + static_cast<ptrdiff_t>(i) * kLevelColumns);
                }
            }
            for (int i = 0; i < batch; i++) {
                const float* own = sums.data() + static_cast<ptrdiff_t>(i) * kLevelColumns;
                float sum = 0;
                for (int j = 0; j < kLevelColumns; j++) sum += own[j];
                results[static_cast<size_t>(i * kShareRows + row)] = sum;
            }
        }
        for (int i = 0; i < batch; i++) {
            const ptrdiff_t at = static_cast<ptrdiff_t>(i) * matrix.rows + first;
            store(outputs, bfloat16, at, count, results.data() + static_cast<ptrdiff_t>(i) * kShareRows, bias, first);
        }
    });
}

std::vector<float> scaled_inputs(const GroupedMatrix& matrix, Numbers inputs, int batch) {
    const auto stride = static_cast<size_t>(padded(matrix.columns));
    std::vector<float> values(static_cast<size_t>(batch) * stride);
    for (int i = 0; i < batch; i++) {
        float* own = values.data() + static_cast<size_t>(i) * stride;
        inputs.copy(static_cast<ptrdiff_t>(i) * matrix.columns, matrix.columns, own);
        for (int j = 0; matrix.column_scales && j < matrix.columns; j++) own[j] *= from_float16(matrix.column_scales[j]);
    }
    return values;
}

}  // namespace

void look_levels_up(const LevelBits& bits, int columns, const float* levels, float* weights) {
    for (int j = 0; j < columns; j++) {
        const auto bit = [&](const uint8_t* plane) { return plane[j / 8] >> j % 8 & 1; };
        const int level = bit(bits.positive) | bit(bits.first) << 1 | bit(bits.second) << 2 | bit(bits.salient) << 3;
        weights[j] = bit(bits.kept) ? levels[level] : 0.0F;
    }
}

bool decode_grouped(const Kernels& kernels, const GroupedMatrix& matrix, int first_row, int rows, float* weights,
                    int threads) {
    threads = threads_for(matrix, rows, threads);
    Decoding decoding{{kernels, matrix, first_row, rows, {shares_of(rows), threads}}, weights};
    on_team(threads, [](void* data) { static_cast<Decoding*>(data)->run(); }, &decoding);
    return !decoding.rows.wrong;
}

bool multiply_grouped(const Kernels& kernels, const GroupedMatrix& matrix, Numbers inputs, int batch, Numbers bias,
                      void* outputs, int threads) {
    if (batch == 0) return true;
    const std::vector<float> values = scaled_inputs(matrix, inputs, batch);
    threads = threads_for(matrix, matrix.rows, threads);
    Multiplication product{{kernels, matrix, 0, matrix.rows, {shares_of(matrix.rows), threads}}, values, batch, bias,
                           outputs, inputs.bfloat16};
    on_team(threads, [](void* data) { static_cast<Multiplication*>(data)->run(); }, &product);
    return !product.rows.wrong;
}

}  // namespace subbit
