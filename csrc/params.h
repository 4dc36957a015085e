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

// Sets one field of a struct.
template <class Struct>
struct Setter {
    py::handle name;  // interned
    void (*set)(Struct&, py::handle value);
};

template <class Struct, int kLine>
void add_setter(std::vector<Setter<Struct>>& setters) {
    constexpr auto kField = Struct::field(Line<kLine>{});
    if constexpr (!std::is_same_v<decltype(kField), const NoField>) {
        auto set = [](Struct& params, py::handle value) {
            constexpr auto kField = Struct::field(Line<kLine>{});
            using T = std::decay_t<decltype(params.*kField.member)>;
            params.*kField.member = from_python<T>(kField.name, value);
        };
        setters.push_back({PyUnicode_InternFromString(kField.name), set});  // lives as long as the class
    }
}

template <class Struct, int... kLines>
std::vector<Setter<Struct>> setters_of(std::integer_sequence<int, kLines...>) {
    std::vector<Setter<Struct>> setters;
    (add_setter<Struct, Struct::kFirstLine + kLines>(setters), ...);
    return setters;
}

template <class Struct>
void set_field(Struct& params, const std::vector<Setter<Struct>>& setters, py::handle name, py::handle value) {
    // Python interns keywords, so comparing addresses usually finds the field.
    auto same = [&](const Setter<Struct>& s) { return s.name.is(name); };
    auto equal = [&](const Setter<Struct>& s) { return s.name.equal(name); };
    auto setter = std::find_if(setters.begin(), setters.end(), same);
    if (setter == setters.end()) setter = std::find_if(setters.begin(), setters.end(), equal);
    if (setter == setters.end()) {
        throw py::attribute_error(std::string(Struct::kName) + " has no field " + std::string(py::str(name)));
    }
    try {
        setter->set(params, value);
    } catch (const py::cast_error&) {
        throw py::type_error(std::string(Struct::kName) + "." + std::string(py::str(name)) + " cannot be " +
                             std::string(py::repr(value)));
    }
}

template <class Struct>
void def_struct(py::module_& m) {
    auto setters = setters_of<Struct>(std::make_integer_sequence<int, kMaxStructLines>{});
    // Local to the module: a process may also load the build that runs the CUDA kernels on the host.
    py::class_<Struct>(m, Struct::kName, py::module_local()).def(py::init([setters](const py::kwargs& fields) {
        Struct params;
        for (const auto& [name, value] : fields) set_field(params, setters, name, value);
        return params;
    }));
}

}  // namespace vlmk
