// What lies between the projections of channel-wise Hyena, for sixteen channels of one sequence: short convolutions,
// gates and long convolutions of any order, forwards and backwards. Backward computes everything again from the
// projections.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <new>

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

// Memory of a thread, kept from call to call and handed out piece by piece; on large pages where there are any.
class Arena {
 public:
  explicit Arena(int64_t vectors) {
    static thread_local Pool pool;
    pool.grow(vectors);
    next_ = pool.data;
  }
  Vec* take(int64_t vectors) { return std::exchange(next_, next_ + vectors); }
  Complex* take_complex(int64_t numbers) { return reinterpret_cast<Complex*>(take(2 * numbers)); }

 private:
  static constexpr size_t kPage = 2 << 20;
  struct Pool {
    Vec* data = nullptr;
    size_t bytes = 0;
    void grow(int64_t vectors) {
      const size_t wanted = (vectors * sizeof(Vec) + kPage - 1) / kPage * kPage;
      if (wanted <= bytes) return;
      std::free(data);
      data = static_cast<Vec*>(std::aligned_alloc(kPage, wanted));
      bytes = data ? wanted : 0;
      if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      madvise(data, bytes, MADV_HUGEPAGE);
#endif
    }
    ~Pool() { std::free(data); }
  };

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

// What forward reads and fills besides the projections.
template <class T>
struct Outputs {
  T* y;  // (batch, width, length)
  int64_t batch_stride, channel_stride, position_stride;
  const Complex* spectra;  // (convolutions, blocks, size)
  int64_t size;
  std::vector<Rows<float>> histories;        // of the first sequence's channels, or none: what goes into a convolution
  std::vector<int64_t> history_batch_stride;
  float* ahead;  // (batch, convolutions, window, channels in whole vectors), what comes out behind the sequence
  int64_t window;
};

// Blocks that go through the projections together, two cache lines of a position wide.
template <class T>
constexpr int64_t kGroup = 128 / (kLanes * sizeof(T));

// y = x_0 (h * (gate .. (h * (gate v)))) of `group` blocks from `block` on.
template <class T>
void forward_group(const Projections<T>& p, const Outputs<T>& o, int64_t sequence, int64_t block, int64_t group) {
  const int64_t convolutions = p.order - 1, parts = p.order + 1, size = o.size, per_block = parts * (p.taps + 1);
  Arena arena(2 * size + group * (size + per_block + 2 * p.window()));
  Vec *z = arena.take(group * size), *taps = arena.take(group * per_block), *windows = arena.take(2 * group * p.window());
  Complex* a = arena.take_complex(size);
  for (int64_t g = 0; g < group; ++g) p.gather_taps(block + g, taps + g * per_block);
  const auto streams = [&](int64_t part, int64_t half) {
    std::vector<ShortConv<T>> made;
    for (int64_t g = 0; g < group; ++g)
      made.push_back(p.stream(sequence, part, block + g, taps + g * per_block, windows + (2 * g + half) * p.window()));
    return made;
  };
  const auto rows_of = [&](auto* data, int64_t channel, int64_t position, int64_t g) {
    return Rows<std::remove_pointer_t<decltype(data)>>{data + (block + g) * kLanes * channel, channel, position,
                                                       p.lanes(block + g)};
  };
  Vec u[16];
  auto values = streams(p.order, 0);
  for (int64_t i = 0; i < convolutions; ++i) {
    auto gates = streams(p.order - 1 - i, 1);
    for (int64_t t = 0; t < p.length; t += kLanes)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t count = gates[g].count();
        Vec* to = z + g * size + t;
        if (i == 0) values[g].next(to);
        gates[g].next(u);
        for (int j = 0; j < 16; ++j) to[j] = j < count ? to[j] * u[j] : Vec{};
        if (o.histories.empty()) continue;
        const Rows<float>& rows = o.histories[i];
        float* data = rows.data + sequence * o.history_batch_stride[i];
        store_tile(rows_of(data, rows.channel, rows.position, g), t, count, to);
      }
    for (int64_t g = 0; g < group; ++g) {
      Vec* to = z + g * size;
      std::fill(to + rounded_up(p.length), to + size, Vec{});
      through_spectrum(to, a, size, Multiply{o.spectra + (i * p.blocks() + block + g) * size}, to);
      const int64_t padded = p.blocks() * kLanes;
      float* ahead = o.ahead + (sequence * convolutions + i) * o.window * padded + (block + g) * kLanes;
      for (int64_t t = 0; t < o.window; ++t) write(ahead + t * padded, to[p.length + t]);
    }
  }
  auto firsts = streams(0, 0);
  for (int64_t t = 0; t < p.length; t += kLanes)
    for (int64_t g = 0; g < group; ++g) {
      const int64_t count = firsts[g].count();
      firsts[g].next(u);
      for (int j = 0; j < 16; ++j) u[j] *= z[g * size + t + j];
      store_tile(rows_of(o.y + sequence * o.batch_stride, o.channel_stride, o.position_stride, g), t, count, u);
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
