// Whole sequences of operators with a window in torch.ops.layerswap, on the CPU: checks and threads around window.h.
#include "window.h"

#include "tensors.h"

namespace {

using namespace layerswap;

Rows<const BFloat> rows_of(const Tensor& t, int64_t sequence, int64_t head) {
  const auto* data = reinterpret_cast<const BFloat*>(t.const_data_ptr<at::BFloat16>());
  return {data + sequence * t.stride(0) + head * t.stride(1), t.stride(2), 1, 0};
}

void check_part(const Tensor& t, const char* name, const Tensor& like, int64_t width) {
  TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kBFloat16 && t.dim() == 4 && touching(t), name, " must be (B, H, rows, L)");
  TORCH_CHECK(t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.size(3) == like.size(3), name, " does not fit");
  TORCH_CHECK(t.size(2) == width, name, " must have ", width, " rows");
}

bool window_served() { return at::native::cpublas::could_pack(at::kBFloat16); }

// Near queries and keys, which are turned, and values (B, H, rows, L); of far positions, where there are any, queries and
// keys, lags (H, 64 + L + 64) with zeros around, what positions count (B, H, L) if it is not 1, and levels (B, H, L).
Tensor window_mix(const Tensor& q, const Tensor& k, const Tensor& v, at::TensorList far,
                  const std::optional<Tensor>& counted, int64_t window, int64_t sinks, int64_t degree) {
  TORCH_CHECK(far.empty() || far.size() == 4, "far queries and keys, lags and levels");
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(3), values = v.size(2);
  const int64_t keys = q.size(2), far_keys = far.empty() ? 0 : far[0].size(2);
  check_part(q, "queries", v, keys), check_part(k, "keys", v, keys), check_part(v, "values", q, values);
  TORCH_CHECK(keys % 2 == 0 && far_keys % 2 == 0, "widths of keys must be even");
  if (far_keys) {
    check_part(far[0], "far queries", v, far_keys), check_part(far[1], "far keys", v, far_keys);
    check_float(far[2], "lags"), check_float(far[3], "levels");
    TORCH_CHECK(far[2].size(0) == heads && far[2].size(1) >= length + 2 * kQueries, "lags do not fit");
    TORCH_CHECK(far[3].numel() == batch * heads * length, "levels do not fit");
  }
  if (counted) {
    check_float(*counted, "counted");
    TORCH_CHECK(counted->numel() == batch * heads * length, "counted does not fit");
  }
  Tensor y = at::empty({batch, heads, values, length}, v.options());
  auto* to = reinterpret_cast<BFloat*>(y.mutable_data_ptr<at::BFloat16>());
  each(batch * heads, [&](int64_t item) {
    const int64_t sequence = item / heads, head = item % heads;
    WindowHead one{length, keys, far_keys, values, window, sinks, degree,
                   rows_of(q, sequence, head), rows_of(k, sequence, head), rows_of(v, sequence, head), {}, {},
                   nullptr, nullptr, nullptr};
    if (far_keys) {
      one.far_q = rows_of(far[0], sequence, head), one.far_k = rows_of(far[1], sequence, head);
      one.h = far[2].const_data_ptr<float>() + head * far[2].size(1);
      one.level = far[3].const_data_ptr<float>() + item * length;
    }
    if (counted) one.counted = counted->const_data_ptr<float>() + item * length;
    WindowMixer mixer(one);
    for (int64_t t0 = 0; t0 < length; t0 += kQueries) mixer.block(t0, to + item * values * length);
    at::native::cpublas::brgemm_release();
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerswap, library) {
  library.def("window_served() -> bool", window_served);
  library.def(
      "window_mix(Tensor q, Tensor k, Tensor v, Tensor[] far, Tensor? counted, int window, int sinks, int degree) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(layerswap, CPU, library) { library.impl("window_mix", window_mix); }
