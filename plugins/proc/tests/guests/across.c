/* From /data, which is read-only, to /tmp: a second name for a file, and another place. */
#include <stdio.h>
#include <wasi/api.h>

int main(void) {
  printf("link %d\n", __wasi_path_link(3, 0, "file", 4, "file"));
  printf("rename %d\n", __wasi_path_rename(3, "file", 4, "file"));
  return 0;
}
