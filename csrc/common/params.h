// Exposes a Params struct to Python: Struct(field=value, ...), addresses and numbers as int and float, dtypes by name.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dtypes.h"

namespace vlmk {

namespace py = pybind11;

inline DType dtype_of(const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "bfloat16") return DType::bfloat16;
    if (name == "float16") return DType::float16;
    throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

template <class Struct>
class ParamsClass {
  public:
    // Local to the module: a process may also load the build that runs the CUDA kernels on the host.
    ParamsClass(py::module_& m, const char* name) : cls_(m, name, py::module_local()) {
        cls_.def(py::init([](const py::kwargs& fields) {
            py::object params = py::cast(Struct{});
            // An unknown field raises AttributeError.
            for (const auto& item : fields) py::setattr(params, item.first, item.second);
            return params.template cast<Struct>();
        }));
    }

    template <class Field>
    ParamsClass& field(const char* name, Field Struct::* member) {
        if constexpr (std::is_pointer_v<Field>) {
            cls_.def_property(
                name, [member](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*member); },
                [member](Struct& s, uintptr_t address) { s.*member = reinterpret_cast<Field>(address); });
        } else if constexpr (std::is_same_v<Field, DType>) {
            cls_.def_property(
                name, [member](const Struct& s) { return static_cast<int>(s.*member); },
                [member](Struct& s, const std::string& dtype) { s.*member = dtype_of(dtype); });
        } else {
            cls_.def_readwrite(name, member);
        }
        return *this;
    }

  private:
    py::class_<Struct> cls_;
};

}  // namespace vlmk
