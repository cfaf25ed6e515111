// Convolutions of sixteen channels at once by a complex FFT no longer than the sequence.
//
// A vector holds one position of sixteen channels, so every lane computes the scalar algorithm on its own channel and
// nothing is ever shuffled inside the transform.
//
// Two real sequences a and b of at most n positions are multiplied as polynomials modulo x^n - i: position k of the
// result is c[k] + i c[k + n] of their linear convolution c, so nothing is padded to twice the length. The ring splits
// like any cyclic one: x^m - r = (x^(m/2) - s) (x^(m/2) + s) with s^2 = r, again and again, down to the numbers that are
// multiplied pairwise. The root s is one number for a whole node of that tree: no table of twiddle factors is walked, no
// weights are multiplied in and no order is reversed. A node's work is finished, back from the product, before its
// sister's begins, so all but the first levels happen in the cache.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace layerswap {

constexpr int64_t kSmallest = 16;       // sizes of transforms: powers of two between these
constexpr int64_t kLargest = 1 << 18;

struct Complex {
  Vec re, im;
};
struct Root {
  float re, im;
};

inline int64_t transform_size(int64_t positions) {
  int64_t size = kSmallest;
  while (size < positions) size *= 2;
  return size;
}

// The root that splits node n; the children of n are 2 n (+s) and 2 n + 1 (-s), the first node is 1, of x^n - i.
inline const Root* roots() {
  static const std::vector<Root> table = [] {
    std::vector<double> angle(kLargest);  // that of the node's own constant
    std::vector<Root> roots(kLargest);
    angle[1] = M_PI / 2;
    for (size_t node = 1; node < roots.size(); ++node) {
      if (node > 1) angle[node] = angle[node / 2] / 2 + (node % 2) * M_PI;
      roots[node] = {float(std::cos(angle[node] / 2)), float(std::sin(angle[node] / 2))};
    }
    return roots;
  }();
  return table.data();
}

FORCED Complex operator+(const Complex& a, const Complex& b) { return {a.re + b.re, a.im + b.im}; }
FORCED Complex operator-(const Complex& a, const Complex& b) { return {a.re - b.re, a.im - b.im}; }
FORCED Complex operator*(const Complex& a, const Complex& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
FORCED Complex times(const Complex& a, Root s) { return {a.re * s.re - a.im * s.im, a.re * s.im + a.im * s.re}; }
FORCED Complex times_conjugate(const Complex& a, Root s) {
  return {a.re * s.re + a.im * s.im, a.im * s.re - a.re * s.im};
}
FORCED Complex plus_i(const Complex& a, const Complex& b) { return {a.re - b.im, a.im + b.re}; }   // a + i b
FORCED Complex minus_i(const Complex& a, const Complex& b) { return {a.re + b.im, a.im - b.re}; }  // a - i b

// One level: a + s b and a - s b, in six fused operations.
FORCED void split2(Complex& a, Complex& b, Root s) {
  const Complex sum{a.re + s.re * b.re - s.im * b.im, a.im + s.im * b.re + s.re * b.im};
  b = {2.0f * a.re - sum.re, 2.0f * a.im - sum.im};
  a = sum;
}

FORCED void join2(Complex& a, Complex& b, Root s) {
  const Complex difference = a - b;
  a = a + b;
  b = times_conjugate(difference, s);
}

// Two levels, from node with root s and its children with roots t and i t.
FORCED void split4(Complex& a, Complex& b, Complex& c, Complex& d, Root s, Root t) {
  const Root it{-t.im, t.re};
  split2(a, c, s);
  split2(b, d, s);
  split2(a, b, t);
  split2(c, d, it);
}

FORCED void join4(Complex& a, Complex& b, Complex& c, Complex& d, Root s, Root t, Root st) {
  const Complex even = a + b, odd = a - b, even2 = c + d, odd2 = c - d;
  a = even + even2;
  b = times_conjugate(minus_i(odd, odd2), t);
  c = times_conjugate(even - even2, s);
  d = times_conjugate(plus_i(odd, odd2), st);
}

FORCED Root product(Root s, Root t) { return {s.re * t.re - s.im * t.im, s.re * t.im + s.im * t.re}; }

// What happens to four numbers x at place `at` of the spectrum. `returns`: whether they are transformed back.
struct Multiply {  // by a spectrum
  static constexpr bool returns = true;
  const Complex* by;
  FORCED void operator()(Complex* x, int64_t at) const {
    for (int k = 0; k < 4; ++k) x[k] = x[k] * by[at + k];
  }
};
struct KeepAndMultiply {
  static constexpr bool returns = true;
  const Complex* by;
  Complex* kept;
  FORCED void operator()(Complex* x, int64_t at) const {
    for (int k = 0; k < 4; ++k) {
      kept[at + k] = x[k];
      x[k] = x[k] * by[at + k];
    }
  }
};
struct SumAndMultiply {  // sum += x y, then x by the spectrum
  static constexpr bool returns = true;
  const Complex *by, *y;
  Complex* sum;
  FORCED void operator()(Complex* x, int64_t at) const {
    for (int k = 0; k < 4; ++k) {
      sum[at + k] = sum[at + k] + x[k] * y[at + k];
      x[k] = x[k] * by[at + k];
    }
  }
};
struct Scale {  // the spectrum itself, divided by the size
  static constexpr bool returns = false;
  float factor;
  FORCED void operator()(Complex* x, int64_t) const {
    for (int k = 0; k < 4; ++k) x[k] = {x[k].re * factor, x[k].im * factor};
  }
};
struct Take {  // back from a spectrum
  static constexpr bool returns = true;
  const Complex* spectrum;
  FORCED void operator()(Complex* x, int64_t at) const {
    for (int k = 0; k < 4; ++k) x[k] = spectrum[at + k];
  }
};

template <class Act>
FORCED void leaf(Complex* a, int64_t at, int64_t node, const Root* root, const Act& act) {
  Complex x[4] = {a[0], a[1], a[2], a[3]};
  const Root s = root[node], t = root[2 * node];
  split4(x[0], x[1], x[2], x[3], s, t);
  act(x, at);
  if (Act::returns) join4(x[0], x[1], x[2], x[3], s, t, product(s, t));
  for (int k = 0; k < 4; ++k) a[k] = x[k];
}

// The part of a from place `at` on, m numbers of `node`, to its spectrum, acted on, and back.
template <class Act>
void transform(Complex* a, int64_t at, int64_t m, int64_t node, const Root* root, const Act& act) {
  if (m == 4) return leaf(a, at, node, root, act);
  if (m == 8) {
    for (int k = 0; k < 4; ++k) split2(a[k], a[k + 4], root[node]);
    leaf(a, at, 2 * node, root, act);
    leaf(a + 4, at + 4, 2 * node + 1, root, act);
    if (Act::returns)
      for (int k = 0; k < 4; ++k) join2(a[k], a[k + 4], root[node]);
    return;
  }
  const int64_t q = m / 4;
  const Root s = root[node], t = root[2 * node], st = product(s, t);
  for (int64_t k = 0; k < q; ++k) split4(a[k], a[k + q], a[k + 2 * q], a[k + 3 * q], s, t);
  for (int64_t child = 0; child < 4; ++child) transform(a + child * q, at + child * q, q, 4 * node + child, root, act);
  if (Act::returns)
    for (int64_t k = 0; k < q; ++k) join4(a[k], a[k + q], a[k + 2 * q], a[k + 3 * q], s, t, st);
}

// Real z of n positions through its spectrum; with `wrapped`, also what lies beyond position n.
template <class Act>
void through_spectrum(const Vec* z, Complex* a, int64_t n, const Act& act, Vec* y = nullptr, Vec* wrapped = nullptr) {
  const Root* root = roots();
  const int64_t q = n / 4;
  const Root s = root[1], t = root[2], st = product(s, t);
  for (int64_t k = 0; k < q; ++k) {
    const Vec z2 = z[k + 2 * q], z3 = z[k + 3 * q];
    Complex c0{z[k] + s.re * z2, s.im * z2}, c1{z[k + q] + s.re * z3, s.im * z3};
    Complex c2{z[k] - s.re * z2, -s.im * z2}, c3{z[k + q] - s.re * z3, -s.im * z3};
    split2(c0, c1, t);
    split2(c2, c3, Root{-t.im, t.re});
    a[k] = c0, a[k + q] = c1, a[k + 2 * q] = c2, a[k + 3 * q] = c3;
  }
  for (int64_t child = 0; child < 4; ++child) transform(a + child * q, child * q, q, 4 + child, root, act);
  if (!Act::returns) return;
  for (int64_t k = 0; k < q; ++k) {
    Complex c0 = a[k], c1 = a[k + q], c2 = a[k + 2 * q], c3 = a[k + 3 * q];
    join4(c0, c1, c2, c3, s, t, st);
    y[k] = c0.re, y[k + q] = c1.re, y[k + 2 * q] = c2.re, y[k + 3 * q] = c3.re;
    if (wrapped) wrapped[k] = c0.im, wrapped[k + q] = c1.im, wrapped[k + 2 * q] = c2.im, wrapped[k + 3 * q] = c3.im;
  }
}

}  // namespace layerswap
