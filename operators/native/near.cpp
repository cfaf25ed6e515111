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

// How heads share near keys and values.
struct Groups {
  int64_t heads, groups, width;

  Groups(int64_t heads, int64_t groups, int64_t width) : heads(heads), groups(groups), width(width) {
    TORCH_CHECK(groups > 0 && heads % groups == 0, "groups do not fit");
  }
  int64_t per() const { return heads / groups; }
  int64_t inner() const { return heads * width; }
};

// Of near positions: frequencies, and the level's key (H K) and shift (H).
struct Level {
  const float *key, *shift;

  Level(at::TensorList near, const Groups& of) {
    for (const Tensor& part : near) check_float(part, "near parts");
    TORCH_CHECK(near[0].numel() == of.width / 2 && near[1].numel() == of.inner() && near[2].numel() == of.heads,
                "near parts do not fit");
    key = near[1].const_data_ptr<float>(), shift = near[2].const_data_ptr<float>();
  }
  float of(int64_t head, const float* q, int64_t width) const {
    float sum = shift[head];
    for (int64_t i = 0; i < width; ++i) sum += q[i] * key[head * width + i];
    return sum;
  }
};

void add_direct(const Tensor& direct, int64_t head, const float* v, int64_t width, float* y) {
  for (int64_t row = 0; row < width; ++row) y[row] += direct.const_data_ptr<float>()[head * width + row] * v[row];
}

// Near and far over one sum. Histories are those of inputs, far keys, far values with their counts, near keys and values;
// `near` are frequencies, the level's key and shift, and where far rows are the near ones the centre of keys. Near keys
// and values, and far ones that are theirs, are those of groups of heads.
Tensor heads_window_step(const Tensor& p, at::TensorList recent, const Tensor& weight, const Tensor& bias,
                         const Tensor& lags, const Tensor& direct, const Tensor& x, at::TensorList histories,
                         at::TensorList near, int64_t position, int64_t degree, bool gated, int64_t heads, int64_t window,
                         int64_t sinks, double largest_gate) {
  TORCH_CHECK(histories.size() == 5 && (near.size() == 3 || near.size() == 4), "histories or near parts do not fit");
  const Tensor &key = histories[1], &value = histories[2], &near_key = histories[3], &near_value = histories[4];
  const bool tied = near.size() == 4;
  const Groups groups(heads, near_key.size(1), near_key.size(2));
  const int64_t batch = x.size(0), width = groups.width, inner = groups.inner(), of_far = tied ? groups.groups : heads;
  const HeadStep step{heads, key.size(2), width, degree, gated, true, 1.0f, float(largest_gate), 0.0f};
  const int64_t least = position + 1;
  check_rows(key, "keys", batch, of_far, step.keys, least);
  check_rows(value, "values", batch, of_far, step.stored(), least);
  check_rows(near_key, "near keys", batch, groups.groups, width, least);
  check_rows(near_value, "near values", batch, groups.groups, width, least);
  const Level level(near, groups);
  TORCH_CHECK(lags.scalar_type() == at::kFloat && touching(lags) && lags.size(1) == least, "lags do not fit");
  TORCH_CHECK(!tied || (step.keys == width && !gated && near[3].numel() == groups.groups * width), "the centre does not fit");
  const WindowRows rows(heads, groups.groups, width, tied ? 0 : step.keys, gated);
  const int64_t first = std::max<int64_t>(0, least - window), far = least - window;
  const Turn turn(near[0].const_data_ptr<float>(), near[0].numel(), position);
  const auto far_step = [&](const HeadInput& in, const float* q, float lse, int64_t item, int64_t head, bool write, float* y) {
    const History far_keys = history_of(key, item), far_values = history_of(value, item);
    if (write) {
      std::vector<float> values(in.v, in.v + width);
      const float counted = position < sinks ? 0.0f : in.counted(step);
      for (float& number : values) number *= counted;
      values.push_back(counted);
      put(in.k, step.keys, far_keys, position);
      put(values.data(), step.stored(), far_values, position);
    }
    if (far <= 0) return;
    std::vector<float> scores(far), gathered(width);
    score(step, q, far_keys, lags.const_data_ptr<float>() + head * lags.stride(0), far, scores.data());
    for (int64_t row = 0; row < width; ++row)
      gathered[row] = dot(scores.data(), far_values.data + row * far_values.stride, far, far_values.stride);
    join(lse, gathered.data(), dot(scores.data(), far_values.data + width * far_values.stride, far, 0), width, y);
  };
  return step_with({p, recent, weight, bias, x, histories[0], position}, groups.groups, inner, rows.count, direct,
                   [&](int64_t item, const float* u, float* y) {
    const int64_t group = item % groups.groups;
    const History of_keys = history_of(near_key, item), of_values = history_of(near_value, item);
    const WindowInput shared = rows.of(u, group * groups.per());
    put(turn.of(shared.k, width).data(), width, of_keys, position);
    put(shared.v, width, of_values, position);
    std::vector<float> centred(shared.k, shared.k + width);
    for (int64_t i = 0; tied && i < width; ++i) centred[i] -= near[3].const_data_ptr<float>()[group * width + i];
    const Seen seen{{of_keys.data + first, of_keys.stride}, {of_values.data + first, of_values.stride}, least - first,
                    of_keys, of_values, std::min(sinks, first)};
    for (int64_t head = group * groups.per(); head < (group + 1) * groups.per(); ++head, y += width) {
      const WindowInput from = rows.of(u, head);
      const std::vector<float> still = scaled(from.q, width);
      float lse = near_values(seen, turn.of(still.data(), width).data(), width, width, y);
      lse -= level.of(head, still.data(), width);
      const HeadInput in{from.far_q, tied ? centred.data() : from.far_k, from.v, from.gate};
      const bool begins = head == group * groups.per();
      far_step(in, tied ? still.data() : in.q, lse, tied ? item : item / groups.groups * heads + head, head,
               begins || !tied, y);
      add_direct(direct, head, from.v, width, y);
    }
  });
}

// Keys and values of the last positions and of the first ones, (B, G, K, window) and (B, G, K, sinks).
struct NearMemory {
  Tensor keys, values, sink_keys, sink_values;
  int64_t position, groups, width, window, sinks;

  NearMemory(at::TensorList parts, int64_t batch, int64_t position)
      : keys(parts[0]), values(parts[1]), sink_keys(parts[2]), sink_values(parts[3]), position(position),
        groups(keys.size(1)), width(keys.size(2)), window(keys.size(3)), sinks(sink_keys.size(3)) {
    for (const Tensor& part : parts.slice(0, 4)) check_rows(part, "memory", batch, groups, width, 0);
    TORCH_CHECK(values.size(3) == window && sink_values.size(3) == sinks, "memory does not fit");
  }

  // Takes in a turned key and a value; what queries of the group then see.
  Seen take(int64_t item, const float* k, const float* v) const {
    const History key = history_of(keys, item), value = history_of(values, item);
    const History sink_key = history_of(sink_keys, item), sink_value = history_of(sink_values, item);
    push(k, width, key, window), push(v, width, value, window);
    if (position < sinks) put(k, width, sink_key, position), put(v, width, sink_value, position);
    const int64_t count = std::min(window, position + 1), first = position + 1 - count, skipped = window - count;
    return {{key.data + skipped, window}, {value.data + skipped, window}, count, sink_key, sink_value, std::min(sinks, first)};
  }
};

// Near alone; `memory` are keys and values of the last positions, which move on by one, and of the first ones.
Tensor window_step(const Tensor& p, at::TensorList recent, const Tensor& weight, const Tensor& bias, const Tensor& direct,
                   const Tensor& x, const Tensor& inputs, at::TensorList memory, const Tensor& frequencies,
                   int64_t heads, int64_t position) {
  TORCH_CHECK(memory.size() == 4, "keys and values of the last positions and of the first");
  const NearMemory near(memory, x.size(0), position);
  const Groups groups(heads, near.groups, near.width);
  const int64_t width = near.width, inner = groups.inner(), shared = groups.groups * width;
  check_float(frequencies, "frequencies");
  TORCH_CHECK(frequencies.numel() == width / 2, "frequencies do not fit");
  const Turn turn(frequencies.const_data_ptr<float>(), frequencies.numel(), position);
  return step_with({p, recent, weight, bias, x, inputs, position}, groups.groups, inner, inner + 2 * shared, direct,
                   [&](int64_t item, const float* u, float* y) {
    const int64_t group = item % groups.groups;
    const float *v = u + group * width, *k = u + shared + inner + group * width;
    const Seen seen = near.take(item, turn.of(k, width).data(), v);
    for (int64_t head = group * groups.per(); head < (group + 1) * groups.per(); ++head, y += width) {
      near_values(seen, turn.of(scaled(u + shared + head * width, width).data(), width).data(), width, width, y);
      add_direct(direct, head, v, width, y);
    }
  });
}

// Near and far over one sum, from a memory of constant size: of near positions as in `window_step`, then far keys (after
// the map) and values with their counts of the last positions, and what was seen before, (B, H, modes, K, V + 1).
Tensor window_modal_step(const Tensor& p, at::TensorList recent, const Tensor& weight, const Tensor& bias,
                         const Tensor& decay, const Tensor& residue, const Tensor& direct, const Tensor& x,
                         const Tensor& inputs, at::TensorList memory, at::TensorList near, int64_t keys, bool gated,
                         int64_t position, double largest_gate) {
  TORCH_CHECK(memory.size() == 7 && near.size() == 3, "memory or near parts do not fit");
  const Tensor &last_keys = memory[4], &last_values = memory[5], &past = memory[6];
  const NearMemory of_near(memory, x.size(0), position);
  const Groups groups(last_keys.size(1), of_near.groups, of_near.width);
  const int64_t batch = x.size(0), heads = groups.heads, width = groups.width, window = of_near.window;
  const int64_t features = squares_of(keys), columns = width + 1, modes = past.size(2), size = modes * features * columns;
  check_rows(last_keys, "far keys", batch, heads, features, window);
  check_rows(last_values, "far values", batch, heads, columns, window);
  check_float(past, "memory"), check_float(decay, "decay"), check_float(residue, "residue");
  TORCH_CHECK(past.numel() == batch * heads * size && decay.numel() == heads * modes && residue.numel() == heads * modes,
              "modes do not fit");
  const Level level(near, groups);
  const WindowRows rows(heads, groups.groups, width, keys, gated);
  const Turn turn(near[0].const_data_ptr<float>(), near[0].numel(), position);
  const HeadStep counting{.gated = gated, .largest_gate = float(largest_gate)};
  const auto far_step = [&](const WindowInput& from, float lse, int64_t item, int64_t head, float* y) {
    const History far_keys = history_of(last_keys, item), far_values = history_of(last_values, item);
    const std::vector<float> query = squares(from.far_q, keys);
    std::vector<float> key(features), value(columns), gathered(columns, 0.0f);
    for (int64_t i = 0; i < features; ++i) key[i] = far_keys.data[i * window];  // what leaves the window
    for (int64_t i = 0; i < columns; ++i) value[i] = far_values.data[i * window];
    const HeadModes of{modes, decay.const_data_ptr<float>() + head * modes, residue.const_data_ptr<float>() + head * modes};
    modal_pass(of, query.data(), key.data(), value.data(), features, columns, past.mutable_data_ptr<float>() + item * size,
               gathered.data());
    join(lse, gathered.data(), gathered[width], width, y);
    const float counted = position < of_near.sinks ? 0.0f : HeadInput{.gate = from.gate}.counted(counting);
    for (int64_t row = 0; row < width; ++row) value[row] = from.v[row] * counted;
    value[width] = counted;
    push(squares(from.far_k, keys).data(), features, far_keys, window), push(value.data(), columns, far_values, window);
  };
  return step_with({p, recent, weight, bias, x, inputs, position}, groups.groups, groups.inner(), rows.count, direct,
                   [&](int64_t item, const float* u, float* y) {
    const int64_t group = item % groups.groups;
    const WindowInput shared = rows.of(u, group * groups.per());
    const Seen seen = of_near.take(item, turn.of(shared.k, width).data(), shared.v);
    for (int64_t head = group * groups.per(); head < (group + 1) * groups.per(); ++head, y += width) {
      const WindowInput from = rows.of(u, head);
      const std::vector<float> still = scaled(from.q, width);
      const float lse = near_values(seen, turn.of(still.data(), width).data(), width, width, y);
      far_step(from, lse - level.of(head, still.data(), width), item / groups.groups * heads + head, head, y);
      add_direct(direct, head, from.v, width, y);
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerswap, library) {
  library.def(
      "heads_window_step(Tensor p, Tensor[] recent, Tensor weight, Tensor bias, Tensor lags, Tensor direct, Tensor x, "
      "Tensor(a!)[] histories, Tensor[] near, int position, int degree, bool gated, int heads, int window, "
      "int sinks, float largest_gate) -> Tensor");
  library.def(
      "window_step(Tensor p, Tensor[] recent, Tensor weight, Tensor bias, Tensor direct, Tensor x, Tensor(a!) inputs, "
      "Tensor(b!)[] memory, Tensor frequencies, int heads, int position) -> Tensor");
  library.def(
      "window_modal_step(Tensor p, Tensor[] recent, Tensor weight, Tensor bias, Tensor decay, Tensor residue, "
      "Tensor direct, Tensor x, Tensor(a!) inputs, Tensor(b!)[] memory, Tensor[] near, int keys, bool gated, "
      "int position, float largest_gate) -> Tensor");
}

TORCH_LIBRARY_IMPL(layerswap, CPU, library) {
  library.impl("heads_window_step", heads_window_step);
  library.impl("window_step", window_step);
  library.impl("window_modal_step", window_modal_step);
}
