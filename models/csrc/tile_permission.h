/* Whether this process may use AMX tiles. */
#pragma once
#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__) && W == 16
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

/* Asks the kernel, once per process, for the permission to use tiles; returns whether it is given. */
static int tiles_permitted(void)
{
    enum { UNKNOWN, YES, NO };
    static int known = UNKNOWN; /* threads that ask at once get the same answer */
    int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (answer == UNKNOWN) {
        const long request_permission = 0x1023, tile_data = 18;
        answer = syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? YES : NO;
        __atomic_store_n(&known, answer, __ATOMIC_RELAXED);
    }
    return answer == YES;
}
#else
#define HAS_TILES 0
INLINE int tiles_permitted(void) { return 0; }
#endif
