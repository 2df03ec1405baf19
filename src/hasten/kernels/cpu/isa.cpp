#include "isa.h"

#include <cstring>
#include <initializer_list>

namespace hasten {

static bool machine_has(Isa which) {
#if defined(__x86_64__) || defined(_M_X64)
    switch (which) {
        case Isa::portable: return true;
        case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vnni");
    }
    return false;
#else
    return which == Isa::portable;
#endif
}

static bool build_has(Isa which) {
    switch (which) {
        case Isa::portable: return true;
        case Isa::avx2:
#ifdef HASTEN_HAS_AVX2
            return true;
#else
            return false;
#endif
        case Isa::avx512:
#ifdef HASTEN_HAS_AVX512
            return true;
#else
            return false;
#endif
    }
    return false;
}

static bool usable(Isa which) { return machine_has(which) && build_has(which); }

Isa best_isa() { return usable(Isa::avx512) ? Isa::avx512 : usable(Isa::avx2) ? Isa::avx2 : Isa::portable; }

static Isa &chosen() {
    static Isa value = best_isa();
    return value;
}

Isa isa() { return chosen(); }

const char *isa_name(Isa which) {
    return which == Isa::avx512 ? "avx512" : which == Isa::avx2 ? "avx2" : "portable";
}

bool set_isa(const char *name) {
    for (Isa which : {Isa::portable, Isa::avx2, Isa::avx512}) {
        if (std::strcmp(name, isa_name(which)) == 0) {
            if (!usable(which)) return false;
            chosen() = which;
            return true;
        }
    }
    return false;
}

}  // namespace hasten
