// What compute.cpp and attention.cpp share: kernels that the host runs in the GPU's place, on the same memory.

#pragma once

#include <ATen/ATen.h>

namespace computed {

// A launch on the current stream, after everything that the stream has been given. Like every launch it is blamed for
// an error that was left behind.
void launched(const std::string &name);

// The kernel `name` reads or writes t, or would if t is on the GPU.
void touch(const std::string &name, const at::Tensor &t, bool write);

// The same memory, as a tensor of the host.
at::Tensor host_view(const at::Tensor &t);

// A new tensor of the GPU, where PyTorch's allocator puts it, written by the kernel `name`.
at::Tensor to_gpu(const std::string &name, const at::Tensor &t);

// Raises if a product of so many multiplications would take the host too long.
void check_size(const std::string &name, double multiplications);

}  // namespace computed
