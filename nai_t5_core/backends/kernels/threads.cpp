// What Python asks and tells of threads.

#include "kernels.h"
#include "threads.h"

#ifdef _OPENMP
int t5_threads() { return omp_get_max_threads(); }
int t5_has_own_threads() { return 0; }
void t5_set_threads(int) {}
#else
int t5_threads() { return static_cast<int>(Pool::most_threads()); }
int t5_has_own_threads() { return 1; }
void t5_set_threads(int count) { Pool::set_threads(count); }
#endif
