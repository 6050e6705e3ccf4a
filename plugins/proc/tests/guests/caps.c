/* Calls its grants: argv[1] says how. Prints what it got. */
#include "ww.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char reply[1 << 20];

static void ask(int handle, const char *message) {
  int count = ww_call(handle, message, strlen(message));
  int taken = ww_take(reply, sizeof reply);
  printf("%d %.*s\n", count, taken, reply);
  fflush(stdout);
}

int main(int argc, char **argv) {
  const char *how = argv[1];
  int handle = ww_cap("echo", 4);
  if (!strcmp(how, "ask")) {
    for (int i = 2; i < argc; i++) ask(handle, argv[i]);
    printf("other %d\n", ww_cap("other", 5));
    printf("forged %d\n", ww_call(handle + 1, "x", 1));
    printf("drop %d\n", ww_drop(handle));
    printf("dropped %d\n", ww_call(handle, "x", 1));
  } else if (!strcmp(how, "loop")) {
    for (;;) ask(handle, "again");
  } else if (!strcmp(how, "handles")) {
    int count = 1;
    while (count < 10000 && ww_cap("echo", 4) > 0) count++;
    printf("%d %d\n", count, ww_cap("echo", 4));
  } else if (!strcmp(how, "send")) {
    int sent = 0, refused = 0;
    for (int i = 0; i < 100; i++) ww_send(handle, "x", 1) == 0 ? sent++ : refused++;
    printf("%d %d\n", sent, refused);
  } else if (!strcmp(how, "large")) {
    printf("%d %d\n", ww_call(handle, reply, sizeof reply) == sizeof reply,
           ww_call(handle, reply, sizeof reply + 1));
  } else if (!strcmp(how, "times")) {
    for (int i = atoi(argv[2]); i > 0; i--) ww_call(handle, "x", 1);
  }
  return 0;
}
