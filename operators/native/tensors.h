// What the operators share: checks of tensors, and threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "step.h"

namespace layerswap {

using at::Tensor;

inline bool touching(const Tensor& t) { return t.size(-1) == 1 || t.stride(-1) == 1; }
inline bool either_way(const Tensor& t) { return t.dim() == 3 && (t.stride(1) == 1 || touching(t)); }

inline void check_float(const Tensor& t, const char* name) {
  TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous(), name, " must be contiguous float32");
}

inline void check_ahead(const Tensor& ahead, int64_t batch, int64_t convolutions, int64_t padded) {
  check_float(ahead, "ahead");
  TORCH_CHECK(ahead.dim() == 4 && ahead.size(0) == batch && ahead.size(1) == convolutions && ahead.size(3) == padded,
              "ahead must be (B, convolutions, window, padded D)");
}

// As long as it lives, its thread takes numbers below the smallest normal one for zero: weights that have decayed to them
// change no sum, and a product with one takes as long as a hundred others.
class WithoutDenormals {
 public:
#ifdef __SSE2__
  WithoutDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~WithoutDenormals() { _mm_setcsr(before_); }

 private:
  uint32_t before_;
#endif
};

// Work items 0 to count - 1, each by one thread.
template <class F>
void each(int64_t count, const F& work) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const WithoutDenormals fast;
    for (int64_t item = begin; item < end; ++item) work(item);
  });
}

inline const Complex* complexes(const Tensor& t) { return reinterpret_cast<const Complex*>(t.const_data_ptr<float>()); }

}  // namespace layerswap
