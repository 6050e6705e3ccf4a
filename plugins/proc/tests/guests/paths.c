/* Tries a path in every way there is; prints what each gave. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <wasi/api.h>

static void told(const char *how, int failed) {
  printf("%s %s\n", how, failed ? strerror(errno) : "ok");
}

/* Straight to the host: the C library would not let some of these paths through. */
static void raw(const char *path, int oflags, __wasi_rights_t rights, const char *how) {
  __wasi_fd_t fd;
  errno = __wasi_path_open(3, __WASI_LOOKUPFLAGS_SYMLINK_FOLLOW, path, oflags, rights, 0, 0, &fd);
  told(how, errno != 0);
  if (errno == 0) {
    char buffer[64] = {0};
    ssize_t count = read(fd, buffer, sizeof buffer - 1);
    if (count > 0) printf("content %s\n", buffer);
    close(fd);
  }
}

int main(int argc, char **argv) {
  struct stat found;
  for (int i = 1; i < argc; i++) {
    const char *path = argv[i];
    printf("path %s\n", path);
    raw(path, 0, __WASI_RIGHTS_FD_READ, "read");
    raw(path, 0, __WASI_RIGHTS_FD_WRITE, "write");
    raw(path, __WASI_OFLAGS_TRUNC, __WASI_RIGHTS_FD_READ, "truncate");
    raw(path, __WASI_OFLAGS_CREAT, __WASI_RIGHTS_FD_READ, "create");
    __wasi_filestat_t stat;
    errno = __wasi_path_filestat_get(3, __WASI_LOOKUPFLAGS_SYMLINK_FOLLOW, path, &stat);
    told("stat", errno != 0);
    errno = __wasi_path_unlink_file(3, path);
    told("unlink", errno != 0);
    errno = __wasi_path_rename(3, path, 3, "renamed");
    told("rename", errno != 0);
    errno = __wasi_path_link(3, 0, path, 3, "linked");
    told("link", errno != 0);
  }
  return 0;
}
