// Steps of operators with a window in torch.ops.layerswap, on the CPU: checks around near.h.
#include "near.h"

#include "steps.h"

namespace {

using namespace layerswap;

void check_rows(const Tensor& t, const char* name, int64_t batch, int64_t heads, int64_t rows, int64_t least) {
  check_float(t, name);
  TORCH_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(1) == heads && t.size(2) == rows && t.size(3) >= least, name,
              " must be (", batch, ", ", heads, ", ", rows, ", at least ", least, ")");
}

// A head's near query by the root of its width.
std::vector<float> scaled(const float* q, int64_t width) {
  std::vector<float> found(q, q + width);
  for (float& number : found) number /= std::sqrt(float(width));
  return found;
}

// Near and far over one sum. Histories are those of inputs, far keys, far values with their counts, near keys and values;
// `near` are frequencies, the level's key and shift, and where far rows are the near ones the centre of keys.
Tensor heads_window_step(const Tensor& p, at::TensorList recent, const Tensor& weight, const Tensor& bias,
                         const Tensor& lags, const Tensor& direct, const Tensor& x, at::TensorList histories,
                         at::TensorList near, int64_t position, int64_t degree, bool gated, int64_t window, int64_t sinks,
                         double largest_gate) {
  TORCH_CHECK(histories.size() == 5 && (near.size() == 3 || near.size() == 4), "histories or near parts do not fit");
  const Tensor &key = histories[1], &value = histories[2], &near_key = histories[3], &near_value = histories[4];
  const bool tied = near.size() == 4;
  const int64_t batch = x.size(0), heads = key.size(1), width = near_key.size(2), inner = heads * width;
  const HeadStep step{heads, key.size(2), width, degree, gated, true, 1.0f, float(largest_gate), 0.0f};
  const int64_t keys = heads * step.keys, least = position + 1;
  check_rows(key, "keys", batch, heads, step.keys, least);
  check_rows(value, "values", batch, heads, step.stored(), least);
  check_rows(near_key, "near keys", batch, heads, width, least);
  check_rows(near_value, "near values", batch, heads, width, least);
  for (const Tensor& part : near) check_float(part, "near parts");
  TORCH_CHECK(near[0].numel() == width / 2 && near[1].numel() == inner && near[2].numel() == heads, "near parts do not fit");
  TORCH_CHECK(lags.scalar_type() == at::kFloat && touching(lags) && lags.size(1) == least, "lags do not fit");
  TORCH_CHECK(!tied || (step.keys == width && !gated && near[3].numel() == inner), "the centre does not fit");
  const int64_t rows = tied ? 3 * inner : 2 * keys + 3 * inner + (gated ? heads : 0);
  const int64_t first = std::max<int64_t>(0, least - window), far = least - window;
  const Turn turn(near[0].const_data_ptr<float>(), near[0].numel(), position);
  return step_with({p, recent, weight, bias, x, histories[0], position}, heads, inner, rows, direct,
                   [&](int64_t item, const float* u, float* y) {
    const int64_t head = item % heads, at = head * width;
    const float *v = u + 2 * keys + at, *near_q = tied ? u + at : u + rows - 2 * inner + at, *near_k = near_q + inner;
    const std::vector<float> still = scaled(near_q, width);
    const History of_keys = history_of(near_key, item), of_values = history_of(near_value, item);
    put(turn.of(near_k, width).data(), width, of_keys, position);
    put(v, width, of_values, position);
    const Seen seen{{of_keys.data + first, of_keys.stride}, {of_values.data + first, of_values.stride}, least - first,
                    of_keys, of_values, std::min(sinks, first)};
    float lse = near_values(seen, turn.of(still.data(), width).data(), width, width, y) - near[2].const_data_ptr<float>()[head];
    for (int64_t i = 0; i < width; ++i) lse -= still[i] * near[1].const_data_ptr<float>()[at + i];
    const History far_keys = history_of(key, item), far_values = history_of(value, item);
    const HeadInput in{u + head * step.keys, u + keys + head * step.keys, v, gated ? u[2 * keys + inner + head] : 0.0f};
    std::vector<float> k(in.k, in.k + step.keys), values(v, v + width), scores(std::max<int64_t>(0, far)), gathered(width);
    for (int64_t i = 0; tied && i < width; ++i) k[i] -= near[3].const_data_ptr<float>()[at + i];
    const float counted = position < sinks ? 0.0f : in.counted(step);
    for (float& number : values) number *= counted;
    values.push_back(counted);
    put(k.data(), step.keys, far_keys, position);
    put(values.data(), step.stored(), far_values, position);
    if (far > 0) {
      const float* lags_of = lags.const_data_ptr<float>() + head * lags.stride(0);
      score(step, tied ? still.data() : in.q, far_keys, lags_of, far, scores.data());
      for (int64_t row = 0; row < width; ++row)
        gathered[row] = dot(scores.data(), far_values.data + row * far_values.stride, far, far_values.stride);
      join(lse, gathered.data(), dot(scores.data(), far_values.data + width * far_values.stride, far, 0), width, y);
    }
    for (int64_t row = 0; row < width; ++row) y[row] += direct.const_data_ptr<float>()[at + row] * v[row];
  });
}

// Near alone; `memory` are keys and values of the last positions, which move on by one, and of the first ones.
Tensor window_step(const Tensor& p, at::TensorList recent, const Tensor& weight, const Tensor& bias, const Tensor& direct,
                   const Tensor& x, const Tensor& inputs, at::TensorList memory, const Tensor& frequencies,
                   int64_t position) {
  TORCH_CHECK(memory.size() == 4, "keys and values of the last positions and of the first");
  const int64_t batch = x.size(0), heads = memory[0].size(1), width = memory[0].size(2), inner = heads * width;
  const int64_t window = memory[0].size(3), sinks = memory[2].size(3);
  for (const Tensor& part : memory) check_rows(part, "memory", batch, heads, width, 0);
  TORCH_CHECK(memory[1].size(3) == window && memory[3].size(3) == sinks, "memory does not fit");
  check_float(frequencies, "frequencies");
  TORCH_CHECK(frequencies.numel() == width / 2, "frequencies do not fit");
  const int64_t count = std::min(window, position + 1), first = position + 1 - count;
  const Turn turn(frequencies.const_data_ptr<float>(), frequencies.numel(), position);
  return step_with({p, recent, weight, bias, x, inputs, position}, heads, inner, 3 * inner, direct,
                   [&](int64_t item, const float* u, float* y) {
    const int64_t at = item % heads * width;
    const float* v = u + at;
    const std::vector<float> k = turn.of(u + 2 * inner + at, width);
    History of[4];
    for (int i = 0; i < 4; ++i) of[i] = history_of(memory[i], item);
    for (int i = 0; i < 2; ++i)
      for (int64_t row = 0; row < width; ++row)
        std::memmove(of[i].data + row * window, of[i].data + row * window + 1, (window - 1) * sizeof(float));
    put(k.data(), width, of[0], window - 1);
    put(v, width, of[1], window - 1);
    if (position < sinks) put(k.data(), width, of[2], position), put(v, width, of[3], position);
    const std::vector<float> q = turn.of(scaled(u + inner + at, width).data(), width);
    const Seen seen{{of[0].data + window - count, window}, {of[1].data + window - count, window}, count,
                    of[2], of[3], std::min(sinks, first)};
    near_values(seen, q.data(), width, width, y);
    for (int64_t row = 0; row < width; ++row) y[row] += direct.const_data_ptr<float>()[at + row] * v[row];
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerswap, library) {
  library.def(
      "heads_window_step(Tensor p, Tensor[] recent, Tensor weight, Tensor bias, Tensor lags, Tensor direct, Tensor x, "
      "Tensor(a!)[] histories, Tensor[] near, int position, int degree, bool gated, int window, int sinks, "
      "float largest_gate) -> Tensor");
  library.def(
      "window_step(Tensor p, Tensor[] recent, Tensor weight, Tensor bias, Tensor direct, Tensor x, Tensor(a!) inputs, "
      "Tensor(b!)[] memory, Tensor frequencies, int position) -> Tensor");
}

TORCH_LIBRARY_IMPL(layerswap, CPU, library) {
  library.impl("heads_window_step", heads_window_step);
  library.impl("window_step", window_step);
}
