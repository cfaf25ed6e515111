// Sixteen numbers that are computed with together, and how they are read, written and moved among each other.
//
// They are one vector where the processor has vectors of sixteen, and several of its own where it has not: GCC keeps what
// is wider than the processor's vectors in memory, and every operation on it goes there and back.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#define FORCED inline __attribute__((always_inline))  // else vectors travel through memory
#define EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)

namespace layerswap {

constexpr int64_t kLanes = 16;

struct BFloat {
  uint16_t bits;
};

#if defined(__AVX512F__)
#define LAYERSWAP_PART 16
#elif defined(__AVX__)
#define LAYERSWAP_PART 8
#else
#define LAYERSWAP_PART 4
#endif
constexpr int kPart = LAYERSWAP_PART, kParts = kLanes / kPart;

typedef float Part __attribute__((vector_size(4 * LAYERSWAP_PART)));
typedef uint32_t Words __attribute__((vector_size(4 * LAYERSWAP_PART)));
typedef uint16_t Halves __attribute__((vector_size(2 * LAYERSWAP_PART)));

#if LAYERSWAP_PART == 16
typedef Part Vec;
FORCED Part& part(Vec& v, int) { return v; }
FORCED const Part& part(const Vec& v, int) { return v; }
#else
struct Vec {
  Part parts[kParts];

  float operator[](int64_t lane) const { return parts[lane / kPart][lane % kPart]; }
  float& operator[](int64_t lane) { return reinterpret_cast<float*>(parts)[lane]; }
};
FORCED Part& part(Vec& v, int i) { return v.parts[i]; }
FORCED const Part& part(const Vec& v, int i) { return v.parts[i]; }

#define OPERATOR(sign)                                          \
  FORCED Vec operator sign(const Vec& a, const Vec& b) {        \
    Vec c;                                                      \
    EACH_PART c.parts[i] = a.parts[i] sign b.parts[i];          \
    return c;                                                   \
  }                                                             \
  FORCED Vec operator sign(const Vec& a, float b) {             \
    Vec c;                                                      \
    EACH_PART c.parts[i] = a.parts[i] sign b;                   \
    return c;                                                   \
  }                                                             \
  FORCED Vec operator sign(float a, const Vec& b) {             \
    Vec c;                                                      \
    EACH_PART c.parts[i] = a sign b.parts[i];                   \
    return c;                                                   \
  }                                                             \
  FORCED Vec& operator sign##=(Vec& a, const Vec& b) { return a = a sign b; } \
  FORCED Vec& operator sign##=(Vec& a, float b) { return a = a sign b; }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
#undef OPERATOR
#endif

FORCED Vec read(const float* from) {
  Vec v;
  EACH_PART std::memcpy(&part(v, i), from + i * kPart, sizeof(Part));
  return v;
}
FORCED Vec read(const BFloat* from) {
  Vec v;
  EACH_PART {
    Halves h;
    std::memcpy(&h, from + i * kPart, sizeof h);
    const Words w = __builtin_convertvector(h, Words) << 16;
    part(v, i) = (Part)w;
  }
  return v;
}
FORCED void write(float* to, const Vec& v) { EACH_PART std::memcpy(to + i * kPart, &part(v, i), sizeof(Part)); }
#ifdef __AVX512BF16__
FORCED void write(BFloat* to, const Vec& v) {
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(to, &h, sizeof h);
}
#else
FORCED void write(BFloat* to, const Vec& v) {  // to the nearest, ties to even; what is no number stays none
  EACH_PART {
    const Part x = part(v, i);
    const Words w = (Words)x;
    const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
    const Halves h = __builtin_convertvector((x == x) ? rounded : (w >> 16 | 0x40u), Halves);
    std::memcpy(to + i * kPart, &h, sizeof h);
  }
}
#endif

// 0, 1, .. 15.
FORCED Vec places() {
  constexpr float kPlaces[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return read(kPlaces);
}

// x where a is larger than b, else y.
FORCED Vec where_larger(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
  Vec v;
  EACH_PART part(v, i) = (part(a, i) > part(b, i)) ? part(x, i) : part(y, i);
  return v;
}
FORCED Vec larger(const Vec& a, const Vec& b) { return where_larger(a, b, a, b); }

// e^x of numbers up to 0.
FORCED Vec exp_of(Vec x) {
  const Vec magic = Vec{} + 12582912.0f;
  x = larger(x, Vec{} - 87.0f);
  const Vec t = x * 1.44269504f + magic, n = t - magic;
  const Vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
  const Vec p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * 0.0083333338f))));
  Vec y;
  EACH_PART part(y, i) = (Part)((Words)part(p, i) + ((Words)part(t, i) << 23));
  return y;
}

// Sixteen pairs in bfloat16, the first in the lower half.
FORCED void pair_of(const Vec& first, const Vec& second, uint32_t* to) {
  BFloat low[kLanes], high[kLanes];
  write(low, first), write(high, second);
  EACH_PART {
    Halves a, b;
    std::memcpy(&a, low + i * kPart, sizeof a);
    std::memcpy(&b, high + i * kPart, sizeof b);
    const Words both = __builtin_convertvector(a, Words) | __builtin_convertvector(b, Words) << 16;
    std::memcpy(to + i * kPart, &both, sizeof both);
  }
}

FORCED float total(const Vec& v) {
#if LAYERSWAP_PART == 16
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LAYERSWAP_PART == 8
  const auto eight = v.parts[0] + v.parts[1];
#endif
#if LAYERSWAP_PART == 4
  const auto four = (v.parts[0] + v.parts[2]) + (v.parts[1] + v.parts[3]);
#else
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#endif
  return (four[0] + four[1]) + (four[2] + four[3]);
}

template <int Step, size_t... J>
FORCED void exchange_in(Part& a, Part& b, std::index_sequence<J...>) {
  const Part low = __builtin_shufflevector(a, b, ((J & Step) ? kPart + J - Step : J)...);
  b = __builtin_shufflevector(a, b, ((J & Step) ? kPart + J : J + Step)...);
  a = low;
}

// Numbers of a whose place has the bit `Step` for those of b whose place has not.
template <int Step>
FORCED void exchange(Vec& a, Vec& b) {
  EACH_PART {
    if constexpr (Step < kPart) exchange_in<Step>(part(a, i), part(b, i), std::make_index_sequence<kPart>());
    else if (!(i & Step / kPart)) std::swap(part(a, i + Step / kPart), part(b, i));
  }
}

template <int Step>
FORCED void exchange_all(Vec* v) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Step)) exchange<Step>(v[i], v[i + Step]);
}

// Number j of vector i and number i of vector j change places.
FORCED void transpose(Vec* v) {
  exchange_all<8>(v);
  exchange_all<4>(v);
  exchange_all<2>(v);
  exchange_all<1>(v);
}

}  // namespace layerswap
