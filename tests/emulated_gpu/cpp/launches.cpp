// Kernels are not run. A launch is checked against what the GPU can do, waits for its stream as a kernel would, and is
// counted by the kernel's name.

#include "emulated.h"

#include <dlfcn.h>

#include <algorithm>
#include <unordered_map>

namespace emulated {

namespace {

struct Launches {
    std::unordered_map<const void *, Function *> functions;
    std::map<std::string, size_t> by_libraries;
};

Launches &launches() {
    static Launches &made = *new Launches;
    return made;
}

// Why the GPU cannot launch this; null if it can.
const char *illegal(dim3 grid, dim3 block, size_t shared, const Function &function) {
    if (!grid.x || !grid.y || !grid.z) return "an empty grid";
    if (!block.x || !block.y || !block.z) return "an empty block";
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "the grid is too large";
    if (block.x > 1024 || block.y > 1024 || block.z > 64 || size_t(block.x) * block.y * block.z > 1024)
        return "the block is too large";
    if (shared > size_t(gpu().shared_per_block)) return "more shared memory than a block can have";
    if (shared > size_t(function.most_dynamic_shared)) return "more shared memory than was asked for";
    return nullptr;
}

}  // namespace

Function *function_of(const void *kernel) {
    Function *&found = launches().functions[kernel];
    if (!found) {  // registered some other way, by a library that brings its own code
        Dl_info info{};
        dladdr(kernel, &info);
        found = new Function{std::string("unregistered ") + (info.dli_sname ? info.dli_sname : "?")};
    }
    return found;
}

Function *new_function(const std::string &name) {
    auto *made = new Function{name};
    launches().functions[made] = made;
    return made;
}

std::string launch(const void *kernel, dim3 grid, dim3 block, size_t shared, const void *stream) {
    Function *function = function_of(kernel);
    if (const char *why = illegal(grid, block, shared, *function)) return function->name + ": " + why;
    Stream *s = stream_of(stream);
    flush(s);
    must_fail("kernel");
    function->launches++;
    s->launches++;
    return "";
}

void launched(const std::string &name, const void *stream) {
    ENTER;
    Stream *s = stream_of(stream);
    flush(s);
    must_fail("kernel");
    launches().by_libraries[name]++;
    s->launches++;
}

std::map<std::string, size_t> launches_by_name() {
    std::map<std::string, size_t> all = launches().by_libraries;
    for (auto &[kernel, function] : launches().functions)
        if (function->launches) all[function->name] += function->launches;
    return all;
}

void reset_launches() {
    launches().by_libraries.clear();
    for (auto &[kernel, function] : launches().functions) function->launches = 0;
    for (Stream *stream : all_streams()) stream->launches = stream->copies = 0;
}

}  // namespace emulated

using namespace emulated;

API void emulated_gpu_kernel(const char *name, void *stream) { launched(name, stream); }

// --- how nvcc's code registers its kernels and launches them

API void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API char __cudaInitModule(void **) { return 1; }
API void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
API void __cudaRegisterManagedVar(void **, void **, char *, const char *, int, size_t, int, int) {}
API void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *,
                                dim3 *, int *) {
    LOCK;
    launches().functions[host] = new Function{name};
}

namespace {
struct Configuration {
    dim3 grid, block;
    size_t shared;
    void *stream;
};
thread_local std::vector<Configuration> configurations;
}  // namespace

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
RUNTIME __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (configurations.empty()) return fail("__cudaPopCallConfiguration", cudaErrorMissingConfiguration);
    Configuration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid, *block = c.block, *shared = c.shared, *(void **)stream = c.stream;
    return cudaSuccess;
}
RUNTIME __cudaGetKernel(cudaKernel_t *out, const void *host) {
    *out = (cudaKernel_t)host;
    return cudaSuccess;
}

namespace {
cudaError_t runtime_launch(const char *call, const void *k, dim3 grid, dim3 block, size_t shared, const void *stream) {
    ENTER_UNLESS_LOST(call);
    std::string why = launch(k, grid, block, shared, stream);
    return why.empty() ? cudaSuccess : fail(call, cudaErrorInvalidConfiguration, why);
}
CUresult driver_launch(const char *call, const void *k, dim3 grid, dim3 block, size_t shared, const void *stream) {
    ENTER;
    if (lost()) return refuse(call, CUDA_ERROR_ILLEGAL_ADDRESS);
    std::string why = launch(k, grid, block, shared, stream);
    return why.empty() ? CUDA_SUCCESS : refuse(call, CUDA_ERROR_INVALID_VALUE, why);
}
}  // namespace

RUNTIME __cudaLaunchKernel(cudaKernel_t k, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) {
    return runtime_launch("cudaLaunchKernel", k, grid, block, shared, stream);
}
RUNTIME cudaLaunchKernel(const void *k, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) {
    return runtime_launch("cudaLaunchKernel", k, grid, block, shared, stream);
}
RUNTIME cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *k, void **) {
    return runtime_launch("cudaLaunchKernelExC", k, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
RUNTIME cudaLaunchCooperativeKernel(const void *k, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) {
    return runtime_launch("cudaLaunchCooperativeKernel", k, grid, block, shared, stream);
}

DRIVER cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, CUstream stream, void **, void **) {
    return driver_launch("cuLaunchKernel", f, dim3(gx, gy, gz), dim3(bx, by, bz), shared, stream);
}
DRIVER cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                 unsigned bz, unsigned shared, CUstream stream, void **) {
    return driver_launch("cuLaunchCooperativeKernel", f, dim3(gx, gy, gz), dim3(bx, by, bz), shared, stream);
}
DRIVER cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **, void **) {
    dim3 grid(c->gridDimX, c->gridDimY, c->gridDimZ), block(c->blockDimX, c->blockDimY, c->blockDimZ);
    return driver_launch("cuLaunchKernelEx", f, grid, block, c->sharedMemBytes, c->hStream);
}

// --- what a kernel is allowed, and how many of its blocks fit on a multiprocessor

namespace {

int blocks_per_multiprocessor(int threads, size_t shared) {
    int by_shared = shared ? gpu().shared_per_multiprocessor / int(shared + 1024) : 32;
    int by_threads = gpu().threads_per_multiprocessor / std::max(threads, 1);
    return std::max(0, std::min({attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR), by_threads, by_shared}));
}

bool allow_shared(const void *kernel, int bytes) {
    LOCK;
    if (bytes > gpu().shared_per_block) return false;
    Function *function = function_of(kernel);
    function->most_dynamic_shared = std::max(function->most_dynamic_shared, bytes);
    return true;
}

cudaError_t set_attribute(const char *call, const void *kernel, cudaFuncAttribute which, int value) {
    if (which == cudaFuncAttributeMaxDynamicSharedMemorySize && !allow_shared(kernel, value))
        return fail(call, cudaErrorInvalidValue, "more shared memory than a block can have");
    return cudaSuccess;
}

}  // namespace

RUNTIME cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute which, int value) {
    return set_attribute("cudaFuncSetAttribute", kernel, which, value);
}
RUNTIME cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute which, int value, int) {
    return set_attribute("cudaKernelSetAttributeForDevice", kernel, which, value);
}
DRIVER cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) {
    if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && !allow_shared(f, value))
        return refuse("cuFuncSetAttribute", CUDA_ERROR_INVALID_VALUE, "more shared memory than a block can have");
    return int(which) == 17 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;  // 17, oversized shared memory: newer GPUs
}
DRIVER cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

RUNTIME cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
    int own = 10 * gpu().major + gpu().minor;
    *a = {};
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = own == 89 ? 86 : own;  // PyTorch has no code of its own for 8.9, and CUB asks
    a->maxDynamicSharedSizeBytes = gpu().shared_per_block;
    return cudaSuccess;
}
DRIVER cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction) {
    switch (which) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 64; break;
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
        case CU_FUNC_ATTRIBUTE_PTX_VERSION: *value = 10 * gpu().major + gpu().minor; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

RUNTIME cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int threads, size_t shared,
                                                               unsigned) {
    *n = blocks_per_multiprocessor(threads, shared);
    return cudaSuccess;
}
RUNTIME cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int threads, size_t shared) {
    *n = blocks_per_multiprocessor(threads, shared);
    return cudaSuccess;
}
DRIVER cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction, int threads, size_t shared) {
    *n = blocks_per_multiprocessor(threads, shared);
    return CUDA_SUCCESS;
}
DRIVER cuOccupancyMaxActiveClusters(int *n, CUfunction, const CUlaunchConfig *) {
    *n = gpu().multiprocessors / 2;
    return CUDA_SUCCESS;
}
