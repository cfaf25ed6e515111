// Whole sequences of operators with a window in torch.ops.layerswap, on the CPU: checks and threads around window.h.
#include "window.h"

#include "tensors.h"

namespace {

using namespace layerswap;

// Of a head of so many, which those of the tensor are shared by.
Rows<const BFloat> rows_of(const Tensor& t, int64_t sequence, int64_t head, int64_t heads) {
  const auto* data = reinterpret_cast<const BFloat*>(t.const_data_ptr<at::BFloat16>());
  return {data + sequence * t.stride(0) + head / (heads / t.size(1)) * t.stride(1), t.stride(2), 1, 0};
}

void check_part(const Tensor& t, const char* name, const Tensor& like, int64_t width) {
  TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kBFloat16 && t.dim() == 4 && touching(t), name, " must be (B, H, rows, L)");
  TORCH_CHECK(t.size(0) == like.size(0) && like.size(1) % t.size(1) == 0 && t.size(3) == like.size(3), name, " does not fit");
  TORCH_CHECK(t.size(2) == width, name, " must have ", width, " rows");
}

bool window_served() { return at::native::cpublas::could_pack(at::kBFloat16); }

// Near queries and keys as the rows have them and values (B, H, rows, L), keys and values also of fewer heads, and the
// cosines and sines (2, pairs, L) that turn them; of far positions, where there are any, queries and keys, lags
// (H, 64 + L + 64) with zeros around, the level's key (H, K) and shift (H), and what positions count (B, H, L) if not 1.
// With modes of the lags, logarithms of poles and residues (H, S), what lies far behind is read of a state of squared
// features, which at the end goes to `state` (B, H, S, features, V + 1).
Tensor window_mix(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& turns, at::TensorList far,
                  const std::optional<Tensor>& counted, int64_t window, int64_t sinks, int64_t degree,
                  at::TensorList modes, const std::optional<Tensor>& state) {
  TORCH_CHECK(far.empty() || far.size() == 5, "far queries and keys, lags and the level");
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(3), values = v.size(2);
  const int64_t keys = q.size(2), far_keys = far.empty() ? 0 : far[0].size(2);
  check_part(q, "queries", q, keys), check_part(k, "keys", q, keys), check_part(v, "values", q, values);
  TORCH_CHECK(keys % 2 == 0 && far_keys % 2 == 0, "widths of keys must be even");
  if (far_keys) {
    check_part(far[0], "far queries", q, far_keys), check_part(far[1], "far keys", q, far_keys);
    TORCH_CHECK(far[0].size(1) == heads, "far queries do not fit");
    check_float(far[2], "lags"), check_float(far[3], "level"), check_float(far[4], "level");
    TORCH_CHECK(far[2].size(0) == heads && far[2].size(1) >= length + 2 * kQueries, "lags do not fit");
    TORCH_CHECK(far[3].numel() == heads * keys && far[4].numel() == heads, "the level does not fit");
  }
  check_float(turns, "turns");
  TORCH_CHECK(turns.numel() == keys * length, "turns do not fit");
  if (counted) {
    check_float(*counted, "counted");
    TORCH_CHECK(counted->numel() == batch * heads * length, "counted does not fit");
  }
  const int64_t poles = modes.empty() ? 0 : modes[0].size(1);
  for (const Tensor& part : modes) {
    check_float(part, "modes");
    TORCH_CHECK(modes.size() == 2 && part.sizes() == at::IntArrayRef({heads, poles}), "modes do not fit");
  }
  TORCH_CHECK(!poles || (far_keys && far_keys <= kMostSquared && degree == 2), "squares of at most 16 channels");
  const int64_t size = poles * squares_of(far_keys) * (values + 1);
  if (state) {
    check_float(*state, "state");
    TORCH_CHECK(poles && state->numel() == batch * heads * size, "state does not fit");
  }
  Tensor y = at::empty({batch, heads, values, length}, v.options());
  auto* to = reinterpret_cast<BFloat*>(y.mutable_data_ptr<at::BFloat16>());
  each(batch * heads, [&](int64_t item) {
    const int64_t sequence = item / heads, head = item % heads;
    const auto of = [&](const Tensor& t) { return rows_of(t, sequence, head, heads); };
    WindowHead one{length, keys, far_keys, values, window, sinks, degree,
                   of(q), of(k), of(v), {}, {},
                   turns.const_data_ptr<float>(), nullptr, nullptr, nullptr, 0.0f, {}};
    if (poles) {
      const auto part = [&](int i) { return modes[i].const_data_ptr<float>() + head * poles; };
      one.modes = {poles, part(0), part(1)};
    }
    if (far_keys) {
      one.far_q = of(far[0]), one.far_k = of(far[1]);
      one.h = far[2].const_data_ptr<float>() + head * far[2].size(1);
      one.level = far[3].const_data_ptr<float>() + head * keys, one.shift = far[4].const_data_ptr<float>()[head];
    }
    if (counted) one.counted = counted->const_data_ptr<float>() + item * length;
    WindowMixer mixer(one);
    for (int64_t t0 = 0; t0 < length; t0 += kQueries) mixer.block(t0, to + item * values * length);
    if (state) mixer.store(state->mutable_data_ptr<float>() + item * size);
    at::native::cpublas::brgemm_release();
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerswap, library) {
  library.def("window_served() -> bool", window_served);
  library.def(
      "window_mix(Tensor q, Tensor k, Tensor v, Tensor turns, Tensor[] far, Tensor? counted, int window, int sinks, int degree, "
      "Tensor[] modes, Tensor(a!)? state) -> Tensor");
}

TORCH_LIBRARY_IMPL(layerswap, CPU, library) { library.impl("window_mix", window_mix); }
