// Whole sequences of operators with a window in torch.ops.layerswap, on the CPU: checks and threads around window.h.
#include "window.h"

#include "tensors.h"

namespace {

using namespace layerswap;

// Of a head of so many, which those of the tensor are shared by.
template <class T>
Rows<const T> rows_of(const Tensor& t, int64_t sequence, int64_t head, int64_t heads) {
  const auto* data = static_cast<const T*>(t.const_data_ptr());
  return {data + sequence * t.stride(0) + head / (heads / t.size(1)) * t.stride(1), t.stride(2), 1, 0};
}

void check_part(const Tensor& t, const char* name, const Tensor& like, int64_t width) {
  const bool known = t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kFloat;
  TORCH_CHECK(t.is_cpu() && known && t.scalar_type() == like.scalar_type(), name, " must be in float32 or bfloat16, like queries");
  TORCH_CHECK(t.dim() == 4 && touching(t), name, " must be (B, H, rows, L)");
  TORCH_CHECK(t.size(0) == like.size(0) && like.size(1) % t.size(1) == 0 && t.size(3) == like.size(3), name, " does not fit");
  TORCH_CHECK(t.size(2) == width, name, " must have ", width, " rows");
}

// All that heads are made of.
struct WindowParts {
  const Tensor &q, &k, &v, &turns;
  at::TensorList far;
  const std::optional<Tensor>& counted;
  int64_t window, sinks, degree;
  at::TensorList modes;
  const std::optional<Tensor>& state;
};

template <class T, class P>
void mix_heads(const WindowParts& of, Tensor& y) {
  const int64_t batch = of.q.size(0), heads = of.q.size(1), length = of.q.size(3), values = of.v.size(2);
  const int64_t keys = of.q.size(2), far_keys = of.far.empty() ? 0 : of.far[0].size(2);
  const int64_t poles = of.modes.empty() ? 0 : of.modes[0].size(1), size = poles * squares_of(far_keys) * (values + 1);
  auto* to = static_cast<T*>(y.mutable_data_ptr());
  each(batch * heads, [&](int64_t item) {
    const int64_t sequence = item / heads, head = item % heads;
    const auto rows = [&](const Tensor& t) { return rows_of<T>(t, sequence, head, heads); };
    WindowHead<T> one{length, keys, far_keys, values, of.window, of.sinks, of.degree,
                      rows(of.q), rows(of.k), rows(of.v), {}, {},
                      of.turns.const_data_ptr<float>(), nullptr, nullptr, nullptr, 0.0f, {}};
    if (poles) {
      const auto part = [&](int i) { return of.modes[i].const_data_ptr<float>() + head * poles; };
      one.modes = {poles, part(0), part(1)};
    }
    if (far_keys) {
      one.far_q = rows(of.far[0]), one.far_k = rows(of.far[1]);
      one.h = of.far[2].const_data_ptr<float>() + head * of.far[2].size(1);
      one.level = of.far[3].const_data_ptr<float>() + head * keys, one.shift = of.far[4].const_data_ptr<float>()[head];
    }
    if (of.counted) one.counted = of.counted->const_data_ptr<float>() + item * length;
    WindowMixer<T, P> mixer(one);
    for (int64_t t0 = 0; t0 < length; t0 += kQueries) mixer.block(t0, to + item * values * length);
    if (of.state) mixer.store(of.state->mutable_data_ptr<float>() + item * size);
    at::native::cpublas::brgemm_release(std::is_same_v<P, BFloat>);
  });
}

// Whether the processor multiplies in bfloat16; where it does not, products are in float32.
bool narrow_products() { return at::native::cpublas::could_pack(at::kBFloat16); }

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
  const WindowParts of{q, k, v, turns, far, counted, window, sinks, degree, modes, state};
  if (q.scalar_type() == at::kFloat) mix_heads<float, float>(of, y);
  else if (narrow_products()) mix_heads<BFloat, BFloat>(of, y);
  else mix_heads<BFloat, float>(of, y);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerswap, library) {
  library.def(
      "window_mix(Tensor q, Tensor k, Tensor v, Tensor turns, Tensor[] far, Tensor? counted, int window, int sinks, int degree, "
      "Tensor[] modes, Tensor(a!)? state) -> Tensor");
}

TORCH_LIBRARY_IMPL(layerswap, CPU, library) { library.impl("window_mix", window_mix); }
