// What heads do to sequences whose positions touch: short convolutions of rows, and products of queries and keys weighed
// by lag, forwards and backwards, each in one pass.
#pragma once

#include "step.h"

namespace layerswap {

constexpr int64_t kPiece = 512;     // positions of a row that are widened at a time
constexpr int64_t kMostTaps = 64;

// Numbers `first` to first + count of a row as float32, zeros outside of the row.
template <class T>
inline void widen(const T* row, int64_t length, int64_t first, int64_t count, float* to) {
  const int64_t from = std::clamp<int64_t>(first, 0, length), until = std::clamp<int64_t>(first + count, from, length);
  std::fill(to, to + (from - first), 0.0f);
  for (int64_t t = from; t < until; ++t) to[t - first] = number(row[t]);
  std::fill(to + (until - first), to + count, 0.0f);
}

// y[t] = bias + sum_lag w[taps - 1 - lag] u[t - lag] of a row. Fixed: taps, or 0 for any.
template <int Fixed, class T>
inline void convolve_row(const T* u, int64_t length, const float* w, float bias, int64_t any, T* y) {
  const int64_t taps = Fixed ? Fixed : any;
  float before[kPiece + kMostTaps + kLanes];
  for (int64_t start = 0; start < length; start += kPiece) {
    const int64_t count = std::min(kPiece, length - start);
    widen(u, length, start - taps + 1, rounded_up(count) + taps - 1, before);
    for (int64_t t = 0; t < count; t += kLanes) {
      Vec sum = Vec{} + bias;
      for (int64_t k = 0; k < taps; ++k) sum += w[k] * read(before + t + k);
      write_some(y + start + t, sum, count - t);
    }
  }
}

// Its adjoint: du, and what this row adds to the gradients of taps and bias.
template <int Fixed, class G, class T>
inline void convolve_row_backward(const G* grad, const T* u, int64_t length, const float* w, int64_t any, T* du,
                                  float* dw, float* dbias) {
  const int64_t taps = Fixed ? Fixed : any;
  float after[kPiece + kMostTaps + kLanes], before[kPiece + kMostTaps + kLanes];
  Vec products[Fixed ? Fixed : kMostTaps] = {}, ones{};
  for (int64_t start = 0; start < length; start += kPiece) {
    const int64_t count = std::min(kPiece, length - start), whole = rounded_up(count);
    // No gradient of this piece lies behind `count`, but the next one's do: du needs them, the sums must not.
    widen(grad, length, start, whole + taps - 1, after);
    widen(u, length, start - taps + 1, whole + taps - 1, before);
    for (int64_t t = 0; t < count; t += kLanes) {
      Vec sum{};
      for (int64_t k = 0; k < taps; ++k) sum += w[k] * read(after + t + taps - 1 - k);
      write_some(du + start + t, sum, count - t);
      const Vec now = read_some(after + t, count - t);
      for (int64_t k = 0; k < taps; ++k) products[k] += now * read(before + t + k);
      ones += now;
    }
  }
  for (int64_t k = 0; k < taps; ++k) dw[k] += total(products[k]);
  *dbias += total(ones);
}

// One row of weighed products over `keys` keys, of which it sees `seen`: f(product) h(lag), 0 for those behind. `lags` is
// h reversed, from the lag of the first key on.
template <class T>
inline void weigh_row(Power f, const float* lags, int64_t seen, int64_t keys, T* row) {
  for (int64_t s = 0; s < seen; s += kLanes)
    write_some(row + s, f.of(read_some(row + s, seen - s)) * read_some(lags + s, seen - s), seen - s);
  std::fill(row + seen, row + keys, T{});
}

// Its adjoint: products become weighed ones, `grad` of these that of the products; adds to that of the lags.
template <class T>
inline void weigh_row_backward(Power f, const float* lags, int64_t seen, int64_t keys, T* row, T* grad, float* dlags) {
  for (int64_t s = 0; s < seen; s += kLanes) {
    const int64_t count = seen - s;
    Vec slope;
    const Vec value = f.with_slope(read_some(row + s, count), slope), h = read_some(lags + s, count);
    const Vec by = read_some(grad + s, count);
    write_some(dlags + s, read_some(dlags + s, count) + by * value, count);
    write_some(row + s, value * h, count);
    write_some(grad + s, by * h * slope, count);
  }
  std::fill(row + seen, row + keys, T{});
  std::fill(grad + seen, grad + keys, T{});
}

}  // namespace layerswap
