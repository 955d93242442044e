// Python before 3.14 ends a thread that asks for the interpreter while it is being finalized, with pthread_exit. If a C++
// destructor asks, as autograd's threads do after the last gradient, that unwinding aborts the process: sometimes, in
// programs that end right after a backward pass. Here such a thread waits for the end of the process, as in 3.14.

#include "emulated.h"

#include <dlfcn.h>
#include <unistd.h>

API void pthread_exit(void *value) {
    static const auto finalizing = (int (*)())dlsym(RTLD_DEFAULT, "_Py_IsFinalizing");
    while (finalizing && finalizing()) pause();
    static const auto ends = (void (*)(void *))dlsym(RTLD_NEXT, "pthread_exit");
    ends(value);
    abort();  // it does not return
}
