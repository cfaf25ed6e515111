// Decoding in torch.ops.layerswap, on the CPU: checks and threads around step.h and heads.h.
#include "product.h"
#include "steps.h"

namespace {

using namespace layerswap;

using FewRows = void (*)(const float*, const float*, const float*, int64_t, int64_t, int64_t, float*, int64_t);

template <int... Rows>
FewRows few_rows_of(int64_t rows, std::integer_sequence<int, Rows...>) {
  static constexpr FewRows all[] = {few_rows<Rows + 1>...};
  return all[rows - 1];
}

// x (..., K) of up to kMostRows rows times weight (E, K) transposed, plus bias (E,): (..., E).
Tensor project_few(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), rows = inputs > 0 ? x.numel() / inputs : 0;
  check_float(x, "x");
  check_float(weight, "weight");
  if (bias) check_float(*bias, "bias");
  TORCH_CHECK(x.size(-1) == inputs && rows >= 1 && rows <= kMostRows, "x must have 1 to ", kMostRows, " rows of ", inputs);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor y = at::empty(sizes, x.options());
  const FewRows work = few_rows_of(rows, std::make_integer_sequence<int, kMostRows>());
  at::parallel_for(0, outputs, 64, [&](int64_t first, int64_t last) {
    work(x.const_data_ptr<float>(), weight.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr, inputs,
         first, last, y.mutable_data_ptr<float>(), outputs);
  });
  return y;
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

template <class T>
void step_sequences(const Decoder& d, const float* u, T* y, int64_t position) {
  const int64_t rows = (d.order + 1) * d.width;
  std::vector<float> z(d.padded());
  for (int64_t sequence = 0; sequence < d.batch; ++sequence, u += rows) {
    std::copy_n(u + d.order * d.width, d.width, z.data());
    for (int64_t i = 0; i < d.convolutions(); ++i) {
      const float* gate = u + (d.order - 1 - i) * d.width;
      for (int64_t c = 0; c < d.width; ++c) z[c] *= gate[c];
      near_step(d, sequence, i, position, z.data(), z.data());
    }
    for (int64_t c = 0; c < d.width; ++c) z[c] *= u[c];
    store_row(z.data(), d.width, y + sequence * d.width);
  }
}

// One position; histories are that of the inputs x, then those of the convolutions.
Tensor step(const Tensor& p, at::TensorList recent, const Tensor& weight, const Tensor& bias, const Tensor& h,
            const Tensor& near, const Tensor& spectra, const Tensor& ready, const Tensor& x, at::TensorList histories,
            const Tensor& ahead, int64_t position, int64_t origin) {
  Decoder d;
  d.batch = p.size(0), d.order = int64_t(histories.size()), d.width = p.size(-1) / (d.order + 1);
  check_float(weight, "short weight");
  check_float(bias, "short bias");
  check_float(h, "h");
  check_float(near, "near");
  check_float(spectra, "spectra");
  check_ahead(ahead, d.batch, d.convolutions(), d.padded());
  TORCH_CHECK(x.is_contiguous() && p.numel() == d.batch * (d.order + 1) * d.width, "projections do not fit");
  TORCH_CHECK(x.scalar_type() == histories[0].scalar_type() && x.numel() == d.batch * histories[0].size(1), "inputs do not fit");
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
  std::vector<float> u(p.numel());
  short_conv_of(p, recent, weight, bias, u.data());
  if (p.scalar_type() == at::kFloat) step_sequences(d, u.data(), y.mutable_data_ptr<float>(), position);
  else step_sequences(d, u.data(), reinterpret_cast<BFloat*>(y.mutable_data_ptr<at::BFloat16>()), position);
  levels_step(d, position - origin, [](int64_t count, const auto& work) { each(count, work); });
  return y;
}

// One position of multi-head Hyena: the short convolution, then work(item, input, y) for every head of every sequence.
template <class F>
Tensor heads_step_with(const HeadStep& step, const StepInputs& given, const Tensor& direct, const F& work) {
  const int64_t heads = step.heads, keys = heads * step.keys, width = heads * step.values;
  return step_with(given, heads, width, 2 * keys + width + (step.gated ? heads : 0), direct,
                   [&](int64_t item, const float* q, float* y) {
    const int64_t head = item % heads;
    const float *k = q + keys, *v = k + keys;
    const HeadInput in{q + head * step.keys, k + head * step.keys, v + head * step.values,
                       step.gated ? v[width + head] : 0.0f};
    work(item, in, direct.const_data_ptr<float>() + head * step.values, y);
  });
}

// Histories are those of inputs x, of keys (B, H, K, positions) and of values.
Tensor heads_step(const Tensor& p, at::TensorList recent, const Tensor& weight, const Tensor& bias, const Tensor& lags,
                  const Tensor& direct, const Tensor& x, at::TensorList histories, int64_t position, int64_t degree,
                  bool gated, bool normalised, double scale, double largest_gate, double smallest_sum) {
  TORCH_CHECK(histories.size() == 3, "histories of inputs, keys and values");
  const Tensor &key = histories[1], &value = histories[2];
  const int64_t heads = key.size(1);
  const HeadStep step{heads, key.size(2), value.size(2) - normalised, degree, gated, normalised,
                      float(scale), float(largest_gate), float(smallest_sum)};
  for (const Tensor* t : {&key, &value})
    TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->size(3) > position, "histories do not fit");
  TORCH_CHECK(value.size(1) == heads && step.values > 0, "rows of values do not fit");
  TORCH_CHECK(lags.scalar_type() == at::kFloat && touching(lags) && lags.size(1) == position + 1, "lags do not fit");
  return heads_step_with(step, {p, recent, weight, bias, x, histories[0], position}, direct,
                         [&](int64_t item, const HeadInput& in, const float* direct_of, float* y) {
    const float* lags_of = lags.const_data_ptr<float>() + item % heads * lags.stride(0);
    head_step(step, in, direct_of, history_of(key, item), history_of(value, item), lags_of, position, y);
  });
}

const float* numbers(const Tensor& t) {
  return t.is_complex() ? static_cast<const float*>(t.const_data_ptr()) : t.const_data_ptr<float>();
}

// From a memory (B, H, modes, K, values), complex where decay and residue (H, modes) are.
Tensor heads_modal_step(const Tensor& p, at::TensorList recent, const Tensor& weight, const Tensor& bias,
                        const Tensor& decay, const Tensor& residue, const Tensor& direct, const Tensor& x,
                        const Tensor& inputs, const Tensor& memory, int64_t position, bool gated, double scale,
                        double largest_gate) {
  const int64_t heads = memory.size(1), modes = memory.size(2), parts = memory.is_complex() ? 2 : 1;
  const HeadStep step{heads, memory.size(3), memory.size(4), 0, gated, false, float(scale), float(largest_gate), 0};
  TORCH_CHECK(memory.is_contiguous() && memory.size(0) == x.size(0), "memory");
  for (const Tensor* t : {&decay, &residue, &memory})
    TORCH_CHECK(t->scalar_type() == (parts == 2 ? at::kComplexFloat : at::kFloat), "float32 or complex64");
  for (const Tensor* t : {&decay, &residue})
    TORCH_CHECK(t->is_contiguous() && t->numel() == heads * modes, "modes do not fit");
  float* memories = static_cast<float*>(memory.mutable_data_ptr());
  const int64_t size = parts * modes * step.keys * step.values;
  return heads_step_with(step, {p, recent, weight, bias, x, inputs, position}, direct,
                         [&](int64_t item, const HeadInput& in, const float* direct_of, float* y) {
    const int64_t first = item % heads * modes * parts;
    const HeadModes of{modes, numbers(decay) + first, numbers(residue) + first};
    modal_head_step(step, in, direct_of, of, parts == 2, memories + item * size, y);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerswap, library) {
  library.def("project_few(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("fold(Tensor[] histories, int seen, Tensor spectra, Tensor(a!) ahead) -> ()");
  library.def(
      "step(Tensor p, Tensor[] recent, Tensor weight, Tensor bias, Tensor h, Tensor near, Tensor(a!) spectra, "
      "Tensor(b!) ready, Tensor x, Tensor(c!)[] histories, Tensor(d!) ahead, int position, int origin) -> Tensor");
  library.def(
      "heads_step(Tensor p, Tensor[] recent, Tensor weight, Tensor bias, Tensor lags, Tensor direct, Tensor x, "
      "Tensor(a!)[] histories, int position, int degree, bool gated, bool normalised, float scale, float largest_gate, "
      "float smallest_sum) -> Tensor");
  library.def(
      "heads_modal_step(Tensor p, Tensor[] recent, Tensor weight, Tensor bias, Tensor decay, Tensor residue, "
      "Tensor direct, Tensor x, Tensor(a!) inputs, Tensor(b!) memory, int position, bool gated, float scale, "
      "float largest_gate) -> Tensor");
}

TORCH_LIBRARY_IMPL(layerswap, CPU, library) {
  library.impl("project_few", project_few);
  library.impl("fold", fold);
  library.impl("step", step);
  library.impl("heads_step", heads_step);
  library.impl("heads_modal_step", heads_modal_step);
}
