// Products of few rows with a matrix that is read once, as decoding needs them: libraries are made for many rows.
#pragma once

#include "rows.h"

namespace layerswap {

#define UNROLLED _Pragma("GCC unroll 16")  // else sums travel through memory

constexpr int64_t kMostRows = 8;

// y[row][output] = x[row] . w[output] + bias[output] of Rows rows and Outputs outputs, sixteen sums at most; rows of x and
// w are `inputs` long, those of y `stride` apart.
template <int Rows, int Outputs>
inline void few_rows_tile(const float* x, const float* w, const float* bias, int64_t inputs, float* y, int64_t stride) {
  static_assert(Rows * Outputs <= kLanes);
  Vec sums[kLanes] = {};
  for (int64_t k = 0; k < inputs; k += kLanes) {
    const int64_t count = inputs - k;
    Vec by[Outputs];
    UNROLLED for (int i = 0; i < Outputs; ++i) by[i] = read_some(w + i * inputs + k, count);
    UNROLLED for (int row = 0; row < Rows; ++row) {
      const Vec from = read_some(x + row * inputs + k, count);
      UNROLLED for (int i = 0; i < Outputs; ++i) sums[row * Outputs + i] += from * by[i];
    }
  }
  Vec turned[kLanes];
  UNROLLED for (int i = 0; i < kLanes; ++i) turned[i] = sums[i];
  transpose(turned);
  Vec all = turned[0];
  for (int lane = 1; lane < kLanes; ++lane) all += turned[lane];
  for (int row = 0; row < Rows; ++row)
    for (int i = 0; i < Outputs; ++i) y[row * stride + i] = all[row * Outputs + i] + (bias ? bias[i] : 0.0f);
}

// Outputs `first` to before `last` of all rows.
template <int Rows>
inline void few_rows(const float* x, const float* w, const float* bias, int64_t inputs, int64_t first, int64_t last,
                     float* y, int64_t stride) {
  constexpr int kOutputs = kLanes / Rows;
  int64_t i = first;
  for (; i + kOutputs <= last; i += kOutputs)
    few_rows_tile<Rows, kOutputs>(x, w + i * inputs, bias ? bias + i : nullptr, inputs, y + i, stride);
  for (; i < last; ++i) few_rows_tile<Rows, 1>(x, w + i * inputs, bias ? bias + i : nullptr, inputs, y + i, stride);
}

}  // namespace layerswap
