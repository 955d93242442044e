// PyTorch's CUDA operators, computed: each is run by its CPU kernel on the same memory, since device memory is the
// host's. New tensors lie where the real caching allocator puts them; views, autograd and dispatch stay PyTorch's own.

#include "compute.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/copy_native.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <set>

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

extern "C" int emulated_gpu_load(const char *operator_name);
extern "C" void emulated_gpu_kernel(const char *name, void *stream);
extern "C" void emulated_gpu_access(const char *name, void *stream, const void *p, size_t n, int write);

// Of ATen/cuda/CUDAContextLight.h, which needs headers that PyTorch's wheels come without.
namespace at::cuda {
struct cublasContext *getCurrentCUDABlasHandle(bool setup = true);
struct cublasLtContext *getCurrentCUDABlasLtHandle();
}  // namespace at::cuda

namespace computed {

namespace {

void *current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

at::Device the_gpu() { return at::Device(at::kCUDA, c10::cuda::current_device()); }

}  // namespace

void launched(const std::string &name) {
    C10_CUDA_CHECK(cudaError_t(emulated_gpu_load(name.c_str())));
    emulated_gpu_kernel(name.c_str(), current_stream());
    C10_CUDA_CHECK(cudaGetLastError());
}

void touch(const std::string &name, const Tensor &t, bool write) {
    if (!t.defined() || !t.is_cuda() || !t.numel()) return;
    size_t last = 0;  // from the first number to the last, gaps included
    for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
    emulated_gpu_access(name.c_str(), current_stream(), t.data_ptr(), (last + 1) * t.element_size(), write);
}

Tensor host_view(const Tensor &t) {
    if (!t.defined() || !t.is_cuda()) return t;
    auto options = t.options().device(at::kCPU);
    if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
    return at::for_blob(t.data_ptr(), t.sizes()).strides(t.strides()).options(options).make_tensor();
}

Tensor to_gpu(const std::string &name, const Tensor &t) {
    Tensor made = at::empty_strided(t.sizes(), t.strides(), t.options().device(the_gpu()));
    if (t.numel()) {
        host_view(made).copy_(t);
        touch(name, made, true);
    }
    return made;
}

void check_size(const std::string &name, double multiplications) {
    const char *setting = getenv("EMULATED_GPU_MAX_PRODUCT");
    double most = setting && *setting ? atof(setting) : 3e10;
    TORCH_CHECK(multiplications <= most, "the emulated GPU does not compute ", name, " of ", multiplications,
                " multiplications, more than ", most,
                "; make it smaller, or raise --max-product (EMULATED_GPU_MAX_PRODUCT)");
}

namespace {

// Operator -> where its two factors are among its arguments. On a GPU cuBLAS multiplies them; cuBLASLt those marked so.
struct Product {
    size_t first, second;
    bool lt = false;
};
const std::map<std::string, Product> PRODUCTS = {
    {"aten::mm", {0, 1}},       {"aten::bmm", {0, 1}},           {"aten::addmm", {1, 2}},
    {"aten::baddbmm", {1, 2}},  {"aten::addbmm", {1, 2}},        {"aten::_addmm_activation", {1, 2, true}},
    {"aten::_int_mm", {0, 1, true}}, {"aten::_scaled_mm", {0, 1, true}},
};

// Before a product: it must not be too large, and makes the stream's handle as it does on a GPU.
void prepare_product(const std::string &name, const std::vector<IValue> &given) {
    auto product = PRODUCTS.find(name);
    if (product == PRODUCTS.end()) return;
    Tensor a = given[product->second.first].toTensor(), b = given[product->second.second].toTensor();
    check_size(name, double(a.numel()) * b.size(-1));
    if (product->second.lt) at::cuda::getCurrentCUDABlasLtHandle();
    else at::cuda::getCurrentCUDABlasHandle();
}

// A generator of the host for each of the GPU: begun anew wherever that one was seeded or moved.
at::Generator generator_for(const at::Generator &given) {
    struct Twin {
        at::Generator generator;
        uint64_t seed, offset;
    };
    static std::map<void *, Twin> twins;
    auto own = given.defined() ? given : at::globalContext().defaultGenerator(at::Device(at::kCUDA, 0));
    if (own.device().is_cpu()) return own;
    auto *cuda = at::check_generator<at::CUDAGeneratorImpl>(own);
    uint64_t seed = own.current_seed(), offset = cuda->philox_offset_per_thread();
    auto twin = twins.find(cuda);
    if (twin == twins.end() || twin->second.seed != seed || twin->second.offset != offset) {
        auto host = at::globalContext().defaultGenerator(at::kCPU).clone();
        host.set_current_seed(seed);
        twin = twins.insert_or_assign(cuda, Twin{host, seed, offset}).first;
    }
    cuda->set_philox_offset_per_thread(offset + 4);
    twin->second.offset = offset + 4;
    return twin->second.generator;
}

// The arguments of one call on both sides.
struct Arguments {
    struct Pair {
        Tensor host, gpu;
    };
    std::vector<Pair> written, read;

    Tensor to_host(const Tensor &t, bool write) {
        if (!t.defined() || !t.is_cuda()) return t;
        Tensor view = host_view(t);
        (write ? written : read).push_back({view, t});
        return view;
    }

    IValue to_host(const IValue &v, const c10::Argument &argument) {
        bool write = argument.alias_info() && argument.alias_info()->isWrite();
        if (v.isTensor()) return to_host(v.toTensor(), write);
        if (v.isTensorList()) {
            c10::List<Tensor> list;
            for (const Tensor &t : v.toTensorVector()) list.push_back(to_host(t, write));
            return list;
        }
        if (v.isOptionalTensorList()) {
            c10::List<std::optional<Tensor>> list;
            for (const auto &t : v.toOptionalTensorVector())
                list.push_back(t ? std::optional(to_host(*t, write)) : std::nullopt);
            return list;
        }
        if (v.isDevice() && v.toDevice().is_cuda()) return at::Device(at::kCPU);
        if (argument.name() == "generator") return generator_for(v.isNone() ? at::Generator() : v.toGenerator());
        return v;
    }

    // An argument that is given back stays itself; what is new moves to the GPU.
    Tensor to_gpu(const std::string &name, const Tensor &t) {
        if (!t.defined() || !t.is_cpu()) return t;
        for (auto *pairs : {&written, &read})
            for (const Pair &pair : *pairs)
                if (pair.host.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return pair.gpu;
        return computed::to_gpu(name, t);
    }

    IValue to_gpu(const std::string &name, const IValue &v) {
        if (v.isTensor()) return to_gpu(name, v.toTensor());
        if (!v.isTensorList()) return v;
        c10::List<Tensor> list;
        for (const Tensor &t : v.toTensorVector()) list.push_back(to_gpu(name, t));
        return list;
    }

    // An output that the CPU's kernel resized no longer is a view of the GPU's memory.
    void write_back(const std::string &name) {
        for (auto &[host, gpu] : written) {
            if (!host.sizes().equals(gpu.sizes())) gpu.resize_(host.sizes());
            if (!gpu.numel() || host.data_ptr() == gpu.data_ptr()) continue;
            host_view(gpu).copy_(host);
            touch(name, gpu, true);
        }
    }
};

// Any operator: its arguments are shown to the CPU's kernel, its results given back.
void on_host(const c10::OperatorHandle &op, c10::DispatchKeySet, Stack *stack) {
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
    const std::string &name = op.schema().name();
    const auto &declared = op.schema().arguments();
    auto given = torch::jit::last(*stack, declared.size()).vec();
    prepare_product(name, given);
    Arguments arguments;
    Stack host;
    for (size_t i = 0; i < given.size(); i++) host.push_back(arguments.to_host(given[i], declared[i]));
    launched(name);
    for (auto &pair : arguments.read) touch(name, pair.gpu, false);
    for (auto &pair : arguments.written) touch(name, pair.gpu, true);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &host);
    arguments.write_back(name);
    torch::jit::drop(*stack, declared.size());
    for (const IValue &v : host) stack->push_back(arguments.to_gpu(name, v));
}

// Copies on the GPU that are no memcpy are kernels; all others are the runtime's.
Tensor &copy(Tensor &self, const Tensor &src, bool non_blocking) {
    bool on_gpu = self.is_cuda() && src.is_cuda();
    bool alike = self.dtype() == src.dtype() && self.sizes().equals(src.sizes()) && self.is_conj() == src.is_conj() &&
                 self.is_neg() == src.is_neg();
    if (!on_gpu || (alike && self.is_contiguous() && src.is_contiguous()))
        return at::native::copy_(self, src, non_blocking);
    if (!self.numel()) return self;
    launched("copy_");
    touch("copy_", src, false);
    touch("copy_", self, true);
    host_view(self).copy_(host_view(src));
    return self;
}

// The CPU has no product with an output of another dtype.
Tensor mm_dtype(const Tensor &a, const Tensor &b, at::ScalarType dtype) {
    return at::mm(a.to(at::kFloat), b.to(at::kFloat)).to(dtype);
}
Tensor &mm_dtype_out(const Tensor &a, const Tensor &b, at::ScalarType dtype, Tensor &out) {
    return out.copy_(mm_dtype(a, b, dtype));
}

// --- which operators are taken over

// Not these: they are made of memory and copies alone, or have a function here or in attention.cpp.
const std::set<std::string> LEFT_ALONE = {
    "aten::empty",
    "aten::empty_strided",
    "aten::_local_scalar_dense",
    "aten::record_stream",
    "aten::_fused_sdp_choice",
    "aten::resize_",
    "aten::set_",
    "aten::_reshape_alias",
    "aten::as_strided",
    "aten::_pin_memory",
    "aten::is_pinned",
    "aten::is_set_to",
    "aten::_efficientzerotensor",
    "aten::_sparse_semi_structured_tile",
    "aten::copy_",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_efficient_attention_backward",
};

bool makes_view(const c10::FunctionSchema &schema) {
    for (const auto &result : schema.returns())
        if (result.alias_info() && !result.alias_info()->isWrite()) return true;
    return false;
}

void take_over(const c10::OperatorName &name) {
    static std::vector<std::unique_ptr<torch::Library>> libraries;  // an implementation lasts as long as its library
    auto space = name.name.substr(0, name.name.find("::"));
    auto own = name.name.substr(space.size() + 2) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    libraries.push_back(
        std::make_unique<torch::Library>(torch::Library::IMPL, space, c10::DispatchKey::CUDA, __FILE__, __LINE__));
    torch::Library &library = *libraries.back();
    if (own == "mm.dtype" && space == "aten") library.impl("mm.dtype", &mm_dtype);
    else if (own == "mm.dtype_out" && space == "aten") library.impl("mm.dtype_out", &mm_dtype_out);
    else library.impl(own.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

// Every operator whose name begins with `prefix` ("aten::") and that has a kernel for CUDA.
void take_over_all(const std::string &prefix) {
    struct Quiet : c10::WarningHandler {  // PyTorch warns of every kernel that is replaced
        void process(const c10::Warning &) override {}
    } quiet;
    c10::WarningUtils::WarningHandlerGuard guard(&quiet);
    auto &dispatcher = c10::Dispatcher::singleton();
    for (const auto &name : dispatcher.getAllOpNames()) {
        auto op = dispatcher.findSchema(name);
        if (op && name.name.rfind(prefix, 0) == 0 && !LEFT_ALONE.count(name.name) && !makes_view(op->schema()) &&
            op->hasKernelForDispatchKey(c10::DispatchKey::CUDA))
            take_over(name);
    }
}

const bool begun = (take_over_all("aten::"), true);

}  // namespace

}  // namespace computed

TORCH_LIBRARY_IMPL(aten, CUDA, m) { m.impl("copy_", &computed::copy); }

// For the hook.
TORCH_LIBRARY(emulated_gpu, m) {
    m.def("host_view(Tensor t) -> Tensor", [](const Tensor &t) { return computed::host_view(t); });
    m.def("touch(Tensor t, str name, bool write) -> ()",
          [](const Tensor &t, const std::string &name, bool write) { computed::touch(name, t, write); });
    m.def("kernel(str name) -> ()", [](const std::string &name) { computed::launched(name); });
    m.def("take_over(str prefix) -> ()", [](const std::string &prefix) { computed::take_over_all(prefix); });
}
