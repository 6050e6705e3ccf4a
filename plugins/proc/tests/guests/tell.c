/* Publishes each line of stdin through its grant "out"; prints what came of it. */
#include "ww.h"
#include <stdio.h>
#include <string.h>

int main(void) {
  static char line[200], reply[4096];
  int out = ww_cap("out", 3);
  while (fgets(line, sizeof line, stdin)) {
    /* CBOR: ["publish", {"data": bytes of at most 255}] */
    static unsigned char message[300] = "\x82\x67publish\xa1\x64" "data\x58";
    unsigned count = strcspn(line, "\n"), head = 16;
    message[head] = count;
    memcpy(message + head + 1, line, count);
    int got = ww_call(out, message, head + 1 + count);
    int taken = ww_take(reply, sizeof reply);
    printf("%d %.*s\n", got < 0 ? -1 : 0, got < 0 ? (int)strcspn(reply, "\n") : 0, reply);
    fflush(stdout);
  }
  return 0;
}
