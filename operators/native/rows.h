// Sixteen channels as vectors of sixteen and back, stored either way, and their short convolution.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <utility>

#include "fft.h"

namespace layerswap {

struct BFloat {
  uint16_t bits;
};
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

FORCED Vec read(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
FORCED Vec read(const BFloat* from) {
  Halves h;
  std::memcpy(&h, from, sizeof h);
  const Words w = __builtin_convertvector(h, Words) << 16;
  return (Vec)w;
}
FORCED void write(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
#ifdef __AVX512BF16__
FORCED void write(BFloat* to, Vec v) {
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(to, &h, sizeof h);
}
#else
FORCED void write(BFloat* to, Vec v) {  // to the nearest, ties to even; what is no number stays none
  const Words w = (Words)v;
  const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const Halves h = __builtin_convertvector((v == v) ? rounded : (w >> 16 | 0x40u), Halves);
  std::memcpy(to, &h, sizeof h);
}
#endif

// e^x of numbers up to 0.
FORCED Vec exp_of(Vec x) {
  const Vec magic = Vec{} + 12582912.0f;
  x = (x > -87.0f) ? x : Vec{} - 87.0f;
  const Vec t = x * 1.44269504f + magic, n = t - magic;
  const Vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
  const Vec p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * 0.0083333338f))));
  return (Vec)((Words)p + ((Words)t << 23));
}

FORCED Words narrow(Vec v) {
  BFloat rounded[16];
  write(rounded, v);
  Halves h;
  std::memcpy(&h, rounded, sizeof h);
  return __builtin_convertvector(h, Words);
}

// Sixteen pairs in bfloat16, the first in the lower half.
FORCED void pair_of(Vec first, Vec second, uint32_t* to) {
  const Words both = narrow(first) | narrow(second) << 16;
  std::memcpy(to, &both, sizeof both);
}

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

FORCED float total(Vec v) {
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[1]) + (four[2] + four[3]);
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

template <int Step, size_t... J>
FORCED void exchange(Vec& a, Vec& b, std::index_sequence<J...>) {
  const Vec low = __builtin_shufflevector(a, b, ((J & Step) ? 16 + J - Step : J)...);
  b = __builtin_shufflevector(a, b, ((J & Step) ? 16 + J : J + Step)...);
  a = low;
}

template <int Step>
FORCED void exchange_all(Vec* v) {
  for (int i = 0; i < 16; ++i)
    if (!(i & Step)) exchange<Step>(v[i], v[i + Step], std::make_index_sequence<16>());
}

FORCED void transpose(Vec* v) {
  exchange_all<8>(v);
  exchange_all<4>(v);
  exchange_all<2>(v);
  exchange_all<1>(v);
}

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
