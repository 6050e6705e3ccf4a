/* Serves an object "counter": add {by: n} gives the sum, later {} is answered after the next call, end {} ends it,
   anything else fails. Says on stdout what it gets: number, handle, method. */
#include "ww.h"
#include <stdio.h>
#include <string.h>

static unsigned char call[1 << 20], *at;

/* The head of an item of CBOR: its number. */
static uint32_t head(void) {
  uint32_t n = *at++ & 31, bytes = n < 24 ? 0 : 1 << (n - 24);
  if (bytes) n = 0;
  while (bytes--) n = n << 8 | *at++;
  return n;
}

static int answer(uint32_t number, int ok, uint32_t value) {
  unsigned char message[] = {0x82, ok ? 0xf5 : 0xf4, 0x1a, value >> 24, value >> 16, value >> 8, value};
  return ww_reply(number, message, sizeof message);
}

int main(void) {
  uint32_t sum = 0, owed = 0;
  printf("nothing %d\n", ww_accept());
  int counter = ww_serve("counter", 7);
  printf("again %d\n", ww_serve("counter", 7));
  printf("called %d\n", ww_call(counter, "\x82\x63" "add\xa0", 6));
  fflush(stdout);
  for (;;) {
    if (ww_accept() < 0) return 1;
    ww_take(call, sizeof call);
    at = call;
    head();
    uint32_t number = head(), handle = head(), length = head();
    const char *method = (char *)at;
    at += length;
    printf("%u %d %.*s\n", number, handle == counter, length, method);
    fflush(stdout);
    if (!strncmp(method, "end", length)) return 0;
    if (!strncmp(method, "later", length)) {
      owed = number;
      continue;
    }
    if (!strncmp(method, "add", length)) {
      at++;          /* one parameter */
      at += head();  /* its name */
      sum += head();
      printf("answered %d\n", answer(number, 1, sum));
    } else {
      printf("refused %d", ww_reply(number, "\x82\xf4\x01", 3));    /* no text */
      printf(" %d\n", ww_reply(number, "\x82\xf4\x62no", 5));       /* it is answered by then */
    }
    if (owed) printf("owed %d\n", answer(owed, 1, 7));
    owed = 0;
    fflush(stdout);
  }
}
