// What lies between the projections of channel-wise Hyena, for sixteen channels of one sequence: short convolutions,
// gates and long convolutions of any order, forwards and backwards. Backward computes everything again from the
// projections.
#pragma once

#include "rows.h"

namespace layerswap {

// The projections (batch, (order + 1) width, length): x_0, the gates, v. Strides are in numbers.
template <class T>
struct Projections {
  const T* data;
  int64_t batch_stride, channel_stride, position_stride;
  int64_t batch, width, length, order, taps;
  const float *weight, *bias;  // ((order + 1) width, taps), ((order + 1) width)
  const float* mask;           // (batch, length) or null

  int64_t blocks() const { return (width + kLanes - 1) / kLanes; }
  int64_t lanes(int64_t block) const { return std::min(kLanes, width - block * kLanes); }
  int64_t row(int64_t part, int64_t block) const { return part * width + block * kLanes; }
  Rows<const T> rows(int64_t sequence, int64_t part, int64_t block) const {
    return {data + sequence * batch_stride + row(part, block) * channel_stride, channel_stride, position_stride,
            lanes(block)};
  }
  const float* mask_of(int64_t sequence) const { return mask ? mask + sequence * length : nullptr; }
  // The taps and, last, the bias of every part of a block: (order + 1) (taps + 1) vectors.
  void gather_taps(int64_t block, Vec* to) const {
    for (int64_t part = 0; part <= order; ++part, to += taps + 1) {
      gather(weight + row(part, block) * taps, taps, lanes(block), taps, to);
      gather(bias + row(part, block), 1, lanes(block), 1, to + taps);
    }
  }
  ShortConv<T> stream(int64_t sequence, int64_t part, int64_t block, const Vec* taps_of_block, Vec* window) const {
    const Vec* weights = taps_of_block + part * (taps + 1);
    return {rows(sequence, part, block), length, weights, taps, mask_of(sequence), window};
  }
  int64_t window() const { return taps + 15; }
};

// Memory of a thread, kept from call to call and handed out piece by piece.
class Arena {
 public:
  explicit Arena(int64_t vectors) {
    static thread_local std::vector<Vec> pool;
    if (int64_t(pool.size()) < vectors) pool.resize(vectors);
    next_ = pool.data();
  }
  Vec* take(int64_t vectors) { return std::exchange(next_, next_ + vectors); }
  Complex* take_complex(int64_t numbers) { return reinterpret_cast<Complex*>(take(2 * numbers)); }

 private:
  Vec* next_;
};

inline int64_t rounded_up(int64_t length) { return (length + kLanes - 1) / kLanes * kLanes; }

// The spectrum of a block of filters (rows of `length` numbers), divided by the size, for `through_spectrum`.
inline void filter_spectrum(Rows<const float> h, int64_t length, const float* direct, int64_t size, Complex* spectrum) {
  thread_local std::vector<Vec> taps;
  if (int64_t(taps.size()) < size) taps.resize(size);
  length = std::min(length, size);
  for (int64_t t = 0; t < length; t += kLanes) load_tile(h, t, std::min(kLanes, length - t), taps.data() + t);
  for (int64_t t = rounded_up(length); t < size; ++t) taps[t] = Vec{};
  if (direct) {
    Vec now;
    gather(direct, 1, h.lanes, 1, &now);
    taps[0] += now;
  }
  through_spectrum(taps.data(), spectrum, size, Scale{1.0f / size});
}

// y = x_0 (h * (gate .. (h * (gate v)))) of a block. `spectra` by convolution, `spectrum_stride` apart. `history`, where
// there is one, takes what goes into convolution i; `ahead`, where there are such, what comes out of it behind the
// sequence, `window` positions `ahead_stride` apart.
template <class T, class History, class Ahead>
void forward_block(const Projections<T>& p, int64_t sequence, int64_t block, int64_t size, const Complex* spectra,
                   int64_t spectrum_stride, Rows<T> out, const History& history, const Ahead& ahead, int64_t window,
                   int64_t ahead_stride) {
  const int64_t convolutions = p.order - 1, parts = p.order + 1;
  Arena arena(size * 3 + parts * (p.taps + 1) + 2 * p.window());
  Vec *z = arena.take(size), *taps = arena.take(parts * (p.taps + 1));
  Vec *inputs = arena.take(p.window()), *gate_inputs = arena.take(p.window());
  Complex* a = arena.take_complex(size);
  p.gather_taps(block, taps);
  Vec u[16];
  auto value = p.stream(sequence, p.order, block, taps, inputs);
  for (int64_t i = 0; i < convolutions; ++i) {
    auto gate = p.stream(sequence, p.order - 1 - i, block, taps, gate_inputs);
    const auto rows = history(i);
    for (int64_t t = 0; t < p.length; t += kLanes) {
      const int64_t count = gate.count();
      if (i == 0) value.next(z + t);
      gate.next(u);
      for (int j = 0; j < 16; ++j) z[t + j] = j < count ? z[t + j] * u[j] : Vec{};
      if (rows.data) store_tile(rows, t, count, z + t);
    }
    for (int64_t t = rounded_up(p.length); t < size; ++t) z[t] = Vec{};
    through_spectrum(z, a, size, Multiply{spectra + i * spectrum_stride}, z);
    for (int64_t t = 0; t < window; ++t) write(ahead(i) + t * ahead_stride, z[p.length + t]);
  }
  auto first = p.stream(sequence, 0, block, taps, inputs);
  for (int64_t t = 0; t < p.length; t += kLanes) {
    const int64_t count = first.count();
    first.next(u);
    for (int j = 0; j < 16; ++j) u[j] *= z[t + j];
    store_tile(out, t, count, u);
  }
}

// What a block's backward reads and fills besides the projections.
template <class T>
struct Gradients {
  const T* grad;            // (batch, width, length) of y
  int64_t batch_stride, channel_stride, position_stride;
  const float *h, *direct;  // (convolutions width, length), (convolutions width)
  T* dp;                    // strides as those of the projections
  float *dweight, *dbias, *dh, *ddirect;
};

// Rows [0, length) of `du` through the short convolution backwards: stores dp and adds to `sums`, taps and then bias.
// `du` is zero for taps + 15 positions behind its end.
template <class T>
void short_conv_backward(ShortConv<T> stream, const Vec* du, int64_t length, const Vec* weights, int64_t taps,
                         Rows<T> dp, Vec* sums) {
  for (int64_t t = 0; t < length; t += kLanes) {
    const int64_t count = stream.count();
    const Vec* inputs = stream.inputs();
    Vec back[16] = {};
    for (int64_t k = 0; k < taps; ++k) {
      Vec sum{};
      for (int j = 0; j < 16; ++j) {
        back[j] += weights[k] * du[t + j + taps - 1 - k];
        sum += du[t + j] * inputs[k + j];
      }
      sums[k] += sum;
    }
    for (int j = 0; j < 16; ++j) sums[taps] += du[t + j];
    store_tile(dp, t, count, back);
  }
}

// The gradients of a block of channels over all sequences, in their order. With r a reversal in time, the gradient of
// a convolution's input is r(h * r(gradient)), and that of its filter r(input * r(gradient)), summed as a spectrum.
template <class T>
void backward_block(const Projections<T>& p, const Gradients<T>& g, int64_t block, int64_t size) {
  const int64_t convolutions = p.order - 1, parts = p.order + 1, length = p.length, lanes = p.lanes(block);
  const int64_t room = rounded_up(length) + p.window(), per_part = p.taps + 1;
  Arena arena(2 * size * (3 * convolutions + 1) + size * (convolutions + 1) + parts * (room + 2 * per_part) + p.window());
  Complex *spectra = arena.take_complex(size * convolutions), *inputs = arena.take_complex(size * convolutions);
  Complex *sums = arena.take_complex(size * convolutions), *a = arena.take_complex(size);
  Vec *y = arena.take(size * convolutions), *z = arena.take(size), *u = arena.take(parts * room);
  Vec *taps = arena.take(parts * per_part), *dtaps = arena.take(parts * per_part), *window = arena.take(p.window());
  p.gather_taps(block, taps);
  std::fill_n(dtaps, parts * per_part, Vec{});
  std::fill_n(sums, size * convolutions, Complex{});
  for (int64_t i = 0; i < convolutions; ++i) {
    const int64_t row = p.row(i, block);
    filter_spectrum({g.h + row * length, length, 1, lanes}, length, g.direct + row, size, spectra + i * size);
  }
  const auto output_of = [&](int64_t i) { return i == 0 ? u + p.order * room : y + (i - 1) * size; };
  const auto gate_of = [&](int64_t i) { return u + (p.order - 1 - i) * room; };
  const auto clear_tail = [&] { std::fill(z + length, z + size, Vec{}); };
  for (int64_t sequence = 0; sequence < p.batch; ++sequence) {
    for (int64_t part = 0; part < parts; ++part) {
      auto stream = p.stream(sequence, part, block, taps, window);
      for (int64_t t = 0; t < length; t += kLanes) stream.next(u + part * room + t);
      std::fill(u + part * room + length, u + (part + 1) * room, Vec{});
    }
    for (int64_t i = 0; i < convolutions; ++i) {
      const Vec *gate = gate_of(i), *in = output_of(i);
      for (int64_t t = 0; t < length; ++t) z[t] = gate[t] * in[t];
      clear_tail();
      through_spectrum(z, a, size, KeepAndMultiply{spectra + i * size, inputs + i * size}, output_of(i + 1));
    }
    const Rows<const T> grad{g.grad + sequence * g.batch_stride + block * kLanes * g.channel_stride, g.channel_stride,
                             g.position_stride, lanes};
    const Vec* last = output_of(convolutions);
    for (int64_t t = 0; t < length; t += kLanes) {
      Vec dy[16];
      const int64_t count = std::min(kLanes, length - t);
      load_tile(grad, t, count, dy);
      for (int64_t j = 0; j < count; ++j) {
        z[length - 1 - t - j] = dy[j] * u[t + j];
        u[t + j] = dy[j] * last[t + j];
      }
    }
    for (int64_t i = convolutions - 1; i >= 0; --i) {
      clear_tail();
      through_spectrum(z, a, size, SumAndMultiply{spectra + i * size, inputs + i * size, sums + i * size}, z);
      Vec *gate = gate_of(i), *in = output_of(i);
      for (int64_t t = 0; t < length; ++t) {
        const Vec dz = z[length - 1 - t];
        const Vec din = dz * gate[t];
        gate[t] = dz * in[t];
        (i == 0 ? in[t] : z[length - 1 - t]) = din;
      }
    }
    for (int64_t part = 0; part < parts; ++part) {
      Vec* du = u + part * room;
      if (p.mask)
        for (int64_t t = 0; t < length; ++t) du[t] *= p.mask_of(sequence)[t];
      const Rows<T> dp{g.dp + sequence * p.batch_stride + p.row(part, block) * p.channel_stride, p.channel_stride,
                       p.position_stride, lanes};
      short_conv_backward(p.stream(sequence, part, block, taps, window), du, length, taps + part * per_part, p.taps, dp,
                          dtaps + part * per_part);
    }
  }
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = p.row(part, block);
    scatter(dtaps + part * per_part, p.taps, lanes, p.taps, g.dweight + row * p.taps);
    scatter(dtaps + part * per_part + p.taps, 1, lanes, 1, g.dbias + row);
  }
  for (int64_t i = 0; i < convolutions; ++i) {
    const int64_t row = p.row(i, block);
    through_spectrum(z, a, size, Take{sums + i * size}, y);
    for (int64_t t = 0; t < length; ++t) z[t] = y[length - 1 - t] * (1.0f / size);
    for (int64_t t = 0; t < length; t += kLanes)
      store_tile(Rows<float>{g.dh + row * length, length, 1, lanes}, t, std::min(kLanes, length - t), z + t);
    scatter(z, 1, lanes, 1, g.ddirect + row);
  }
}

}  // namespace layerswap
