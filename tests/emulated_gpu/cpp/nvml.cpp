// NVML, as far as PyTorch and programs that print a GPU's state ask.

#include "emulated.h"

#include <cstdio>
#include <cstring>

using namespace emulated;

namespace {
enum { SUCCESS = 0, NOT_FOUND = 6 };
int device;  // there is one, and its address is its handle
}  // namespace

API int nvmlInit() { return SUCCESS; }
API int nvmlInit_v2() { return SUCCESS; }
API int nvmlShutdown() { return SUCCESS; }
API const char *nvmlErrorString(int) { return "an error"; }
API int nvmlSystemGetDriverVersion(char *out, unsigned n) {
    snprintf(out, n, "580.65.06");
    return SUCCESS;
}
API int nvmlDeviceGetCount_v2(unsigned *n) {
    *n = 1;
    return SUCCESS;
}
API int nvmlDeviceGetHandleByIndex_v2(unsigned, void **out) {
    *out = &device;
    return SUCCESS;
}
API int nvmlDeviceGetHandleByPciBusId_v2(const char *, void **out) {
    *out = &device;
    return SUCCESS;
}
API int nvmlDeviceGetHandleByUUID(const char *asked, void **out) {
    unsigned char bytes[16];
    uuid(bytes);
    std::string own = "GPU-";
    for (int i = 0; i < 16; i++) {
        char two[3];
        snprintf(two, sizeof two, "%02x", bytes[i]);
        own += (i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "") + std::string(two);
    }
    *out = &device;
    return own == asked ? SUCCESS : NOT_FOUND;
}
API int nvmlDeviceGetName(void *, char *out, unsigned n) {
    snprintf(out, n, "%s", gpu().name);
    return SUCCESS;
}
API int nvmlDeviceGetMemoryInfo(void *, unsigned long long *total_free_used) {
    LOCK;
    const Memory &m = memory();
    total_free_used[0] = m.total;
    total_free_used[1] = m.free();
    total_free_used[2] = m.total - m.free();
    return SUCCESS;
}
API int nvmlDeviceGetComputeRunningProcesses(void *, unsigned *n, void *) {
    *n = 0;
    return SUCCESS;
}
// Made up: nothing here uses power.
API int nvmlDeviceGetUtilizationRates(void *, unsigned *gpu_and_memory) {
    gpu_and_memory[0] = gpu_and_memory[1] = 50;
    return SUCCESS;
}
API int nvmlDeviceGetPowerUsage(void *, unsigned *milliwatts) {
    *milliwatts = 150000;
    return SUCCESS;
}
API int nvmlDeviceGetTotalEnergyConsumption(void *, unsigned long long *millijoules) {
    *millijoules = 150000 * now();
    return SUCCESS;
}
