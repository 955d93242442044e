// What the files of the emulated GPU share. Each section names the file that defines it.
//
// Device memory is host memory, so a copy is a memmove and an address means the same on both sides. All state is made
// at first use and never destroyed: PyTorch calls in before main() begins and after it ends.

#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
#define RUNTIME API cudaError_t CUDARTAPI
#define DRIVER API CUresult CUDAAPI

namespace emulated {

// One lock for everything, held during every call: autograd's threads and a program's own call in at the same time.
std::recursive_mutex &mutex();
#define LOCK std::lock_guard<std::recursive_mutex> lock_(emulated::mutex())
#define ENTER LOCK; emulated::used()  // of a function that a program calls to do something

const char *setting(const char *name, const char *otherwise);  // the environment's EMULATED_GPU_<name>
size_t setting_mib(const char *name, size_t otherwise);        // the same, in MiB; the result in bytes
double now();                                                  // seconds, of a clock that only goes forward

// --- gpus.cpp: which GPU is emulated

struct GPU {
    const char *key, *name;
    int major, minor, multiprocessors;
    size_t total_memory;  // what torch.cuda.get_device_properties says on a real one
    int shared_per_block, shared_per_multiprocessor, threads_per_multiprocessor, blocks_per_multiprocessor, l2_bytes;
    int clock_khz, memory_clock_khz, bus_bits;
};
const GPU &gpu();
int attribute(int which);  // CUdevice_attribute and cudaDeviceAttr have the same numbers
void uuid(unsigned char *sixteen);

// --- report.cpp: what was called, refused and noticed

void count(const std::string &call, size_t n = 1);
void note(const char *topic, const std::string &text);              // once more
bool noted(const char *topic, const std::string &text);             // whether there is such a note
void used();                                                        // from here on there is something to report
bool is_used();
cudaError_t fail(const char *call, cudaError_t code, const std::string &why = "");  // runtime: leaves a last error
CUresult refuse(const char *call, CUresult code, const std::string &why = "");      // driver: leaves none
cudaError_t take_last_error();
cudaError_t last_error();

// --- failures.cpp: calls that are to fail though nothing is wrong

bool must_fail(const char *kind);  // "alloc", "pin", ...: counts the call, and says whether it fails
// Whether a kernel has made an illegal access. No call succeeds after it, as on a GPU: what is in its memory is gone.
bool lost();
#define ENTER_UNLESS_LOST(call) \
    ENTER;                      \
    if (lost()) return fail(call, cudaErrorIllegalAddress)

// --- memory.cpp: what is allocated and pinned

constexpr size_t PAGE = 2 << 20;  // the driver gives out device memory in such pages

struct Ranges : std::map<uintptr_t, size_t> {  // address -> bytes
    iterator holding(const void *p);           // the range that p lies in, or end()
    bool has(const void *p) { return holding(p) != end(); }
    bool covers(const void *p, size_t n, bool joined);  // joined: ranges that touch count as one
};
struct Memory {
    size_t total, context, pin_limit;
    size_t taken = 0, peak = 0, mallocs = 0, frees = 0, pinned = 0, pinned_peak = 0;
    Ranges device, host;  // allocations; pinned ranges
    Memory();
    size_t free() const { return total - std::min(total, taken + context); }
    bool take(size_t n);  // false if the GPU has no n bytes left
    void give_back(size_t n);
};
Memory &memory();
void *map_pages(size_t n);  // zeros that take no memory until they are written; null if there are none
bool device_malloc(void **out, size_t n);
bool device_free(void *p);
cudaError_t pin(const char *call, void *p, size_t n);
cudaError_t unpin(const char *call, void *p);

// --- streams.cpp: queues of copies, and what orders them

using Clock = std::vector<size_t>;  // stream -> how many of its accesses have happened before; see races.cpp

struct Stream;
struct Event {
    Stream *stream = nullptr;  // where it was last recorded
    size_t position = 0;       // after so many operations of that stream
    double time = 0;
    unsigned flags = 0;
    int polls = 0;
    Clock clock;
};
struct Operation {
    enum Kind { COPY, SET, WAIT, RECORD, HOST_FUNCTION } kind;
    char *to = nullptr;
    const char *from = nullptr;
    size_t n = 0;
    int value = 0;
    std::vector<char> staged;  // of a copy from pageable memory: the bytes as they were at the call
    Event *event = nullptr;
    Stream *other = nullptr;  // waited for until `position`
    size_t position = 0;
    void (*call)(void *) = nullptr;
};
struct Stream {
    int id;
    int priority = 0;
    std::deque<Operation> queue;
    size_t given = 0, done = 0, launches = 0, copies = 0;
    Clock clock;
};
struct Traffic {
    size_t bytes = 0, copies = 0;
};
enum Way { HOST_TO_HOST, HOST_TO_GPU, GPU_TO_HOST, ON_GPU };

Stream *stream_of(const void *handle);
std::vector<Stream *> all_streams();
Stream *new_stream(int priority);
Traffic &traffic(Way way);
void give(Stream *stream, Operation operation);
void flush(Stream *stream);  // do everything that the stream has been given
void flush_all();            // the same for all; the host has waited for them
void run_until(Stream *stream, size_t position);
cudaError_t copy(const char *call, void *to, const void *from, size_t n, cudaMemcpyKind kind, Stream *stream,
                 bool wait);
cudaError_t set(const char *call, void *p, int value, size_t n, Stream *stream, bool wait);
void note_unfinished(const char *call, const void *p, size_t n);  // copies of [p, p + n) that are still to be done
void record(Event *event, Stream *stream);
void wait(Stream *stream, Event *event);  // stream waits for event
void forget(Event *event);                // its stream is to touch it no more
bool poll(Event *event);

// --- races.cpp: accesses to the same memory that nothing orders

void access(const char *name, Stream *stream, const void *p, size_t n, bool write);
void forget(uintptr_t from, size_t n);  // the memory is freed
void joined(Clock &later, const Clock &earlier);
void host_knows(const Clock &clock);  // the host has waited for it
Clock clock_now(const Stream *stream);

// --- launches.cpp: kernels are checked and counted, not run

struct Function {
    std::string name;
    size_t launches = 0;
    int most_dynamic_shared = 48 << 10;  // more has to be asked for
};
Function *function_of(const void *kernel);  // a kernel of the runtime by its host function, or of the driver
Function *new_function(const std::string &name);
std::string launch(const void *kernel, dim3 grid, dim3 block, size_t shared, const void *stream);  // why not, or ""
void launched(const std::string &name, const void *stream);  // by a library, or run by someone else
std::map<std::string, size_t> launches_by_name();
void reset_launches();

}  // namespace emulated

// For compute.cpp, the stubs, and Python by ctypes.
API const char *emulated_gpu_report();  // JSON
API void emulated_gpu_reset();          // counts begin anew; memory stays as it is
API int emulated_gpu_fail(const char *plan);  // "alloc:7-9,module:1", counted from now; 0: cannot be read
API int emulated_gpu_load(const char *operator_name);  // 0, or the error of a launch whose kernel finds no memory
API void emulated_gpu_kernel(const char *name, void *stream);
API void emulated_gpu_access(const char *name, void *stream, const void *p, size_t n, int write);
API int emulated_gpu_stub(const char *name, int code);
API int emulated_gpu_product(const char *name, void *handle);
