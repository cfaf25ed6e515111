// Whole sequences in torch.ops.layerswap, on the CPU: checks and threads around conv.h. Work is divided by channels and
// sequences, never inside a sum, so that results do not depend on the number of threads.
#include "tensors.h"

namespace {

using namespace layerswap;

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
  Tensor y = p.stride(1) == 1 ? at::empty({q.batch, q.length, width}, p.options()).transpose(1, 2)
                              : at::empty({q.batch, width, q.length}, p.options());
  Outputs<T> o;
  o.y = reinterpret_cast<T*>(y.template mutable_data_ptr<U>());
  o.batch_stride = y.stride(0), o.channel_stride = y.stride(1), o.position_stride = y.stride(2);
  o.spectra = complexes(spectra), o.size = size;
  o.window = ahead ? ahead->size(2) : 0, o.ahead = nullptr;
  TORCH_CHECK(size >= q.length + o.window, "spectra are too short for the window");
  if (ahead) {
    check_ahead(*ahead, q.batch, convolutions, blocks * kLanes);
    o.ahead = ahead->mutable_data_ptr<float>();
  }
  for (const Tensor& z : histories) {
    o.histories.push_back({z.mutable_data_ptr<float>(), z.stride(1), 1, width});
    o.history_batch_stride.push_back(z.stride(0));
  }
  const int64_t groups = (blocks + kGroup<T> - 1) / kGroup<T>;
  each(q.batch * groups, [&](int64_t item) {
    const int64_t block = item / q.batch * kGroup<T>;
    forward_group(q, o, item % q.batch, block, std::min(kGroup<T>, blocks - block));
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
}

TORCH_LIBRARY_IMPL(layerswap, CPU, library) {
  library.impl("spectrum", spectrum);
  library.impl("convolve", convolve);
  library.impl("convolve_backward", convolve_backward);
}
