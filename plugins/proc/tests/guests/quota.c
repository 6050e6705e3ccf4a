/* Fills /tmp in several ways; prints what it got. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char page[65536];

/* Pages that fit into a new file. */
static int fill(const char *path, int flags) {
  int count = 0, fd = open(path, O_WRONLY | O_CREAT | flags, 0600);
  while (write(fd, page, sizeof page) == sizeof page) count++;
  printf("%d %s\n", count, strerror(errno));
  close(fd);
  return count;
}

int main(void) {
  char name[64];
  int fd;
  fill("/tmp/a", 0);
  fill("/tmp/b", 0); /* nothing is left */
  unlink("/tmp/a");
  fill("/tmp/b", O_APPEND); /* what was unlinked is free again */
  truncate("/tmp/b", 0);
  fd = open("/tmp/c", O_RDWR | O_CREAT, 0600);
  printf("sparse %d\n", ftruncate(fd, 1LL << 40) != 0 && errno == EDQUOT);
  printf("allocate %d\n", posix_fallocate(fd, 0, 1LL << 40) != 0);
  printf("seek %d\n", pwrite(fd, "x", 1, 1LL << 40) < 0 && errno == EDQUOT);
  while (write(fd, page, sizeof page) > 0) continue;
  unlink("/tmp/c"); /* it is open still, and counts */
  fill("/tmp/d", 0);
  close(fd);
  fill("/tmp/d", O_TRUNC);
  fill("/tmp/e", 0);
  rename("/tmp/e", "/tmp/d"); /* what was there is gone */
  fill("/tmp/e", 0);
  unlink("/tmp/b"), unlink("/tmp/d"), unlink("/tmp/e");
  int made = 0;
  for (;; made++) {
    snprintf(name, sizeof name, "/tmp/%d", made);
    int failed = made % 3 == 0   ? mkdir(name, 0700)
                 : made % 3 == 1 ? symlink("0", name)
                                 : (fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600)) < 0;
    if (failed) break;
    if (made % 3 == 2) close(fd);
  }
  printf("names %d %s\n", made, strerror(errno));
  unlink("/tmp/1");
  printf("link %d\n", link("/tmp/2", "/tmp/more") == 0);
  printf("another %d\n", link("/tmp/2", "/tmp/another") != 0 && errno == EDQUOT);
  return 0;
}
