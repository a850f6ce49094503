// Beside its tiles, a processor with AMX has AVX512.

#pragma once

#include "../avx512/vectors.h"
