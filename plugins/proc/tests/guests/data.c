/* Reads a file of a directory that was given, and tries to change it in every way C has. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void told(const char *how, int result) {
  printf("%s: %s\n", how, result < 0 ? strerror(errno) : "ok");
}

static void tried(const char *how, const char *path, int flags) {
  int fd = open(path, flags, 0666);
  told(how, fd);
  if (fd >= 0) close(fd);
}

int main(int argc, char **argv) {
  char path[256], text[256] = {0};
  snprintf(path, sizeof path, "%s/x", argv[1]);
  FILE *file = fopen(path, "r");
  if (file == NULL) return printf("%s: %s\n", path, strerror(errno)), 1;
  fputs(fgets(text, sizeof text, file), stdout);
  tried("write", path, O_WRONLY);
  tried("append", path, O_WRONLY | O_APPEND);
  tried("truncate", path, O_WRONLY | O_TRUNC);
  told("unlink", unlink(path));
  snprintf(path, sizeof path, "%s/new", argv[1]);
  tried("create", path, O_WRONLY | O_CREAT);
  told("mkdir", mkdir(path, 0777));
  told("symlink", symlink("x", path));
  snprintf(path, sizeof path, "%s/link", argv[1]);
  tried("read link", path, O_RDONLY);
  tried("write link", path, O_WRONLY | O_TRUNC);
  snprintf(path, sizeof path, "%s/../x", argv[1]);
  tried("above", path, O_RDONLY);
  snprintf(path, sizeof path, "%s/../../etc/passwd", argv[1]);
  tried("passwd", path, O_RDONLY);
  return 0;
}
