// What is allocated on the GPU, to the byte, and which of the host's memory is pinned.

#include "emulated.h"

#include <sys/mman.h>

#include <algorithm>

namespace emulated {

Ranges::iterator Ranges::holding(const void *p) {
    auto after = upper_bound(uintptr_t(p));
    if (after == begin()) return end();
    auto before = std::prev(after);
    return uintptr_t(p) < before->first + before->second ? before : end();
}

bool Ranges::covers(const void *p, size_t n, bool joined) {
    auto range = holding(p);
    if (range == end()) return false;
    uintptr_t until = range->first + range->second;
    for (++range; joined && range != end() && range->first == until; ++range) until += range->second;
    return uintptr_t(p) + n <= until;
}

Memory::Memory()
    : total(setting_mib("TOTAL_MIB", gpu().total_memory)),
      context(setting_mib("CONTEXT_MIB", 300 << 20)),  // assumed: what the driver itself takes
      pin_limit(setting_mib("PIN_LIMIT_MIB", ~size_t(0))) {}

Memory &memory() {
    static Memory &made = *new Memory;
    return made;
}

bool Memory::take(size_t n) {
    if (n > free()) return false;
    taken += n;
    mallocs++;
    peak = std::max(peak, taken);
    return true;
}

void Memory::give_back(size_t n) {
    taken -= n;
    frees++;
}

void *map_pages(size_t n) {
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *mapped = mmap(nullptr, n + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    uintptr_t start = uintptr_t(mapped), aligned = (start + PAGE - 1) / PAGE * PAGE;
    if (aligned > start) munmap(mapped, aligned - start);
    if (aligned < start + PAGE) munmap((void *)(aligned + n), start + PAGE - aligned);
    return (void *)aligned;
}

bool device_malloc(void **out, size_t n) {
    Memory &m = memory();
    size_t size = (std::max<size_t>(n, 1) + PAGE - 1) / PAGE * PAGE;
    if (must_fail("alloc") || size > m.free()) return false;
    void *p = map_pages(size);
    if (!p) return false;
    m.take(size);
    m.device[uintptr_t(p)] = size;
    *out = p;
    return true;
}

bool device_free(void *p) {
    Memory &m = memory();
    auto range = m.device.find(uintptr_t(p));
    if (range == m.device.end()) return false;
    flush_all();  // cudaFree waits for the device
    forget(range->first, range->second);
    munmap(p, range->second);
    m.give_back(range->second);
    m.device.erase(range);
    return true;
}

cudaError_t pin(const char *call, void *p, size_t n) {
    Memory &m = memory();
    if (!n || !p) return fail(call, cudaErrorInvalidValue);
    auto next = m.host.lower_bound(uintptr_t(p));
    if (m.host.has(p) || (next != m.host.end() && next->first < uintptr_t(p) + n))
        return fail(call, cudaErrorHostMemoryAlreadyRegistered);
    if (must_fail("pin")) return fail(call, cudaErrorMemoryAllocation, "on purpose");
    if (n > m.pin_limit - std::min(m.pin_limit, m.pinned))
        return fail(call, cudaErrorMemoryAllocation, "the pin limit");
    m.host[uintptr_t(p)] = n;
    m.pinned += n;
    m.pinned_peak = std::max(m.pinned, m.pinned_peak);
    return cudaSuccess;
}

cudaError_t unpin(const char *call, void *p) {
    Memory &m = memory();
    auto range = m.host.find(uintptr_t(p));
    if (range == m.host.end()) return fail(call, cudaErrorHostMemoryNotRegistered);
    note_unfinished(call, p, range->second);
    forget(range->first, range->second);
    m.pinned -= range->second;
    m.host.erase(range);
    return cudaSuccess;
}

}  // namespace emulated
