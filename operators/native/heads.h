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

// scores[s] = f(q . k_s) h(last - s) of `length` positions; `lags` is h reversed, its last entry that of lag 0.
inline void score(const HeadStep& step, const float* q, History key, const float* lags, int64_t length, float* scores) {
  for (int64_t s = 0; s < length; s += 4 * kLanes) {
    const int64_t left = length - s;
    Vec sum[4] = {};
    for (int64_t k = 0; k < step.keys; ++k) {
      const float* row = key.data + k * key.stride + s;
      const float weight = q[k];
      if (left >= 4 * kLanes) {
        for (int j = 0; j < 4; ++j) sum[j] += weight * read(row + j * kLanes);
      } else {
        for (int64_t j = 0; j * kLanes < left; ++j) sum[j] += weight * read_some(row + j * kLanes, left - j * kLanes);
      }
    }
    for (int64_t j = 0; j < 4 && j * kLanes < left; ++j) {
      const int64_t count = left - j * kLanes;
      const Vec value = Power{step.degree}.of(sum[j]);
      write_some(scores + s + j * kLanes, value * read_some(lags + s + j * kLanes, count), count);
    }
  }
}

inline float dot(const float* a, const float* b, int64_t length) {
  Vec sum[4] = {};
  int64_t s = 0;
  for (; s + 4 * kLanes <= length; s += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sum[j] += read(a + s + j * kLanes) * read(b + s + j * kLanes);
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
    sum = dot(scores.data(), value.data + step.values * value.stride, position + 1) + step.smallest_sum;
  for (int64_t row = 0; row < step.values; ++row)
    y[row] = dot(scores.data(), value.data + row * value.stride, position + 1) / sum + direct[row] * in.v[row];
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
