/* The import module `ww`, version 1. */
#include <stdint.h>
#define WW(call) __attribute__((import_module("ww"), import_name(call)))
WW("cap") int32_t ww_cap(const char *name, uint32_t count);
WW("call") int32_t ww_call(int32_t handle, const void *message, uint32_t count);
WW("send") int32_t ww_send(int32_t handle, const void *message, uint32_t count);
WW("take") int32_t ww_take(void *buffer, uint32_t count);
WW("drop") int32_t ww_drop(int32_t handle);
WW("offer") int32_t ww_offer(int32_t handle, const char *name, uint32_t count);
WW("serve") int32_t ww_serve(const char *name, uint32_t count);
WW("accept") int32_t ww_accept(void);
WW("reply") int32_t ww_reply(uint32_t number, const void *message, uint32_t count);
