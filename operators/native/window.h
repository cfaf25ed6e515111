// Whole sequences of a head with a window: sixty-four queries at a time against the keys that they see, near
// ones by softmax and far ones by power and lag, over one sum. Products are transposed, keys by queries, so that what is
// done to them goes along queries, and pairs of their rows are at once what the product with the values reads.
#pragma once

#include "window_state.h"

namespace layerswap {

constexpr int64_t kQueries = 64, kFarKeys = 512;

template <class T>
struct WindowHead {
  int64_t length, keys, far_keys, values;   // widths of a near key, a far one (0: nothing is far) and a value
  int64_t window, sinks, degree;
  Rows<const T> q, k, v, far_q, far_k;       // rows `channel` apart, positions touch
  const float* turns;                        // cosines and sines, rows of pairs
  const float *h, *counted, *level;          // h: kQueries zeros, lags from the window on, zeros; counted may be null
  float shift;                               // of the level, whose key `level` is
  LagModes modes;                            // of h, where there is a state of squared features
};

// Two rows of sixty-four.
template <class P>
FORCED void pair(const Vec* first, const Vec* second, typename Packed<P>::Word* to) {
  for (int j = 0; j < kQueries / kLanes; ++j) Packed<P>::put(first[j], second[j], to + j * kLanes, kQueries);
}

// Queries t0 to t0 + n of `width` rows, packed.
template <class P, class T>
inline void pack_queries(Rows<const T> q, int64_t width, int64_t t0, int64_t n, typename Packed<P>::Word* to) {
  for (int64_t k = 0; k < width; k += 2, to += Packed<P>::kRows * kQueries) {
    const T *a = q.data + k * q.channel + t0, *b = a + q.channel;
    for (int64_t r = 0; r < kQueries; r += kLanes) {
      const int64_t count = std::max<int64_t>(0, n - r);
      Packed<P>::put(read_some(a + r, count), read_some(b + r, count), to + r, kQueries);
    }
  }
}

// Channels i and pairs + i of `width` rows turned by position, times a factor; the rows of `to` are `length` apart.
template <class T, class P>
inline void turn_rows(Rows<const T> x, int64_t width, int64_t length, const float* turns, float factor, P* to) {
  const int64_t pairs = width / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    const T *one = x.data + i * x.channel, *other = one + pairs * x.channel;
    const float *cosine = turns + i * length, *sine = cosine + pairs * length;
    for (int64_t t = 0; t < length; t += kLanes) {
      const int64_t n = length - t;
      const Vec a = factor * read_some(one + t, n), b = factor * read_some(other + t, n);
      const Vec c = read_some(cosine + t, n), s = read_some(sine + t, n);
      write_some(to + i * length + t, a * c - b * s, n);
      write_some(to + (pairs + i) * length + t, b * c + a * s, n);
    }
  }
}

// Keys with the channels of a position side by side, (length, width).
template <class T, class P>
inline void turn_keys(Rows<const T> k, int64_t width, int64_t length, P* to) {
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t lanes = std::min(kLanes, width - c);
    for (int64_t s = 0; s < length; s += kLanes) {
      const int64_t count = std::min(kLanes, length - s);
      Vec tile[16];
      load_tile(Rows<const T>{k.data + c * k.channel, k.channel, 1, lanes}, s, count, tile);
      for (int64_t i = 0; i < count; ++i) write_some(to + (s + i) * width + c, tile[i], lanes);
    }
  }
}

// T: of the rows; P: of the factors of products.
template <class T, class P>
class WindowMixer {
 public:
  explicit WindowMixer(const WindowHead<T>& head)
      : head_(head), stride_(head.length + 2), turned_(head.length * head.keys), far_(head.length * head.far_keys),
        v_(head.values * stride_), query_(head.keys / 2 * kPair), far_query_(head.far_keys / 2 * kPair),
        near_(std::max(head.values, head.sinks + head.window + kQueries) * kQueries), far_products_(kFarKeys * kQueries),
        weights_((head.sinks + head.window + kQueries + kFarKeys + 4) / 2 * kPair), y_(head.values * kQueries),
        far_y_((head.values + 1) * kQueries), state_(head.modes, head.modes.count ? head.far_keys : 0, head.values),
        from_state_((head.values + 1) * kQueries), rotated_(head.keys * head.length), levels_(head.length) {
    turn_rows(head.k, head.keys, head.length, head.turns, 1.0f, rotated_.data());
    turn_keys(Rows<const P>{rotated_.data(), head.length, 1, 0}, head.keys, head.length, turned_.data());
    const float factor = 1.0f / std::sqrt(float(head.keys));
    turn_rows(head.q, head.keys, head.length, head.turns, factor, rotated_.data());
    if (head.far_keys) set_levels(factor);
    if (head.far_keys) turn_keys(head.far_k, head.far_keys, head.length, far_.data());
    for (int64_t row = 0; row < head.values; ++row)
      for (int64_t t = 0; t < head.length; t += kLanes)
        write_some(&v_[row * stride_ + t], read_some(head.v.data + row * head.v.channel + t, head.length - t), head.length - t);
  }

  // The state of all positions that lie behind the window for the position that comes next.
  void store(float* to) {
    const int64_t behind = std::max<int64_t>(0, head_.length - head_.window);
    while (state_.seen() < behind) take(std::min(kTaken, behind - state_.seen()));
    state_.store(to);
  }

  // Queries from t0 on, rows of y `length` apart.
  void block(int64_t t0, T* y) {
    const int64_t n = std::min(kQueries, head_.length - t0);
    pack_queries<P>(Rows<const P>{rotated_.data(), head_.length, 1, 0}, head_.keys, t0, n, query_.data());
    near(t0, n);
    Vec share[kVecs], rest[kVecs] = {};
    for (int j = 0; j < kVecs; ++j) share[j] = 1.0f / sum_[j];
    if (head_.far_keys && t0 + n > head_.window + head_.sinks) {
      far(t0, n);
      shares(t0, n, share, rest);
    } else {
      std::fill(far_y_.begin(), far_y_.end(), 0.0f);
    }
    for (int64_t row = 0; row < head_.values; ++row)
      for (int j = 0; j * kLanes < n; ++j) {
        const int64_t at = row * kQueries + j * kLanes;
        write_some(y + row * head_.length + t0 + j * kLanes, read(&y_[at]) * share[j] + read(&far_y_[at]) * rest[j],
                   n - j * kLanes);
      }
  }

 private:
  using Word = typename Packed<P>::Word;
  static constexpr int64_t kPair = Packed<P>::kRows * kQueries;  // words of two rows of queries
  static constexpr int kVecs = kQueries / kLanes;

  // Of queries that are not turned.
  void set_levels(float factor) {
    std::fill(levels_.begin(), levels_.end(), head_.shift);
    for (int64_t row = 0; row < head_.keys; ++row) {
      const float by = factor * head_.level[row];
      for (int64_t t = 0; t < head_.length; t += kLanes) {
        const int64_t n = head_.length - t;
        const Vec sum = read_some(&levels_[t], n) + by * read_some(head_.q.data + row * head_.q.channel + t, n);
        write_some(&levels_[t], sum, n);
      }
    }
  }

  // A key's products where it counts as near, `other` where it does not.
  void row_of(const float* products, int64_t s, int64_t t0, float other, Vec* row) const {
    const Vec first = Vec{} + float(s - t0) - 0.5f;
    const Vec last = Vec{} + (s < head_.sinks ? float(kQueries) : float(s - t0 + head_.window));
    for (int j = 0; j < kVecs; ++j) {
      const Vec place = places() + float(j * kLanes);
      const Vec seen = where_larger(place, first, read(products + j * kLanes), Vec{} + other);
      row[j] = where_larger(last, place, seen, Vec{} + other);
    }
  }

  // Sums of exponentials relative to the largest, which are kept, and the values by them.
  void near(int64_t t0, int64_t n) {
    const int64_t low = std::max<int64_t>(0, t0 - head_.window + 1), sinks = std::min(head_.sinks, low);
    const int64_t all = sinks + t0 + n - low;
    if (sinks) product(sinks, kQueries, head_.keys, head_.keys, turned_.data(), query_.data(), false, near_.data());
    product(all - sinks, kQueries, head_.keys, head_.keys, &turned_[low * head_.keys], query_.data(), false, &near_[sinks * kQueries]);
    const auto place = [&](int64_t i) { return i < sinks ? i : low + i - sinks; };
    for (int j = 0; j < kVecs; ++j) largest_[j] = Vec{} - 1e30f, sum_[j] = Vec{};
    Vec row[kVecs], next[kVecs];
    for (int64_t i = 0; i < all; ++i) {
      row_of(&near_[i * kQueries], place(i), t0, -1e30f, row);
      for (int j = 0; j < kVecs; ++j) largest_[j] = larger(row[j], largest_[j]);
    }
    const auto weigh = [&](int64_t i, int64_t end, Vec* to) {
      if (i >= end) return std::fill(to, to + kVecs, Vec{});
      row_of(&near_[i * kQueries], place(i), t0, -1e30f, to);
      for (int j = 0; j < kVecs; ++j) sum_[j] += to[j] = exp_of(to[j] - largest_[j]);
    };
    bool add = false;
    for (const auto& [from, end] : {std::pair{int64_t{0}, sinks}, std::pair{sinks, all}}) {
      if (from == end) continue;
      for (int64_t i = from; i < end; i += 2) {
        weigh(i, end, row), weigh(i + 1, end, next);
        pair<P>(row, next, &weights_[(i - from) / 2 * kPair]);
      }
      product(head_.values, kQueries, (end - from + 1) / 2 * 2, stride_, &v_[place(from)], weights_.data(), add, y_.data());
      add = true;
    }
  }

  void take(int64_t count) {
    state_.take(far_.data(), v_.data(), stride_, head_.counted, head_.sinks, count);
  }

  // Values by far weights, and the sums of these.
  void far(int64_t t0, int64_t n) {
    pack_queries<P>(head_.far_q, head_.far_keys, t0, n, far_query_.data());
    const int64_t stop = t0 + n - head_.window;
    for (int j = 0; j < kVecs; ++j) far_sum_[j] = Vec{};
    const Power power{head_.degree};
    if (head_.modes.count)  // what is far for all of these queries
      while (state_.seen() + kTaken <= t0 - head_.window + 1) take(kTaken);
    const int64_t from = std::max(head_.sinks, state_.seen());
    for (int64_t start = from; start < stop; start += kFarKeys) {
      const int64_t count = std::min(kFarKeys, stop - start);
      product(count, kQueries, head_.far_keys, head_.far_keys, &far_[start * head_.far_keys], far_query_.data(), false,
              far_products_.data());
      const auto weigh = [&](int64_t i, Vec* to) {
        if (i >= count) return std::fill(to, to + kVecs, Vec{});
        const int64_t s = start + i;
        const float* lags = head_.h + kQueries + t0 - s - head_.window;
        const float counted = head_.counted ? head_.counted[s] : 1.0f;
        for (int j = 0; j < kVecs; ++j) {
          to[j] = power.of(read(&far_products_[i * kQueries + j * kLanes])) * read(lags + j * kLanes) * counted;
          far_sum_[j] += to[j];
        }
      };
      for (int64_t i = 0; i < count; i += 2) {
        Vec row[kVecs], next[kVecs];
        weigh(i, row), weigh(i + 1, next);
        pair<P>(row, next, &weights_[i / 2 * kPair]);
      }
      product(head_.values, kQueries, (count + 1) / 2 * 2, stride_, &v_[start], weights_.data(), start > from, far_y_.data());
    }
    if (state_.seen()) gather(t0, n, from < stop);
  }

  // Adds what the state gives, or begins with it.
  void gather(int64_t t0, int64_t n, bool add) {
    float queries[kMostSquared * kQueries] = {};
    for (int64_t c = 0; c < head_.far_keys; ++c)
      for (int64_t r = 0; r < n; r += kLanes)
        write(&queries[c * kQueries + r], read_some(head_.far_q.data + c * head_.far_q.channel + t0 + r, n - r));
    state_.read(queries, t0 - head_.window - state_.seen() + 1, from_state_.data());
    for (int64_t i = 0; i < head_.values * kQueries; i += kLanes)
      write(&far_y_[i], read(&from_state_[i]) + (add ? read(&far_y_[i]) : Vec{}));
    for (int j = 0; j < kVecs; ++j) far_sum_[j] += read(&from_state_[head_.values * kQueries + j * kLanes]);
  }

  // What near and far values are multiplied by.
  void shares(int64_t t0, int64_t n, Vec* share, Vec* rest) const {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t j = r / kLanes, i = r % kLanes;
      if (far_sum_[j][i] < 1e-30f) continue;
      const float near = largest_[j][i] + std::log(sum_[j][i]) - levels_[t0 + r];
      const float part = 1.0f / (1.0f + std::exp(std::log(far_sum_[j][i]) - near));
      share[j][i] = part / sum_[j][i], rest[j][i] = (1.0f - part) / far_sum_[j][i];
    }
  }

  const WindowHead<T>& head_;
  int64_t stride_;
  std::vector<P> turned_, far_, v_;
  std::vector<Word> query_, far_query_;
  std::vector<float> near_, far_products_;
  std::vector<Word> weights_;
  std::vector<float> y_, far_y_;
  WindowState<P> state_;
  std::vector<float> from_state_;
  std::vector<P> rotated_;
  std::vector<float> levels_;
  Vec largest_[kVecs], sum_[kVecs], far_sum_[kVecs];
};

}  // namespace layerswap
