#include "rows.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "codes.hpp"
#include "team.hpp"

namespace subbit {
namespace {

constexpr ptrdiff_t kBlockBytes = 32 * 1024;  // of the rows that a thread takes at a time: they stay in its cache

// All input vectors on their grids.
struct GridInputs {
    int columns, groups;
    std::vector<int16_t> values;
    std::vector<float> steps, sums;

    GridInputs(const RowMatrix& matrix, Numbers inputs, int batch);
    RowInputs of(int input) const {
        const auto group = static_cast<ptrdiff_t>(input) * groups;
        return {values.data() + static_cast<ptrdiff_t>(input) * columns, steps.data() + group, sums.data() + group};
    }
};

GridInputs::GridInputs(const RowMatrix& matrix, Numbers inputs, int batch)
    : columns(matrix.columns),
      groups(matrix.groups()),
      values(static_cast<size_t>(batch) * static_cast<size_t>(columns)),
      steps(static_cast<size_t>(batch) * static_cast<size_t>(groups)),
      sums(steps.size()) {
    std::vector<float> x(static_cast<size_t>(matrix.group_size));
    for (int input = 0; input < batch; input++) {
        for (int group = 0; group < groups; group++) {
            const int first = group * matrix.group_size, count = std::min(matrix.group_size, columns - first);
            const ptrdiff_t from = static_cast<ptrdiff_t>(input) * columns + first;
            inputs.copy(from, count, x.data());
            float largest = 0;
            bool finite = true;
            for (int i = 0; i < count; i++) {
                const float size = std::fabs(x[static_cast<size_t>(i)]);
                largest = std::max(largest, size);
                finite &= std::isfinite(size);
            }
            const auto at = static_cast<size_t>(input * groups + group);
            steps[at] = finite ? largest / kLargestInput : std::nanf("");
            if (!finite) continue;  // the products of this group are no numbers either
            const float inverse = largest > 0 ? kLargestInput / largest : 0;
            int sum = 0;
            for (int i = 0; i < count; i++) {
                const int value = static_cast<int>(std::nearbyint(x[static_cast<size_t>(i)] * inverse));
                values[static_cast<size_t>(from + i)] = static_cast<int16_t>(value);
                sum += value;
            }
            sums[at] = static_cast<float>(sum);
        }
    }
}

struct RowsProduct {
    const Kernels& kernels;
    const RowMatrix& matrix;
    const GridInputs& grid;
    int batch;
    Numbers bias;
    void* outputs;
    bool bfloat16;
    int rows_at_once;
    Shares shares;  // of blocks of `rows_at_once`

    void run();
};

void RowsProduct::run() {
    std::vector<float> sums(static_cast<size_t>(rows_at_once));
    const int thread = shares.join();
    for (int block; (block = shares.take(thread)) >= 0;) {
        const int first = block * rows_at_once;
        const int count = std::min(rows_at_once, matrix.rows - first);
        for (int input = 0; input < batch; input++) {
            kernels.rows(matrix, grid.of(input), first, count, sums.data());
            const ptrdiff_t at = static_cast<ptrdiff_t>(input) * matrix.rows + first;
            store(outputs, bfloat16, at, count, sums.data(), bias, first);
        }
    }
}

}  // namespace

void add_rows(const RowMatrix& matrix, const RowInputs& inputs, int first, int count, float* sums) {
    const int groups = matrix.groups(), size = matrix.group_size;
    for (int i = 0; i < count; i++) {
        const ptrdiff_t row = first + i;
        const uint8_t* codes = matrix.codes + row * matrix.row_bytes();
        float total = 0;
        for (int group = 0; group < groups; group++) {
            const int from = group * size, to = std::min(from + size, matrix.columns);
            int sum = 0;
            for (int j = from; j < to; j++) {
                const int code = matrix.bits == 8 ? codes[j] : codes[j / 2] >> j % 2 * 4 & 15;
                sum += code * inputs.values[j];
            }
            const ptrdiff_t at = row * groups + group;
            const float step = from_float16(matrix.scales[at]) * inputs.steps[group];
            total += step * (static_cast<float>(sum) - static_cast<float>(matrix.zeros[at]) * inputs.sums[group]);
        }
        sums[i] = total;
    }
}

void multiply_rows(const Kernels& kernels, const RowMatrix& matrix, Numbers inputs, int batch, Numbers bias,
                   void* outputs, int threads) {
    if (batch == 0) return;
    const GridInputs grid(matrix, inputs, batch);
    const int at_once = static_cast<int>(std::max<ptrdiff_t>(1, kBlockBytes / matrix.row_bytes()));
    const int blocks = (matrix.rows + at_once - 1) / at_once;
    threads = std::min(threads, blocks);
    RowsProduct product{kernels, matrix, grid, batch, bias, outputs, inputs.bfloat16, at_once, {blocks, threads}};
    on_team(threads, [](void* data) { static_cast<RowsProduct*>(data)->run(); }, &product);
}

}  // namespace subbit
