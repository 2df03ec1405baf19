// What a kernel's binding needs. A file bind_NAME.cpp holds one static Binding, which module.cpp finds by itself.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <vector>

#include "isa.h"

namespace hasten {

namespace nb = nanobind;

// Dense row-major tensors in main memory. Python hands them over in the memory order the kernel wants, detached;
// bfloat16 comes as int16 of the same bits.
template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

using Bind = void (*)(nb::module_ &);

inline std::vector<Bind> &bindings() {
    static std::vector<Bind> all;
    return all;
}

struct Binding {
    explicit Binding(Bind bind) { bindings().push_back(bind); }
};

// Raises ValueError in Python: the wrappers have checked what users can get wrong, so this is a defect of hasten.
inline void require(bool good, const char *what) {
    if (!good) throw nb::value_error(what);
}

}  // namespace hasten
