/* A guest that means harm: argv[1] says which. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <wasi/api.h>

volatile unsigned sink;
char *volatile kept; /* the compiler cannot know that nobody looks */

__attribute__((noinline)) static unsigned deeper(unsigned n) {
  volatile unsigned here = n;
  return n == 0xffffffff ? here : deeper(n + 1) + here;
}

static void spin(void) {
  for (;;) sink++;
}

static void ask_the_clock(void) {
  __wasi_timestamp_t now;
  for (;;) __wasi_clock_time_get(__WASI_CLOCKID_MONOTONIC, 0, &now);
}

static void yield(void) {
  for (;;) __wasi_sched_yield();
}

static void pause_and_fill(void) {
  char *much = (char *)(__builtin_wasm_memory_grow(0, 48 << 4) << 16);
  for (;;) {
    memset(much, sink++, 48 << 20);
    kept = much;
    usleep(1);
  }
}

static int flood(void) {
  static char page[65536];
  for (;;)
    if (write(1, page, sizeof page) < 0) return errno == EPIPE ? 32 : 1;
}

static int drip(void) { /* one byte at a time */
  for (;;)
    if (write(1, "x", 1) < 0) return 1;
}

static int take_all_memory(void) {
  size_t taken = 0;
  for (size_t page; (page = __builtin_wasm_memory_grow(0, 16)) != (size_t)-1; taken++)
    memset(kept = (char *)(page << 16), 1, 1 << 20);
  printf("%zu\n", taken);
  return 0;
}

static int ask_for_too_much(void) {
  static __wasi_ciovec_t pieces[1 << 16];
  static __wasi_subscription_t waits[1 << 12];
  static __wasi_event_t events[1 << 12];
  size_t count;
  int failed = 0;
  failed += __wasi_fd_write(1, pieces, 1 << 16, &count) == __WASI_ERRNO_INVAL;
  failed += __wasi_poll_oneoff(waits, events, 1 << 12, &count) == __WASI_ERRNO_INVAL;
  failed += __wasi_fd_write(1, (__wasi_ciovec_t *)0xfffffff0, 4, &count) == __WASI_ERRNO_FAULT;
  failed += __wasi_random_get((uint8_t *)0xffff0000, 0xffff) == __WASI_ERRNO_FAULT;
  failed += __wasi_fd_read(0, (__wasi_iovec_t *)0x7fffffff, 1024, &count) == __WASI_ERRNO_FAULT;
  printf("%d\n", failed);
  return 0;
}

static int open_everything(void) {
  int count = 0;
  while (open("/tmp/one", O_RDWR | O_CREAT, 0600) >= 0) count++;
  printf("%d %d\n", count, errno == EMFILE);
  return 0;
}

static void write_a_file(void) {
  int fd = open("/out/file", O_WRONLY | O_CREAT, 0600);
  for (;;) write(fd, "x", 1);
}

static void poll_much(void) { /* a thousand clocks, of which one is due */
  static __wasi_subscription_t waits[1024];
  static __wasi_event_t events[1024];
  size_t count;
  for (int i = 0; i < 1024; i++) {
    waits[i].u.tag = i % 2 ? __WASI_EVENTTYPE_CLOCK : __WASI_EVENTTYPE_FD_WRITE;
    if (i % 2) waits[i].u.u.clock.timeout = i == 1 ? 0 : (__wasi_timestamp_t)-1;
    else waits[i].u.u.fd_write.file_descriptor = 1;
  }
  for (;;) __wasi_poll_oneoff(waits, events, 1024, &count);
}

static void ask_for_arguments(void) {
  char *text = malloc(1 << 20);
  static uint8_t *each[5000];
  for (;;) __wasi_args_get(each, (uint8_t *)text);
}

static void go_deep(void) { /* the longest path there is */
  static char path[4097];
  for (int i = 0; i < 4096; i++) path[i] = i % 2 ? '/' : '.';
  for (;;) open(path, O_RDONLY);
}

static int list_far(void) {
  uint8_t *names = malloc(1 << 17);
  int fd = open("/tmp", O_RDONLY | O_DIRECTORY), failed = 0;
  size_t used;
  failed += __wasi_fd_readdir(fd, names, 4096, (__wasi_dircookie_t)1 << 40, &used) == __WASI_ERRNO_INVAL;
  failed += __wasi_fd_readdir(fd, names, 1 << 17, 0, &used) == __WASI_ERRNO_INVAL;
  failed += __wasi_fd_readdir(fd, names, 4096, 0, &used) == 0;
  printf("%d\n", failed);
  return 0;
}

static int write_and_unlink(void) {
  char *much = calloc(1, 1 << 20);
  int fd = open("/tmp/much", O_RDWR | O_CREAT, 0600);
  for (int i = 0; i < 12; i++)
    if (write(fd, much, 1 << 20) != 1 << 20) return 1;
  return unlink("/tmp/much");
}

int main(int argc, char **argv) {
  const char *how = argc > 1 ? argv[1] : "";
  if (!strcmp(how, "spin")) spin();
  if (!strcmp(how, "clock")) ask_the_clock();
  if (!strcmp(how, "yield")) yield();
  if (!strcmp(how, "fill")) pause_and_fill();
  if (!strcmp(how, "flood")) return flood();
  if (!strcmp(how, "drip")) return drip();
  if (!strcmp(how, "memory")) return take_all_memory();
  if (!strcmp(how, "recursion")) return deeper(1);
  if (!strcmp(how, "abort")) abort();
  if (!strcmp(how, "bounds")) return *(volatile int *)0xfffffff0u;
  if (!strcmp(how, "greedy")) return ask_for_too_much();
  if (!strcmp(how, "descriptors")) return open_everything();
  if (!strcmp(how, "file")) write_a_file();
  if (!strcmp(how, "poll")) poll_much();
  if (!strcmp(how, "arguments")) ask_for_arguments();
  if (!strcmp(how, "path")) go_deep();
  if (!strcmp(how, "far")) return list_far();
  if (!strcmp(how, "unlink")) return write_and_unlink();
  if (!strcmp(how, "allocate")) return posix_fallocate(open("/tmp/a", O_RDWR | O_CREAT, 0600), 0, 9);
  return 99;
}
