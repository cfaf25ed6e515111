// Heads over whole sequences in torch.ops.layerswap, on the CPU: checks and threads around mixing.h. Work is divided by
// rows or heads, never inside a sum, so that results do not depend on the number of threads.
#include "mixing.h"

#include "tensors.h"

namespace {

using namespace layerswap;

template <class F>
void with_type(const Tensor& t, const F& work) {
  if (t.scalar_type() == at::kFloat) return work(float{});
  TORCH_CHECK(t.scalar_type() == at::kBFloat16, "float32 or bfloat16");
  work(BFloat{});
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

void check_rows(const Tensor& u, const Tensor& weight) {
  check_float(weight, "short weight");
  TORCH_CHECK(u.is_cpu() && u.dim() == 3 && touching(u) && weight.size(0) == u.size(1), "rows must be (B, E, L)");
  TORCH_CHECK(weight.size(1) <= kMostTaps, "at most ", kMostTaps, " taps");
}

// Depthwise causal convolution of u (B, E, L) by weight (E, K), the last tap at the present.
Tensor short_conv_rows(const Tensor& u, const Tensor& weight, const Tensor& bias) {
  check_rows(u, weight);
  check_float(bias, "short bias");
  const int64_t batch = u.size(0), rows = u.size(1), length = u.size(2), taps = weight.size(1);
  Tensor y = at::empty({batch, rows, length}, u.options());
  with_type(u, [&](auto like) {
    using T = decltype(like);
    each(batch * rows, [&](int64_t item) {
      const int64_t row = item % rows;
      (taps == 3 ? convolve_row<3, T> : convolve_row<0, T>)(
          data<T>(u) + item / rows * u.stride(0) + row * u.stride(1), length,
          weight.const_data_ptr<float>() + row * taps, bias.const_data_ptr<float>()[row], taps,
          data<T>(y) + item * length);
    });
  });
  return y;
}

// Gradients of weight and bias; that of u goes to `du`, of its shape and dtype.
std::tuple<Tensor, Tensor> short_conv_rows_backward(const Tensor& grad, const Tensor& u, const Tensor& weight,
                                                    const Tensor& du) {
  check_rows(u, weight);
  TORCH_CHECK(grad.sizes() == u.sizes() && touching(grad), "gradients do not fit");
  TORCH_CHECK(du.sizes() == u.sizes() && touching(du) && du.scalar_type() == u.scalar_type(), "du does not fit");
  const int64_t batch = u.size(0), rows = u.size(1), length = u.size(2), taps = weight.size(1);
  Tensor dweight = at::empty_like(weight), dbias = at::empty({rows}, weight.options());
  with_type(grad, [&](auto like_grad) {
    with_type(u, [&](auto like) {
      using G = decltype(like_grad);
      using T = decltype(like);
      each(rows, [&](int64_t row) {
        float* dw = data<float>(dweight) + row * taps;
        float* db = data<float>(dbias) + row;
        std::fill(dw, dw + taps, 0.0f), *db = 0.0f;
        for (int64_t i = 0; i < batch; ++i)
          (taps == 3 ? convolve_row_backward<3, G, T> : convolve_row_backward<0, G, T>)(
              data<G>(grad) + i * grad.stride(0) + row * grad.stride(1),
              data<T>(u) + i * u.stride(0) + row * u.stride(1), length, weight.const_data_ptr<float>() + row * taps, taps,
              data<T>(du) + i * du.stride(0) + row * du.stride(1), dw, db);
      });
    });
  });
  return {dweight, dbias};
}

struct Block {
  int64_t batch, heads, rows, keys;
  int64_t seen(int64_t row) const { return keys - rows + row + 1; }  // keys at or before it
};

Block block_of(const Tensor& products, const Tensor& lags) {
  TORCH_CHECK(products.dim() == 4 && products.is_contiguous() && products.is_cpu(), "products must be (B, H, R, S)");
  const Block b{products.size(0), products.size(1), products.size(2), products.size(3)};
  check_float(lags, "lags");
  TORCH_CHECK(b.rows <= b.keys && lags.size(0) == b.heads && lags.size(1) == b.keys, "lags must be (H, S)");
  return b;
}

// f(products) (B, H, R, S) of the last R of S positions times h by lag, in place; `lags` (H, S) is h reversed.
void weigh(const Tensor& products, const Tensor& lags, int64_t degree) {
  const Block b = block_of(products, lags);
  with_type(products, [&](auto like) {
    using T = decltype(like);
    each(b.batch * b.heads, [&](int64_t item) {
      const float* of_head = lags.const_data_ptr<float>() + item % b.heads * b.keys;
      T* row = data<T>(products) + item * b.rows * b.keys;
      for (int64_t r = 0; r < b.rows; ++r, row += b.keys)
        weigh_row(Power{degree}, of_head + b.rows - 1 - r, b.seen(r), b.keys, row);
    });
  });
}

// The same, and `grad` of the weighed products becomes that of the products; adds that of the lags to `dlags` (H, S).
void weigh_backward(const Tensor& products, const Tensor& grad, const Tensor& lags, const Tensor& dlags, int64_t degree) {
  const Block b = block_of(products, lags);
  check_float(dlags, "dlags");
  TORCH_CHECK(grad.sizes() == products.sizes() && grad.is_contiguous() && dlags.sizes() == lags.sizes() &&
                  grad.scalar_type() == products.scalar_type(), "gradients do not fit");
  with_type(products, [&](auto like) {
    using T = decltype(like);
    each(b.heads, [&](int64_t head) {
      const float* of_head = lags.const_data_ptr<float>() + head * b.keys;
      float* dof_head = data<float>(dlags) + head * b.keys;
      for (int64_t i = 0; i < b.batch; ++i) {
        const int64_t first = (i * b.heads + head) * b.rows * b.keys;
        for (int64_t r = 0; r < b.rows; ++r) {
          const int64_t lag = b.rows - 1 - r, at = first + r * b.keys;
          weigh_row_backward(Power{degree}, of_head + lag, b.seen(r), b.keys, data<T>(products) + at,
                             data<T>(grad) + at, dof_head + lag);
        }
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerswap, library) {
  library.def("short_conv(Tensor u, Tensor weight, Tensor bias) -> Tensor");
  library.def("short_conv_backward(Tensor grad, Tensor u, Tensor weight, Tensor(a!) du) -> (Tensor, Tensor)");
  library.def("weigh(Tensor(a!) products, Tensor lags, int degree) -> ()");
  library.def(
      "weigh_backward(Tensor(a!) products, Tensor(b!) grad, Tensor lags, Tensor(c!) dlags, int degree) -> ()");
}

TORCH_LIBRARY_IMPL(layerswap, CPU, library) {
  library.impl("short_conv", short_conv_rows);
  library.impl("short_conv_backward", short_conv_rows_backward);
  library.impl("weigh", weigh);
  library.impl("weigh_backward", weigh_backward);
}
