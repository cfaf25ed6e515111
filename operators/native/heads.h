// One position of multi-head Hyena: a query against the keys of its head, weighed by lag, and the values gathered.
#pragma once

#include "rows.h"

namespace layerswap {

struct HeadStep {
  int64_t heads, keys, values;  // widths of a head's query and key, and of its value
  int64_t degree;               // of the power, a power of two; 0 for q . k itself
  bool gated, normalised;
  float scale, largest_gate, smallest_sum;

  int64_t stored() const { return values + normalised; }  // rows of a head's values, the last counts them
};

// A head's history: rows `stride` apart, positions touch.
struct History {
  float* data;
  int64_t stride;
};

// scores[s] += sum_i weight[i] row_i[s] of Rows rows `stride` apart.
template <int Rows>
inline void add_rows(const float* weights, const float* rows, int64_t stride, int64_t length, float* scores) {
  int64_t s = 0;
  for (; s + kLanes <= length; s += kLanes) {
    Vec sum = read(scores + s);
    for (int row = 0; row < Rows; ++row) __builtin_prefetch(rows + (Rows + row) * stride + s);  // rows lie on other pages
    for (int row = 0; row < Rows; ++row) sum += weights[row] * read(rows + row * stride + s);
    write(scores + s, sum);
  }
  if (s == length) return;
  Vec sum = read_some(scores + s, length - s);
  for (int row = 0; row < Rows; ++row) sum += weights[row] * read_some(rows + row * stride + s, length - s);
  write_some(scores + s, sum, length - s);
}

// scores[s] = f(q . k_s) h(last - s) of `length` positions; `lags` is h reversed, its last entry that of lag 0. A few rows
// at a time from end to end, as memory is read best.
inline void score(const HeadStep& step, const float* q, History key, const float* lags, int64_t length, float* scores) {
  std::fill(scores, scores + length, 0.0f);
  int64_t k = 0;
  for (; k + 8 <= step.keys; k += 8) add_rows<8>(q + k, key.data + k * key.stride, key.stride, length, scores);
  for (; k < step.keys; ++k) add_rows<1>(q + k, key.data + k * key.stride, key.stride, length, scores);
  for (int64_t s = 0; s < length; s += kLanes) {
    const int64_t count = length - s;
    write_some(scores + s, Power{step.degree}.of(read_some(scores + s, count)) * read_some(lags + s, count), count);
  }
}

// Sum of products; the next row of b, `stride` further on, is read soon.
inline float dot(const float* a, const float* b, int64_t length, int64_t stride) {
  Vec sum[4] = {};
  int64_t s = 0;
  for (; s + 4 * kLanes <= length; s += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(b + stride + s + j * kLanes);
      sum[j] += read(a + s + j * kLanes) * read(b + s + j * kLanes);
    }
  for (; s < length; s += kLanes) sum[0] += read_some(a + s, length - s) * read_some(b + s, length - s);
  return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// One head's part of a position after the short convolution.
struct HeadInput {
  const float *q, *k, *v;
  float gate;

  float counted(const HeadStep& step) const {
    return step.gated ? std::exp(std::min(gate, step.largest_gate)) : 1.0f;
  }
};

// A head's outputs y at `position`, whose key and value go to the histories first.
inline void head_step(const HeadStep& step, const HeadInput& in, const float* direct, History key, History value,
                      const float* lags, int64_t position, float* y) {
  static thread_local std::vector<float> scores, query;
  scores.resize(position + 1);
  query.assign(in.q, in.q + step.keys);
  for (float& number : query) number *= step.scale;
  const float counted = in.counted(step);
  for (int64_t row = 0; row < step.keys; ++row) key.data[row * key.stride + position] = in.k[row];
  for (int64_t row = 0; row < step.values; ++row) value.data[row * value.stride + position] = in.v[row] * counted;
  if (step.normalised) value.data[step.values * value.stride + position] = counted;
  score(step, query.data(), key, lags, position + 1, scores.data());
  float sum = 1.0f;
  if (step.normalised)
    sum = dot(scores.data(), value.data + step.values * value.stride, position + 1, 0) + step.smallest_sum;
  for (int64_t row = 0; row < step.values; ++row)
    y[row] = dot(scores.data(), value.data + row * value.stride, position + 1, value.stride) / sum + direct[row] * in.v[row];
}

// Modes of a head, real ones or pairs of real and imaginary part.
struct HeadModes {
  int64_t count;
  const float *decay, *residue;
};

// memory = decay memory + k v^T of every mode, (modes, keys, columns), and sums += Re residue memory^T q, in one pass.
inline void modal_pass(HeadModes modes, const float* q, const float* k, const float* v, int64_t keys, int64_t columns,
                       float* __restrict memory, float* __restrict sums) {
  for (int64_t mode = 0; mode < modes.count; ++mode)
    for (int64_t i = 0; i < keys; ++i, memory += columns) {
      const float decay = modes.decay[mode], read = modes.residue[mode] * q[i], key = k[i];
      for (int64_t j = 0; j < columns; ++j) {
        memory[j] = decay * memory[j] + key * v[j];
        sums[j] += read * memory[j];
      }
    }
}

inline void complex_modal_pass(HeadModes modes, const float* q, const float* k, const float* v, int64_t keys,
                               int64_t columns, float* __restrict memory, float* __restrict sums) {
  for (int64_t mode = 0; mode < modes.count; ++mode)
    for (int64_t i = 0; i < keys; ++i, memory += 2 * columns) {
      const float re = modes.decay[2 * mode], im = modes.decay[2 * mode + 1], key = k[i];
      const float read_re = modes.residue[2 * mode] * q[i], read_im = modes.residue[2 * mode + 1] * q[i];
      for (int64_t j = 0; j < columns; ++j) {
        const float was_re = memory[2 * j], was_im = memory[2 * j + 1];
        memory[2 * j] = re * was_re - im * was_im + key * v[j];
        memory[2 * j + 1] = re * was_im + im * was_re;
        sums[j] += read_re * memory[2 * j] - read_im * memory[2 * j + 1];
      }
    }
}

// `head_step` of values that are not counted from a memory of constant size, (modes, keys, values), complex or not.
inline void modal_head_step(const HeadStep& step, const HeadInput& in, const float* direct, HeadModes modes, bool complex,
                            float* memory, float* y) {
  static thread_local std::vector<float> query, value, sums;
  query.assign(in.q, in.q + step.keys);
  for (float& number : query) number *= step.scale;
  const float counted = in.counted(step);
  value.assign(in.v, in.v + step.values);
  for (float& number : value) number *= counted;
  sums.assign(step.values, 0.0f);
  (complex ? complex_modal_pass : modal_pass)(modes, query.data(), in.k, value.data(), step.keys, step.values, memory,
                                              sums.data());
  for (int64_t row = 0; row < step.values; ++row) y[row] = sums[row] + direct[row] * in.v[row];
}

}  // namespace layerswap
