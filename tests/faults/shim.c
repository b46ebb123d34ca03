/* Counts the system calls that change files under a folder, by standing before the C library (LD_PRELOAD), and at one
   of them kills the process or lets it fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long count, target, last;
static int error; /* 0: SIGKILL, else errno of call `target` up to `last` */

/* Begin to count; call `at` is struck, and those after it up to `until` where they are to fail. */
void shim_arm(const char *path, long at, long until, int number) {
    snprintf(folder, sizeof folder, "%s", path);
    count = 0; target = at; last = until; error = number;
}
long shim_count(void) { return count; }

static int is_inside(const char *path) {
    char full[PATH_MAX];
    if (!folder[0] || !path) return 0;
    if (path[0] != '/') {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here)) return 0;
        if (snprintf(full, sizeof full, "%s/%s", here, path) >= (int)sizeof full) return 0;
        path = full;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}
static int is_inside_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return is_inside(path);
}
/* Whether the call may go on. */
static int pass(int inside) {
    if (!inside) return 1;
    count++;
    if (!target || count < target || count > last) return 1;
    if (!error) { kill(getpid(), SIGKILL); pause(); }
    errno = error;
    return 0;
}
#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list list; va_start(list, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; va_end(list); \
        if (!pass(flags & (O_CREAT | O_TRUNC) && is_inside(path))) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(name); \
        va_list list; va_start(list, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; va_end(list); \
        if (!pass(flags & (O_CREAT | O_TRUNC) && is_inside(path))) return -1; \
        return real(at, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)
ssize_t write(int fd, const void *data, size_t size) { REAL(write); return pass(is_inside_fd(fd)) ? real(fd, data, size) : -1; }
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    static ssize_t (*real)(int, int, off64_t *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "sendfile64");
    return pass(is_inside_fd(to)) ? real(to, from, offset, size) : -1;
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    static ssize_t (*real)(int, int, off_t *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "sendfile");
    return pass(is_inside_fd(to)) ? real(to, from, offset, size) : -1;
}
int fsync(int fd) { REAL(fsync); return pass(is_inside_fd(fd)) ? real(fd) : -1; }
int rename(const char *from, const char *to) { REAL(rename); return pass(is_inside(to)) ? real(from, to) : -1; }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); return pass(is_inside(to)) ? real(a, from, b, to) : -1; }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return pass(is_inside(path)) ? real(path, mode) : -1; }
int unlink(const char *path) { REAL(unlink); return pass(is_inside(path)) ? real(path) : -1; }
int unlinkat(int at, const char *path, int flags) { REAL(unlinkat); return pass(at == AT_FDCWD ? is_inside(path) : is_inside_fd(at)) ? real(at, path, flags) : -1; }
int rmdir(const char *path) { REAL(rmdir); return pass(is_inside(path)) ? real(path) : -1; }
int chmod(const char *path, mode_t mode) { REAL(chmod); return pass(is_inside(path)) ? real(path, mode) : -1; }
