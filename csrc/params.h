// Exposes the structs of common/ to Python as Struct(field=value, ...). An address is an int, and an enum value is its name.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/fields.h"

namespace vlmk {

namespace py = pybind11;

// ("first", "second") from "first, second".
inline std::vector<std::string> split_names(std::string_view names) {
    std::vector<std::string> result;
    while (true) {
        size_t end = names.find(", ");
        result.emplace_back(names.substr(0, end));
        if (end == std::string_view::npos) return result;
        names.remove_prefix(end + 2);
    }
}

inline py::tuple name_tuple(std::string_view names) {
    py::list result;
    for (const std::string& name : split_names(names)) result.append(name);
    return py::tuple(result);
}

template <class Enum>
Enum enum_of(const char* field, std::string_view name) {
    static const std::vector<std::string> names = split_names(names_of(Enum{}));
    auto found = std::find(names.begin(), names.end(), name);
    if (found != names.end()) return static_cast<Enum>(found - names.begin());
    throw std::invalid_argument(std::string(field) + " must be one of " + names_of(Enum{}) + ", got " + std::string(name));
}

template <class T>
T from_python(const char* field, py::handle value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value.cast<uintptr_t>());
    } else if constexpr (std::is_enum_v<T>) {
        return enum_of<T>(field, value.cast<std::string_view>());
    } else {
        return value.cast<T>();
    }
}

// Sets one field of a struct. The types are those of fields, not of structs, so that few functions are compiled.
struct Setter {
    py::handle name;  // interned
    size_t offset;
    void (*assign)(void* member, const char* field, py::handle value);
};

template <class T>
void assign(void* member, const char* field, py::handle value) {
    *static_cast<T*>(member) = from_python<T>(field, value);
}

template <class Struct, class T>
void add_setter(std::vector<Setter>& setters, const Struct& params, const Field<Struct, T>& field) {
    size_t offset = reinterpret_cast<const char*>(&(params.*field.member)) - reinterpret_cast<const char*>(&params);
    setters.push_back({PyUnicode_InternFromString(field.name), offset, assign<T>});  // lives as long as the class
}

template <class Struct>
void add_setter(std::vector<Setter>&, const Struct&, NoField) {}

template <class Struct, int... kLines>
std::vector<Setter> setters_of(std::integer_sequence<int, kLines...>) {
    std::vector<Setter> setters;
    Struct params;
    (add_setter(setters, params, Struct::field(Line<Struct::kFirstLine + kLines>{})), ...);
    return setters;
}

inline void set_field(void* params, const char* kind, const std::vector<Setter>& setters, py::handle name, py::handle value) {
    // Python interns keywords, so comparing addresses usually finds the field.
    auto same = [&](const Setter& s) { return s.name.is(name); };
    auto equal = [&](const Setter& s) { return s.name.equal(name); };
    auto setter = std::find_if(setters.begin(), setters.end(), same);
    if (setter == setters.end()) setter = std::find_if(setters.begin(), setters.end(), equal);
    if (setter == setters.end()) {
        throw py::attribute_error(std::string(kind) + " has no field " + std::string(py::str(name)));
    }
    try {
        setter->assign(static_cast<char*>(params) + setter->offset, PyUnicode_AsUTF8(setter->name.ptr()), value);
    } catch (const py::cast_error&) {
        throw py::type_error(std::string(kind) + "." + std::string(py::str(name)) + " cannot be " +
                             std::string(py::repr(value)));
    }
}

template <class Struct>
void def_struct(py::module_& m) {
    std::vector<Setter> setters = setters_of<Struct>(std::make_integer_sequence<int, kMaxStructLines>{});
    // Local to the module: a process may also load the build that runs the CUDA kernels on the host.
    py::class_<Struct>(m, Struct::kName, py::module_local()).def(py::init([setters](const py::kwargs& fields) {
        Struct params;
        for (const auto& [name, value] : fields) set_field(&params, Struct::kName, setters, name, value);
        return params;
    }));
}

}  // namespace vlmk
