// Whether the system lets this process use what the kernels are made for.

#include "kernels.h"

#if __has_include("tile_unit.h") && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// Linux saves the tiles of a thread only for processes that have asked for them.
int t5_is_permitted() {
    const Index request = 0x1023, tiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tiles) == 0;
}
#else
int t5_is_permitted() { return 1; }
#endif
