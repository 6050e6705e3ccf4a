/* Prints the file that its argument names, and waits. */
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv) {
  char line[256];
  FILE *file = fopen(argv[1], "r");
  if (file == NULL || fgets(line, sizeof line, file) == NULL) return 1;
  fputs(line, stdout);
  fflush(stdout);
  for (;;) sleep(60);
}
