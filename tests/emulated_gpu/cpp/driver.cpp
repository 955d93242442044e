// The CUDA driver: contexts, modules, and memory that is mapped into reserved addresses. Triton and PyTorch's
// expandable segments call it directly. (Launches are in launches.cpp.)

#include "emulated.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>

using namespace emulated;

// The runtime's errors and the driver's have the same numbers, as far as they are used here.
#define AS_RUNTIME(call) CUresult(call)

// --- entry points, devices, contexts

namespace {
void *symbol(const char *name) {  // cuda.h names the newest version of a function by a macro, callers without suffix
    for (const char *suffix : {"_v4", "_v3", "_v2", ""})
        if (void *found = dlsym(RTLD_DEFAULT, (std::string(name) + suffix).c_str())) return found;
    return nullptr;
}
int context;  // there is one, and its address is its handle
}  // namespace

DRIVER cuInit(unsigned) { return CUDA_SUCCESS; }
DRIVER cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}
DRIVER cuGetProcAddress_v2(const char *name, void **function, int, cuuint64_t, CUdriverProcAddressQueryResult *status) {
    *function = symbol(name);
    if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : refuse("cuGetProcAddress", CUDA_ERROR_NOT_FOUND, name);
}
DRIVER cuGetErrorString(CUresult code, const char **text) {
    *text = cudaGetErrorString(cudaError_t(code));
    return CUDA_SUCCESS;
}
DRIVER cuGetErrorName(CUresult code, const char **name) {
    *name = cudaGetErrorName(cudaError_t(code));
    return CUDA_SUCCESS;
}
DRIVER cuDeviceGetCount(int *n) {
    *n = 1;
    return CUDA_SUCCESS;
}
DRIVER cuDeviceGet(CUdevice *device, int i) {
    *device = 0;
    return i == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
DRIVER cuDeviceGetName(char *out, int n, CUdevice) {
    snprintf(out, n, "%s", gpu().name);
    return CUDA_SUCCESS;
}
DRIVER cuDeviceTotalMem_v2(size_t *n, CUdevice) {
    *n = memory().total;
    return CUDA_SUCCESS;
}
DRIVER cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice) {
    *value = attribute(which);
    return CUDA_SUCCESS;
}
DRIVER cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice) {
    *out = (CUcontext)&context;
    return CUDA_SUCCESS;
}
DRIVER cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
DRIVER cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
    *flags = 0;
    *active = is_used();
    return CUDA_SUCCESS;
}
DRIVER cuCtxGetCurrent(CUcontext *out) {
    *out = (CUcontext)&context;
    return CUDA_SUCCESS;
}
DRIVER cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
DRIVER cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
DRIVER cuCtxPopCurrent_v2(CUcontext *) { return CUDA_SUCCESS; }
DRIVER cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}
DRIVER cuCtxSynchronize() { return AS_RUNTIME(cudaDeviceSynchronize()); }
DRIVER cuCtxGetLimit(size_t *n, CUlimit) {
    *n = 1 << 20;
    return CUDA_SUCCESS;
}
DRIVER cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
DRIVER cuLogsRegisterCallback(CUlogsCallback, void *, CUlogsCallbackHandle *) { return CUDA_SUCCESS; }
DRIVER cuStreamSynchronize(CUstream stream) { return AS_RUNTIME(cudaStreamSynchronize(stream)); }

// --- modules: compiled code is not looked at, a kernel has a name

namespace {
CUresult load_module(const char *call, void **out, const void *image) {
    ENTER;
    if (!image) return refuse(call, CUDA_ERROR_INVALID_IMAGE);
    if (must_fail("module")) return refuse(call, CUDA_ERROR_OUT_OF_MEMORY, "on purpose");
    count("modules loaded");
    *out = new int;
    return CUDA_SUCCESS;
}
}  // namespace

DRIVER cuModuleLoadData(CUmodule *out, const void *image) {
    return load_module("cuModuleLoadData", (void **)out, image);
}
DRIVER cuModuleLoadDataEx(CUmodule *out, const void *image, unsigned, CUjit_option *, void **) {
    return load_module("cuModuleLoadDataEx", (void **)out, image);
}
DRIVER cuModuleLoadFatBinary(CUmodule *out, const void *image) {
    return load_module("cuModuleLoadFatBinary", (void **)out, image);
}
DRIVER cuModuleUnload(CUmodule module) {
    delete (int *)module;
    return CUDA_SUCCESS;
}
DRIVER cuModuleGetFunction(CUfunction *out, CUmodule, const char *name) {
    LOCK;
    *out = (CUfunction)new_function(std::string("triton ") + name);
    return CUDA_SUCCESS;
}
DRIVER cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                              const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

// --- memory

DRIVER cuPointerGetAttribute(void *out, CUpointer_attribute which, CUdeviceptr p) {
    LOCK;
    bool device = memory().device.has((void *)p);
    if (!device && !memory().host.has((void *)p))  // Triton asks: such a pointer is an error on a GPU too
        return refuse("cuPointerGetAttribute", CUDA_ERROR_INVALID_VALUE, "pageable memory of the host");
    switch (which) {
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(CUdeviceptr *)out = p; break;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *(unsigned *)out = device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
            break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)out = 0; break;
        default: return refuse("cuPointerGetAttribute", CUDA_ERROR_NOT_SUPPORTED);
    }
    return CUDA_SUCCESS;
}
DRIVER cuMemGetInfo_v2(size_t *free, size_t *total) { return AS_RUNTIME(cudaMemGetInfo(free, total)); }
DRIVER cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
    ENTER;
    return device_malloc((void **)p, n) ? CUDA_SUCCESS : refuse("cuMemAlloc", CUDA_ERROR_OUT_OF_MEMORY);
}
DRIVER cuMemFree_v2(CUdeviceptr p) { return AS_RUNTIME(cudaFree((void *)p)); }
DRIVER cuMemHostRegister_v2(void *p, size_t n, unsigned flags) { return AS_RUNTIME(cudaHostRegister(p, n, flags)); }
DRIVER cuMemHostUnregister(void *p) { return AS_RUNTIME(cudaHostUnregister(p)); }
DRIVER cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *n, CUdeviceptr p) {
    LOCK;
    auto range = memory().device.holding((void *)p);
    if (range == memory().device.end()) return refuse("cuMemGetAddressRange", CUDA_ERROR_INVALID_VALUE);
    if (base) *base = range->first;
    if (n) *n = range->second;
    return CUDA_SUCCESS;
}

// --- addresses without memory, and memory that is mapped there: what expandable segments are made of

DRIVER cuMemGetAllocationGranularity(size_t *n, const CUmemAllocationProp *, CUmemAllocationGranularity_flags) {
    *n = PAGE;
    return CUDA_SUCCESS;
}
DRIVER cuMemAddressReserve(CUdeviceptr *p, size_t n, size_t, CUdeviceptr, unsigned long long) {
    *p = CUdeviceptr(map_pages(n));
    return *p ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
DRIVER cuMemAddressFree(CUdeviceptr p, size_t n) {
    munmap((void *)p, n);
    return CUDA_SUCCESS;
}
DRIVER cuMemCreate(CUmemGenericAllocationHandle *handle, size_t n, const CUmemAllocationProp *, unsigned long long) {
    ENTER;
    if (lost()) return refuse("cuMemCreate", CUDA_ERROR_ILLEGAL_ADDRESS);
    if (must_fail("alloc") || !memory().take(n)) return refuse("cuMemCreate", CUDA_ERROR_OUT_OF_MEMORY);
    *handle = (CUmemGenericAllocationHandle) new size_t(n);
    return CUDA_SUCCESS;
}
DRIVER cuMemRelease(CUmemGenericAllocationHandle handle) {
    LOCK;
    memory().give_back(*(size_t *)handle);
    delete (size_t *)handle;
    return CUDA_SUCCESS;
}
DRIVER cuMemMap(CUdeviceptr p, size_t n, size_t, CUmemGenericAllocationHandle, unsigned long long) {
    LOCK;
    memory().device[p] = n;
    return CUDA_SUCCESS;
}
DRIVER cuMemUnmap(CUdeviceptr p, size_t n) {
    LOCK;
    flush_all();
    Ranges &device = memory().device;
    auto range = device.lower_bound(p);
    for (; range != device.end() && range->first < p + n; range = device.erase(range)) {
        forget(range->first, range->second);
        madvise((void *)range->first, range->second, MADV_DONTNEED);
    }
    return CUDA_SUCCESS;
}
DRIVER cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t) { return CUDA_SUCCESS; }
