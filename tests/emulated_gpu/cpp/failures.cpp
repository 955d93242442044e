// Calls that fail because a test says so: the i-th allocation, pinning, module or handle, once. A GPU runs out of
// memory outside PyTorch's allocator too, where no pool can be emptied and no exception is called OutOfMemoryError.
// And the i-th kernel, which makes an illegal access: its launch succeeds, and every call after it fails.

#include "emulated.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sstream>

namespace emulated {

namespace {

struct Plan {
    size_t calls = 0;
    std::set<size_t> failing;  // by the number of the call, from 1
};

using Plans = std::map<std::string, Plan>;

// Adds "alloc:7-9,module:3", counted from the calls made so far. False if it cannot be read: nothing is changed then.
bool add(Plans &plans, const std::string &text) {
    Plans changed = plans;
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) {
        char kind[16], rest;
        size_t first, last;
        int read = sscanf(part.c_str(), "%15[a-z]:%zu-%zu%c", kind, &first, &last, &rest);
        if (read == 2) last = first;
        if (read < 2 || read > 3 || first < 1 || last < first || !changed.count(kind)) return false;
        Plan &plan = changed[kind];
        for (size_t i = first; i <= last; i++) plan.failing.insert(plan.calls + i);
    }
    plans = changed;
    return true;
}

bool is_lost = false;

Plans &plans() {
    static Plans &made = *[] {
        auto *plans = new Plans{{"alloc", {}}, {"pin", {}}, {"module", {}}, {"handle", {}}, {"kernel", {}}};
        if (add(*plans, setting("FAIL", ""))) return plans;
        fprintf(stderr, "emulated GPU: cannot read EMULATED_GPU_FAIL; write it like alloc:7,module:3-4\n");
        _Exit(2);
    }();
    return made;
}

}  // namespace

bool must_fail(const char *kind) {
    Plan &plan = plans().at(kind);
    bool fails = plan.failing.erase(++plan.calls);
    count(std::string("attempts: ") + kind);
    if (fails) note("failed on purpose", std::string(kind) + ":" + std::to_string(plan.calls));
    if (fails && !strcmp(kind, "kernel")) is_lost = true;
    return fails;
}

bool lost() { return is_lost; }

}  // namespace emulated

// CUDA loads an operator's kernels when they are first launched. A load that fails is tried again at the next launch.
API int emulated_gpu_load(const char *operator_name) {
    using namespace emulated;
    ENTER_UNLESS_LOST("cudaLaunchKernel");
    static auto &loaded = *new std::set<std::string>;
    if (loaded.count(operator_name)) return cudaSuccess;
    if (emulated::must_fail("module")) return emulated::fail("cudaLaunchKernel", cudaErrorMemoryAllocation, "on purpose");
    loaded.insert(operator_name);
    return cudaSuccess;
}

API int emulated_gpu_fail(const char *plan) {
    LOCK;
    return emulated::add(emulated::plans(), plan);
}
