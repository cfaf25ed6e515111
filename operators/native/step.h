// One position of channel-wise Hyena, exactly, with a bounded amount of work at every step.
//
// `ahead` holds, for every output of a window, what inputs already seen add to it. An input meets outputs up to kNear - 1
// positions later at once. Level U = 16, 32, .. takes blocks of U inputs to the outputs that are 2 U to 4 U - 1
// positions later, all such pairs of every input and no other. The first of those outputs is U steps away when the block
// is complete, so the block's work, sixteen channels of a sequence at a time, is spread over U steps. Levels have their
// turns at different steps, where a level's turns are further apart than one step.
#pragma once

#include "conv.h"

namespace layerswap {

constexpr int64_t kNear = 32;
constexpr int64_t kFirstBlock = kNear / 2;

// Numbers of the spectra of levels below U, and so where those of level U begin: 2 U numbers a level.
inline int64_t spectra_before(int64_t block) { return 2 * (block - kFirstBlock); }

struct Decoder {
  int64_t batch, width, order, lags;        // lags: of the filters
  const float* h;                           // (convolutions width, lags), the direct term at lag 0
  const float* near;                        // (convolutions, kNear, padded width): h by lag
  Complex* spectra;                         // (convolutions blocks, spectra of all levels), filled when first needed
  int64_t spectra_stride;
  uint8_t* ready;                           // (levels, convolutions blocks)
  float* ahead;                             // (batch, convolutions, window, padded width)
  int64_t origin, window;                   // first position of the window, and how many it has
  std::vector<float*> history;              // by convolution: (batch, width, positions)
  std::vector<int64_t> sequence_stride, row_stride;

  int64_t blocks() const { return (width + kLanes - 1) / kLanes; }
  int64_t padded() const { return blocks() * kLanes; }
  int64_t convolutions() const { return order - 1; }
  float* ahead_of(int64_t sequence, int64_t convolution, int64_t place) const {
    return ahead + ((sequence * convolutions() + convolution) * window + place) * padded();
  }
};

inline float number(float x) { return x; }
inline float number(BFloat x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Adds one tap of the short convolution, of the projections p of one position (rows,), to u.
template <class T>
void add_tap(const T* p, const float* weight, int64_t rows, float* u) {
  for (int64_t row = 0; row < rows; ++row) u[row] += weight[row] * number(p[row]);
}

// z of one position and convolution: y = what was ahead + h(0) z, z to the history, and to the outputs that are near.
// `z` and `y` hold padded width, with zeros behind the width, and may be the same.
inline void near_step(const Decoder& d, int64_t sequence, int64_t convolution, int64_t position, const float* z, float* y) {
  const int64_t place = position - d.origin, lags = std::min(kNear, d.window - place), padded = d.padded();
  const float* near = d.near + convolution * kNear * padded;
  float* to = d.history[convolution] + sequence * d.sequence_stride[convolution] + position;
  for (int64_t channel = 0; channel < d.width; ++channel) to[channel * d.row_stride[convolution]] = z[channel];
  float* row = d.ahead_of(sequence, convolution, place);
  for (int64_t lag = lags - 1; lag >= 0; --lag) {  // the present last: it takes the place of z
    const float* by = near + lag * padded;
    float* into = lag > 0 ? row + lag * padded : y;
    for (int64_t block = 0; block < padded; block += kLanes)
      write(into + block, read(row + lag * padded + block) + read(z + block) * read(by + block));
  }
}

// The spectrum of a level's lags for sixteen channels, computed when it is first needed.
inline void prepare_level(const Decoder& d, int64_t inputs, int level, int64_t chain) {
  uint8_t& ready = d.ready[level * d.convolutions() * d.blocks() + chain];
  if (ready) return;
  const int64_t size = 2 * inputs, block = chain % d.blocks(), row = chain / d.blocks() * d.width + block * kLanes;
  const Rows<const float> rows{d.h + row * d.lags + size, d.lags, 1, std::min(kLanes, d.width - block * kLanes)};
  Complex* spectrum = d.spectra + chain * d.spectra_stride + spectra_before(inputs);
  filter_spectrum(rows, std::min(size, d.lags - size), nullptr, size, spectrum);
  ready = 1;
}

// A block of `inputs` that ends before place `end`, of sixteen channels, to the outputs of its level.
inline void level_step(const Decoder& d, int64_t inputs, int64_t item, int64_t end) {
  const int64_t size = 2 * inputs, chains = d.convolutions() * d.blocks();
  const int64_t chain = item % chains, sequence = item / chains;
  const int64_t convolution = chain / d.blocks(), block = chain % d.blocks();
  const int64_t lanes = std::min(kLanes, d.width - block * kLanes), first = end + inputs;
  if (first >= d.window) return;
  const Complex* spectrum = d.spectra + chain * d.spectra_stride + spectra_before(inputs);
  Arena arena(4 * size);
  Vec *z = arena.take(size), *wrapped = arena.take(size);
  Complex* a = arena.take_complex(size);
  const float* rows = d.history[convolution] + sequence * d.sequence_stride[convolution] +
                      block * kLanes * d.row_stride[convolution] + d.origin + end - inputs;
  for (int64_t t = 0; t < inputs; t += kLanes)
    load_tile(Rows<const float>{rows, d.row_stride[convolution], 1, lanes}, t, kLanes, z + t);
  std::fill(z + inputs, z + size, Vec{});
  through_spectrum(z, a, size, Multiply{spectrum}, z, wrapped);
  float* to = d.ahead_of(sequence, convolution, first) + block * kLanes;
  const int64_t outputs = std::min(3 * inputs, d.window - first), padded = d.padded();
  for (int64_t t = 0; t < outputs; ++t, to += padded) write(to, read(to) + (t < size ? z[t] : wrapped[t - size]));
}

// The turns of all levels after the input at `place`. Items are numbered by chain within sequence, as `level_step` reads.
template <class Each>
void levels_step(const Decoder& d, int64_t place, const Each& each) {
  const int64_t seen = place + 1, items = d.batch * d.convolutions() * d.blocks();
  int level = 0;
  for (int64_t inputs = kFirstBlock; 2 * inputs < std::min(d.window, d.lags); inputs *= 2, ++level) {
    const int64_t since = seen % inputs, end = seen - since;
    if (end < inputs) break;
    const auto done = [&](int64_t steps) { return std::min(items, (2 * steps * items + inputs) / (2 * inputs)); };
    const int64_t from = since == 0 ? 0 : done(since), to = done(since + 1);
    for (int64_t item = from; item < to; ++item) prepare_level(d, inputs, level, item % (items / d.batch));
    if (to > from) each(to - from, [&](int64_t item) { level_step(d, inputs, from + item, end); });
  }
}

// What the past of `seen` positions adds to the outputs of a window that begins behind it, for sixteen channels.
inline void fold_block(Rows<const float> past, int64_t seen, const Complex* spectrum, int64_t size, float* ahead,
                       int64_t window, int64_t padded) {
  Arena arena(3 * size);
  Vec* z = arena.take(size);
  for (int64_t t = 0; t < seen; t += kLanes) load_tile(past, t, std::min(kLanes, seen - t), z + t);
  std::fill(z + seen, z + size, Vec{});
  through_spectrum(z, arena.take_complex(size), size, Multiply{spectrum}, z);
  for (int64_t t = 0; t < window; ++t) write(ahead + t * padded, z[seen + t]);
}

}  // namespace layerswap
