// Attention's forward and backward, computed by the CPU's flash attention. CUDA's operators have signatures of their
// own, so unlike the others they cannot be passed on as they come.

#include "compute.h"

#include <torch/library.h>

using at::Tensor;

namespace computed {

namespace {

// The CPU's kernel lays out its results as it likes; CUDA's lie as (B, L, H, D).
Tensor as_on_gpu(const Tensor &t) { return t.transpose(1, 2).contiguous().transpose(1, 2); }

std::optional<Tensor> mask(const Tensor &bias) {
    return bias.defined() ? std::optional(host_view(bias)) : std::nullopt;
}

double multiplications(const Tensor &q, const Tensor &k) { return 2.0 * q.numel() * k.size(2); }  // (B, H, L, D)

std::tuple<Tensor, Tensor> forward(const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &bias, bool causal,
                                   std::optional<double> scale) {
    const std::string name = "attention";
    check_size(name, multiplications(q, k));
    launched(name);
    for (auto &t : {q, k, v, bias}) touch(name, t, false);
    auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(host_view(q), host_view(k), host_view(v), 0.0,
                                                                      causal, mask(bias), scale);
    return {to_gpu(name, as_on_gpu(out)), to_gpu(name, lse.contiguous())};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor &dout, const Tensor &q, const Tensor &k, const Tensor &v,
                                            const Tensor &bias, const Tensor &out, const Tensor &lse, bool causal,
                                            std::optional<double> scale) {
    const std::string name = "attention backward";
    check_size(name, 2.5 * multiplications(q, k));
    launched(name);
    for (auto &t : {dout, q, k, v, bias, out, lse}) touch(name, t, false);
    auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        host_view(dout), host_view(q), host_view(k), host_view(v), host_view(out), host_view(lse), 0.0, causal,
        mask(bias), scale);
    return {to_gpu(name, as_on_gpu(dq)), to_gpu(name, as_on_gpu(dk)), to_gpu(name, as_on_gpu(dv))};
}

// What dropout's random numbers would come from. There is no dropout.
Tensor unused(at::ScalarType dtype, at::IntArrayRef shape = {}) {
    return at::empty(shape, at::TensorOptions().dtype(dtype).device(at::kCUDA));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> flash(
    const Tensor &q, const Tensor &k, const Tensor &v, double, bool causal, bool, std::optional<double> scale) {
    auto [out, lse] = forward(q, k, v, {}, causal, scale);
    Tensor seed = unused(at::kUInt64, {2}), offset = unused(at::kUInt64), debug_mask = at::empty({0}, q.options());
    return {out, lse, {}, {}, q.size(2), k.size(2), seed, offset, debug_mask};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor &dout, const Tensor &q, const Tensor &k, const Tensor &v,
                                                  const Tensor &out, const Tensor &lse, const Tensor &, const Tensor &,
                                                  c10::SymInt, c10::SymInt, double, bool causal, const Tensor &,
                                                  const Tensor &, std::optional<double> scale) {
    return backward(dout, q, k, v, {}, out, lse, causal, scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(const Tensor &q, const Tensor &k, const Tensor &v,
                                                     const std::optional<Tensor> &bias, bool, double, bool causal,
                                                     std::optional<double> scale) {
    auto [out, lse] = forward(q, k, v, bias.value_or(Tensor()), causal, scale);
    return {out, lse, unused(at::kLong), unused(at::kLong)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(const Tensor &dout, const Tensor &q, const Tensor &k,
                                                              const Tensor &v, const Tensor &bias, const Tensor &out,
                                                              const Tensor &lse, const Tensor &, const Tensor &, double,
                                                              std::array<bool, 4>, bool causal,
                                                              std::optional<double> scale) {
    auto [dq, dk, dv] = backward(dout, q, k, v, bias, out, lse, causal, scale);
    return {dq, dk, dv, {}};
}

}  // namespace

}  // namespace computed

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
    m.impl("_scaled_dot_product_flash_attention", &computed::flash);
    m.impl("_scaled_dot_product_flash_attention_backward", &computed::flash_backward);
    m.impl("_scaled_dot_product_efficient_attention", &computed::efficient);
    m.impl("_scaled_dot_product_efficient_attention_backward", &computed::efficient_backward);
}
