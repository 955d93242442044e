// The CUDA runtime: devices, memory, copies, streams and events. (Launches are in launches.cpp.)

#include "emulated.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>

using namespace emulated;

// --- the device

RUNTIME cudaGetDeviceCount(int *n) {
    *n = 1;
    return cudaSuccess;
}
RUNTIME cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
RUNTIME cudaSetDevice(int device) {
    ENTER;
    return device == 0 ? cudaSuccess : fail("cudaSetDevice", cudaErrorInvalidDevice);
}
RUNTIME cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
RUNTIME cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
RUNTIME cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
    *value = attribute(which);
    return cudaSuccess;
}
RUNTIME cudaDeviceGetPCIBusId(char *out, int n, int) {
    snprintf(out, n, "0000:01:00.0");
    return cudaSuccess;
}
RUNTIME cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
RUNTIME cudaDeviceCanAccessPeer(int *can, int, int) {
    *can = 0;
    return cudaSuccess;
}
RUNTIME cudaDeviceSynchronize() {
    ENTER_UNLESS_LOST("cudaDeviceSynchronize");
    count("device synchronizations");
    flush_all();
    return cudaSuccess;
}
RUNTIME cudaDeviceReset() { return cudaSuccess; }
RUNTIME cudaProfilerStart() { return cudaSuccess; }
RUNTIME cudaProfilerStop() { return cudaSuccess; }

RUNTIME cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                         cudaDriverEntryPointQueryResult *status) {
    bool found = cuGetProcAddress(name, function, 0, 0, nullptr) == CUDA_SUCCESS;
    if (status) *status = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// --- errors

RUNTIME cudaGetLastError() { return take_last_error(); }
RUNTIME cudaPeekAtLastError() { return last_error(); }

namespace {
struct Error {
    int code;
    const char *name, *text;
};
constexpr Error ERRORS[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};
const Error &error(int code) {
    static constexpr Error other{0, "cudaErrorUnknown", "unknown error"};
    for (const Error &each : ERRORS)
        if (each.code == code) return each;
    return other;
}
}  // namespace

API const char *CUDARTAPI cudaGetErrorString(cudaError_t code) { return error(code).text; }
API const char *CUDARTAPI cudaGetErrorName(cudaError_t code) { return error(code).name; }

// --- memory

RUNTIME cudaMalloc(void **p, size_t n) {
    ENTER_UNLESS_LOST("cudaMalloc");
    return device_malloc(p, n) ? cudaSuccess : fail("cudaMalloc", cudaErrorMemoryAllocation);
}
RUNTIME cudaFree(void *p) {
    ENTER_UNLESS_LOST("cudaFree");
    return !p || device_free(p) ? cudaSuccess : fail("cudaFree", cudaErrorInvalidValue);
}
RUNTIME cudaMemGetInfo(size_t *free, size_t *total) {
    ENTER;
    count("cudaMemGetInfo");
    *total = memory().total;
    *free = memory().free();
    return cudaSuccess;
}

namespace {
std::map<void *, size_t> &owned() {  // of cudaHostAlloc: address -> bytes mapped
    static auto &made = *new std::map<void *, size_t>;
    return made;
}
}  // namespace

RUNTIME cudaHostAlloc(void **p, size_t n, unsigned) {
    ENTER;
    *p = nullptr;
    if (!n) return cudaSuccess;
    size_t mapped = (n + 4095) / 4096 * 4096;
    void *made = map_pages(mapped);
    if (!made) return fail("cudaHostAlloc", cudaErrorMemoryAllocation);
    if (cudaError_t error = pin("cudaHostAlloc", made, n)) {
        munmap(made, mapped);
        return error;
    }
    owned()[made] = mapped;
    *p = made;
    return cudaSuccess;
}
RUNTIME cudaMallocHost(void **p, size_t n) { return cudaHostAlloc(p, n, 0); }
RUNTIME cudaFreeHost(void *p) {
    ENTER;
    if (!p) return cudaSuccess;
    auto found = owned().find(p);
    if (found == owned().end()) return fail("cudaFreeHost", cudaErrorInvalidValue);
    unpin("cudaFreeHost", p);
    munmap(p, found->second);
    owned().erase(found);
    return cudaSuccess;
}
RUNTIME cudaHostRegister(void *p, size_t n, unsigned) {
    ENTER;
    return pin("cudaHostRegister", p, n);
}
RUNTIME cudaHostUnregister(void *p) {
    ENTER;
    return unpin("cudaHostUnregister", p);
}
RUNTIME cudaHostGetDevicePointer(void **out, void *p, unsigned) {
    *out = p;
    return cudaSuccess;
}
RUNTIME cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
    ENTER;
    bool device = memory().device.has(p), pinned = !device && memory().host.has(p);
    *a = {};
    a->type = device ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->device = device || pinned ? 0 : cudaInvalidDeviceId;
    a->devicePointer = device || pinned ? (void *)p : nullptr;
    a->hostPointer = device ? nullptr : (void *)p;
    return cudaSuccess;
}

// --- copies

RUNTIME cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    ENTER;
    return copy("cudaMemcpy", to, from, n, kind, stream_of(nullptr), true);
}
RUNTIME cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t stream) {
    ENTER;
    return copy("cudaMemcpyAsync", to, from, n, kind, stream_of(stream), false);
}
RUNTIME cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t n, cudaStream_t stream) {
    ENTER;
    return copy("cudaMemcpyPeerAsync", to, from, n, cudaMemcpyDeviceToDevice, stream_of(stream), false);
}
RUNTIME cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                          cudaMemcpyKind kind, cudaStream_t stream) {
    ENTER;
    for (size_t row = 0; row < height; row++) {
        char *target = (char *)to + row * to_pitch;
        const char *source = (const char *)from + row * from_pitch;
        cudaError_t error = copy("cudaMemcpy2DAsync", target, source, width, kind, stream_of(stream), false);
        if (error) return error;
    }
    return cudaSuccess;
}
RUNTIME cudaMemset(void *p, int value, size_t n) {
    ENTER;
    return set("cudaMemset", p, value, n, stream_of(nullptr), true);
}
RUNTIME cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t stream) {
    ENTER;
    return set("cudaMemsetAsync", p, value, n, stream_of(stream), false);
}
// Variables of kernels: nothing reads them, since no kernel runs.
RUNTIME cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
RUNTIME cudaGetSymbolAddress(void **p, const void *) {
    ENTER;
    static void *scratch;
    if (!scratch) device_malloc(&scratch, PAGE);
    *p = scratch;
    return cudaSuccess;
}

// --- streams

RUNTIME cudaStreamCreateWithPriority(cudaStream_t *out, unsigned, int priority) {
    ENTER;
    *out = (cudaStream_t)new_stream(priority);
    return cudaSuccess;
}
RUNTIME cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    return cudaStreamCreateWithPriority(out, flags, 0);
}
RUNTIME cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, 0, 0); }
RUNTIME cudaStreamDestroy(cudaStream_t stream) {
    ENTER;
    flush(stream_of(stream));  // the stream itself stays: events may have been recorded on it
    return cudaSuccess;
}
RUNTIME cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = stream_of(stream)->priority;
    return cudaSuccess;
}
RUNTIME cudaStreamSynchronize(cudaStream_t stream) {
    ENTER_UNLESS_LOST("cudaStreamSynchronize");
    count("stream synchronizations");
    flush(stream_of(stream));
    host_knows(stream_of(stream)->clock);
    return cudaSuccess;
}
RUNTIME cudaStreamQuery(cudaStream_t handle) {
    ENTER_UNLESS_LOST("cudaStreamQuery");
    Stream *stream = stream_of(handle);
    if (stream->done == stream->given) {
        host_knows(stream->clock);
        return cudaSuccess;
    }
    flush(stream);  // the next query finds it done
    return cudaErrorNotReady;
}
RUNTIME cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    ENTER;
    wait(stream_of(stream), (Event *)event);
    return cudaSuccess;
}
RUNTIME cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    ENTER;
    Operation op{Operation::HOST_FUNCTION, (char *)data};
    op.call = function;
    give(stream_of(stream), std::move(op));
    return cudaSuccess;
}
RUNTIME cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
RUNTIME cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *id,
                                 cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                 size_t *n) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (graph) *graph = nullptr;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (n) *n = 0;
    return cudaSuccess;
}
RUNTIME cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }

// --- events

RUNTIME cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    ENTER;
    count("events made");
    auto *event = new Event;
    event->flags = flags;
    *out = (cudaEvent_t)event;
    return cudaSuccess;
}
RUNTIME cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
RUNTIME cudaEventDestroy(cudaEvent_t event) {
    ENTER;
    forget((Event *)event);
    delete (Event *)event;
    return cudaSuccess;
}
RUNTIME cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    ENTER_UNLESS_LOST("cudaEventRecord");
    record((Event *)event, stream_of(stream));
    return cudaSuccess;
}
RUNTIME cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
RUNTIME cudaEventSynchronize(cudaEvent_t handle) {
    ENTER_UNLESS_LOST("cudaEventSynchronize");
    auto *event = (Event *)handle;
    count("event synchronizations");
    if (event->stream) run_until(event->stream, event->position);
    host_knows(event->clock);
    return cudaSuccess;
}
RUNTIME cudaEventQuery(cudaEvent_t event) {
    ENTER_UNLESS_LOST("cudaEventQuery");
    return poll((Event *)event) ? cudaSuccess : cudaErrorNotReady;
}
RUNTIME cudaEventElapsedTime(float *milliseconds, cudaEvent_t first, cudaEvent_t last) {
    ENTER;
    auto *a = (Event *)first, *b = (Event *)last;
    if (!a->stream || !b->stream || ((a->flags | b->flags) & cudaEventDisableTiming))
        return fail("cudaEventElapsedTime", cudaErrorInvalidResourceHandle);
    if (a->stream->done < a->position || b->stream->done < b->position)
        return cudaErrorNotReady;
    *milliseconds = std::max(1e-3, 1e3 * (b->time - a->time));  // the host's time: never 0, which programs divide by
    return cudaSuccess;
}
