/* Counts the calls of libc by which a program changes files, and makes one of them fail, or ends the process at it.

   LD_PRELOAD puts these functions before libc's, for Python and for every native library. Until `faults_arm` they only
   pass on. Counted are calls about a path below its root, and calls with a descriptor of such a file (a deleted one
   too), in every thread. mmap counts from a MiB on, of a file below the root or shared between processes. What libc
   calls inside itself does not come by here: fwrite, malloc's own mmap. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXIT_CODE 99 /* of a process that is ended by its fault */
#define LARGE (1 << 20)

static char root[PATH_MAX];
static long count, target;
static int failure; /* an errno; 0: the process ends */
static int fired;
static FILE *calls;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* From now on count what concerns files below `folder` (no link in it), and let the `at`-th call (0: none) fail with
   `error` (0: end the process there). A line "KIND PATH" of each goes to `list`, unless that is NULL. */
void faults_arm(const char *folder, long at, int error, const char *list) {
    calls = list ? fopen(list, "w") : NULL;
    snprintf(root, sizeof root, "%s", folder);
    count = 0, fired = 0, target = at, failure = error;
}

/* Stop counting; returns how many calls there were, or minus that if none was disturbed. */
long faults_disarm(void) {
    root[0] = 0;
    if (calls) fclose(calls);
    calls = NULL;
    return fired ? count : -count;
}

static int below(const char *path) {
    size_t n = strlen(root);
    return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

static void of_descriptor(int fd, char *path) {
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
}

/* The absolute path of `name` as seen from the folder `fd`. */
static void of_name(int fd, const char *name, char *path) {
    char folder[PATH_MAX] = "";
    if (name[0] != '/') {
        if (fd != AT_FDCWD)
            of_descriptor(fd, folder);
        else if (!getcwd(folder, sizeof folder))
            folder[0] = 0;
    }
    if (snprintf(path, PATH_MAX, "%s%s%s", folder, folder[0] ? "/" : "", name) >= PATH_MAX) path[0] = 0;
}

/* Whether this call is the one that fails. `half` first writes a part of what a crash would cut in two. */
static int fails(const char *kind, const char *path, int fd, const void *half, size_t bytes) {
    pthread_mutex_lock(&lock);
    int is_it = ++count == target;
    if (calls) fprintf(calls, "%s %s\n", kind, path), fflush(calls);
    pthread_mutex_unlock(&lock);
    if (!is_it) return 0;
    fired = 1;
    if (!failure) {
        if (bytes > 1) {
            ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
            if (real(fd, half, bytes / 2) < 0) _exit(EXIT_CODE);
        }
        _exit(EXIT_CODE);
    }
    errno = failure;
    return 1;
}

static int fails_on(const char *kind, int fd, const void *half, size_t bytes) {
    char path[PATH_MAX];
    if (!root[0]) return 0;
    int before = errno;
    of_descriptor(fd, path);
    errno = before;
    return below(path) && fails(kind, path, fd, half, bytes);
}

static int fails_at(const char *kind, int fd, const char *name) {
    char path[PATH_MAX];
    if (!root[0]) return 0;
    int before = errno;
    of_name(fd, name, path);
    errno = before;
    return below(path) && fails(kind, path, -1, NULL, 0);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = dlsym(RTLD_NEXT, name)

#define ON_DESCRIPTOR(type, name, kind, half, bytes, parameters, ...) \
    type name parameters { \
        static type(*real) parameters; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        return fails_on(kind, fd, half, bytes) ? -1 : real(__VA_ARGS__); \
    }

ON_DESCRIPTOR(ssize_t, write, "write", data, n, (int fd, const void *data, size_t n), fd, data, n)
ON_DESCRIPTOR(ssize_t, pwrite, "write", 0, 0, (int fd, const void *d, size_t n, off_t at), fd, d, n, at)
ON_DESCRIPTOR(ssize_t, pwrite64, "write", 0, 0, (int fd, const void *d, size_t n, off64_t at), fd, d, n, at)
ON_DESCRIPTOR(ssize_t, writev, "write", 0, 0, (int fd, const struct iovec *v, int n), fd, v, n)
ON_DESCRIPTOR(ssize_t, pwritev, "write", 0, 0, (int fd, const struct iovec *v, int n, off_t at), fd, v, n, at)
ON_DESCRIPTOR(ssize_t, pwritev64, "write", 0, 0, (int fd, const struct iovec *v, int n, off64_t at), fd, v, n, at)
ON_DESCRIPTOR(int, fsync, "fsync", 0, 0, (int fd), fd)
ON_DESCRIPTOR(int, fdatasync, "fsync", 0, 0, (int fd), fd)
ON_DESCRIPTOR(int, ftruncate, "truncate", 0, 0, (int fd, off_t n), fd, n)
ON_DESCRIPTOR(int, ftruncate64, "truncate", 0, 0, (int fd, off64_t n), fd, n)

#define ON_PATH(name, kind, folder, path, parameters, ...) \
    int name parameters { \
        static int(*real) parameters; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        return fails_at(kind, folder, path) ? -1 : real(__VA_ARGS__); \
    }

ON_PATH(rename, "rename", AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH(renameat, "rename", g, to, (int f, const char *from, int g, const char *to), f, from, g, to)
ON_PATH(renameat2, "rename", g, to, (int f, const char *from, int g, const char *to, unsigned x), f, from, g, to, x)
ON_PATH(mkdir, "mkdir", AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
ON_PATH(mkdirat, "mkdir", fd, path, (int fd, const char *path, mode_t mode), fd, path, mode)
ON_PATH(unlink, "unlink", AT_FDCWD, path, (const char *path), path)
ON_PATH(unlinkat, "unlink", fd, path, (int fd, const char *path, int flags), fd, path, flags)
ON_PATH(rmdir, "unlink", AT_FDCWD, path, (const char *path), path)
ON_PATH(truncate, "truncate", AT_FDCWD, path, (const char *path, off_t n), path, n)
ON_PATH(creat, "open", AT_FDCWD, path, (const char *path, mode_t mode), path, mode)

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return writes(flags) && fails_at("open", AT_FDCWD, path) ? -1 : real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return writes(flags) && fails_at("open", fd, path) ? -1 : real(fd, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define MMAP(name) \
    void *name(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) { \
        REAL(void *, #name, void *, size_t, int, int, int, off_t); \
        int shared = fd < 0 && flags & MAP_SHARED; \
        if (bytes >= LARGE && root[0] && (shared ? fails("mmap", "shared", -1, NULL, 0) : fails_on("mmap", fd, NULL, 0))) \
            return MAP_FAILED; \
        return real(at, bytes, protection, flags, fd, offset); \
    }
MMAP(mmap)
MMAP(mmap64)
