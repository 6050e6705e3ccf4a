/* Names in a directory, sorted by nobody; then again from the middle. */
#include <dirent.h>
#include <stdio.h>

int main(int argc, char **argv) {
  DIR *dir = opendir(argv[1]);
  struct dirent *entry;
  long middle = -1;
  int count = 0, again = 0;
  while ((entry = readdir(dir)) != NULL) {
    if (argc > 2) printf("%s\n", entry->d_name);
    if (count++ == 10) middle = telldir(dir);
  }
  if (middle >= 0) {
    seekdir(dir, middle);
    while (readdir(dir) != NULL) again++;
  }
  printf("%d %d\n", count, again);
  return 0;
}
