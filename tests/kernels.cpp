// Kernels against float64 and the portable ones, on random cases, where there is no processor for them to run
// tests/test_native.py on: tests/neon.sh builds this for an emulator, tests/amx.sh with matrix registers of its own.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "codes.hpp"

using namespace subbit;

namespace {

constexpr int kCases = 60;       // of each N:M, and of heads
constexpr double kBound = 2e-3;  // of the error, as in tests/test_native.py
constexpr double kSame = 1e-4;   // of the difference of two kernels with the same tables
constexpr double kBrief = 4e-3;  // more, where outputs are bfloat16

#ifdef SUBBIT_NEON
const Kernels& checked = neon_kernels;
constexpr int kMostInputs = 9;
#else
Kernels with_matrix() {
    Kernels kernels = avx512_kernels;
    kernels.matrix = &amx_matrix;
    return kernels;
}
const Kernels checked = with_matrix();
constexpr int kMostInputs = 70;  // enough for the matrix kernel, whatever the N:M
#endif
const Kernels* const kBoth[] = {&portable_kernels, &checked};

std::mt19937 engine(0);
int draw(int from, int to) { return std::uniform_int_distribution<int>(from, to)(engine); }
float normal() { return std::normal_distribution<float>()(engine); }

void require(bool good, const char* what) {
    if (good) return;
    std::printf("wrong: %s\n", what);
    std::exit(1);
}

// Normal numbers of either dtype.
struct Vector {
    bool bfloat16;
    std::vector<float> whole;
    std::vector<uint16_t> brief;

    Vector(bool b, int count) : bfloat16(b) {
        for (int i = 0; i < count; i++) {
            whole.push_back(normal());
            brief.push_back(to_bfloat16(whole.back()));
        }
    }
    void* data() { return bfloat16 ? static_cast<void*>(brief.data()) : whole.data(); }
    Numbers numbers() { return {data(), bfloat16}; }
};

double distance(Numbers x, const std::vector<double>& y) {
    double sum = 0;
    for (size_t i = 0; i < y.size(); i++) sum += std::pow(x[static_cast<ptrdiff_t>(i)] - y[i], 2);
    return std::sqrt(sum);
}

// `multiply(kernels, inputs, batch, bias, outputs, threads)` is compared with the product with dense weights, and of both
// kernels with each other.
template <class Multiply>
void check(const char* name, const std::vector<float>& weights, int rows, int columns, double bound,
           Multiply multiply) {
    const int batch = draw(1, kMostInputs);
    const bool brief = draw(0, 1);
    Vector inputs(brief, batch * columns), bias(draw(0, 1), rows);
    const Numbers added = draw(0, 1) ? bias.numbers() : Numbers{nullptr, false};
    std::vector<double> expected, portable;
    double typical = 0;  // a few outputs may be near zero by chance
    for (int i = 0; i < batch * rows; i++) {
        double sum = added.data ? added[i % rows] : 0;
        for (int j = 0; j < columns; j++) {
            const double x = inputs.numbers()[i / rows * columns + j];
            const double product = x * static_cast<double>(weights[static_cast<size_t>(i % rows * columns + j)]);
            sum += product;
            typical += product * product;
        }
        expected.push_back(sum);
    }
    const std::vector<float> nothing(expected.size());
    const double size = std::fmax(std::sqrt(typical), distance({nothing.data(), false}, expected));
    for (const Kernels* kernels : kBoth) {
        Vector outputs(brief, batch * rows);
        multiply(*kernels, inputs.numbers(), batch, added, outputs.data(), draw(1, 3));
        require(distance(outputs.numbers(), expected) <= (kBound + brief * kBrief) * size, name);
        if (kernels == &portable_kernels) {
            for (int i = 0; i < batch * rows; i++) portable.push_back(outputs.numbers()[i]);
        }
        require(distance(outputs.numbers(), portable) <= (bound + brief * kBrief) * size, name);
    }
}

// Codewords of the file, below `count`.
std::vector<uint8_t> random_codes(const Shape& shape, int count) {
    const size_t width = static_cast<size_t>(shape.width());
    std::vector<uint8_t> codes(static_cast<size_t>(shape.rows) * shape.file_row_bytes());
    for (int row = 0; row < shape.rows; row++) {
        uint8_t* bytes = codes.data() + static_cast<size_t>(row) * shape.file_row_bytes();
        for (size_t bit = 0; bit < width * static_cast<size_t>(shape.codewords()); bit += width) {
            const int word = draw(0, count - 1);
            for (size_t i = 0; i < width; i++)
                bytes[(bit + i) / 8] |= static_cast<uint8_t>((word >> i & 1) << (bit + i) % 8);
        }
    }
    return codes;
}

// In the order of both kernels, given back as they were, decoded alike, and multiplied.
void check_codes(int n, int m) {
    int count = 1;
    for (int i = 0; i < n; i++) count = count * (m - i) / (i + 1);
    Shape shape{draw(1, 200), m * draw(1, 70), n, m, draw(0, 1) == 1, Order::small};
    const std::vector<uint8_t> codes = random_codes(shape, count << n);
    const Vector rows(false, shape.rows), columns(false, shape.columns);
    std::vector<uint8_t> packed[2];
    std::vector<float> weights[2];
    Layout layouts[2];
    for (int i = 0; i < 2; i++) {
        shape.order = kBoth[i]->order;
        layouts[i] = shape.layout();
        packed[i].resize(shape.bytes());
        const float *r = rows.whole.data(), *c = columns.whole.data();
        require(repack(shape, codes.data(), r, c, packed[i].data(), 2) == -1, "repack");
        weights[i].resize(static_cast<size_t>(shape.rows) * static_cast<size_t>(shape.columns));
        decode(shape, packed[i].data(), 0, shape.rows, weights[i].data());
        std::vector<uint8_t> again(codes.size());
        unpack(shape, packed[i].data(), again.data());
        require(again == codes && weights[i] == weights[0], "unpack, decode");
    }
    char name[32];
    std::snprintf(name, sizeof name, "%d:%d", n, m);
    const double bound = layouts[0] == layouts[1] ? kSame : 2 * kBound;
    check(name, weights[0], shape.rows, shape.columns, bound, [&](const Kernels& kernels, auto... rest) {
        shape.order = kernels.order;
        multiply(kernels, shape, packed[&kernels == kBoth[1]].data(), rest...);
    });
}

void check_head() {
    const int bits = 4 * draw(1, 2), size = draw(0, 3) ? 16 * draw(1, 16) : draw(1, 256);
    const int columns = draw(0, 3) ? 16 * draw(1, 40) : draw(1, 600);
    RowMatrix matrix{nullptr, nullptr, nullptr, draw(1, 200), columns, bits, size};
    std::vector<uint8_t> codes(static_cast<size_t>(matrix.rows * matrix.row_bytes())), zeros;
    std::vector<uint16_t> scales;
    for (uint8_t& code : codes) code = static_cast<uint8_t>(draw(0, 255));
    for (int i = 0; i < matrix.rows * matrix.groups(); i++) {
        zeros.push_back(static_cast<uint8_t>(draw(0, (1 << bits) - 1)));
        scales.push_back(static_cast<uint16_t>(draw(0, 1) << 15 | draw(0, 0x3BFF)));  // below 1
    }
    matrix.codes = codes.data(), matrix.zeros = zeros.data(), matrix.scales = scales.data();
    std::vector<float> weights;
    for (int i = 0; i < matrix.rows * matrix.columns; i++) {
        const int row = i / matrix.columns, column = i % matrix.columns;
        const size_t group = static_cast<size_t>(row * matrix.groups() + column / matrix.group_size);
        const uint8_t* bytes = codes.data() + row * matrix.row_bytes();
        const int code = bits == 8 ? bytes[column] : bytes[column / 2] >> column % 2 * 4 & 15;
        weights.push_back(from_float16(scales[group]) * static_cast<float>(code - zeros[group]));
    }
    check("head", weights, matrix.rows, matrix.columns, kSame,
          [&](const Kernels& kernels, auto... rest) { multiply_rows(kernels, matrix, rest...); });
}

}  // namespace

int main() {
    constexpr int kinds[][2] = {{1, 4}, {1, 8}, {2, 8}, {3, 8}, {4, 8}, {1, 16}, {2, 16}, {3, 16}, {2, 4}, {4, 16}};
    for (int i = 0; i < kCases; i++) {
        for (const auto& kind : kinds) check_codes(kind[0], kind[1]);
        check_head();
    }
    std::printf("%d random cases of each kind agree\n", kCases);
}
