#include "binding.h"

NB_MODULE(_native, m) {
    m.doc() = "Native kernels of hasten.";
    m.def("isa", [] { return hasten::isa_name(hasten::isa()); }, "The instruction set in use.");
    m.def("best_isa", [] { return hasten::isa_name(hasten::best_isa()); }, "The best set this machine and build have.");
    m.def("set_isa", &hasten::set_isa, "Use another set; False if the machine or the build lacks it.");
    for (hasten::Bind bind : hasten::bindings()) bind(m);
}
