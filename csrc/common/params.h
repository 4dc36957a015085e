// Exposes a Params struct to Python: Struct(field=value, ...), addresses and numbers as int and float, dtypes by name.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dtypes.h"

namespace vlmk {

namespace py = pybind11;

inline DType dtype_of(const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "bfloat16") return DType::bfloat16;
    if (name == "float16") return DType::float16;
    throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

template <class Field>
Field from_python(py::handle value) {
    if constexpr (std::is_pointer_v<Field>) {
        return reinterpret_cast<Field>(value.cast<uintptr_t>());
    } else if constexpr (std::is_same_v<Field, DType>) {
        return dtype_of(value.cast<std::string>());
    } else {
        return value.cast<Field>();
    }
}

template <class Field>
auto to_python(const Field& value) {
    if constexpr (std::is_pointer_v<Field>) {
        return reinterpret_cast<uintptr_t>(value);
    } else if constexpr (std::is_same_v<Field, DType>) {
        return static_cast<int>(value);
    } else {
        return value;
    }
}

template <class Struct>
class ParamsClass {
    // The name of a field, interned, and what sets it.
    using Setter = std::pair<py::handle, std::function<void(Struct&, py::handle)>>;

  public:
    // Local to the module: a process may also load the build that runs the CUDA kernels on the host.
    ParamsClass(py::module_& m, const char* name)
        : cls_(m, name, py::module_local()), setters_(std::make_shared<std::vector<Setter>>()) {
        cls_.def(py::init([name = std::string(name), setters = setters_](const py::kwargs& fields) {
            Struct params{};
            for (const auto& [key, value] : fields) {
                py::handle field = key;
                // Keywords are interned by Python as a rule, so their addresses are compared first.
                auto setter =
                    std::find_if(setters->begin(), setters->end(), [&](const Setter& s) { return s.first.is(field); });
                if (setter == setters->end()) {
                    setter =
                        std::find_if(setters->begin(), setters->end(), [&](const Setter& s) { return s.first.equal(field); });
                }
                if (setter == setters->end()) throw py::attribute_error(name + " has no field " + std::string(py::str(field)));
                try {
                    setter->second(params, value);
                } catch (const py::cast_error&) {
                    std::string got = py::repr(value);
                    throw py::type_error(name + "." + std::string(py::str(field)) + " cannot be " + got);
                }
            }
            return params;
        }));
    }

    template <class Field>
    ParamsClass& field(const char* name, Field Struct::* member) {
        auto set = [member](Struct& s, py::handle value) { s.*member = from_python<Field>(value); };
        setters_->emplace_back(PyUnicode_InternFromString(name), set);  // never freed, as the class
        cls_.def_property(name, [member](const Struct& s) { return to_python(s.*member); }, set);
        return *this;
    }

  private:
    py::class_<Struct> cls_;
    std::shared_ptr<std::vector<Setter>> setters_;
};

}  // namespace vlmk
