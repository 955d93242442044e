// cuBLAS and cuBLASLt: products succeed, and are counted as the launches that they are. building.py makes a stub for
// every function that is not here: those that multiply call emulated_gpu_product.

#include "emulated.h"

#include <cstring>

using namespace emulated;

namespace {

enum Status { SUCCESS = 0, ALLOC_FAILED = 3, INVALID_VALUE = 7 };

struct Handle {
    void *stream = nullptr;
    int math_mode = 0, pointer_mode = 0;
};

int create(const char *call, void **out) {
    ENTER;
    if (must_fail("handle")) return refuse(call, CUresult(ALLOC_FAILED), "on purpose");
    count("handles made");
    *out = new Handle;
    return SUCCESS;
}

int destroy(void *handle) {
    delete (Handle *)handle;
    return SUCCESS;
}

bool on_gpu(const void *workspace, size_t n) {
    LOCK;
    if (!n || memory().device.covers(workspace, n, true)) return true;
    note("cublas", "a workspace that is not on the GPU");
    return false;
}

}  // namespace

API int cublasCreate_v2(void **out) { return create("cublasCreate", out); }
API int cublasDestroy_v2(void *handle) { return destroy(handle); }
API int cublasSetStream_v2(void *handle, void *stream) {
    ((Handle *)handle)->stream = stream;
    return SUCCESS;
}
API int cublasGetStream_v2(void *handle, void **stream) {
    *stream = ((Handle *)handle)->stream;
    return SUCCESS;
}
API int cublasSetWorkspace_v2(void *, void *p, size_t n) { return on_gpu(p, n) ? SUCCESS : INVALID_VALUE; }
API int cublasSetMathMode(void *handle, int mode) {
    ((Handle *)handle)->math_mode = mode;
    return SUCCESS;
}
API int cublasGetMathMode(void *handle, int *mode) {
    *mode = ((Handle *)handle)->math_mode;
    return SUCCESS;
}
API int cublasSetPointerMode_v2(void *handle, int mode) {
    ((Handle *)handle)->pointer_mode = mode;
    return SUCCESS;
}
API int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = ((Handle *)handle)->pointer_mode;
    return SUCCESS;
}
API int cublasSetSmCountTarget(void *, int) { return SUCCESS; }
API int cublasGetVersion_v2(void *, int *version) {
    *version = 130100;
    return SUCCESS;
}
API int emulated_gpu_product(const char *name, void *handle) {
    launched(name, handle ? ((Handle *)handle)->stream : nullptr);
    return SUCCESS;
}

// --- cuBLASLt: descriptions are taken and not read; any algorithm will do

namespace {
int describe(void **out) {
    *out = new int;
    return SUCCESS;
}
int forget_description(void *description) {
    delete (int *)description;
    return SUCCESS;
}
}  // namespace

API size_t cublasLtGetVersion() { return 130100; }
API int cublasLtCreate(void **out) { return create("cublasLtCreate", out); }
API int cublasLtDestroy(void *handle) { return destroy(handle); }
API int cublasLtMatmulDescCreate(void **out, int, int) { return describe(out); }
API int cublasLtMatmulDescDestroy(void *description) { return forget_description(description); }
API int cublasLtMatmulDescSetAttribute(void *, int, const void *, size_t) { return SUCCESS; }
API int cublasLtMatrixLayoutCreate(void **out, int, uint64_t, uint64_t, int64_t) { return describe(out); }
API int cublasLtMatrixLayoutDestroy(void *description) { return forget_description(description); }
API int cublasLtMatrixLayoutSetAttribute(void *, int, const void *, size_t) { return SUCCESS; }
API int cublasLtMatmulPreferenceCreate(void **out) { return describe(out); }
API int cublasLtMatmulPreferenceDestroy(void *description) { return forget_description(description); }
API int cublasLtMatmulPreferenceSetAttribute(void *, int, const void *, size_t) { return SUCCESS; }
API int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int asked, void *results,
                                       int *found) {
    memset(results, 0, 96);  // one cublasLtMatmulHeuristicResult_t: an algorithm, no workspace, success
    *found = std::min(asked, 1);
    return SUCCESS;
}
API int cublasLtMatmul(void *, void *, const void *, const void *, void *, const void *, void *, const void *,
                       const void *, void *, void *, void *, const void *, void *workspace, size_t n, void *stream) {
    if (!on_gpu(workspace, n)) return INVALID_VALUE;
    launched("cublasLtMatmul", stream);
    return SUCCESS;
}
