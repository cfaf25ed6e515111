// What steps of one position share: inputs that are remembered, the short convolution, heads in turn.
#pragma once

#include "heads.h"
#include "tensors.h"

namespace layerswap {

// Writes x (B, 1, D) to a position of its history (B, D, positions); D need not be the width of what is mixed.
template <class Bits>
void remember(const Tensor& x, const Tensor& history, int64_t position) {
  TORCH_CHECK(x.element_size() == sizeof(Bits) && history.stride(1) == 1 && history.size(2) > position, "history of inputs");
  const Bits* from = static_cast<const Bits*>(x.const_data_ptr());
  const int64_t width = x.size(-1);
  Bits* to = static_cast<Bits*>(history.mutable_data_ptr()) + position * history.stride(2);
  for (int64_t sequence = 0; sequence < x.size(0); ++sequence)
    std::copy_n(from + sequence * width, width, to + sequence * history.stride(0));
}

// Short convolutions by weights (K, E) of `recent`, K - 1 of (B, 1, E), and p (B, 1, E), which comes last, to u (B, E).
inline void short_conv_of(const Tensor& p, at::TensorList recent, const Tensor& weight, const Tensor& bias, float* u) {
  const int64_t taps = weight.size(0), rows = weight.size(1), batch = p.numel() / rows;
  TORCH_CHECK(int64_t(recent.size()) == taps - 1 && bias.numel() == rows, "recent projections do not fit");
  for (int64_t i = 0; i < batch; ++i) std::copy_n(bias.const_data_ptr<float>(), rows, u + i * rows);
  for (int64_t k = 0; k < taps; ++k) {
    const Tensor& from = k < taps - 1 ? recent[k] : p;
    const float* w = weight.const_data_ptr<float>() + k * rows;
    TORCH_CHECK(from.is_contiguous() && from.numel() == batch * rows, "projections do not fit");
    for (int64_t i = 0; i < batch; ++i) {
      if (from.scalar_type() == at::kFloat) add_tap(from.const_data_ptr<float>() + i * rows, w, rows, u + i * rows);
      else add_tap(reinterpret_cast<const BFloat*>(from.const_data_ptr<at::BFloat16>()) + i * rows, w, rows, u + i * rows);
    }
  }
}

// What comes into a step beside its weights: projections, those before them, the short convolution, inputs and their
// history (B, D, positions).
struct StepInputs {
  const Tensor& p;
  at::TensorList recent;
  const Tensor &weight, &bias, &x, &inputs;
  int64_t position;
};

// The rows of a head in a history or memory (B, H, rows, positions).
inline History history_of(const Tensor& t, int64_t item) {
  return {t.mutable_data_ptr<float>() + item * t.size(2) * t.size(3), t.size(3)};
}

// The short convolution to u (B, rows), then work(item, u of its sequence, y of its head) for every head of every
// sequence; (B, 1, width) in the projections' precision.
template <class F>
Tensor step_with(const StepInputs& given, int64_t heads, int64_t width, int64_t rows, const Tensor& direct, const F& work) {
  const Tensor &p = given.p, &x = given.x, &inputs = given.inputs;
  const int64_t batch = x.size(0), values = width / heads;
  check_float(given.weight, "short weight");
  check_float(given.bias, "short bias");
  check_float(direct, "direct");
  TORCH_CHECK(given.weight.size(1) == rows && direct.numel() == width, "rows do not fit");
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == inputs.scalar_type() && x.size(-1) == inputs.size(1), "inputs do not fit");
  if (x.element_size() == 4) remember<uint32_t>(x, inputs, given.position);
  else remember<uint16_t>(x, inputs, given.position);
  std::vector<float> u(batch * rows), y(batch * width);
  short_conv_of(p, given.recent, given.weight, given.bias, u.data());
  each(batch * heads, [&](int64_t item) { work(item, u.data() + item / heads * rows, y.data() + item * values); });
  Tensor out = at::empty({batch, 1, width}, p.options());
  if (p.scalar_type() == at::kFloat) store_row(y.data(), batch * width, out.mutable_data_ptr<float>());
  else store_row(y.data(), batch * width, reinterpret_cast<BFloat*>(out.mutable_data_ptr<at::BFloat16>()));
  return out;
}

}  // namespace layerswap
