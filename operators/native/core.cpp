// The operators of torch.ops.layerswap, on the CPU: checks and threads around conv.h. Work is divided by channels and
// sequences, never inside a sum, so that results do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "step.h"

namespace {

using at::Tensor;
using namespace layerswap;

bool touching(const Tensor& t) { return t.size(-1) == 1 || t.stride(-1) == 1; }
bool either_way(const Tensor& t) { return t.dim() == 3 && (t.stride(1) == 1 || touching(t)); }

void check_float(const Tensor& t, const char* name) {
  TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous(), name, " must be contiguous float32");
}

void check_ahead(const Tensor& ahead, int64_t batch, int64_t convolutions, int64_t padded) {
  check_float(ahead, "ahead");
  TORCH_CHECK(ahead.dim() == 4 && ahead.size(0) == batch && ahead.size(1) == convolutions && ahead.size(3) == padded,
              "ahead must be (B, convolutions, window, padded D)");
}

template <class T, class U>
Projections<T> projections(const Tensor& p, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
                           int64_t width) {
  TORCH_CHECK(either_way(p) && p.size(1) % width == 0, "projections must be (B, parts D, L)");
  check_float(weight, "short weight");
  check_float(bias, "short bias");
  TORCH_CHECK(weight.size(0) == p.size(1) && bias.size(0) == p.size(1), "a row of taps for every projection");
  Projections<T> q;
  q.data = reinterpret_cast<const T*>(p.const_data_ptr<U>());
  q.batch_stride = p.stride(0), q.channel_stride = p.stride(1), q.position_stride = p.stride(2);
  q.batch = p.size(0), q.width = width, q.length = p.size(2), q.order = p.size(1) / width - 1, q.taps = weight.size(1);
  q.weight = weight.const_data_ptr<float>(), q.bias = bias.const_data_ptr<float>();
  q.mask = nullptr;
  if (mask) {
    check_float(*mask, "mask");
    TORCH_CHECK(mask->size(0) == q.batch && mask->size(1) == q.length, "mask must be (B, L)");
    q.mask = mask->const_data_ptr<float>();
  }
  return q;
}

// Work items 0 to count - 1, each by one thread.
template <class F>
void each(int64_t count, const F& work) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) work(item);
  });
}

const Complex* complexes(const Tensor& t) { return reinterpret_cast<const Complex*>(t.const_data_ptr<float>()); }

// Filters (convolutions width, lags), with `direct` added at lag 0 where given: (convolutions, blocks, size, 2, lanes).
Tensor spectrum(const Tensor& h, const std::optional<Tensor>& direct, int64_t width, int64_t length) {
  TORCH_CHECK(h.dim() == 2 && touching(h) && h.scalar_type() == at::kFloat && h.size(0) % width == 0, "filters");
  if (direct) check_float(*direct, "direct");
  const int64_t convolutions = h.size(0) / width, blocks = (width + kLanes - 1) / kLanes, size = transform_size(length);
  TORCH_CHECK(size <= kLargest, "at most ", kLargest, " positions");
  Tensor out = at::empty({convolutions, blocks, size, 2, kLanes}, h.options());
  Complex* to = reinterpret_cast<Complex*>(out.mutable_data_ptr<float>());
  each(convolutions * blocks, [&](int64_t item) {
    const int64_t block = item % blocks, row = item / blocks * width + block * kLanes;
    const Rows<const float> rows{h.const_data_ptr<float>() + row * h.stride(0), h.stride(0), 1,
                                 std::min(kLanes, width - block * kLanes)};
    const float* now = direct ? direct->const_data_ptr<float>() + row : nullptr;
    filter_spectrum(rows, std::min(length, h.size(1)), now, size, to + item * size);
  });
  return out;
}

template <class T, class U>
Tensor convolve_as(const Tensor& p, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
                   const Tensor& spectra, int64_t width, at::TensorList histories, const std::optional<Tensor>& ahead) {
  const auto q = projections<T, U>(p, mask, weight, bias, width);
  const int64_t size = spectra.size(2), blocks = q.blocks(), convolutions = q.order - 1;
  check_float(spectra, "spectra");
  TORCH_CHECK(size >= q.length && spectra.size(0) == convolutions && spectra.size(1) == blocks, "spectra do not fit");
  TORCH_CHECK(histories.empty() || int64_t(histories.size()) == convolutions, "a history for every convolution");
  for (const Tensor& z : histories) TORCH_CHECK(z.scalar_type() == at::kFloat && touching(z), "history");
  const int64_t window = ahead ? ahead->size(2) : 0, padded = blocks * kLanes;
  TORCH_CHECK(size >= q.length + window, "spectra are too short for the window");
  if (ahead) check_ahead(*ahead, q.batch, convolutions, padded);
  float* windows = ahead ? ahead->mutable_data_ptr<float>() : nullptr;
  Tensor y = p.stride(1) == 1 ? at::empty({q.batch, q.length, width}, p.options()).transpose(1, 2)
                              : at::empty({q.batch, width, q.length}, p.options());
  T* out = reinterpret_cast<T*>(y.template mutable_data_ptr<U>());
  each(q.batch * blocks, [&](int64_t item) {
    const int64_t sequence = item % q.batch, block = item / q.batch, lanes = q.lanes(block);
    const auto history = [&](int64_t i) -> Rows<float> {
      if (histories.empty()) return {nullptr, 0, 0, 0};
      const Tensor& z = histories[i];
      return {z.mutable_data_ptr<float>() + sequence * z.stride(0) + block * kLanes * z.stride(1), z.stride(1), 1,
              lanes};
    };
    const auto ahead_of = [&](int64_t i) {
      return windows + (sequence * convolutions + i) * window * padded + block * kLanes;
    };
    const Rows<T> rows{out + sequence * y.stride(0) + block * kLanes * y.stride(1), y.stride(1), y.stride(2), lanes};
    forward_block(q, sequence, block, size, complexes(spectra) + block * size, blocks * size, rows, history, ahead_of,
                  window, padded);
  });
  return y;
}

Tensor convolve(const Tensor& p, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
                const Tensor& spectra, int64_t width, at::TensorList histories, const std::optional<Tensor>& ahead) {
  if (p.scalar_type() == at::kFloat)
    return convolve_as<float, float>(p, mask, weight, bias, spectra, width, histories, ahead);
  TORCH_CHECK(p.scalar_type() == at::kBFloat16, "projections must be float32 or bfloat16");
  return convolve_as<BFloat, at::BFloat16>(p, mask, weight, bias, spectra, width, histories, ahead);
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T, class U>
Five backward_as(const Tensor& grad, const Tensor& p, const std::optional<Tensor>& mask, const Tensor& weight,
                 const Tensor& bias, const Tensor& h, const Tensor& direct) {
  const int64_t width = grad.size(1);
  const auto q = projections<T, U>(p, mask, weight, bias, width);
  check_float(h, "h");
  check_float(direct, "direct");
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({q.batch, width, q.length}) && either_way(grad), "gradient does not fit");
  TORCH_CHECK(h.size(0) == (q.order - 1) * width && h.size(1) == q.length, "filters do not fit");
  Tensor dp = at::empty_strided(p.sizes(), p.strides(), p.options()), dweight = at::empty_like(weight), dbias = at::empty_like(bias);
  Tensor dh = at::empty_like(h), ddirect = at::empty_like(direct);
  Gradients<T> g;
  g.grad = reinterpret_cast<const T*>(grad.const_data_ptr<U>());
  g.batch_stride = grad.stride(0), g.channel_stride = grad.stride(1), g.position_stride = grad.stride(2);
  g.h = h.const_data_ptr<float>(), g.direct = direct.const_data_ptr<float>();
  g.dp = reinterpret_cast<T*>(dp.template mutable_data_ptr<U>());
  g.dweight = dweight.mutable_data_ptr<float>(), g.dbias = dbias.mutable_data_ptr<float>();
  g.dh = dh.mutable_data_ptr<float>(), g.ddirect = ddirect.mutable_data_ptr<float>();
  const int64_t size = transform_size(q.length);
  each(q.blocks(), [&](int64_t block) { backward_block(q, g, block, size); });
  return {dp, dweight, dbias, dh, ddirect};
}

Five convolve_backward(const Tensor& grad, const Tensor& p, const std::optional<Tensor>& mask, const Tensor& weight,
                       const Tensor& bias, const Tensor& h, const Tensor& direct) {
  TORCH_CHECK(grad.scalar_type() == p.scalar_type(), "gradient and projections must have one dtype");
  if (p.scalar_type() == at::kFloat) return backward_as<float, float>(grad, p, mask, weight, bias, h, direct);
  TORCH_CHECK(p.scalar_type() == at::kBFloat16, "projections must be float32 or bfloat16");
  return backward_as<BFloat, at::BFloat16>(grad, p, mask, weight, bias, h, direct);
}

// What the first `seen` positions of histories add to those behind, into ahead.
void fold(at::TensorList histories, int64_t seen, const Tensor& spectra, const Tensor& ahead) {
  const int64_t convolutions = histories.size(), batch = ahead.size(0), width = histories[0].size(1);
  const int64_t blocks = spectra.size(1), size = spectra.size(2), window = ahead.size(2), padded = blocks * kLanes;
  check_float(spectra, "spectra");
  check_ahead(ahead, batch, convolutions, padded);
  TORCH_CHECK(spectra.size(0) == convolutions && size >= seen + window, "spectra do not fit");
  float* windows = ahead.mutable_data_ptr<float>();
  each(batch * convolutions * blocks, [&](int64_t item) {
    const int64_t block = item % blocks, i = item / blocks % convolutions, sequence = item / (blocks * convolutions);
    const Tensor& z = histories[i];
    const float* rows = z.const_data_ptr<float>() + sequence * z.stride(0) + block * kLanes * z.stride(1);
    fold_block({rows, z.stride(1), 1, std::min(kLanes, width - block * kLanes)}, seen,
               complexes(spectra) + (i * blocks + block) * size, size,
               windows + (sequence * convolutions + i) * window * padded + block * kLanes, window, padded);
  });
}

// Writes x (B, 1, D) to a position of its history (B, D, positions).
template <class Bits>
void remember(const Tensor& x, const Tensor& history, int64_t position) {
  TORCH_CHECK(x.element_size() == sizeof(Bits) && touching(history) && history.size(2) > position, "history of inputs");
  const Bits* from = static_cast<const Bits*>(x.const_data_ptr());
  const int64_t width = x.size(-1), stride = history.stride(1);
  for (int64_t sequence = 0; sequence < x.size(0); ++sequence, from += width) {
    Bits* to = static_cast<Bits*>(history.mutable_data_ptr()) + sequence * history.stride(0) + position;
    for (int64_t c = 0; c < width; ++c) to[c * stride] = from[c];
  }
}

template <class T>
void step_sequences(const Decoder& d, const T* p, T* recent, T* y, int64_t position) {
  const int64_t rows = (d.order + 1) * d.width;
  std::vector<float> u(rows), z(d.padded());
  for (int64_t sequence = 0; sequence < d.batch; ++sequence) {
    short_conv_step(p + sequence * rows, recent + sequence * rows * (d.taps - 1), d.weight, d.bias, rows, d.taps, u.data());
    std::copy_n(u.data() + d.order * d.width, d.width, z.data());
    for (int64_t i = 0; i < d.convolutions(); ++i) {
      const float* gate = u.data() + (d.order - 1 - i) * d.width;
      for (int64_t c = 0; c < d.width; ++c) z[c] *= gate[c];
      near_step(d, sequence, i, position, z.data(), z.data());
    }
    for (int64_t c = 0; c < d.width; ++c) z[c] *= u[c];
    store_row(z.data(), d.width, y + sequence * d.width);
  }
}

// One position; histories are that of the inputs x, then those of the convolutions.
Tensor step(const Tensor& p, const Tensor& recent, const Tensor& weight, const Tensor& bias, const Tensor& h,
            const Tensor& near, const Tensor& spectra, const Tensor& ready, const Tensor& x, at::TensorList histories,
            const Tensor& ahead, int64_t position, int64_t origin) {
  Decoder d;
  d.width = x.size(-1), d.batch = p.size(0), d.order = int64_t(histories.size()), d.taps = weight.size(1);
  check_float(weight, "short weight");
  check_float(bias, "short bias");
  check_float(h, "h");
  check_float(near, "near");
  check_float(spectra, "spectra");
  check_ahead(ahead, d.batch, d.convolutions(), d.padded());
  TORCH_CHECK(p.is_contiguous() && recent.is_contiguous() && x.is_contiguous(), "inputs must be contiguous");
  TORCH_CHECK(p.scalar_type() == recent.scalar_type() && p.numel() == d.batch * (d.order + 1) * d.width, "projections");
  TORCH_CHECK(x.scalar_type() == histories[0].scalar_type() && x.numel() == d.batch * d.width, "inputs do not fit");
  d.weight = weight.const_data_ptr<float>(), d.bias = bias.const_data_ptr<float>();
  d.h = h.const_data_ptr<float>(), d.lags = h.size(1), d.near = near.const_data_ptr<float>();
  d.spectra = reinterpret_cast<Complex*>(spectra.mutable_data_ptr<float>());
  d.spectra_stride = spectra.size(1), d.ready = ready.mutable_data_ptr<uint8_t>();
  d.ahead = ahead.mutable_data_ptr<float>(), d.origin = origin, d.window = ahead.size(2);
  TORCH_CHECK(position >= origin && position - origin < d.window, "position ", position, " lies outside of the window");
  for (const Tensor& z : histories.slice(1)) {
    TORCH_CHECK(z.scalar_type() == at::kFloat && touching(z) && z.size(2) > position, "history");
    d.history.push_back(z.mutable_data_ptr<float>());
    d.sequence_stride.push_back(z.stride(0)), d.row_stride.push_back(z.stride(1));
  }
  if (x.element_size() == 4) remember<uint32_t>(x, histories[0], position);
  else remember<uint16_t>(x, histories[0], position);
  Tensor y = at::empty({d.batch, 1, d.width}, p.options());
  if (p.scalar_type() == at::kFloat) {
    step_sequences(d, p.const_data_ptr<float>(), recent.mutable_data_ptr<float>(), y.mutable_data_ptr<float>(), position);
  } else {
    using U = at::BFloat16;
    step_sequences(d, reinterpret_cast<const BFloat*>(p.const_data_ptr<U>()),
                   reinterpret_cast<BFloat*>(recent.mutable_data_ptr<U>()),
                   reinterpret_cast<BFloat*>(y.mutable_data_ptr<U>()), position);
  }
  levels_step(d, position - origin, [](int64_t count, const auto& work) { each(count, work); });
  return y;
}

}  // namespace

TORCH_LIBRARY(layerswap, library) {
  library.def("spectrum(Tensor h, Tensor? direct, int width, int length) -> Tensor");
  library.def(
      "convolve(Tensor p, Tensor? mask, Tensor weight, Tensor bias, Tensor spectra, int width, Tensor(a!)[] histories, "
      "Tensor(b!)? ahead) -> "
      "Tensor");
  library.def(
      "convolve_backward(Tensor grad, Tensor p, Tensor? mask, Tensor weight, Tensor bias, Tensor h, Tensor direct) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("fold(Tensor[] histories, int seen, Tensor spectra, Tensor(a!) ahead) -> ()");
  library.def(
      "step(Tensor p, Tensor(a!) recent, Tensor weight, Tensor bias, Tensor h, Tensor near, Tensor(b!) spectra, "
      "Tensor(c!) ready, Tensor x, Tensor(d!)[] histories, Tensor(e!) ahead, int position, int origin) -> Tensor");
}

TORCH_LIBRARY_IMPL(layerswap, CPU, library) {
  library.impl("spectrum", spectrum);
  library.impl("convolve", convolve);
  library.impl("convolve_backward", convolve_backward);
  library.impl("fold", fold);
  library.impl("step", step);
}
