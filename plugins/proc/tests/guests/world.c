/* What a guest sees: arguments, environment, clocks, chance, and its directories. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <wasi/api.h>

extern char **environ;

int main(int argc, char **argv) {
  struct timespec wall, start, end;
  unsigned char chance[16] = {0}, sum = 0;
  for (int i = 0; i < argc; i++) printf("arg %s\n", argv[i]);
  for (char **each = environ; *each; each++) printf("env %s\n", *each);
  for (int fd = 3;; fd++) {
    __wasi_prestat_t found;
    char name[64] = {0};
    if (__wasi_fd_prestat_get(fd, &found)) break;
    __wasi_fd_prestat_dir_name(fd, (uint8_t *)name, found.u.dir.pr_name_len);
    printf("dir %s\n", name);
  }
  clock_gettime(CLOCK_REALTIME, &wall);
  clock_gettime(CLOCK_MONOTONIC, &start);
  usleep(20000);
  clock_gettime(CLOCK_MONOTONIC, &end);
  long slept = (end.tv_sec - start.tv_sec) * 1000000000L + end.tv_nsec - start.tv_nsec;
  getentropy(chance, sizeof chance);
  for (int i = 0; i < 16; i++) sum |= chance[i];
  printf("wall %lld\nslept %d\nchance %d\n", (long long)wall.tv_sec, slept >= 20000000, sum != 0);
  return argc > 1 ? atoi(argv[1]) : 0;
}
