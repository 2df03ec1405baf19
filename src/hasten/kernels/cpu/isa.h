// The instruction sets a kernel is compiled for, and the choice among them at run time.
//
// A kernel's header declares its functions with HASTEN_EACH_ISA. Its source defines them once, in namespace HASTEN_ISA,
// and is compiled for each set with other flags. Its binding calls HASTEN_PICK(name)(...).
//
// Kernel sources must not use inline functions or templates of the standard library that are not fully inlined: the
// linker keeps one copy, perhaps that with instructions the machine lacks. <cmath>, <cstring>, <cstdint> are fine.
#pragma once

namespace hasten {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };  // avx512: F, BW, DQ, VL and VNNI (Ice Lake, Zen 4 and later)

Isa isa();                          // the set in use: the best this machine has, unless set_isa chose another
Isa best_isa();                     // the best that this machine has and the build holds
bool set_isa(const char *name);     // false if the name is unknown or the machine or build lacks it
const char *isa_name(Isa which);

}  // namespace hasten

#ifdef HASTEN_HAS_AVX2
#define HASTEN_AVX2(name) hasten::avx2::name
#else
#define HASTEN_AVX2(name) hasten::portable::name
#endif
#ifdef HASTEN_HAS_AVX512
#define HASTEN_AVX512(name) hasten::avx512::name
#else
#define HASTEN_AVX512(name) HASTEN_AVX2(name)
#endif

#define HASTEN_EACH_ISA(declaration)                    \
    namespace hasten {                                  \
    namespace portable { declaration; }                 \
    namespace avx2 { declaration; }                     \
    namespace avx512 { declaration; }                   \
    }

#define HASTEN_PICK(name)                                               \
    (hasten::isa() == hasten::Isa::avx512 ? HASTEN_AVX512(name)         \
     : hasten::isa() == hasten::Isa::avx2 ? HASTEN_AVX2(name)           \
                                          : hasten::portable::name)
