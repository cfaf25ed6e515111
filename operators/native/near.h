// Near positions of one step: a query and key turned by position, softmax over the last positions and the first ones.
#pragma once

#include "heads.h"

namespace layerswap {

constexpr float kSmallestFar = 1e-30f;  // of a sum of far weights that counts

// What a query sees of its head: `count` positions of a window, the present last, and `sinks` first ones before them.
struct Seen {
  History key, value;
  int64_t count;
  History sink_key, sink_value;
  int64_t sinks;
};

// Turns channels i and P + i by a position times frequency i.
class Turn {
 public:
  Turn(const float* frequencies, int64_t pairs, int64_t position) : cosine_(pairs), sine_(pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float angle = frequencies[i] * float(position);
      cosine_[i] = std::cos(angle), sine_[i] = std::sin(angle);
    }
  }

  std::vector<float> of(const float* x, int64_t width) const {
    std::vector<float> turned(x, x + width);
    const int64_t pairs = cosine_.size();
    for (int64_t i = 0; i < pairs; ++i) {
      turned[i] = x[i] * cosine_[i] - x[pairs + i] * sine_[i];
      turned[pairs + i] = x[pairs + i] * cosine_[i] + x[i] * sine_[i];
    }
    return turned;
  }

 private:
  std::vector<float> cosine_, sine_;
};

inline void put(const float* x, int64_t rows, History to, int64_t place) {
  for (int64_t row = 0; row < rows; ++row) to.data[row * to.stride + place] = x[row];
}

// The rows of all positions but the first go to the place before theirs, and x to the last.
inline void push(const float* x, int64_t rows, History to, int64_t positions) {
  for (int64_t row = 0; row < rows; ++row)
    std::memmove(to.data + row * to.stride, to.data + row * to.stride + 1, (positions - 1) * sizeof(float));
  put(x, rows, to, positions - 1);
}

constexpr int64_t kMostSquared = 16;  // channels

// Features of some channels whose products are (1 + q . k / 2)^2, one after the other, in the order of `mixing.features`.
template <class Number, class Put>
inline void each_square(const Number* x, int64_t width, const Put& put) {
  put(Number{} + 1.0f);
  for (int64_t i = 0; i < width; ++i) put(x[i]);
  for (int64_t i = 0; i < width; ++i) put(0.5f * x[i] * x[i]);
  for (int64_t i = 0; i < width; ++i)
    for (int64_t j = i + 1; j < width; ++j) put(std::sqrt(0.5f) * x[i] * x[j]);
}

inline int64_t squares_of(int64_t width) { return 1 + width + width * (width + 1) / 2; }

inline std::vector<float> squares(const float* x, int64_t width) {
  std::vector<float> found;
  each_square(x, width, [&](float feature) { found.push_back(feature); });
  return found;
}

// What a head reads of its rows: near query and key, value, far query and key.
struct WindowInput {
  const float *q, *k, *v, *far_q, *far_k;
  float gate;
};

// Where that lies: far queries and keys of `keys` channels, values of groups, gates, near queries, near keys of groups; or,
// where far rows are the near ones (`keys` is 0), queries, keys, values.
struct WindowRows {
  int64_t heads, groups, width, keys;
  bool gated;
  int64_t count;

  WindowRows(int64_t heads, int64_t groups, int64_t width, int64_t keys, bool gated)
      : heads(heads), groups(groups), width(width), keys(keys), gated(gated),
        count(2 * heads * keys + 2 * groups * width + (gated ? heads : 0) + heads * width) {}

  WindowInput of(const float* u, int64_t head) const {
    const int64_t shared = groups * width, inner = heads * width, of_group = head / (heads / groups) * width;
    if (keys == 0)
      return {u + head * width, u + inner + of_group, u + inner + shared + of_group, nullptr, nullptr, 0.0f};
    const float *far_k = u + heads * keys, *v = far_k + heads * keys, *gates = v + shared, *q = gates + (gated ? heads : 0);
    return {q + head * width, q + inner + of_group, v + of_group, u + head * keys, far_k + head * keys,
            gated ? gates[head] : 0.0f};
  }
};

// Values by softmax, y, and the logarithm of the sum of exponentials; q and the keys are turned, q is scaled.
inline float near_values(const Seen& seen, const float* q, int64_t keys, int64_t values, float* y) {
  static thread_local std::vector<float> weights, ones;
  const int64_t all = seen.sinks + seen.count;
  weights.resize(all), ones.assign(all, 1.0f);
  score(HeadStep{.keys = keys}, q, seen.sink_key, ones.data(), seen.sinks, weights.data());
  score(HeadStep{.keys = keys}, q, seen.key, ones.data(), seen.count, weights.data() + seen.sinks);
  const float largest = *std::max_element(weights.begin(), weights.end());
  float sum = 0.0f;
  for (float& weight : weights) sum += weight = std::exp(weight - largest);
  for (int64_t row = 0; row < values; ++row)
    y[row] = (dot(weights.data(), seen.sink_value.data + row * seen.sink_value.stride, seen.sinks, 0) +
              dot(weights.data() + seen.sinks, seen.value.data + row * seen.value.stride, seen.count, seen.value.stride)) / sum;
  return largest + std::log(sum);
}

// y of near values becomes that of all: the near share is a sigmoid of its logarithm over the far one. `far` are the
// values that far weights gather, `sum` is of these weights.
inline void join(float near, const float* far, float sum, int64_t values, float* y) {
  if (sum < kSmallestFar) return;
  const float share = 1.0f / (1.0f + std::exp(std::log(sum) - near));
  for (int64_t row = 0; row < values; ++row) y[row] = share * y[row] + (1.0f - share) * far[row] / sum;
}

}  // namespace layerswap
