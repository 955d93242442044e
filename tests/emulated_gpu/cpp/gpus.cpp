// The GPUs that can be emulated, and what they answer about themselves.

#include "emulated.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

namespace {

// Keys are those of fluxq/offload/gpus.py. T4: a GPU that is too old for Triton's kernels.
const GPU GPUS[] = {
    // key, name, capability, multiprocessors, memory,
    //     shared memory of a block and of a multiprocessor, its threads and blocks, L2, clocks in kHz, bits of the bus
    {"rtx3060", "NVIDIA GeForce RTX 3060", 8, 6, 28, 12622168064,
     101376, 102400, 1536, 16, 2359296, 1777000, 7501000, 192},
    {"rtx4060ti", "NVIDIA GeForce RTX 4060 Ti", 8, 9, 34, 16754081792,
     101376, 102400, 1536, 24, 33554432, 2535000, 9001000, 128},
    {"rtx4090", "NVIDIA GeForce RTX 4090", 8, 9, 128, 25393692672,
     101376, 102400, 1536, 24, 75497472, 2520000, 10501000, 384},
    {"rtx5090", "NVIDIA GeForce RTX 5090", 12, 0, 170, 33683865600,
     101376, 102400, 1536, 24, 100663296, 2407000, 14001000, 512},
    {"a100", "NVIDIA A100-SXM4-80GB", 8, 0, 108, 85197848576,
     166912, 167936, 2048, 32, 41943040, 1410000, 1593000, 5120},
    {"h100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 84942979072,
     232448, 233472, 2048, 32, 52428800, 1980000, 2619000, 5120},
    {"t4", "Tesla T4", 7, 5, 40, 15655829504,
     65536, 65536, 1024, 16, 4194304, 1590000, 5001000, 256},
};

const GPU &chosen() {
    const char *key = setting("NAME", GPUS[0].key);
    for (const GPU &each : GPUS)
        if (!strcmp(each.key, key)) return each;
    std::string keys;
    for (const GPU &each : GPUS) keys += std::string(keys.empty() ? "" : ", ") + each.key;
    fprintf(stderr, "emulated GPU: there is no %s; choose one of %s\n", key, keys.c_str());
    _Exit(2);
}

}  // namespace

const GPU &gpu() {
    static const GPU &found = chosen();
    return found;
}

int attribute(int which) {
    const GPU &g = gpu();
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 0x7fffffff;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 << 10;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return g.shared_per_block;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return g.shared_per_multiprocessor;
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return g.clock_khz;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return g.memory_clock_khz;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return g.bus_bits;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return g.multiprocessors;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return g.threads_per_multiprocessor;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return g.blocks_per_multiprocessor;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return g.l2_bytes;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return g.major;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return g.minor;
        case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 2;
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
        case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
        case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
        case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: return 1;
        default: return 0;
    }
}

void uuid(unsigned char *sixteen) {
    for (int i = 0; i < 16; i++) sixteen[i] = 17 * i + 1;
}

}  // namespace emulated

RUNTIME cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    using namespace emulated;
    const GPU &g = gpu();
    *p = {};
    snprintf(p->name, sizeof p->name, "%s", g.name);
    uuid((unsigned char *)p->uuid.bytes);
    p->major = g.major;
    p->minor = g.minor;
    p->pciBusID = 1;
    p->totalGlobalMem = memory().total;
    p->totalConstMem = attribute(CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY);
    p->l2CacheSize = g.l2_bytes;
    p->memoryBusWidth = g.bus_bits;
    p->memPitch = 0x7fffffff;
    p->textureAlignment = attribute(CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT);
    p->multiProcessorCount = g.multiprocessors;
    p->maxThreadsPerMultiProcessor = g.threads_per_multiprocessor;
    p->maxBlocksPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
    p->sharedMemPerMultiprocessor = g.shared_per_multiprocessor;
    p->regsPerMultiprocessor = p->regsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
    p->sharedMemPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
    p->sharedMemPerBlockOptin = g.shared_per_block;
    p->reservedSharedMemPerBlock = attribute(CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK);
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->asyncEngineCount = 2;
    p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = p->streamPrioritiesSupported = 1;
    p->globalL1CacheSupported = p->localL1CacheSupported = p->cooperativeLaunch = 1;
    p->hostRegisterSupported = p->canUseHostPointerForRegisteredMem = 1;
    return cudaSuccess;
}
