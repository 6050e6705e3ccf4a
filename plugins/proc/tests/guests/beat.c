/* Publishes "beat" through its grant "out" twenty times a second, and prints what came of each: as often
   as its argument says, and then exits with 3; or for ever. */
#include "ww.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
  static const char message[] = "\x82\x67publish\xa1\x64" "data\x44" "beat";
  static char reply[4096];
  int out = ww_cap("out", 3);
  for (long left = argc > 1 ? atol(argv[1]) : -1; left; left -= left > 0) {
    int got = ww_call(out, message, sizeof message - 1);
    ww_take(reply, sizeof reply);
    printf("%s %.*s\n", got < 0 ? "failed" : "beat", got < 0 ? (int)strcspn(reply, "\n") : 0, reply);
    fflush(stdout);
    usleep(50000);
  }
  return 3;
}
