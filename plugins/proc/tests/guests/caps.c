/* Calls its grants: argv[1] says how. Prints what it got. */
#include "ww.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned char message[2 << 20], reply[1 << 20];
static size_t size; /* of the message */
static int taken;   /* of the reply */

/* CBOR: the head of an item, and items */
static void head(int major, uint32_t n) {
  unsigned char *at = message + size;
  if (n < 24) {
    at[0] = major << 5 | n;
    size += 1;
  } else {
    at[0] = major << 5 | 26;
    for (int i = 0; i < 4; i++) at[1 + i] = n >> (24 - 8 * i);
    size += 5;
  }
}

static void bytes(int major, const char *data, size_t count) {
  head(major, count);
  memcpy(message + size, data, count);
  size += count;
}

static void text(const char *data) { bytes(3, data, strlen(data)); }

static void begin(const char *method, int params) {
  size = 0;
  head(4, 2);
  text(method);
  head(5, params);
}

static void data(const char *what) {
  text("data");
  bytes(2, what, strlen(what));
}

static void capability(const char *name, int handle) {
  text(name);
  head(6, 39);
  head(0, handle);
}

static int call(int handle) {
  int count = ww_call(handle, message, size);
  taken = ww_take(reply, sizeof reply - 1);
  reply[taken] = 0;
  return count;
}

/* Print the answer to `say`: {"data": bytes}, or an error. */
static void show(int count) {
  const char *at = (const char *)reply;
  if (count >= 0) at += reply[6] == 0x58 ? 8 : 7; /* one byte of length, or none */
  printf("%d %s\n", count < 0 ? count : 0, at);
  fflush(stdout);
}

static int say(int handle, const char *what) {
  begin("say", 1);
  data(what);
  int count = call(handle);
  show(count);
  return count;
}

/* The number of a handle that begins at `at` in the reply. */
static int handle_at(int at) {
  if (reply[at] != 0xd8 || reply[at + 1] != 39) return -1;
  const unsigned char *number = reply + at + 2;
  if (number[0] < 24) return number[0];
  return number[0] == 0x18 ? number[1] : number[1] << 8 | number[2];
}

static int another(int handle) { /* {"echo": …} */
  begin("another", 0);
  int count = call(handle);
  return count < 0 ? count : handle_at(6);
}

static int untyped(int handle, const char *interface) { /* {"cap": …, "interface": …} */
  begin("untyped", 1);
  text("named");
  uint64_t number = strtoull(interface, 0, 16);
  message[size++] = 0x1b;
  for (int i = 56; i >= 0; i -= 8) message[size++] = number >> i;
  int count = call(handle);
  return count < 0 ? count : handle_at(5);
}

int main(int argc, char **argv) {
  const char *how = argv[1];
  int handle = ww_cap("echo", 4);
  if (!strcmp(how, "ask")) {
    for (int i = 2; i < argc; i++) say(handle, argv[i]);
    printf("other %d\n", ww_cap("other", 5));
    printf("forged %d\n", ww_call(handle + 1, message, size));
    printf("drop %d\n", ww_drop(handle));
    printf("dropped %d\n", ww_call(handle, message, size));
  } else if (!strcmp(how, "loop")) {
    for (;;) say(handle, "again");
  } else if (!strcmp(how, "handles")) {
    int count = 1;
    while (count < 10000 && ww_cap("echo", 4) > 0) count++;
    printf("%d %d\n", count, ww_cap("echo", 4));
  } else if (!strcmp(how, "send")) {
    int sent = 0, refused = 0;
    begin("say", 1);
    data("x");
    for (int i = 0; i < 100; i++) ww_send(handle, message, size) == 0 ? sent++ : refused++;
    printf("%d %d\n", sent, refused);
  } else if (!strcmp(how, "drop after send")) {
    int to = another(handle);
    begin("hand_on", 2);
    capability("to", to);
    data("late");
    printf("%d", ww_send(handle, message, size));
    printf(" %d %d\n", ww_drop(to), ww_drop(handle));
  } else if (!strcmp(how, "large")) {
    begin("say", 1);
    text("data");
    head(2, (1 << 20) - 100);
    size += (1 << 20) - 100;
    printf("%d", ww_call(handle, message, size) > 1000000);
    printf(" %d\n", ww_call(handle, message, (1 << 20) + 1));
  } else if (!strcmp(how, "raw")) { /* one byte of argv[2] in hex after the other */
    for (const char *at = argv[2]; *at; at += 2) {
      char two[3] = {at[0], at[1], 0};
      message[size++] = strtoul(two, 0, 16);
    }
    int count = call(handle);
    printf("%d %s\n", count, count < 0 ? (char *)reply : "");
  } else if (!strcmp(how, "answered")) { /* one of an answer: call it, pass it on, drop it */
    int first = another(handle), second = another(first);
    say(second, "hello");
    begin("hand_on", 2);
    capability("to", first);
    data("round");
    show(call(handle));
    printf("drop %d %d\n", ww_drop(first), ww_drop(second));
    begin("hand_on", 2);
    capability("to", first);
    data("round");
    show(call(handle));
    say(first, "gone");
  } else if (!strcmp(how, "untyped")) {
    int found = untyped(handle, argv[2]);
    found < 0 ? show(found) : (void)say(found, "typed");
  } else if (!strcmp(how, "stream")) {
    begin("stream", 0);
    show(call(handle));
  } else if (!strcmp(how, "exhaust")) { /* by answers, of one and of ten at a time */
    int last = handle, next, count = 1;
    while ((next = another(handle)) > 0 && count < 100) count++, last = next;
    printf("%d ", count);
    show(next);
    printf("drop %d\n", ww_drop(last));
    begin("many", 1);
    text("count");
    head(0, 10);
    show(call(handle));
    last = another(handle);
    say(last, "again");
  } else if (!strcmp(how, "blob")) { /* opens it at the grant "store", and asks it, line by line */
    begin("open", 2);
    text("cid");
    text(argv[2]);
    text("local");
    message[size++] = 0xf5; /* true */
    int blob = call(ww_cap("store", 5)) < 0 ? -1 : handle_at(6);
    for (int c = 0; c >= 0; c = getchar()) {
      begin("stat", 0);
      int count = call(blob);
      printf("%d %.*s\n", count < 0 ? count : 0, count < 0 ? (int)strcspn((char *)reply, "\n") : 0, reply);
      fflush(stdout);
    }
  } else if (!strcmp(how, "times")) {
    begin("say", 1);
    data("x");
    for (int i = atoi(argv[2]); i > 0; i--) ww_call(handle, message, size);
  }
  return 0;
}
