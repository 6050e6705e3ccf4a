/* Directories in directories, deeper than any path is long. */
#include <stdio.h>
#include <wasi/api.h>

int main(void) {
  __wasi_fd_t above = 3, below;
  int depth = 0;
  while (__wasi_path_create_directory(above, "a-name-of-some-length") == 0 &&
         __wasi_path_open(above, 0, "a-name-of-some-length", __WASI_OFLAGS_DIRECTORY,
                          __WASI_RIGHTS_PATH_CREATE_DIRECTORY | __WASI_RIGHTS_PATH_OPEN,
                          ~0ull, 0, &below) == 0) {
    if (above != 3) __wasi_fd_close(above);
    above = below;
    depth++;
  }
  printf("%d\n", depth);
  return 0;
}
