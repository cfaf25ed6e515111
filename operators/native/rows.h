// Sixteen channels as vectors of sixteen and back, stored either way, and their short convolution.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "fft.h"

namespace layerswap {

// The first `count` of sixteen.
template <class T>
FORCED Vec read_some(const T* from, int64_t count) {
  if (count >= kLanes) return read(from);
  T part[16] = {};
  std::memcpy(part, from, count * sizeof(T));
  return read(part);
}

template <class T>
FORCED void write_some(T* to, Vec v, int64_t count) {
  if (count >= kLanes) return write(to, v);
  T part[16];
  write(part, v);
  std::memcpy(to, part, count * sizeof(T));
}

// f of a product and its derivative: the product itself, or (1 + product / degree)^degree.
struct Power {
  int64_t degree;  // a power of two, or 0

  FORCED Vec of(Vec x) const {
    if (degree == 0) return x;
    Vec base = 1.0f + x * (1.0f / degree);
    for (int64_t power = 1; power < degree; power *= 2) base *= base;
    return base;
  }
  FORCED Vec with_slope(Vec x, Vec& slope) const {
    slope = Vec{} + 1.0f;
    if (degree == 0) return x;
    const Vec base = 1.0f + x * (1.0f / degree);
    Vec square = base;
    for (int64_t power = 1; power < degree; power *= 2, square *= square) slope *= square;
    return slope * base;
  }
};

// Up to sixteen channels of a sequence. Either the positions of a channel touch, or the channels of a position.
template <class T>
struct Rows {
  T* data;
  int64_t channel, position;  // strides
  int64_t lanes;
};

constexpr int64_t kPrefetch = 24;  // positions: where the channels of a position touch, each lies on a page of its own

// Positions start to start + count, at most sixteen, each as a vector of channels; zeros where there is nothing.
template <class T>
inline void load_tile(Rows<const T> rows, int64_t start, int64_t count, Vec* tile) {
  if (rows.channel == 1) {
    const T* from = rows.data + start * rows.position;
    for (int64_t k = 0; k < kLanes; ++k, from += rows.position) {
      if (k < count && rows.lanes == kLanes) {
        __builtin_prefetch(from + kPrefetch * rows.position);
        tile[k] = read(from);
      } else {
        T part[16] = {};
        if (k < count) std::memcpy(part, from, rows.lanes * sizeof(T));
        tile[k] = read(part);
      }
    }
    return;
  }
  Vec v[16] = {};
  if (count == kLanes && rows.lanes == kLanes) {
    for (int lane = 0; lane < 16; ++lane) v[lane] = read(rows.data + lane * rows.channel + start);
  } else {
    for (int64_t lane = 0; lane < rows.lanes; ++lane) {
      T part[16] = {};
      std::memcpy(part, rows.data + lane * rows.channel + start, count * sizeof(T));
      v[lane] = read(part);
    }
  }
  transpose(v);
  for (int k = 0; k < 16; ++k) tile[k] = v[k];
}

template <class T>
inline void store_tile(Rows<T> rows, int64_t start, int64_t count, const Vec* tile) {
  if (rows.channel == 1) {
    T* to = rows.data + start * rows.position;
    for (int64_t k = 0; k < count; ++k, to += rows.position) {
      T part[16];
      if (rows.lanes == kLanes) write(to, tile[k]);
      else write(part, tile[k]), std::memcpy(to, part, rows.lanes * sizeof(T));
    }
    return;
  }
  Vec v[16];
  for (int k = 0; k < 16; ++k) v[k] = tile[k];
  transpose(v);
  if (count == kLanes && rows.lanes == kLanes) {
    for (int lane = 0; lane < 16; ++lane) write(rows.data + lane * rows.channel + start, v[lane]);
    return;
  }
  for (int64_t lane = 0; lane < rows.lanes; ++lane) {
    T part[16];
    write(part, v[lane]);
    std::memcpy(rows.data + lane * rows.channel + start, part, count * sizeof(T));
  }
}

// Numbers of one position, in the other's precision.
template <class T>
inline void store_row(const float* from, int64_t count, T* to) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t part = std::min(kLanes, count - c);
    T rounded[16];
    float exact[16] = {};
    std::copy_n(from + c, part, exact);
    write(rounded, read(exact));
    std::copy_n(rounded, part, to + c);
  }
}

// A few numbers of every channel, `stride` apart, as vectors: taps and biases.
inline void gather(const float* from, int64_t stride, int64_t lanes, int64_t count, Vec* to) {
  for (int64_t k = 0; k < count; ++k) {
    float part[16] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) part[lane] = from[lane * stride + k];
    to[k] = read(part);
  }
}

inline void scatter(const Vec* from, int64_t stride, int64_t lanes, int64_t count, float* to) {
  for (int64_t k = 0; k < count; ++k)
    for (int64_t lane = 0; lane < lanes; ++lane) to[lane * stride + k] = from[k][lane];
}

// Depthwise causal convolution of sixteen rows, sixteen positions at every `next`, zero where `mask` is.
template <class T>
class ShortConv {
 public:
  // `taps` vectors of weights, oldest first, then the bias; `window` holds taps + 15 vectors.
  ShortConv(Rows<const T> rows, int64_t length, const Vec* weights, int64_t taps, const float* mask, Vec* window)
      : rows_(rows), length_(length), weights_(weights), taps_(taps), mask_(mask), window_(window) {
    for (int64_t k = 0; k < taps - 1; ++k) window[k] = Vec{};
  }

  // How many of the next sixteen positions there are.
  int64_t count() const { return std::min(kLanes, length_ - at_); }

  // Sixteen more inputs, and the taps - 1 before them.
  const Vec* inputs() {
    if (at_ > 0)
      for (int64_t k = 0; k < taps_ - 1; ++k) window_[k] = window_[k + kLanes];
    load_tile(rows_, at_, count(), window_ + taps_ - 1);
    at_ += kLanes;
    return window_;
  }

  void next(Vec* u) {
    const int64_t valid = count(), start = at_;
    inputs();
    Vec sum[16];
    for (int j = 0; j < 16; ++j) sum[j] = weights_[taps_];
    for (int64_t k = 0; k < taps_; ++k)
      for (int j = 0; j < 16; ++j) sum[j] += weights_[k] * window_[k + j];
    if (mask_)
      for (int64_t j = 0; j < valid; ++j) sum[j] *= mask_[start + j];
    for (int j = 0; j < 16; ++j) u[j] = sum[j];
  }

 private:
  Rows<const T> rows_;
  int64_t length_, at_ = 0;
  const Vec* weights_;
  int64_t taps_;
  const float* mask_;
  Vec* window_;
};

}  // namespace layerswap
