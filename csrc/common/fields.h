// Structs and enums whose members are listed once: the bindings (csrc/params.h) read their names and types from here.
//
//     struct Rotary {
//         VLMK_STRUCT(Rotary);
//         VLMK_FIELD(DType, dtype);  // of query and key
//         VLMK_FIELD(int64_t, tokens);
//     };
//
// VLMK_FIELD declares a member that is zero by default, and a function field(Line<__LINE__>) that returns the member's name and
// pointer. VLMK_STRUCT declares field() for all other lines, so that the bindings can visit a struct line by line.
#pragma once

#include <cstdint>

namespace vlmk {

template <int kLine>
struct Line {};

template <class Struct, class T>
struct Field {
    const char* name;
    T Struct::* member;
};
struct NoField {};

constexpr int kMaxStructLines = 80;

}  // namespace vlmk

#define VLMK_STRUCT(NAME)                         \
    using Self = NAME;                            \
    static constexpr const char* kName = #NAME;   \
    static constexpr int kFirstLine = __LINE__;   \
    template <int kLine>                          \
    static constexpr NoField field(Line<kLine>) { \
        return {};                                \
    }                                             \
    static_assert(true)

#define VLMK_FIELD(TYPE, NAME)                                                                    \
    TYPE NAME{};                                                                                  \
    static constexpr auto field(Line<__LINE__>) { return Field<Self, TYPE>{#NAME, &Self::NAME}; } \
    static_assert(__LINE__ - kFirstLine < kMaxStructLines, "raise kMaxStructLines")

// enum class NAME { first, second }, and names_of(NAME{}), which returns "first, second". Python passes a value by its name.
#define VLMK_ENUM(NAME, ...)                   \
    enum class NAME : int32_t { __VA_ARGS__ }; \
    constexpr const char* names_of(NAME) { return #__VA_ARGS__; }

// Positions in an array: NAME::first is 0, NAME::second is 1, NAME::count is the array's size. NAME::kNames is "first, second".
#define VLMK_INDEX(NAME, ...)                    \
    namespace NAME {                             \
    enum Index : int32_t { __VA_ARGS__, count }; \
    constexpr char kNames[] = #__VA_ARGS__;      \
    }
