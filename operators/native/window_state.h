// What lies so far behind that every query of a block counts it, as a state of constant size: sums of squared features of
// keys and of values, each weighed by a mode of the filter (`mixing.head_states`), taken in by whole blocks of positions.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "near.h"
#include "step.h"

namespace layerswap {

constexpr int64_t kTaken = 64;  // positions that are taken in at once

// The second factor of a product in numbers P, whose rows go two by two: in bfloat16 pairs of numbers, in float32 rows.
template <class P>
struct Packed;

template <>
struct Packed<BFloat> {
  using Word = uint32_t;
  static constexpr int64_t kRows = 1;  // of words that two rows take
  static FORCED void put(Vec first, Vec second, Word* to, int64_t) { pair_of(first, second, to); }
};

template <>
struct Packed<float> {
  using Word = float;
  static constexpr int64_t kRows = 2;
  static FORCED void put(Vec first, Vec second, Word* to, int64_t apart) { write(to, first), write(to + apart, second); }
};

// c = a b (+ c) of a, rows `stride` apart, and a packed b of as many columns as c has.
inline void product(int64_t rows, int64_t columns, int64_t inner, int64_t stride, const BFloat* a, const uint32_t* b, bool add,
                    float* c) {
  at::native::cpublas::brgemm(rows, columns, inner, stride, columns, columns, add,
                              reinterpret_cast<const at::BFloat16*>(a), reinterpret_cast<const at::BFloat16*>(b), c);
}
inline void product(int64_t rows, int64_t columns, int64_t inner, int64_t stride, const float* a, const float* b, bool add,
                    float* c) {
  at::native::cpublas::brgemm(rows, columns, inner, stride, columns, columns, add, a, b, c);
}

// Filters of a head as sums of modes: logarithms of poles and residues, for lags from the window on.
struct LagModes {
  int64_t count = 0;
  const float *log_pole = nullptr, *residue = nullptr;
};

// sum_s into_r(s) f(k_s) [v_s, 1] c_s of all positions before `seen()`, into_r(s) the decay of mode r from s to the last
// of them. Kept transposed, (V + 1) rows of every mode's features.
template <class P>
class WindowState {
 public:
  using Word = typename Packed<P>::Word;

  WindowState(LagModes modes, int64_t keys, int64_t values)
      : modes_(modes), keys_(keys), rows_(values + 1), features_(squares_of(keys)),
        stride_((modes.count * features_ + 15) / 16 * 16), sums_(rows_ * stride_), narrow_(rows_ * stride_),
        added_(rows_ * stride_), read_(stride_ / 2 * kRows * kTaken), written_(kTaken / 2 * kRows * stride_),
        values_(rows_ * kTaken), into_(modes.count * kTaken) {
    for (int64_t i = 0; i < modes.count * kTaken; ++i)
      into_[i] = std::exp(modes.log_pole[i / kTaken] * float(kTaken - 1 - i % kTaken));
  }

  int64_t seen() const { return seen_; }

  // Takes in the next `count` positions, at most 64: keys side by side, rows of values `apart`, what each counts (null: 1)
  // and from which on they do.
  void take(const P* keys, const P* values, int64_t apart, const float* counted, int64_t sinks, int64_t count) {
    float by[kTaken];
    for (int64_t i = 0; i < kTaken; ++i) by[i] = i < count && seen_ + i >= sinks ? (counted ? counted[seen_ + i] : 1.0f) : 0.0f;
    for (int64_t j = 0; j < kTaken; j += kLanes) {
      const Vec weight = layerswap::read(by + j);
      for (int64_t row = 0; row + 1 < rows_; ++row) {
        const Vec value = read_some(values + row * apart + seen_ + j, std::max<int64_t>(0, count - j));
        layerswap::write(&values_[row * kTaken + j], value * weight);
      }
      layerswap::write(&values_[(rows_ - 1) * kTaken + j], weight);
    }
    write(keys + seen_ * keys_, count);
    product(rows_, stride_, kTaken, kTaken, values_.data(), written_.data(), false, added_.data());
    for (int64_t mode = 0; mode < modes_.count; ++mode) {
      const float decay = std::exp(modes_.log_pole[mode] * float(count));
      for (int64_t row = 0; row < rows_; ++row)
        for (int64_t i = row * stride_ + mode * features_, end = i + features_; i < end; ++i)
          sums_[i] = decay * sums_[i] + added_[i];
    }
    for (int64_t i = 0; i < rows_ * stride_; i += kLanes) layerswap::write(&narrow_[i], layerswap::read(&sums_[i]));
    seen_ += count;
  }

  // What queries, rows of 64 of each channel, gather of it: (V + 1) rows of 64 to y. The first lies `lag` behind the last
  // position taken in and the window.
  void read(const float* queries, int64_t lag, float* y) {
    std::fill(read_.begin(), read_.end(), Word{});
    for (int64_t j = 0; j < kTaken / kLanes; ++j) {
      Vec channel[kMostSquared], decay;
      for (int64_t i = 0; i < keys_; ++i) channel[i] = layerswap::read(queries + i * kTaken + j * kLanes);
      int64_t at = 0;
      Vec held{};
      const auto put = [&](Vec feature) {
        const Vec weighed = feature * decay;
        if (at++ % 2 == 0) held = weighed;
        else Packed<P>::put(held, weighed, &read_[(at / 2 - 1) * kRows * kTaken + j * kLanes], kTaken);
      };
      for (int64_t mode = 0; mode < modes_.count; ++mode) {
        decay = modes_.residue[mode] * exp_of(modes_.log_pole[mode] * (places() + float(lag + j * kLanes)));
        each_square(channel, keys_, put);
      }
      if (at % 2) put(Vec{});
    }
    product(rows_, kTaken, stride_, stride_, narrow_.data(), read_.data(), false, y);
  }

  // (modes, features, V + 1), as steps go on from it.
  void store(float* to) const {
    for (int64_t i = 0; i < modes_.count * features_; ++i)
      for (int64_t row = 0; row < rows_; ++row) to[i * rows_ + row] = sums_[row * stride_ + i];
  }

 private:
  static constexpr int64_t kRows = Packed<P>::kRows;

  // Features of keys by mode, pairs of positions side by side.
  void write(const P* keys, int64_t count) {
    std::vector<float> both(2 * stride_), of(features_);
    for (int64_t i = 0; i < kTaken; i += 2) {
      std::fill(both.begin(), both.end(), 0.0f);
      for (int64_t which = 0; which < 2 && i + which < count; ++which) {
        float channel[kMostSquared];
        for (int64_t c = 0; c < keys_; ++c) channel[c] = number(keys[(i + which) * keys_ + c]);
        int64_t at = 0;
        each_square(channel, keys_, [&](float feature) { of[at++] = feature; });
        for (int64_t mode = 0; mode < modes_.count; ++mode) {
          const float decay = into_[mode * kTaken + kTaken - count + i + which];
          float* to = &both[which * stride_ + mode * features_];
          for (int64_t f = 0; f < features_; ++f) to[f] = decay * of[f];
        }
      }
      for (int64_t f = 0; f < stride_; f += kLanes)
        Packed<P>::put(layerswap::read(&both[f]), layerswap::read(&both[stride_ + f]),
                       &written_[i / 2 * kRows * stride_ + f], stride_);
    }
  }

  LagModes modes_;
  int64_t keys_, rows_, features_, stride_, seen_ = 0;
  std::vector<float> sums_;
  std::vector<P> narrow_;
  std::vector<float> added_;
  std::vector<Word> read_, written_;
  std::vector<P> values_;
  std::vector<float> into_;
};

}  // namespace layerswap
